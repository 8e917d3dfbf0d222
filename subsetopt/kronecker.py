"""A power of the curvature that L-BFGS's pairs have met, as a Kronecker product for each parameter array.

The sum C of y y' / s.y over pairs s, y is a curvature matrix, of P x P numbers. Of each array U (r, c) in
u = y / (s.y)^1/2 only L = sum U U' and R = sum U' U are kept: C is near L (x) R / tr L there. With gradients for u this
is the preconditioner of Shampoo (Gupta, Koren and Singer, ICML 2018), its exponent doubled, for L (x) R / tr L is the
nearest Kronecker product but for the rest of a power iteration (Morwani et al., A New Perspective on Shampoo's
Preconditioner, 2024). Of a large factor only blocks along the diagonal are kept, as in Anil et al. (Scalable Second
Order Optimization for Deep Learning, 2020).
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from subsetopt.linalg import inverse_root
from subsetopt.model import Shape

# Heuristics, measured. Rows of a block, at most, and how many of them beside one column of the array: from so many
# vectors a pair is its factor learned. n parameters have roots of at most 16 n numbers; those of a large square, 2 n.
_SIDE, _ASPECT = 128, 8
_FLOOR = 0.1  # what share of their mean all eigenvalues get

Factors = tuple[Array, Array]


@partial(jax.tree_util.register_dataclass, meta_fields=["shapes"], data_fields=["roots"])
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """C^-1/2, over its scale, for parameters (P,) that are arrays of these shapes, one after the other.

    roots: for the n arrays of each shape that there is, L and R to the power -1/2, as blocks (n, down, a, a) and
    (n, across, b, b).
    """

    shapes: tuple[Shape, ...]
    roots: tuple[Factors, ...]

    def times(self, v: Array) -> Array:
        """C^-1/2 v, of v (P,)."""
        matrices = zip(self.roots, _matrices(self.shapes, v), strict=True)
        return _flat(self.shapes, [_product(*roots, matrix) for roots, matrix in matrices])


def unlearned(shapes: tuple[Shape, ...], dtype: Any) -> Kronecker:
    """Without a pair: all zeros."""

    def zeros(shape: Shape, n: int) -> Factors:
        down, across, a, b = _blocks(shape)
        return jnp.zeros((n, down, a, a), dtype), jnp.zeros((n, across, b, b), dtype)

    return Kronecker(shapes, tuple(zeros(shape, len(starts)) for shape, starts in _places(shapes).items()))


def learned(shapes: tuple[Shape, ...], us: Array) -> Kronecker:
    """From the vector u of each pair, (m, P)."""
    different = _places(shapes)
    factors = [_factors(shape, u) for shape, u in zip(different, _matrices(shapes, us), strict=True)]
    mean = jnp.sum(jnp.concatenate([_trace(right) for _, right in factors])) / us.shape[1]
    roots = (_roots(shape, left, right, mean) for shape, (left, right) in zip(different, factors, strict=True))
    return Kronecker(shapes, tuple(roots))


def _factors(shape: Shape, u: Array) -> Factors:
    """L and R from u (n, m, r, c)."""
    down, across, a, b = _blocks(shape)
    n, m, *_ = u.shape
    rows = u.reshape(n, m, down, a, -1).transpose(0, 2, 3, 1, 4).reshape(n, down, a, -1)
    columns = u.reshape(n, -1, across, b).transpose(0, 2, 3, 1)
    return rows @ rows.mT, columns @ columns.mT


def _roots(shape: Shape, left: Array, right: Array, mean: Array) -> Factors:
    """Roots of factors whose product is C over its mean, but for a floor under the array's mean and all eigenvalues."""
    (rows, columns), trace = _sides(shape), _trace(right)
    own = (1 - _FLOOR) * trace / (rows * columns * mean) + _FLOOR
    right = own[:, None, None, None] * _floored(right, trace / columns)
    return inverse_root(_floored(left, trace / rows)), inverse_root(right)


def _floored(f: Array, mean: Array) -> Array:
    """Factors over the mean of their eigenvalues, the identity where they are zero; then the floor."""
    eye, mean = jnp.broadcast_to(jnp.eye(f.shape[-1], dtype=f.dtype), f.shape), mean[:, None, None, None]
    f = jnp.where(mean > 0, f / jnp.where(mean > 0, mean, 1), eye)
    return (1 - _FLOOR) * f + _FLOOR * eye


def _trace(f: Array) -> Array:
    """(n,) of blocks (n, k, a, a)."""
    return jnp.sum(jnp.trace(f, axis1=2, axis2=3), axis=1)


def _product(left: Array, right: Array, matrices: Array) -> Array:
    """L V R of each V in (n, r, c)."""
    (n, down, a, _), (_, across, b, _) = left.shape, right.shape
    matrices = (matrices.reshape(n, -1, across, b).swapaxes(1, 2) @ right).swapaxes(1, 2)
    return (left @ matrices.reshape(n, down, a, -1)).reshape(n, down * a, across * b)


# --- arrays as matrices --------------------------------------------------------------------------------------------


def _places(shapes: tuple[Shape, ...]) -> dict[Shape, list[int]]:
    """Where the arrays of each shape begin: all of them are computed at once, for a program of few operations."""
    found: dict[Shape, list[int]] = {}
    for shape, end in zip(shapes, itertools.accumulate(map(math.prod, shapes)), strict=True):
        found.setdefault(shape, []).append(end - math.prod(shape))
    return found


def _sides(shape: Shape) -> tuple[int, int]:
    """Of an array as a matrix, whose columns are its last axis: the outputs of a layer."""
    columns = shape[-1] if shape else 1
    return math.prod(shape) // columns, columns


def _blocks(shape: Shape) -> tuple[int, int, int, int]:
    """How many blocks of rows and of columns there are, and how many rows and columns are in each."""
    rows, columns = _sides(shape)
    down = -(-rows // min(_SIDE, _ASPECT * columns))
    across = -(-columns // min(_SIDE, _ASPECT * rows))
    return down, across, -(-rows // down), -(-columns // across)


def _matrices(shapes: tuple[Shape, ...], v: Array) -> list[Array]:
    """The arrays of each shape in v (..., P) as matrices (n, ..., r, c), filled up with zeros to whole blocks."""
    found = []
    for shape, starts in _places(shapes).items():
        (rows, columns), (down, across, a, b) = _sides(shape), _blocks(shape)
        same = jnp.stack([v[..., start : start + rows * columns] for start in starts])
        filling = (0, down * a - rows), (0, across * b - columns)
        found.append(jnp.pad(same.reshape(*same.shape[:-1], rows, columns), ((0, 0),) * v.ndim + filling))
    return found


def _flat(shapes: tuple[Shape, ...], matrices: list[Array]) -> Array:
    """The other way round: (P,)."""
    pieces: dict[int, Array] = {}
    for (shape, starts), same in zip(_places(shapes).items(), matrices, strict=True):
        rows, columns = _sides(shape)
        pieces |= zip(starts, same[:, :rows, :columns].reshape(len(starts), -1), strict=True)
    return jnp.concatenate([pieces[start] for start in sorted(pieces)])
