"""The curvature that L-BFGS's pairs have met, as a Kronecker product for each tile of each parameter array.

The sum C of y y' / s.y over pairs s, y is a curvature matrix, of P x P numbers. Of each tile U (a, b) of each array in
u = y / (s.y)^1/2 only L = sum U U' and R = sum U' U are kept: C is near L (x) R / tr L there. With gradients for u this
is the preconditioner of Shampoo (Gupta, Koren and Singer, ICML 2018), its exponent doubled, for L (x) R / tr L is the
nearest Kronecker product but for the rest of a power iteration (Morwani et al., A New Perspective on Shampoo's
Preconditioner, 2024). Tiles bound what a factor costs, as the blocks of Anil et al. (Scalable Second Order Optimization
for Deep Learning, 2020).
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

# Heuristics, measured. Most rows and columns of a tile, and most of the one for each of the other, for the long side's
# factor is learned from as many vectors a pair as the short side has: n parameters have factors of 2 n to 8 n numbers.
_SIDE, _ASPECT = 128, 8
_KEEP, _FLOOR = 0.95, 0.1  # how fast factors forget; what share of their mean all eigenvalues get

Factors = tuple[tuple[Array, Array], ...]


@partial(jax.tree_util.register_dataclass, meta_fields=["shapes"], data_fields=["factors", "roots"])
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """C^-1/2, over its scale, for parameters (P,) that are arrays of these shapes, one after the other.

    factors: L (t, a, a) and R (t, b, b) of the t tiles of each array. roots: their powers -1/2 when last `rooted`.
    """

    shapes: tuple[Shape, ...]
    factors: Factors
    roots: Factors

    def plus(self, u: Array) -> "Kronecker":
        """Of C + u u', u (P,), the older pairs fading."""
        news = tuple((t @ t.mT, t.mT @ t) for t in _tiles(self.shapes, u))
        factors = jax.tree.map(lambda old, new: _KEEP * old + new, self.factors, news)
        return dataclasses.replace(self, factors=factors)

    def rooted(self) -> "Kronecker":
        """With the roots of the factors as they are now."""
        traces = jnp.concatenate([_trace(left) for left, _ in self.factors])
        mean = jnp.sum(traces) / sum(math.prod(shape) for shape in self.shapes)
        roots = ((inverse_root(left), inverse_root(right)) for left, right in _normalised(self.factors, mean))
        return dataclasses.replace(self, roots=tuple(roots))

    def times(self, v: Array) -> Array:
        """C^-1/2 v, of v (P,)."""
        tiles = zip(self.roots, _tiles(self.shapes, v), strict=True)
        return _flat(self.shapes, [left @ t @ right for (left, right), t in tiles])


def unlearned(shapes: tuple[Shape, ...], dtype: Any) -> Kronecker:
    """Without a pair: all zeros."""

    def zeros(shape: Shape) -> tuple[Array, Array]:
        down, across, a, b = _tiling(shape)
        return jnp.zeros((down * across, a, a), dtype), jnp.zeros((down * across, b, b), dtype)

    none = tuple(map(zeros, shapes))
    return Kronecker(shapes, none, none)


def _normalised(factors: Factors, mean: Array) -> Factors:
    """Factors whose product is C over its mean, but for a floor under every eigenvalue and under every tile's mean."""
    found = []
    for left, right in factors:
        trace, size = _trace(left), left.shape[-1] * right.shape[-1]
        own = (1 - _FLOOR) * trace / (size * mean) + _FLOOR
        found.append((_floored(left, trace), own * _floored(right, trace)))
    return tuple(found)


def _floored(f: Array, trace: Array) -> Array:
    """A factor over the mean of its eigenvalues, the identity where they are zero; then the floor."""
    eye, known = jnp.broadcast_to(jnp.eye(f.shape[-1], dtype=f.dtype), f.shape), trace > 0
    f = jnp.where(known, f * (f.shape[-1] / jnp.where(known, trace, 1)), eye)
    return (1 - _FLOOR) * f + _FLOOR * eye


def _trace(f: Array) -> Array:
    """(t, 1, 1) of (t, n, n)."""
    return jnp.trace(f, axis1=1, axis2=2)[:, None, None]


# --- tiles ---------------------------------------------------------------------------------------------------------


def _sides(shape: Shape) -> tuple[int, int]:
    """Of an array as a matrix, whose columns are its last axis: the outputs of a layer."""
    columns = shape[-1] if shape else 1
    return math.prod(shape) // columns, columns


def _tiling(shape: Shape) -> tuple[int, int, int, int]:
    """How many tiles there are down and across, and the rows and columns of each."""
    rows, columns = _sides(shape)
    down = -(-rows // min(_SIDE, _ASPECT * columns))
    across = -(-columns // min(_SIDE, _ASPECT * rows))
    return down, across, -(-rows // down), -(-columns // across)


def _tiles(shapes: tuple[Shape, ...], v: Array) -> list[Array]:
    """The tiles (t, a, b) of each array in v (P,), filled up with zeros."""
    found, start = [], 0
    for shape in shapes:
        (rows, columns), (down, across, a, b) = _sides(shape), _tiling(shape)
        matrix = v[start : start + rows * columns].reshape(rows, columns)
        matrix = jnp.pad(matrix, ((0, down * a - rows), (0, across * b - columns)))
        found.append(matrix.reshape(down, a, across, b).swapaxes(1, 2).reshape(-1, a, b))
        start += rows * columns
    return found


def _flat(shapes: tuple[Shape, ...], tiles: list[Array]) -> Array:
    """The other way round: (P,)."""
    pieces = []
    for shape, own in zip(shapes, tiles, strict=True):
        (rows, columns), (down, across, a, b) = _sides(shape), _tiling(shape)
        matrix = own.reshape(down, across, a, b).swapaxes(1, 2).reshape(down * a, across * b)
        pieces.append(matrix[:rows, :columns].reshape(-1))
    return jnp.concatenate(pieces)
