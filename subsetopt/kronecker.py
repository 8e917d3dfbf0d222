"""Powers of a curvature matrix as Kronecker products, one for each parameter array.

A curvature matrix C = sum u u' has P x P numbers: u are the rows of a Gauss-Newton matrix, or y / (s.y)^1/2 of
L-BFGS's pairs s, y. Of each array U (r, c) in u only L = sum U U' and R = sum U' U are kept: C is near L (x) R / tr L
there. With gradients for u this is the preconditioner of Shampoo (Gupta, Koren and Singer, ICML 2018), its exponent
doubled, for L (x) R / tr L is the nearest Kronecker product but for the rest of a power iteration (Morwani et al., A
New Perspective on Shampoo's Preconditioner, 2024). Of a large factor only blocks along the diagonal are kept, as in
Anil et al. (Scalable Second Order Optimization for Deep Learning, 2020).
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


# --- for L-BFGS: the inverse root ----------------------------------------------------------------------------------


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
    factors = _floored_factors(shapes, _factors(shapes, us))
    return Kronecker(shapes, tuple((inverse_root(left), inverse_root(right)) for left, right in factors))


# --- for Gauss-Newton: a metric ------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Euclidean:
    """M = I."""

    def times(self, v: Array) -> Array:
        """M v."""
        return v

    def solve(self, scale: Array, shift: Array, v: Array) -> Array:
        """(scale M + shift I)^-1 v, of v (P,)."""
        return v / (scale + shift)

    def whitened(self, scale: Array, shift: Array, rows: Array) -> Array:
        """R S of rows R (n, P) with S S' = (scale M + shift I)^-1."""
        return rows / jnp.sqrt(scale + shift)

    def added(self, a: Array, scale: Array) -> tuple[Array, Array]:
        """B (P, P) and b with a + scale M = B + b I, in lower triangles."""
        return a, scale


@partial(jax.tree_util.register_dataclass, meta_fields=["shapes"], data_fields=["vectors", "values"])
@dataclasses.dataclass(frozen=True)
class Metric:
    """M = C^1/4, over its scale, for parameters (P,) that are arrays of these shapes, one after the other.

    The power is a heuristic, measured: 1/2 is better on digits, and far worse on a network of three convolutions.

    vectors: for the n arrays of each shape that there is, eigenvectors of L and R, as blocks (n, down, a, a) and
    (n, across, b, b). values: fourth roots of their eigenvalues, (n, down a) and (n, across b): M's are their products.
    """

    shapes: tuple[Shape, ...]
    vectors: tuple[Factors, ...]
    values: tuple[Factors, ...]

    def times(self, v: Array) -> Array:
        """M v, of v (P,)."""
        return self._scaled(self._eigenvalues(), v)

    def solve(self, scale: Array, shift: Array, v: Array) -> Array:
        """(scale M + shift I)^-1 v, of v (P,)."""
        return self._scaled([1 / (scale * values + shift) for values in self._eigenvalues()], v)

    def whitened(self, scale: Array, shift: Array, rows: Array) -> Array:
        """R S of rows R (n, P) with S S' = (scale M + shift I)^-1; of whole blocks, (n, P or more)."""
        roots = [jnp.sqrt(scale * values + shift) for values in self._eigenvalues()]

        def one(row: Array) -> Array:
            return jnp.concatenate([(m / root).ravel() for m, root in zip(self._turned(row), roots, strict=True)])

        return jax.vmap(one)(rows)

    def added(self, a: Array, scale: Array) -> tuple[Array, Array]:
        """B (P, P) and b with a + scale M = B + b I, in lower triangles."""
        for (shape, starts), roots, values in zip(_places(self.shapes).items(), self.vectors, self.values, strict=True):
            left, right = (_whole(root, value) for root, value in zip(roots, values, strict=True))
            for start, factor, other in zip(starts, left, right, strict=True):
                a = _with_product(a, start, shape, scale * factor, other)
        return a, jnp.zeros_like(scale)

    def _eigenvalues(self) -> list[Array]:
        """Of M, (n, down a, across b) each."""
        return [left[:, :, None] * right[:, None] for left, right in self.values]

    def _turned(self, v: Array) -> list[Array]:
        """The coordinates of v in the eigenvectors."""
        matrices = zip(self.vectors, _matrices(self.shapes, v), strict=True)
        return [_product(left.mT, right, matrix) for (left, right), matrix in matrices]

    def _scaled(self, values: list[Array], v: Array) -> Array:
        """The matrix of these eigenvalues times v."""
        turned = zip(self.vectors, values, self._turned(v), strict=True)
        return _flat(self.shapes, [_product(left, right.mT, own * m) for (left, right), own, m in turned])


def metric_of_rows(shapes: tuple[Shape, ...], rows: Array) -> Metric:
    """Of the curvature R'R, R = rows (n, P)."""
    return _metric(shapes, _factors(shapes, rows))


def metric_of(shapes: tuple[Shape, ...], a: Array) -> Metric:
    """Of the curvature a (P, P), of which the lower triangle is read."""
    return _metric(shapes, [_partial_traces(shape, starts, a) for shape, starts in _places(shapes).items()])


def _metric(shapes: tuple[Shape, ...], factors: list[Factors]) -> Metric:
    """The floor is under what the root is taken of: the root of rounding would show."""
    found = [[_eigen(f) for f in both] for both in _floored_factors(shapes, factors)]
    vectors = tuple((left[0], right[0]) for left, right in found)
    return Metric(shapes, vectors, tuple((left[1], right[1]) for left, right in found))


def _eigen(f: Array) -> Factors:
    """Eigenvectors of blocks (n, k, a, a), and fourth roots of their eigenvalues (n, k a)."""
    values, vectors = jnp.linalg.eigh(f, symmetrize_input=False)
    return vectors, jnp.sqrt(jnp.sqrt(jnp.maximum(values, 0))).reshape(len(f), -1)


def _partial_traces(shape: Shape, starts: list[int], a: Array) -> Factors:
    """L and R of the sum of the products u u' in a's own blocks: sums over equal columns, and over equal rows."""
    (rows, columns), (down, across, *_) = _sides(shape), _blocks(shape)
    size = rows * columns
    own = jnp.stack([a[start : start + size, start : start + size] for start in starts])
    own = own.reshape(-1, rows, columns, rows, columns)
    left = jnp.sum(jnp.diagonal(own, axis1=2, axis2=4), axis=-1)
    right = jnp.sum(jnp.diagonal(own, axis1=1, axis2=3), axis=-1)
    return _diagonal_blocks(left, down), _diagonal_blocks(right, across)


def _diagonal_blocks(f: Array, k: int) -> Array:
    """Of symmetric matrices (n, r, r), given by their lower triangles: k blocks each, filled up with zeros."""
    f = jnp.tril(f) + jnp.tril(f, -1).mT
    size = -(-f.shape[-1] // k)
    f = jnp.pad(f, ((0, 0),) + ((0, k * size - f.shape[-1]),) * 2).reshape(-1, k, size, k, size)
    return jnp.moveaxis(jnp.diagonal(f, axis1=1, axis2=3), -1, 1)


def _whole(vectors: Array, values: Array) -> Array:
    """The matrices (n, r, r) of these blocks of eigenvectors (n, k, a, a) and eigenvalues (n, k a)."""
    n, k, a, _ = vectors.shape
    blocks = vectors * values.reshape(n, k, 1, a) @ vectors.mT
    own = jnp.eye(k, dtype=bool)[None, :, None, :, None]
    return jnp.where(own, blocks[:, :, :, None], 0).reshape(n, k * a, k * a)


def _with_product(a: Array, start: int, shape: Shape, left: Array, right: Array) -> Array:
    """The matrix with left (x) right added to the block of the array that starts there."""
    rows, columns = _sides(shape)
    product = jnp.kron(left[:rows, :rows], right[:columns, :columns])
    own = slice(start, start + rows * columns)
    return a.at[own, own].add(product)


# --- factors -------------------------------------------------------------------------------------------------------


def _factors(shapes: tuple[Shape, ...], us: Array) -> list[Factors]:
    """L and R of the arrays of each shape, from the vectors u (m, P)."""
    return [_sums(shape, own) for shape, own in zip(_places(shapes), _matrices(shapes, us), strict=True)]


def _sums(shape: Shape, u: Array) -> Factors:
    """L and R from u (n, m, r, c)."""
    down, across, a, b = _blocks(shape)
    n, m, *_ = u.shape
    rows = u.reshape(n, m, down, a, -1).transpose(0, 2, 3, 1, 4).reshape(n, down, a, -1)
    columns = u.reshape(n, -1, across, b).transpose(0, 2, 3, 1)
    return rows @ rows.mT, columns @ columns.mT


def _floored_factors(shapes: tuple[Shape, ...], factors: list[Factors]) -> list[Factors]:
    """Factors whose product is C over its mean, but for a floor under the arrays' means and all eigenvalues."""
    traces = [_trace(right) for _, right in factors]
    mean = jnp.sum(jnp.concatenate(traces)) / sum(map(math.prod, shapes))
    curved, found = mean > 0, []
    mean = jnp.where(curved, mean, 1)
    for shape, (left, right), trace in zip(_places(shapes), factors, traces, strict=True):
        rows, columns = _sides(shape)
        own = jnp.where(curved, (1 - _FLOOR) * trace / (rows * columns * mean) + _FLOOR, 1)
        right = own[:, None, None, None] * _floored(right, trace / columns)
        found.append((_floored(left, trace / rows), right))
    return found


def _floored(f: Array, mean: Array) -> Array:
    """Factors over the mean of their eigenvalues, the identity where they are zero; then the floor."""
    eye, mean = jnp.broadcast_to(jnp.eye(f.shape[-1], dtype=f.dtype), f.shape), mean[:, None, None, None]
    f = jnp.where(mean > 0, f / jnp.where(mean > 0, mean, 1), eye)
    return (1 - _FLOOR) * f + _FLOOR * eye


def _trace(f: Array) -> Array:
    """(n,) of blocks (n, k, a, a)."""
    return jnp.sum(jnp.trace(f, axis1=2, axis2=3), axis=1)


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


def _product(left: Array, right: Array, matrices: Array) -> Array:
    """L V R of each V in (n, r, c)."""
    (n, down, a, _), (_, across, b, _) = left.shape, right.shape
    matrices = (matrices.reshape(n, -1, across, b).swapaxes(1, 2) @ right).swapaxes(1, 2)
    return (left @ matrices.reshape(n, down, a, -1)).reshape(n, down * a, across * b)
