"""A power of the curvature that L-BFGS's pairs have met, as a Kronecker product for each parameter array.

The sum C of y y' / s.y over pairs s, y is a curvature matrix, of P x P numbers. Of each array U (r, c) in
u = y / (s.y)^1/2 only L = sum U U' and R = sum U' U are kept: C is near L (x) R / tr L there. With gradients for u this
is the preconditioner of Shampoo (Gupta, Koren and Singer, ICML 2018), its exponent doubled, for L (x) R / tr L is the
nearest Kronecker product but for the rest of a power iteration (Morwani et al., A New Perspective on Shampoo's
Preconditioner, 2024). Of a large factor only blocks along the diagonal are kept, as in Anil et al. (Scalable Second
Order Optimization for Deep Learning, 2020).
"""

import dataclasses
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

    roots: of each array, its L and R to the power -1/2, as blocks (down, a, a) and (across, b, b).
    """

    shapes: tuple[Shape, ...]
    roots: tuple[Factors, ...]

    def times(self, v: Array) -> Array:
        """C^-1/2 v, of v (P,)."""
        matrices = zip(self.roots, _matrices(self.shapes, v), strict=True)
        return _flat(self.shapes, [_product(roots, matrix) for roots, matrix in matrices])


def unlearned(shapes: tuple[Shape, ...], dtype: Any) -> Kronecker:
    """Without a pair: all zeros."""

    def zeros(shape: Shape) -> Factors:
        down, across, a, b = _blocks(shape)
        return jnp.zeros((down, a, a), dtype), jnp.zeros((across, b, b), dtype)

    return Kronecker(shapes, tuple(map(zeros, shapes)))


def learned(shapes: tuple[Shape, ...], us: Array) -> Kronecker:
    """From the vector u of each pair, (m, P)."""
    factors = [_factors(shape, u) for shape, u in zip(shapes, _matrices(shapes, us), strict=True)]
    mean = jnp.sum(jnp.stack([_trace(right) for _, right in factors])) / us.shape[1]
    roots = (_roots(shape, left, right, mean) for shape, (left, right) in zip(shapes, factors, strict=True))
    return Kronecker(shapes, tuple(roots))


def _factors(shape: Shape, u: Array) -> Factors:
    """L and R from u (m, r, c)."""
    down, across, a, b = _blocks(shape)
    rows = u.reshape(len(u), down, a, -1).transpose(1, 2, 0, 3).reshape(down, a, -1)
    columns = u.reshape(-1, across, b).transpose(1, 2, 0)
    return rows @ rows.mT, columns @ columns.mT


def _roots(shape: Shape, left: Array, right: Array, mean: Array) -> Factors:
    """Roots of factors whose product is C over its mean, but for a floor under the array's mean and all eigenvalues."""
    (rows, columns), trace = _sides(shape), _trace(right)
    own = (1 - _FLOOR) * trace / (rows * columns * mean) + _FLOOR
    return inverse_root(_floored(left, trace / rows)), inverse_root(own * _floored(right, trace / columns))


def _floored(f: Array, mean: Array) -> Array:
    """A factor over the mean of its eigenvalues, the identity where they are zero; then the floor."""
    eye, known = jnp.broadcast_to(jnp.eye(f.shape[-1], dtype=f.dtype), f.shape), mean > 0
    f = jnp.where(known, f / jnp.where(known, mean, 1), eye)
    return (1 - _FLOOR) * f + _FLOOR * eye


def _trace(f: Array) -> Array:
    return jnp.sum(jnp.trace(f, axis1=1, axis2=2))


def _product(factors: Factors, matrix: Array) -> Array:
    """L V R, V (r, c)."""
    left, right = factors
    (down, a, _), (across, b, _) = left.shape, right.shape
    matrix = (matrix.reshape(-1, across, b).swapaxes(0, 1) @ right).swapaxes(0, 1)
    return (left @ matrix.reshape(down, a, -1)).reshape(down * a, across * b)


# --- arrays as matrices --------------------------------------------------------------------------------------------


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
    """The arrays in v (..., P) as matrices (..., r, c), filled up with zeros to whole blocks."""
    found, start = [], 0
    for shape in shapes:
        (rows, columns), (down, across, a, b) = _sides(shape), _blocks(shape)
        matrix = v[..., start : start + rows * columns].reshape(*v.shape[:-1], rows, columns)
        filling = (0, down * a - rows), (0, across * b - columns)
        found.append(jnp.pad(matrix, ((0, 0),) * (v.ndim - 1) + filling))
        start += rows * columns
    return found


def _flat(shapes: tuple[Shape, ...], matrices: list[Array]) -> Array:
    """The other way round: (P,)."""
    sides = map(_sides, shapes)
    return jnp.concatenate([m[:rows, :columns].reshape(-1) for (rows, columns), m in zip(sides, matrices, strict=True)])
