"""The factored curvature against the one that NumPy adds up and roots, for arrays of every shape."""

import itertools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from subsetopt.kronecker import Kronecker, unlearned
from subsetopt.model import Shape

# Vectors, matrices, kernels, numbers; one tile, tiles that fill up, tiles with a rest, slim ones.
SHAPES: list[tuple[Shape, ...]] = [
    ((5,), (6, 5)),
    ((3, 3, 2, 8), (), (8,)),
    ((130, 3), (3,), (260, 300)),
    ((1, 40), (2, 40), (40, 1)),
]
PLUS, ROOTED, TIMES = (jax.jit(f) for f in (Kronecker.plus, Kronecker.rooted, Kronecker.times))

every_shape = pytest.mark.parametrize("shapes", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def count(shapes: tuple[Shape, ...]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def learned(shapes: tuple[Shape, ...], pairs: np.ndarray) -> Kronecker:
    found = unlearned(shapes, np.float64)
    for u in pairs:
        found = PLUS(found, u)
    return ROOTED(found)


def tiles(shape: Shape) -> list[np.ndarray]:
    """Where each tile's entries are in the array, flat: by the rule as the module words it."""
    columns = shape[-1] if shape else 1
    places = np.arange(int(np.prod(shape))).reshape(-1, columns)
    rows = len(places)

    def cuts(side: int, other: int) -> Iterator[slice]:
        most = min(128, 8 * other)
        size = -(-side // -(-side // most))
        return (slice(start, start + size) for start in range(0, side, size))

    return [places[r, c] for r, c in itertools.product(cuts(rows, columns), cuts(columns, rows))]


def power(f: np.ndarray, mean: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(0.9 * f / mean + 0.1 * np.eye(len(f)))
    return vectors / np.sqrt(values) @ vectors.T


def expected_product(shapes: tuple[Shape, ...], pairs: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Tile by tile, with eigenvalues."""
    weights = 0.95 ** np.arange(len(pairs))[::-1]
    mean = float(weights @ np.sum(pairs**2, axis=1)) / count(shapes)
    product, start = np.zeros_like(v), 0
    for shape in shapes:
        for tile in tiles(shape):
            place = start + tile
            a, b = place.shape
            us = np.sqrt(weights)[:, None, None] * pairs[:, place]
            left, right = np.einsum("kij,klj->il", us, us), np.einsum("kji,kjl->il", us, us)
            trace = np.trace(left)
            own = 0.9 * trace / (a * b * mean) + 0.1
            product[place] = power(left, trace / a) @ v[place] @ power(right, trace / b) / np.sqrt(own)
        start += int(np.prod(shape))
    return product


@every_shape
def test_product_is_that_by_eigenvalues_of_each_tile(shapes: tuple[Shape, ...]):
    rng = np.random.default_rng(0)
    pairs, v = rng.standard_normal((7, count(shapes))), rng.standard_normal(count(shapes))
    found = np.asarray(TIMES(learned(shapes, pairs), v))
    expected = expected_product(shapes, pairs, v)
    # A tile with rows or columns of filling counts them in its means: a tile of 87 rows has 261 of 260.
    assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


@every_shape
def test_product_is_that_of_a_symmetric_definite_matrix_whatever_was_met(shapes: tuple[Shape, ...]):
    rng = np.random.default_rng(1)
    p = count(shapes)
    pairs = np.zeros((3, p))
    pairs[:, : p // 3] = rng.standard_normal((3, p // 3))  # whole arrays without a curvature
    curvature = learned(shapes, pairs)
    u, v = rng.standard_normal((2, p))
    along_u, along_v = (np.asarray(TIMES(curvature, a)) for a in (u, v))
    assert u @ along_v == pytest.approx(v @ along_u, rel=1e-9)
    assert v @ along_v > 0


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_curvatures_changes_nothing(scale: float):
    pairs = np.random.default_rng(2).standard_normal((4, count(SHAPES[0])))
    v = np.ones(count(SHAPES[0]))
    assert np.array_equal(*(TIMES(learned(SHAPES[0], own), v) for own in (pairs, scale * pairs)))


def test_curvature_that_is_such_a_product_is_undone():
    """Pairs (A^1/2 Z B^1/2) with white Z have the curvature A (x) B, and C^-1/2 takes u to white noise again."""
    rng = np.random.default_rng(3)
    a, b = np.geomspace(1, 4, 12), np.geomspace(1, 3, 10)
    pairs = (np.sqrt(a)[:, None] * rng.standard_normal((60, 12, 10)) * np.sqrt(b)).reshape(60, -1)
    entries = np.stack([np.asarray(TIMES(learned(((12, 10),), pairs), unit)) for unit in np.eye(120)])
    ratio = np.diag(entries) * np.sqrt(np.outer(a, b).ravel())
    spread = np.log(np.sqrt(np.outer(a, b).ravel()))
    assert np.std(np.log(ratio)) <= 0.35 * np.std(spread)
