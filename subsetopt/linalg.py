"""TEMPORARY stub, to be replaced by the blocked version."""

from jax import Array, lax

_PANELS = 8


def add_gram(gram: Array, rows: Array) -> Array:
    p = gram.shape[0]
    width = -(-p // _PANELS)
    for start in range(0, p, width):
        stop = min(start + width, p)
        panel = lax.slice(gram, (start, start), (p, stop)) + rows[:, start:].T @ rows[:, start:stop]
        gram = lax.dynamic_update_slice(gram, panel, (start, start))
    return gram


def cholesky(a: Array) -> Array:
    return lax.linalg.cholesky(a, symmetrize_input=False)


def cholesky_solve(factor: Array, b: Array) -> Array:
    b2 = b[:, None] if b.ndim == 1 else b
    half = lax.linalg.triangular_solve(factor, b2, left_side=True, lower=True)
    out = lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)
    return out.reshape(b.shape)
