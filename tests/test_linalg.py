"""Blocked factorisations against NumPy, at sizes that fit the blocks and at sizes that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subsetopt.linalg import add_gram, cholesky, cholesky_solve

SIZES = [1, 5, 63, 64, 65, 257, 700]


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


def matrix(size: int, condition: float, dtype: np.dtype) -> np.ndarray:
    """Symmetric, of largest eigenvalue 1."""
    q, _ = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))
    return ((q * np.geomspace(1, 1 / condition, size)) @ q.T).astype(dtype)


@pytest.mark.parametrize("condition", [1e2, 1e5])
@pytest.mark.parametrize("size", SIZES)
def test_factor_is_nearly_as_exact_as_that_of_lapack(size: int, condition: float, dtype: np.dtype):
    a = matrix(size, condition, dtype)
    factor = np.asarray(jax.jit(cholesky)(a), float)
    assert not np.triu(factor, 1).any()
    lapack = np.linalg.cholesky(a).astype(float)
    error, least = (np.linalg.norm(f @ f.T - a) for f in (factor, lapack))
    assert error <= 20 * least + 1e-14


@pytest.mark.parametrize("size", SIZES)
def test_solution_is_nearly_as_exact_as_that_of_lapack(size: int, dtype: np.dtype):
    a, b = matrix(size, 1e4, dtype), np.random.default_rng(0).normal(size=(size, 3)).astype(dtype)
    factor = jax.jit(cholesky)(a)
    x = np.asarray(jax.jit(cholesky_solve)(factor, b))
    residual, least = (np.linalg.norm(a.astype(float) @ s - b) for s in (x, np.linalg.solve(a, b)))
    assert residual <= 20 * least + 1e-14
    np.testing.assert_allclose(jax.jit(cholesky_solve)(factor, b[:, 1]), x[:, 1], rtol=1e-3, atol=1e-3 * abs(x).max())


@pytest.mark.parametrize("size", [5, 257])
def test_only_the_lower_triangle_is_read(size: int):
    a = matrix(size, 1e2, np.dtype("float32"))
    spoilt = np.tril(a) + np.triu(np.full_like(a, np.nan), 1)
    np.testing.assert_array_equal(jax.jit(cholesky)(spoilt), jax.jit(cholesky)(a))


@pytest.mark.parametrize("bad", [0, 64, 256])
def test_an_indefinite_matrix_gives_nan(bad: int):
    a = np.eye(257, dtype=np.float32)
    a[bad, bad] = -1
    factor = jax.jit(cholesky)(a)
    assert jnp.any(jnp.isnan(factor))
    assert jnp.any(jnp.isnan(jax.jit(cholesky_solve)(factor, jnp.ones(257))))


@pytest.mark.parametrize("size", SIZES)
def test_gram_adds_all_products_of_rows(size: int, dtype: np.dtype):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, size)).astype(dtype)
    start = rng.normal(size=(size, size)).astype(dtype)
    found = np.tril(jax.jit(add_gram)(start, rows))
    np.testing.assert_allclose(found, np.tril(start + rows.T @ rows), rtol=1e-4, atol=1e-4)


def test_factorisation_inside_a_compiled_loop():
    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, x = carry
        return a, cholesky_solve(cholesky(a), x)

    a = jnp.diag(jnp.linspace(1.0, 2.0, 100))
    _, x = jax.jit(lambda: jax.lax.fori_loop(0, 3, lambda _, carry: step(carry), (a, jnp.ones(100))))()
    np.testing.assert_allclose(x, np.linspace(1, 2, 100) ** -3.0, rtol=1e-5)
