"""Gram matrices, Cholesky factors and solves against NumPy and SciPy, and what they may not depend on."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax

from subsetopt.linalg import Factor, add_gram, cholesky, cholesky_solve, inverse_root, row_products, symmetric_product

SIZES = [1, 5, 64, 65, 257, 1000]  # a leaf, one more, one more than a panel, and no multiple of either
ADD_GRAM, CHOLESKY, SOLVE, PRODUCT = (jax.jit(f) for f in (add_gram, cholesky, cholesky_solve, symmetric_product))

every_size = pytest.mark.parametrize("p", SIZES)
every_condition = pytest.mark.parametrize("condition", [1e2, 1e6])


@pytest.fixture(params=[np.float32, np.float64])
def dtype(request) -> Iterator[type]:
    with jax.enable_x64(request.param == np.float64):
        yield request.param


def positive_definite(p: int, condition: float, dtype: type, smooth: bool = False) -> np.ndarray:
    """Eigenvalues from 1 down to 1 / condition; smooth: leading blocks are as ill-conditioned as the whole."""
    rng = np.random.default_rng(p)
    if smooth:
        x = np.linspace(0, 1, p)
        a = np.exp(-(((x[:, None] - x) / 0.3) ** 2))
        return (a / np.linalg.norm(a) + np.eye(p) / condition).astype(dtype)
    a = np.diag(np.geomspace(1, 1 / condition, p))
    for v in rng.standard_normal((3, p)):  # reflections on both sides
        a -= np.outer(v, 2 / (v @ v) * v @ a)
        a -= np.outer(2 / (v @ v) * a @ v, v)
    return ((a + a.T) / 2).astype(dtype)


def only_lower(a: np.ndarray) -> np.ndarray:
    """NaN above the diagonal: whoever reads there shows it."""
    return np.where(np.tri(len(a), dtype=bool), a, np.nan).astype(a.dtype)


def whole(factor: Factor) -> np.ndarray:
    """The panels of rows in one matrix."""
    p = factor[-1].shape[1]
    return np.concatenate([np.pad(panel, ((0, 0), (0, p - panel.shape[1]))) for panel in factor])


def backward_error(a: np.ndarray, factor: np.ndarray) -> float:
    a, factor = a.astype(np.float64), factor.astype(np.float64)
    return float(np.linalg.norm(factor @ factor.T - a) / np.linalg.norm(a))


@every_size
def test_symmetric_product_reads_the_lower_triangle(p: int, dtype: type):
    rng = np.random.default_rng(p)
    a, v = rng.standard_normal((p, p)).astype(dtype), rng.standard_normal(p).astype(dtype)
    whole = (np.tril(a) + np.tril(a, -1).T).astype(np.float64)
    found = PRODUCT(only_lower(a), v)
    assert found.dtype == dtype
    assert np.all(np.abs(found - whole @ v) <= (p + 2) * np.finfo(dtype).eps * (np.abs(whole) @ np.abs(v)))


@every_size
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_products_of_rows_are_below_the_diagonal(p: int, share: float, dtype: type):
    n, rows = max(1, int(share * p)), np.random.default_rng(p).standard_normal((p, 37)).astype(dtype)
    found, magnitude = np.tril(jax.jit(row_products, static_argnums=1)(rows, n)), np.abs(rows) @ np.abs(rows[:n]).T
    assert found.dtype == dtype
    expected = np.tril(rows.astype(np.float64) @ rows[:n].T)
    assert np.all(np.abs(found - expected) <= 40 * np.finfo(dtype).eps * magnitude)


@every_size
@pytest.mark.parametrize("n", [1, 37])
def test_gram_adds_the_rows_to_the_lower_triangle(p: int, n: int, dtype: type):
    rng = np.random.default_rng(p)
    gram, rows = only_lower(rng.standard_normal((p, p)).astype(dtype)), rng.standard_normal((n, p)).astype(dtype)
    found = ADD_GRAM(gram, rows)
    assert found.dtype == dtype
    expected = gram + rows.T.astype(np.float64) @ rows
    bound = (
        (n + 2) * np.finfo(dtype).eps * (np.abs(gram) + np.abs(rows.T) @ np.abs(rows))
    )  # whatever the order of terms
    lower = np.tri(p, dtype=bool)
    assert np.all(np.abs(np.asarray(found, np.float64) - expected)[lower] <= bound[lower])


@pytest.mark.parametrize("p", [5, 257, 1000])
def test_gram_of_rounded_rows_is_that_of_the_rows_after_rounding(p: int, dtype: type):
    """Not of rounded products or sums: it stays as definite as ever."""
    rng = np.random.default_rng(p)
    rows = rng.standard_normal((37, p)).astype(dtype)
    with jax.default_matmul_precision("bfloat16"):
        found = ADD_GRAM(jnp.zeros((p, p), dtype), rows)
    assert found.dtype == dtype
    rounded = np.asarray(jnp.asarray(rows).astype(jnp.bfloat16).astype(dtype))
    bound = 40 * float(np.finfo(np.float32).eps) * np.abs(rounded.T) @ np.abs(rounded)
    assert np.all(np.tril(np.abs(found - rounded.T @ rounded) <= bound) | ~np.tri(p, dtype=bool))
    assert not np.allclose(np.tril(found), np.tril(rows.T @ rows), rtol=1e-4, atol=1e-4)


@every_size
@every_condition
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_factor_is_as_good_as_lapacks_and_reads_the_lower_triangle_only(
    p: int, condition: float, smooth: bool, damping: float, dtype: type
):
    a = positive_definite(p, condition, dtype, smooth)
    factor = whole(CHOLESKY(only_lower(a), damping))
    a = a + np.eye(p, dtype=dtype) * dtype(damping)
    assert factor.dtype == dtype
    assert not np.triu(factor, 1).any()
    lapack = backward_error(a, scipy.linalg.cholesky(a, lower=True))
    assert backward_error(a, factor) <= 4 * lapack + 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("p", [1, 65, 257, 1100])  # the last one in three panels of rows, and a rest
@every_condition
@pytest.mark.parametrize("columns", [(), (3,)])
def test_solution_is_as_good_as_lapacks(p: int, condition: float, columns: tuple[int, ...], dtype: type):
    a = positive_definite(p, condition, dtype)
    b = np.random.default_rng(0).standard_normal((p, *columns)).astype(dtype)
    x = SOLVE(CHOLESKY(only_lower(a)), b)
    assert (x.shape, x.dtype) == (b.shape, dtype)

    def residual(x: np.ndarray) -> float:
        return float(np.linalg.norm(a.astype(np.float64) @ x - b) / (np.linalg.norm(a) * np.linalg.norm(x)))

    lapack = residual(scipy.linalg.cho_solve((scipy.linalg.cholesky(a, lower=True), True), b))
    assert residual(np.asarray(x, np.float64)) <= 4 * lapack + 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("p", [5, 257])
def test_scale_changes_nothing(p: int, scale: float):
    a = positive_definite(p, 1e2, np.float32)
    b = np.ones(p, np.float32)
    factor = CHOLESKY(np.float32(scale) * a)
    assert backward_error(scale * a.astype(np.float64), whole(factor)) < 10 * np.finfo(np.float32).eps
    np.testing.assert_allclose(np.float32(scale) * SOLVE(factor, b), SOLVE(CHOLESKY(a), b), rtol=1e-3)


@pytest.mark.parametrize(("p", "at"), [(1, 0), (257, 0), (257, 100), (257, 256), (1000, 300), (1000, 999)])
def test_indefinite_matrix_gives_nan_in_factor_and_solution(p: int, at: int, dtype: type):
    a = np.eye(p, dtype=dtype)
    a[at, at] = -1
    factor = CHOLESKY(a)
    assert np.isnan(whole(factor)).any()
    assert np.isnan(SOLVE(factor, np.ones(p, dtype))).any()


def test_all_of_it_inside_a_loop():
    p, n = 300, 400
    rows = np.random.default_rng(0).standard_normal((n, p)).astype(np.float32)

    @jax.jit
    def run(rows, b):
        """Three refinements of a solution, each with a factor of its own."""

        def step(state):
            i, x = state
            factor = cholesky(add_gram(jnp.eye(p, dtype=rows.dtype), rows))
            return i + 1, x + cholesky_solve(factor, b - x - rows.T @ (rows @ x))

        return lax.while_loop(lambda state: state[0] < 3, step, (0, jnp.zeros_like(b)))[1]

    a = rows.T.astype(np.float64) @ rows + np.eye(p)
    b = np.ones(p, np.float32)
    np.testing.assert_allclose(run(rows, b), np.linalg.solve(a, b), rtol=0, atol=1e-5)


def test_several_devices(run_python):
    code = """if True:
        import jax, jax.numpy as jnp, numpy as np
        from subsetopt.linalg import add_gram, cholesky, cholesky_solve
        rows = np.random.default_rng(0).standard_normal((2, 400, 300)).astype(np.float32)
        def solve(rows):
            return cholesky_solve(cholesky(add_gram(jnp.eye(300, dtype=rows.dtype), rows)), rows[0])
        found = jax.pmap(solve)(rows)
        for r, x in zip(rows, found):
            np.testing.assert_allclose((r.T @ r + np.eye(300)) @ x, r[0], rtol=0, atol=1e-2)
        print("same")"""
    assert run_python("-c", code, devices=2).strip() == "same"


@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("n", [1, 5, 128])
def test_inverse_root_is_that_by_eigenvalues(n: int, condition: float, dtype: type):
    stack = np.stack([scale * positive_definite(n, condition, dtype) for scale in (1e-10, 1.0, 1e6)]).astype(dtype)
    found = np.asarray(jax.jit(inverse_root)(stack))
    assert found.dtype == dtype
    assert np.array_equal(found, found.swapaxes(1, 2))
    for a, root in zip(stack.astype(np.float64), found, strict=True):
        values, vectors = np.linalg.eigh(a)
        expected = vectors / np.sqrt(values) @ vectors.T
        # The iteration has not ended where the condition is this bad: see its number of steps.
        assert np.linalg.norm(root - expected, 2) <= 0.03 * np.linalg.norm(expected, 2)
