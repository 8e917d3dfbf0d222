"""The factored curvature against the one that NumPy adds up and roots, for arrays of every shape."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from subsetopt.kronecker import Kronecker, learned
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

every_shape = pytest.mark.parametrize("shapes", SHAPES, ids=str)


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


def power(f: np.ndarray, mean: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(0.9 * f / mean + 0.1 * np.eye(len(f)))
    return vectors / np.sqrt(values) @ vectors.T


def expected_product(shapes: tuple[Shape, ...], pairs: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Array by array, with eigenvalues of the whole factors."""
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
        products.append(power(left, trace / rows) @ matrix @ power(right, trace / columns) / np.sqrt(own))
        start += size
    return np.concatenate([product.ravel() for product in products])


@every_shape
def test_product_is_that_by_eigenvalues(shapes: tuple[Shape, ...]):
    rng = np.random.default_rng(0)
    pairs, v = rng.standard_normal((7, count(shapes))), rng.standard_normal(count(shapes))
    found = np.asarray(TIMES(LEARNED(shapes, pairs), v))
    expected = expected_product(shapes, pairs, v)
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
