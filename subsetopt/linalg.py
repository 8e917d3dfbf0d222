"""Dense symmetric linear algebra on lower triangles, from XLA's matrix products where these are what is fast.

On CPU, XLA hands a factorisation to LAPACK, which runs at a third of XLA's own products or less; worse, LAPACK's
threads spin on after every call and take the cores from the product that follows. So LAPACK sees only matrices too
small for threads here. Left-looking blocked Cholesky: Golub and Van Loan, Matrix Computations (2013), section 4.2.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# All measured, two AVX-512 cores.
_PANELS = (4, 12)  # of rows of a triangle, at least and at most: k take (k + 1) / 2k of the square's work and memory
_LEAF = 64  # LAPACK gets twice this, and starts threads from 200
_PANEL, _CORNER = 256, 128  # columns of the factorisation that are updated at once, and that are eliminated at once
_ROOT_STEPS = 12  # the two roots' product has the eigenvalues of A over its norm at first; 9 / 4 times them, up to 1

Factor = tuple[Array, ...]  # panels of rows of a lower triangle (h, stop), up to the last diagonal; zeros above it


def add_gram(gram: Array, rows: Array) -> Array:
    """The lower triangle of gram + R'R, gram (P, P) and R = rows (n, P); what is above the diagonal means nothing.

    The product has the precision that is the default where this is called. At "bfloat16" the rows are rounded to it
    and their products summed up in the dtype of gram: the result is that of rows a little off, definite as ever.
    """
    return lax.platform_dependent(gram, rows, cpu=_add_panels, default=_add_product)


def _add_product(gram: Array, rows: Array) -> Array:
    """One product, both triangles: on GPUs as fast as half of it in panels, at coarser precision 2.5 times as fast."""
    return gram + rows.T @ rows


def _add_panels(gram: Array, rows: Array) -> Array:
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]: made at run time
    product = (_rounded_product if precision == "bfloat16" else _plain_product)(rows)
    for start, stop in _row_panels(gram.shape[0]):
        panel = lax.slice(gram, (start, 0), (stop, stop)) + product(start, stop)
        gram = lax.dynamic_update_slice(gram, panel, (start, 0))
    return gram


def row_products(rows: Array, n: int) -> Array:
    """The first n columns of R R', (N, n), R = rows (N, P); what is above the diagonal means nothing.

    At full precision.
    """
    in_panels, whole = partial(_row_panel_products, n), lambda rows: _product(rows, rows[:n], 1, 1)
    return lax.platform_dependent(rows, cpu=in_panels, default=whole)


def _row_panel_products(n: int, rows: Array) -> Array:
    panels = [_product(rows[start:stop], rows[:stop], 1, 1) for start, stop in _row_panels(n)]
    corner = [jnp.pad(panel, ((0, 0), (0, n - panel.shape[1]))) for panel in panels]
    return jnp.concatenate([*corner, _product(rows[n:], rows[:n], 1, 1)])


def norm(v: Array) -> Array:
    """|v|, also where the squares leave the range of the dtype: v goes through a power of two, which rounds nothing."""
    _, exponent = jnp.frexp(jnp.max(jnp.abs(v), initial=0))
    scale = jnp.ldexp(jnp.ones((), v.dtype), jnp.maximum(exponent - 1, jnp.finfo(v.dtype).minexp))
    return scale * jnp.linalg.norm(v / scale)


def inverse_root(a: Array) -> Array:
    """A^-1/2 of symmetric matrices A (..., n, n), of a condition number up to some thousands: for a preconditioner.

    By the coupled Newton-Schulz iteration (Higham, Functions of Matrices, 2008, (6.35)) for A over its norm: products
    alone, which every device is quick at. The result is symmetric to the last bit.
    """
    norm = jnp.sqrt(jnp.sum(a * a, axis=(-2, -1), keepdims=True))
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)

    def iterate(_: Any, roots: tuple[Array, Array]) -> tuple[Array, Array]:
        y, z = roots
        step = (3 * eye - z @ y) / 2
        return y @ step, step @ z

    _, root = lax.fori_loop(0, _ROOT_STEPS, iterate, (a / norm, eye))
    return (root + root.mT) / (2 * jnp.sqrt(norm))


def symmetric_product(a: Array, v: Array) -> Array:
    """A v, v (P,), from the lower triangle of a (P, P); what is above the diagonal means nothing."""
    result = jnp.zeros_like(v)
    for start, stop in _row_panels(len(v)):
        left, corner = a[start:stop, :start], a[start:stop, start:stop]
        corner = jnp.tril(corner) + jnp.tril(corner, -1).T
        own = _product(left, v[:start], 1, 0) + _product(corner, v[start:stop], 1, 0)
        result = result.at[start:stop].add(own).at[:start].add(_product(left, v[start:stop], 0, 0))
    return result


def _row_panels(p: int) -> list[tuple[int, int]]:
    """Where panels of rows of a (P, P) triangle begin and end, in columns that a factorisation updates at once."""
    height = -(-p // min(max(p // 1000, _PANELS[0]), _PANELS[1]))
    height = -(-height // _PANEL) * _PANEL
    return [(start, min(start + height, p)) for start in range(0, p, height)]


def _plain_product(rows: Array) -> Callable[[int, int], Array]:
    """Rows start to stop of R'R, up to its diagonal."""
    return lambda start, stop: rows[:, start:stop].T @ rows[:, :stop]


def _rounded_product(rows: Array) -> Callable[[int, int], Array]:
    """The same with R rounded to bfloat16; on CPUs with matrix units four times as fast."""
    # Both factors in memory with n along the rows, which is what XLA's fast kernels ask for; without the barrier it
    # would fold the transpose into the product again.
    columns = lax.optimization_barrier(rows.T.astype(jnp.bfloat16))
    along = (((1,), (1,)), ((), ()))
    return lambda start, stop: lax.dot_general(
        columns[start:stop], columns[:stop], along, preferred_element_type=rows.dtype
    )


def cholesky(a: Array, damping: Array | float = 0.0) -> Factor:
    """The lower factor of a + damping I, a (P, P), in panels of rows; NaN in it where there is none.

    Reads the lower triangle of a only. Nothing is won by donating a.
    """
    damping = jnp.asarray(damping, a.dtype)
    return lax.platform_dependent(a, damping, cpu=_blocked_cholesky, default=_library_cholesky)


def cholesky_solve(factor: Factor, b: Array) -> Array:
    """The x of A x = b, b (P,) or (P, k), from the factor of A that `cholesky` gives, zeros and all."""
    columns = b if b.ndim == 2 else b[:, None]
    return lax.platform_dependent(factor, columns, cpu=_blocked_solve, default=_library_solve).reshape(b.shape)


def _library_cholesky(a: Array, damping: Array) -> Factor:
    factor = lax.linalg.cholesky(_damped(a, damping), symmetrize_input=False)
    return tuple(factor[start:stop, :stop] for start, stop in _row_panels(len(a)))


def _damped(a: Array, damping: Array) -> Array:
    diagonal = jnp.arange(len(a))
    return a.at[diagonal, diagonal].add(damping)


def _library_solve(factor: Factor, b: Array) -> Array:
    whole = jnp.concatenate([jnp.pad(panel, ((0, 0), (0, len(b) - panel.shape[1]))) for panel in factor])
    half = lax.linalg.triangular_solve(whole, b, left_side=True, lower=True)
    return lax.linalg.triangular_solve(whole, half, left_side=True, lower=True, transpose_a=True)


def _blocked_cholesky(a: Array, damping: Array) -> Factor:
    """Left-looking, panel by panel of columns, into zeros.

    Not into a: XLA may compute a panel anew where it is used, and copies a whole matrix to have its old content then.
    The damping is added to the corners alone, for the same reason: a is not copied.
    """
    factor = [jnp.zeros((stop - start, stop), a.dtype) for start, stop in _row_panels(len(a))]
    for start in range(0, len(a), _PANEL):
        own = start // len(factor[0])
        for offset, columns in _eliminated(_updated(a, factor[own:], start), damping):
            factor[own:] = [_with_columns(panel, columns, start + offset) for panel in factor[own:]]
    return tuple(factor)


def _updated(a: Array, panels: list[Array], start: int) -> Array:
    """The next columns of a, from row `start` on, less what the factor's columns before them account for."""
    next_columns = a[start:, start : start + _PANEL]
    if start == 0:
        return next_columns
    done = [panel[max(start - panel.shape[1], -len(panel)) :, :start] for panel in panels]
    left = done[0][:_PANEL]
    return next_columns - jnp.concatenate([_product(rows, left, 1, 1) for rows in done])


def _with_columns(panel: Array, columns: Array, first: int) -> Array:
    """The panel of rows with its part of the factor's columns, which begin on the diagonal at `first`."""
    height, stop = panel.shape
    top = max(stop - height, first)
    return lax.dynamic_update_slice(panel, columns[top - first : stop - first], (top - stop + height, first))


def _eliminated(panel: Array, damping: Array) -> Iterator[tuple[int, Array]]:
    """The factor's columns from the diagonal down, and where they begin: some at once, then the rest without them.

    The corners' inverses are half zeros, so small ones save products; the updates before this want wide panels.
    """
    for offset in range(0, panel.shape[1], _CORNER):
        n = min(_CORNER, panel.shape[1])
        corner, inverse = _factor_and_inverse(_damped(panel[:n, :n], damping))
        below = _product(panel[n:, :n], inverse, 1, 1)
        yield offset, jnp.concatenate([corner, below])
        panel = panel[n:, n:] - _product(below, below[: panel.shape[1] - n], 1, 1)


def _factor_and_inverse(a: Array) -> tuple[Array, Array]:
    """The factor L of a small matrix, and its inverse: eliminating [A | I] by blocks leaves [L' | L^-1].

    A loop, not unrolled: it is compiled once a panel.
    """
    n = a.shape[0]
    size = -(-n // _LEAF) * _LEAF
    eye = jnp.eye(size, dtype=a.dtype)
    a = jnp.tril(a) + jnp.tril(a, -1).T
    system = jnp.concatenate([a if n == size else eye.at[:n, :n].set(a), eye], 1)
    column = jnp.arange(size)

    def eliminate(i: Array, system: Array) -> Array:
        start = i * _LEAF
        row = lax.dynamic_slice(system, (start, 0), (_LEAF, 2 * size))
        leaf, inverse = _leaf(lax.dynamic_slice(row, (0, start), (_LEAF, _LEAF)))
        row = lax.dynamic_update_slice(_product(inverse, row, 1, 0), leaf.T, (0, start))
        below = jnp.where(column >= start + _LEAF, row[:, :size], 0)
        return lax.dynamic_update_slice(system - _product(below, row, 0, 0), row, (start, 0))

    system = lax.fori_loop(0, size // _LEAF, eliminate, system)
    return jnp.triu(system[:n, :n]).T, system[:n, size : size + n]


def _leaf(a: Array) -> tuple[Array, Array]:
    """The factor L and its inverse in one call: the factor of [A I; I cI] begins [L 0; L^-T ...].

    c only has to keep the rest positive definite. LAPACK's own inverse of a triangle would use threads at any size.
    """
    n = a.shape[0]
    eye = jnp.eye(n, dtype=a.dtype)
    doubled = jnp.block([[a, eye], [eye, jnp.finfo(a.dtype).max / 4 * eye]])
    factor = lax.linalg.cholesky(doubled, symmetrize_input=False)
    return factor[:n, :n], factor[n:, :n].T


def _blocked_solve(factor: Factor, b: Array) -> Array:
    """Both substitutions, panel by panel of rows, whose numbers lie together in memory: each is read once a way."""
    x = b
    for panel in factor:
        x = _forward(panel, x)
    for panel in reversed(factor):
        x = _backward(panel, x)
    return x


def _forward(panel: Array, x: Array) -> Array:
    """L y = b for the panel's rows: x is y before them, and b from there on."""

    def solve(i: Array | int, x: Array, size: int = _LEAF) -> Array:
        rows, corner, own, start = _block(panel, x, i, size)
        known = jnp.where(jnp.arange(panel.shape[1])[:, None] < start, x[: panel.shape[1]], 0)
        own = own - _product(rows, known, 1, 0)
        own = lax.linalg.triangular_solve(corner, own, left_side=True, lower=False, transpose_a=True)
        return lax.dynamic_update_slice(x, own, (start, 0))

    whole, rest = divmod(len(panel), _LEAF)
    x = lax.fori_loop(0, whole, solve, x) if whole else x
    return solve(whole, x, rest) if rest else x


def _backward(panel: Array, x: Array) -> Array:
    """L'x = y for the panel's rows, of which those behind it have had their share."""

    def solve(i: Array | int, x: Array, size: int = _LEAF) -> Array:
        rows, corner, own, start = _block(panel, x, i, size)
        own = lax.linalg.triangular_solve(corner, own, left_side=True, lower=False)
        # Zeros above the diagonal: the unknowns already found stay.
        others = lax.dynamic_update_slice(x, x[: panel.shape[1]] - _product(rows, own, 0, 0), (0, 0))
        return lax.dynamic_update_slice(others, own, (start, 0))

    whole, rest = divmod(len(panel), _LEAF)
    x = solve(whole, x, rest) if rest else x
    return lax.fori_loop(0, whole, lambda i, x: solve(whole - 1 - i, x), x) if whole else x


def _block(panel: Array, x: Array, i: Array | int, size: int) -> tuple[Array, Array, Array, Array | int]:
    """The i-th block of the panel's rows, its corner's transpose, its part of x, and where that begins.

    LAPACK wants columns together: without the transpose XLA would transpose the whole panel before.
    """
    start = panel.shape[1] - len(panel) + i * _LEAF
    rows = lax.dynamic_slice(panel, (i * _LEAF, 0), (size, panel.shape[1]))
    corner = lax.dynamic_slice(rows, (0, start), (size, size)).T
    return rows, corner, lax.dynamic_slice(x, (start, 0), (size, x.shape[1])), start


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The sum over one axis of each, at full precision whatever the default."""
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), precision="highest")
