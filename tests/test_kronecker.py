"""The factored curvature against the one that NumPy adds up and roots, for arrays of every shape."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subsetopt.kronecker import Euclidean, Kronecker, Metric, learned, metric_of, metric_of_rows
from subsetopt.model import Shape

# Vectors, matrices, kernels, numbers; one block, blocks with a rest, slim ones; several arrays of a shape.
SHAPES: list[tuple[Shape, ...]] = [
    ((5,), (6, 5)),
    ((3, 3, 2, 8), (), (8,)),
    ((130, 3), (3,), (260, 300)),
    ((1, 40), (2, 40), (40, 1)),
    ((4,), (30, 4), (4,), (30, 4), (30, 4), ()),
]
LEARNED, TIMES = jax.jit(learned, static_argnums=0), jax.jit(Kronecker.times)
METRIC_OF_ROWS, METRIC_OF = (jax.jit(function, static_argnums=0) for function in (metric_of_rows, metric_of))

every_shape = pytest.mark.parametrize("shapes", SHAPES, ids=str)
few_parameters = pytest.mark.parametrize("shapes", [*SHAPES[:2], *SHAPES[3:], ((130, 3), (3,))], ids=str)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def count(shapes: tuple[Shape, ...]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def diagonal_blocks(f: np.ndarray, other: int) -> np.ndarray:
    """A factor (n, n) without what is off its blocks, by the rule as the module words it; other: columns beside it."""
    n = len(f)
    size = -(-n // -(-n // min(128, 8 * other)))
    block = np.arange(n) // size
    return np.where(block[:, None] == block, f, 0)


def power(f: np.ndarray, mean: float, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(0.9 * f / mean + 0.1 * np.eye(len(f)))
    return vectors * values**exponent @ vectors.T


def expected_product(shapes: tuple[Shape, ...], pairs: np.ndarray, v: np.ndarray, exponent: float) -> np.ndarray:
    """Of C to that power, array by array, with eigenvalues of the whole factors."""
    mean = float(np.sum(pairs**2)) / count(shapes)
    products, start = [], 0
    for shape in shapes:
        size, columns = int(np.prod(shape)), shape[-1] if shape else 1
        us, matrix = (a[..., start : start + size].reshape(*a.shape[:-1], -1, columns) for a in (pairs, v))
        rows = len(matrix)
        left, right = np.einsum("kij,klj->il", us, us), np.einsum("kji,kjl->il", us, us)
        trace = np.trace(left)
        left, right = diagonal_blocks(left, columns), diagonal_blocks(right, rows)
        own = 0.9 * trace / (size * mean) + 0.1
        roots = power(left, trace / rows, exponent), power(right, trace / columns, exponent)
        products.append(roots[0] @ matrix @ roots[1] * own**exponent)
        start += size
    return np.concatenate([product.ravel() for product in products])


@every_shape
def test_product_is_that_by_eigenvalues(shapes: tuple[Shape, ...]):
    rng = np.random.default_rng(0)
    pairs, v = rng.standard_normal((7, count(shapes))), rng.standard_normal(count(shapes))
    found = np.asarray(TIMES(LEARNED(shapes, pairs), v))
    expected = expected_product(shapes, pairs, v, -0.5)
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


@every_shape
def test_product_is_that_of_a_symmetric_definite_matrix_whatever_was_met(shapes: tuple[Shape, ...]):
    rng = np.random.default_rng(1)
    p = count(shapes)
    pairs = np.zeros((3, p))
    pairs[:, : p // 3] = rng.standard_normal((3, p // 3))  # whole arrays without a curvature
    curvature = LEARNED(shapes, pairs)
    u, v = rng.standard_normal((2, p))
    along_u, along_v = (np.asarray(TIMES(curvature, a)) for a in (u, v))
    assert u @ along_v == pytest.approx(v @ along_u, rel=1e-9)
    assert v @ along_v > 0


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_curvatures_changes_nothing(scale: float):
    pairs = np.random.default_rng(2).standard_normal((4, count(SHAPES[0])))
    v = np.ones(count(SHAPES[0]))
    assert np.array_equal(*(TIMES(LEARNED(SHAPES[0], own), v) for own in (pairs, scale * pairs)))


def test_curvature_that_is_such_a_product_is_undone():
    """Pairs (A^1/2 Z B^1/2) with white Z have the curvature A (x) B, and C^-1/2 takes u to white noise again."""
    rng = np.random.default_rng(3)
    a, b = np.geomspace(1, 4, 12), np.geomspace(1, 3, 10)
    pairs = (np.sqrt(a)[:, None] * rng.standard_normal((60, 12, 10)) * np.sqrt(b)).reshape(60, -1)
    entries = np.stack([np.asarray(TIMES(LEARNED(((12, 10),), pairs), unit)) for unit in np.eye(120)])
    ratio = np.diag(entries) * np.sqrt(np.outer(a, b).ravel())
    spread = np.log(np.sqrt(np.outer(a, b).ravel()))
    assert np.std(np.log(ratio)) <= 0.35 * np.std(spread)


# --- the metric ----------------------------------------------------------------------------------------------------


def rows_of(shapes: tuple[Shape, ...]) -> np.ndarray:
    """Fewer than there are parameters, those of one array three times as long as of the one before."""
    rng = np.random.default_rng(4)
    sizes = [int(np.prod(shape)) for shape in shapes]
    return rng.standard_normal((7, sum(sizes))) * np.repeat(3.0 ** np.arange(len(sizes)), sizes)


def matrix_of(metric: Euclidean | Metric, p: int) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(metric.times))(np.eye(p)))


@every_shape
def test_metric_is_the_fourth_root_by_eigenvalues(shapes: tuple[Shape, ...]):
    rows, v = rows_of(shapes), np.random.default_rng(5).standard_normal(count(shapes))
    found = np.asarray(METRIC_OF_ROWS(shapes, rows).times(v))
    np.testing.assert_allclose(found, expected_product(shapes, rows, v, 0.25), rtol=1e-9, atol=1e-9)


@few_parameters
def test_metric_of_a_matrix_is_that_of_its_rows(shapes: tuple[Shape, ...]):
    rows, v = rows_of(shapes), np.random.default_rng(5).standard_normal(count(shapes))
    rows[:, : len(v) // 3] = 0  # arrays without a curvature, too
    lower = np.tril(rows.T @ rows) + np.triu(np.full((len(v), len(v)), 7e77), 1)
    by_matrix, by_rows = METRIC_OF(shapes, lower), METRIC_OF_ROWS(shapes, rows)
    np.testing.assert_allclose(by_matrix.times(v), by_rows.times(v), rtol=1e-9, atol=1e-9)


@few_parameters
@pytest.mark.parametrize("learns", [True, False])
def test_a_metric_solves_whitens_and_adds_up_as_its_matrix_does(shapes: tuple[Shape, ...], learns: bool):
    p, rows = count(shapes), rows_of(shapes)
    metric = METRIC_OF_ROWS(shapes, rows) if learns else Euclidean()
    matrix, scale, shift = matrix_of(metric, p), jnp.asarray(2.5), jnp.asarray(0.3)
    whole = scale * matrix + shift * np.eye(p)
    v, on_device = np.random.default_rng(6).standard_normal(p), jnp.asarray(rows)
    np.testing.assert_allclose(
        metric.solve(scale, shift, jnp.asarray(v)), np.linalg.solve(whole, v), rtol=1e-9, atol=1e-12
    )
    whitened = np.asarray(metric.whitened(scale, shift, on_device))
    np.testing.assert_allclose(whitened @ whitened.T, rows @ np.linalg.solve(whole, rows.T), rtol=1e-9, atol=1e-9)
    added, diagonal = metric.added(jnp.ones((p, p)), scale)
    found = np.tril(added) + np.asarray(diagonal) * np.eye(p)
    np.testing.assert_allclose(found, np.tril(1 + scale * matrix), rtol=1e-9, atol=1e-12)


@every_shape
def test_metric_of_no_curvature_is_the_identity(shapes: tuple[Shape, ...]):
    v = np.random.default_rng(7).standard_normal(count(shapes))
    np.testing.assert_allclose(METRIC_OF_ROWS(shapes, np.zeros((1, len(v)))).times(v), v, rtol=1e-12)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_rows_changes_no_metric(scale: float):
    rows = rows_of(SHAPES[1])
    assert np.array_equal(*(METRIC_OF_ROWS(SHAPES[1], own).times(rows[0]) for own in (rows, scale * rows)))
