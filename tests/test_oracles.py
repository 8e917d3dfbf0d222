"""Kernels against dense matrices, solvers against scipy and NumPy, and what may change no result; in float64."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax import Array
from jax.flatten_util import ravel_pytree
from problems import Example, affine, least_squares, linear, problems, pseudo_huber

from subsetopt import LBFGS, FitResult, GaussNewton, Growth, Status, fit_subset
from subsetopt.curvature import Dense, Recipe, SampleSpace, conjugate_gradient, form_flops, form_of, window
from subsetopt.drivers import Sample
from subsetopt.losses import resolve
from subsetopt.problem import Problem, make_problem
from subsetopt.timing import compiled_programs

EXAMPLES = {example.name: example for example in problems(np.float64)}
HUBER, MLP, CNN = (EXAMPLES[name] for name in ("Huber regression", "MLP", "CNN"))
WHOLE = Growth(start=1e9)  # a first ratio that no set reaches: one stage, the whole set
CLASSICAL = GaussNewton(curvature_ratio=None)
QUADRATICS = [1e2, 1e4, 1e6]

every_full_batch_solver = pytest.mark.parametrize("solver", [LBFGS(), CLASSICAL], ids=["LBFGS", "classical"])
every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def fit(example: Example, solver: Any, max_steps: int, **options: Any) -> FitResult:
    options = {"l2": example.l2, "loss": example.loss, "growth": WHOLE, "until": "converged"} | options
    data = example.x, example.y
    return fit_subset(
        example.apply,
        data,
        example.params,
        solver=solver,
        max_steps=max_steps,
        warmup_epochs=0,
        progress=False,
        **options,
    )


# --- kernels against dense matrices --------------------------------------------------------------------------------


def away_from_start(example: Example) -> tuple[Problem, Array, Any]:
    """The problem in blocks of 16, a random point, and what makes parameters of it."""
    problem, _ = make_problem(
        example.apply, (example.x, example.y), example.params, loss=example.loss, l2=example.l2, block_size=16
    )
    w, unravel = ravel_pytree(example.params)
    return problem, w + 0.3 * jax.random.normal(jax.random.key(0), w.shape, w.dtype), unravel


def repeated_sample(problem: Problem) -> Sample:
    """Weighted examples, some of them several times."""
    rng = np.random.default_rng(0)
    return weighted(rng.integers(0, problem.examples, 37), rng.uniform(0.1, 1, 37))


def weighted(indices: np.ndarray, weights: np.ndarray) -> Sample:
    return Sample(indices, weights, np.int32(len(indices)))


def mean_loss(example: Example, unravel: Any) -> Any:
    """(value, gradient) of the plain mean over all examples, as a compiled function of w."""
    x, y = jnp.asarray(example.x), jnp.asarray(example.y)

    def mean(w: Array) -> Array:
        losses = resolve(example.loss).values(example.apply(unravel(w), x), y)
        return jnp.mean(losses) + example.l2 / 2 * jnp.vdot(w, w)

    return jax.jit(jax.value_and_grad(mean))


def output_hessians(loss: Any, f: Array, y: Array) -> Array:
    """H_i (n, M, M) by jax.hessian, one example at a time."""
    values = resolve(loss).values
    return jax.jit(jax.vmap(jax.hessian(lambda f, y: values(f[None], y[None])[0])))(f, y)


def dense_curvature(example: Example, w: Array, unravel: Any, sample: Sample) -> np.ndarray:
    """Sum_i weight_i J_i' H_i J_i, J_i by jax.jacobian."""
    indices = sample.indices[: sample.count]
    x, y = jnp.asarray(example.x[indices]), jnp.asarray(example.y[indices])
    j = jax.jit(jax.jacobian(lambda w: example.apply(unravel(w), x)))(w)
    h = output_hessians(example.loss, example.apply(unravel(w), x), y)
    weights = sample.weights[: sample.count]
    return np.einsum("n,nip,nij,njq->pq", weights, j, h, j, optimize=True)


def symmetric(lower: Array) -> np.ndarray:
    return np.tril(lower) + np.tril(lower, -1).T


def relative_error(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@every_example
def test_loss_and_gradient_are_those_of_the_plain_mean(example: Example):
    problem, w, unravel = away_from_start(example)
    value, grad = mean_loss(example, unravel)(w)
    found = problem.evaluate(w)
    assert found.value == pytest.approx(float(value), rel=1e-12)
    assert relative_error(found.grad, grad) < 1e-12


@every_example
def test_gauss_newton_product_is_that_of_the_dense_matrix(example: Example):
    problem, w, unravel = away_from_start(example)
    sample = repeated_sample(problem)
    v = jax.random.normal(jax.random.key(1), w.shape, w.dtype)
    expected = dense_curvature(example, w, unravel, sample) @ v + example.l2 * v
    assert relative_error(problem.product(w, v, sample), expected) < 1e-10


@every_example
def test_gram_of_all_unit_vectors_is_the_dense_matrix(example: Example):
    problem, w, unravel = away_from_start(example)
    sample = repeated_sample(problem)
    every_row = weighted(*(np.repeat(a, problem.outputs) for a in sample[:2]))
    units = np.tile(np.eye(problem.outputs), (len(sample.indices), 1))
    expected = dense_curvature(example, w, unravel, sample)
    assert relative_error(symmetric(problem.gram(w, every_row, units)), expected) < 1e-10
    assert relative_error(symmetric(problem.gram(w, sample, None)), expected) < 1e-10


@every_example
def test_rows_make_the_matrix_and_the_gradient(example: Example):
    problem, w, unravel = away_from_start(example)
    sample = problem.whole()
    rows, c = problem.rows(w, sample, None)
    rows = rows.reshape(-1, w.size)
    assert relative_error(rows.T @ rows, dense_curvature(example, w, unravel, sample)) < 1e-10
    if callable(example.loss):
        assert c is None
    else:
        assert relative_error(rows.T @ c.reshape(-1) + example.l2 * w, problem.evaluate(w).grad) < 1e-9


def test_long_rows_are_computed_in_several_pieces():
    rng = np.random.default_rng(0)
    x, parameters = rng.normal(size=(300, 6000)), {"w": np.zeros((6000, 1))}
    problem, w = make_problem(linear, (x, x[:, :1]), parameters, loss="squared_error")
    signs, sample = rng.choice([-1.0, 1.0], (300, 1)), weighted(np.arange(300), rng.uniform(size=300))
    rows = problem.rows(w, sample, signs)
    np.testing.assert_allclose(rows, np.sqrt(sample.weights)[:, None] * signs * x, rtol=1e-13)


@pytest.mark.parametrize("example", [HUBER, MLP, CNN], ids=lambda example: example.name)
def test_rows_with_random_signs_average_to_the_dense_matrix(example: Example):
    problem, w, unravel = away_from_start(example)
    few = weighted(np.arange(8), np.full(8, 1 / 8))
    expected = dense_curvature(example, w, unravel, few)

    def error(draws: int) -> float:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (8 * draws, problem.outputs))
        repeated = weighted(np.tile(few.indices, draws), np.tile(few.weights / draws, draws))
        return relative_error(symmetric(problem.gram(w, repeated, signs)), expected)

    # 64 times as many draws: an eighth of the error.
    assert error(1024) < min(0.1, error(16) / 4)


def test_drawing_by_uncertainty_is_unbiased_and_repeats_no_example_too_often():
    problem, w, _ = away_from_start(MLP)
    subset = problem.on(np.arange(100, 140))
    uncertainty = subset.evaluate(w, uncertain=True).uncertainty
    share = 0.1 / 40 + 0.9 * uncertainty[:40] / uncertainty.sum()
    total = np.zeros(150)
    for key in jax.random.split(jax.random.key(0), 200):
        positions, sample = (
            jax.tree.map(np.asarray, part) for part in subset.draw(key, uncertainty, 120, np.int32(100))
        )
        np.testing.assert_array_equal(sample.indices, subset.subset[positions])
        assert np.all(np.bincount(positions[:100], minlength=40) <= np.ceil(100 * share))
        assert not sample.weights[100:].any()
        total += np.bincount(sample.indices, sample.weights, minlength=150) / 200
    np.testing.assert_allclose(total[100:140], 1 / 40, rtol=0.1)
    assert not total[:100].any()
    assert not total[140:].any()


def test_weighted_subsets_are_drawn_from_by_the_same_program():
    problem, *_ = away_from_start(MLP)
    key, score, few = jax.random.key(0), jnp.asarray(np.ones(problem.examples)), np.arange(40)
    _, equal = problem.on(few).draw(key, score, 30, np.int32(20))
    before = compiled_programs()
    _, weighted = problem.on(few, np.full(40, 1 / 40)).draw(key, score, 30, np.int32(20))
    assert compiled_programs() == before
    jax.tree.map(np.testing.assert_array_equal, weighted, equal)


def test_uncertainty_and_slope_count_alike_for_a_draw():
    problem, w, _ = away_from_start(MLP)
    known = problem.evaluate(w, uncertain=True)
    uncertainty, slope = np.asarray(known.uncertainty), np.asarray(known.slope)
    expected = uncertainty / uncertainty.mean() + slope / slope.mean()
    np.testing.assert_allclose(GaussNewton()._score(known), expected, rtol=1e-6)
    without = GaussNewton()._score(known._replace(slope=jnp.zeros_like(known.slope)))  # of a model that errs nowhere
    np.testing.assert_allclose(without, uncertainty / uncertainty.mean(), rtol=1e-6)


def test_draws_survive_rounding_in_the_scores():
    with jax.enable_x64(False):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(20_000, 2)).astype(np.float32)
        problem, _ = make_problem(linear, (x, x[:, :1]), {"w": np.zeros((2, 1), np.float32)}, loss="squared_error")
        uncertainty = rng.uniform(0, 1, 20_000).astype(np.float32)
        other = uncertainty * (1 + rng.choice([-1e-7, 0, 1e-7], 20_000).astype(np.float32))
        for key in jax.random.split(jax.random.key(0), 5):
            ours, theirs = (np.asarray(problem.draw(key, u, 3000, np.int32(3000))[0]) for u in (uncertainty, other))
            assert np.sum(ours != theirs) <= 2


@pytest.mark.parametrize("scale", [0.1, 1, 30])
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        ("softmax_cross_entropy", "labels"),
        ("softmax_cross_entropy", "probabilities"),
        ("squared_error", "probabilities"),
        (pseudo_huber, "labels"),
    ],
)
def test_root_times_its_transpose_is_the_output_hessian(loss: Any, targets: str, scale: float):
    rng = np.random.default_rng(0)
    n, m = 12, 5
    f = jnp.asarray(scale * rng.normal(size=(n, m)))
    y = rng.integers(0, m, n) if targets == "labels" else rng.dirichlet(np.ones(m), n)
    y, kernels = jnp.asarray(y), resolve(loss)

    def columns(product: Any) -> np.ndarray:
        units = jnp.tile(jnp.eye(m)[:, None], (1, n, 1))
        return np.moveaxis(jax.jit(jax.vmap(product, (None, None, 0)))(f, y, units), 0, 2)

    expected = output_hessians(loss, f, y)
    b = columns(kernels.root)
    np.testing.assert_allclose(b @ b.transpose(0, 2, 1), expected, atol=1e-14)
    np.testing.assert_allclose(columns(kernels.hessian), expected, atol=1e-14)
    trace = np.trace(expected, axis1=1, axis2=2)
    np.testing.assert_allclose(kernels.uncertainty(f, y), np.sqrt(np.maximum(trace, 0)), atol=1e-7)
    slopes = jax.jacobian(lambda f: kernels.values(f, y))(f)[np.arange(n), np.arange(n)]
    np.testing.assert_allclose(kernels.slope(f, y), np.linalg.norm(slopes, axis=1), atol=1e-12)


@pytest.mark.parametrize("norm", [1, 1e-3, 1e-6])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients_reach_their_tolerance_in_float32_at_any_scale(norm: float, preconditioned: bool):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(50, 50)))
    a = (q * np.geomspace(1, 1e-3, 50)) @ q.T
    b = rng.normal(size=50)
    b *= norm / np.linalg.norm(b)
    a32, b32 = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    # All of the inverse but for its five largest eigenvalues.
    kept = np.where(np.arange(50) < 45, np.geomspace(1, 1e-3, 50), 1)
    inverse = jnp.asarray((q / kept) @ q.T if preconditioned else np.eye(50), jnp.float32)
    x, products = conjugate_gradient(
        jax.lax.while_loop, lambda v: a32 @ v, lambda v: inverse @ v, b32, jnp.zeros_like(b32), 1e-4, 300
    )
    assert x.dtype == jnp.float32
    assert relative_error(a @ np.asarray(x, float), b) < 1.1e-4
    assert products < (15 if preconditioned else 300)


def test_conjugate_gradients_stay_orthogonal_in_float32():
    """They need no more products than there are unknowns; without care it is four times as many here."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    a, b = (jnp.asarray(v, jnp.float32) for v in ((q * np.geomspace(1, 1e-4, 60)) @ q.T, rng.normal(size=60)))
    x, products = conjugate_gradient(jax.lax.while_loop, lambda v: a @ v, lambda v: v, b, jnp.zeros_like(b), 1e-4, 300)
    assert products <= 60
    assert relative_error(np.asarray(a, float) @ np.asarray(x, float), np.asarray(b, float)) < 2e-4


def test_conjugate_gradients_begin_where_they_ended():
    a, b = jnp.diag(jnp.arange(1.0, 9)), jnp.ones(8)
    solve = functools.partial(conjugate_gradient, jax.lax.while_loop, lambda v: a @ v, lambda v: v, b)
    x, products = solve(jnp.zeros(8), 1e-10, 20)
    assert products == 9
    np.testing.assert_allclose(solve(x, 1e-9, 20)[0], x)
    assert solve(x, 1e-9, 20)[1] == 1
    assert solve(100 * x, 1e-10, 20)[1] == 9


# --- solvers against scipy and NumPy -------------------------------------------------------------------------------


@functools.cache
def scipy_minimum(name: str) -> float:
    return scipy_descent(EXAMPLES[name], EXAMPLES[name].params)


def scipy_descent(example: Example, params: Any) -> float:
    """The loss at which scipy's L-BFGS-B ends from `params`, going on to the last digit."""
    w, unravel = ravel_pytree(params)
    mean = mean_loss(example, unravel)
    options = {"maxiter": 10_000, "maxfun": 10_000, "ftol": 0, "gtol": 1e-11, "maxcor": 20}
    return scipy.optimize.minimize(
        lambda w: [np.asarray(part) for part in mean(w)], np.asarray(w), jac=True, method="L-BFGS-B", options=options
    ).fun


@every_full_batch_solver
@every_example
def test_solver_reaches_the_minimum_that_scipy_finds(example: Example, solver: Any):
    # A gradient of 1e-8 of the first one would leave 3.4e-12 of Rosenbrock's loss, (1e-8 * 116)^2 / (2 * 0.2).
    result = fit(example, dataclasses.replace(solver, tolerance=1e-9), max_steps=2000)
    assert result.status == Status.CONVERGED
    # Where there are many minima, ours is one if scipy can descend no further from it.
    minimum = scipy_minimum(example.name) if example.convex else scipy_descent(example, result.params)
    assert result.loss == pytest.approx(minimum, rel=1e-6, abs=1e-12)


BADLY_SCALED = [
    example._replace(x=example.x * np.geomspace(0.1, 10, example.x.shape[1]))
    for example in (least_squares(1e4, np.float64), HUBER, MLP)
]


def scipy_lbfgs(example: Example) -> list[float]:
    """The losses that scipy's evaluations give in 40 steps."""
    w, unravel = ravel_pytree(example.params)
    mean, losses = mean_loss(example, unravel), []

    def evaluate(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, gradient = (np.asarray(part) for part in mean(w))
        losses.append(float(value))
        return value, gradient

    options = {"maxiter": 40, "ftol": 0, "gtol": 0, "maxcor": 20}
    scipy.optimize.minimize(evaluate, np.asarray(w), jac=True, method="L-BFGS-B", options=options)
    return losses


@pytest.mark.parametrize("example", BADLY_SCALED, ids=lambda example: example.name)
def test_lbfgs_tells_scales_of_parameters_apart(example: Example):
    ratios = []
    for rng in map(np.random.default_rng, range(5)):  # some end in a worse minimum than scipy
        start = jax.tree.map(lambda p, rng=rng: p + 0.1 * rng.standard_normal(np.shape(p)), example.params)
        moved = example._replace(params=start)
        theirs = scipy_lbfgs(moved)
        ours = fit(moved, LBFGS(memory=20, tolerance=0), max_steps=60).history
        evaluations = np.array(ours["sample_grads"]) / len(example.x)
        reached = evaluations[np.array(ours["loss"]) <= min(theirs)]
        ratios.append(np.min(reached, initial=np.inf) / len(theirs))
    # Measured: 0.37, 0.47 and 0.45 of scipy's evaluations; 1.00, 1.00 and 0.87 with a multiple of the identity as h0.
    assert np.median(ratios) <= 0.7


@every_full_batch_solver
@pytest.mark.parametrize("example", [e for e in problems(np.float32) if e.convex], ids=lambda example: example.name)
def test_solver_nears_the_minimum_in_float32(example: Example, solver: Any):
    # The default, a gradient of 1e-4 of the first one, may leave 3e-4 of Rosenbrock's loss, see above; this one 8.4e-7.
    with jax.enable_x64(False):
        result = fit(example, dataclasses.replace(solver, tolerance=5e-6), max_steps=500)
    assert result.status in (Status.CONVERGED, Status.STALLED)
    assert result.loss == pytest.approx(scipy_minimum(example.name), rel=5e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("solver", "driver", "steps"),
    [(CLASSICAL, "host", 10), (GaussNewton(), "host", 20), (GaussNewton(), "compiled", 20)],
)
def test_gauss_newton_converges_however_many_examples_there_are(solver: GaussNewton, driver: str, steps: int):
    """Near a minimum the loss of some examples rises where that of all of them falls, and momentum goes past it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 10))
    y = (x @ rng.normal(size=(10, 3)) + 2 * rng.normal(size=(1000, 3))).argmax(axis=1).astype(np.int32)
    example = Example("overlapping classes", linear, {"w": np.zeros((10, 3))}, x, y, "softmax_cross_entropy", l2=1e-2)
    result, reference = fit(example, solver, steps, driver=driver), fit(example, LBFGS(), 80)
    assert result.status == reference.status == Status.CONVERGED
    assert result.loss == pytest.approx(reference.loss, rel=1e-10)


@pytest.mark.parametrize("driver", ["host", "compiled"])
def test_precision_that_ends_is_told_by_few_rejected_steps(driver: str):
    """Not by ten of them, each of which costs as much as two gradients."""
    example = least_squares(1e4, np.float32)
    with jax.enable_x64(False):
        result = fit(example, GaussNewton(tolerance=0), 80, driver=driver)
    assert result.status == Status.STALLED
    assert result.loss == pytest.approx(scipy_minimum(example.name), rel=1e-5)
    rejected = np.array(result.history["loss"]) == result.loss
    assert np.sum(rejected) < 8


@pytest.mark.parametrize("driver", ["host", "compiled"])
def test_step_that_few_examples_mislead_is_undone(driver: str):
    """Counts over many orders of magnitude: what 24 of the examples say would send others to e^200."""
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(size=(2000, 5)), np.ones((2000, 1))], axis=1)
    y = rng.poisson(np.exp(x @ np.array([[0.8], [-0.4], [0.25], [0.2], [-0.1], [20]]))).astype(float)

    def loss(f: Array, y: Array) -> Array:
        return jnp.sum(jnp.exp(f) - y * f, axis=1)

    example = Example("counts", linear, {"w": np.zeros((6, 1))}, x, y, loss)
    solver = GaussNewton()
    result = fit(example, solver, 80, growth=solver.growth, until=1, driver=driver)
    assert result.status == Status.CONVERGED
    assert result.loss == pytest.approx(fit(example, CLASSICAL, 80).loss, rel=1e-8)


@pytest.mark.parametrize("linear_solve", ["dense", "sample", "cg"])
def test_examples_that_are_badly_wrong_are_learned_in_every_form(linear_solve: str):
    """Logits of hundreds: the residual of the rows, whose divisors are probabilities, cannot hold such a gradient."""
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0, 255, (20, 64)).astype(np.float32), (rng.normal(size=(64, 3)) / 8).astype(np.float32)
    y = rng.integers(0, 3, 20).astype(np.int32)
    example = Example("pixels", linear, {"w": w}, x, y, "softmax_cross_entropy")
    with jax.enable_x64(False):
        result = fit(example, dataclasses.replace(CLASSICAL, linear_solve=linear_solve), 30)
    assert result.history["loss"][0] > 50
    assert result.loss < 1e-4


@pytest.mark.parametrize("logit", [24, 60, 100])
def test_saturated_start_with_a_vanishing_curvature_is_left(logit: int):
    """A softmax has next to no curvature there, by which the first damping goes: at 24 some, at 100 none in float32."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 3)).astype(np.float32), (rng.random(600) < 0.9).astype(np.int32)
    start = {"w": np.zeros((3, 2), np.float32), "b": np.array([logit, 0], np.float32)}
    example = Example("confidently wrong", affine, start, x, y, "softmax_cross_entropy")
    with jax.enable_x64(False):
        found = [fit(example, solver, 60).loss for solver in (GaussNewton(), CLASSICAL, LBFGS())]
    assert found == pytest.approx([0.316805] * 3, rel=1e-5)


@pytest.mark.parametrize("solver", [GaussNewton(), CLASSICAL], ids=["default", "classical"])
@pytest.mark.parametrize(("x_unit", "y_unit"), [(1, 1e13), (1e-6, 1e10)])
def test_units_of_a_regression_leave_it_its_curvature(solver: GaussNewton, x_unit: float, y_unit: float):
    """A step of length 1 is nothing there, and the curvature, in other units, next to nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 5))
    y = x @ rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=(500, 1))
    x32, y32 = (x_unit * x).astype(np.float32), (y_unit * y).astype(np.float32)
    example = Example("units", linear, {"w": np.zeros((5, 1), np.float32)}, x32, y32, "squared_error")
    with jax.enable_x64(False):
        result = fit(example, solver, 40)
    residuals = y - x @ np.linalg.lstsq(x, y)[0]
    assert result.loss / y_unit**2 == pytest.approx(0.5 * np.mean(residuals**2), rel=1e-3)


def test_loss_without_curvature_is_lowered_alike_in_every_form():
    """The first damping is the gradient's norm, not what rounding has left of l2."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(300, 7)).astype(np.float32), np.zeros((7, 1), np.float32)
    y = (x @ rng.normal(size=(7, 1)) + 0.1 * rng.normal(size=(300, 1))).astype(np.float32)
    example = Example("absolute error", linear, {"w": w}, x, y, lambda f, y: jnp.abs(f - y).sum(axis=1), l2=0.1)
    solvers = [dataclasses.replace(CLASSICAL, linear_solve=name) for name in ("dense", "sample", "cg")]
    with jax.enable_x64(False):
        found = [fit(example, solver, 20) for solver in solvers]
    assert found[0].loss < 0.4 * np.mean(np.abs(y))
    assert [result.loss for result in found] == pytest.approx([found[0].loss] * 3, rel=1e-4)


@pytest.mark.parametrize("labels", [np.uint8, np.int8, np.int64])
def test_labels_of_any_dtype_tell_hundreds_of_classes(labels: Any):
    f, y = jnp.asarray(np.random.default_rng(0).normal(size=(5, 300))), np.array([0, 3, 43, 44, 127])
    residual: Any = resolve("softmax_cross_entropy").residual
    np.testing.assert_array_equal(residual(f, y.astype(labels)), residual(f, y.astype(np.int32)))


@pytest.mark.parametrize(
    ("condition", "linear_solve"), [*((condition, "dense") for condition in QUADRATICS), (1e2, "cg")]
)
def test_one_undamped_step_solves_linear_least_squares(condition: float, linear_solve: str):
    example = least_squares(condition, np.float64)
    undamped = GaussNewton(
        curvature_ratio=None,
        damping=0,
        damping_factors=(1.0,),
        momenta=(0.0,),
        linear_solve=linear_solve,
        cg_tolerance=1e-13,
    )
    result = fit(example, undamped, max_steps=1)
    w, residuals, *_ = np.linalg.lstsq(example.x, example.y)
    assert result.loss == pytest.approx(residuals[0] / (2 * len(example.x)), rel=1e-12)
    assert relative_error(result.params["w"], w) < 1e-14 * condition


@pytest.mark.parametrize("damping", [1e-1, 1e-4])
@every_example
def test_all_forms_solve_the_same_systems(example: Example, damping: float):
    problem, w, unravel = away_from_start(example)
    problem = problem.on(np.arange(min(10, problem.examples)))
    recipe = Recipe(rows=None, share=0.0, averaging=0.5, precision="highest", cg_tolerance=1e-12, cg_max_steps=1000)
    grad, uncertainty = (getattr(problem.evaluate(w, uncertain=True), name) for name in ("grad", "uncertainty"))
    a, eye = dense_curvature(example, w, unravel, problem.whole()), np.eye(w.size)
    dampings = damping * jnp.asarray([0.4, 1.0, 1.5])
    expected = [-np.linalg.solve(a + (own + example.l2) * eye, grad) for own in dampings]
    forms = [form_of(problem, recipe, name, 1) for name in ("dense", "sample", "cg")]
    for form in (*forms, SampleSpace(recipe, 1, push_through=False)):
        kept = form.empty(problem, w)
        for key in (0, 1):  # what is there already changes nothing
            kept, _ = form.renewed(problem, w, uncertainty, kept, jax.random.key(key))
        for found, solution in zip(form.solve(problem, w, kept, dampings, grad)[0], expected, strict=True):
            assert relative_error(found, solution) < 1e-6, form
        product, _ = form.times(problem, w, kept, grad)
        assert relative_error(product, (a + example.l2 * eye) @ grad) < 1e-9, form


@pytest.mark.parametrize("averaging", [0.0, 0.5])
def test_sample_space_averages_as_the_matrix_does(averaging: float):
    problem, w, _ = away_from_start(MLP)
    evaluation = problem.evaluate(w, uncertain=True)
    recipe = Recipe(rows=9, share=0.0, averaging=averaging, precision="highest", cg_tolerance=1e-9, cg_max_steps=100)
    dense, rows = Dense(recipe), SampleSpace(recipe, 4 if averaging else 1, push_through=False)
    matrix, space = dense.empty(problem, w), rows.empty(problem, w)
    for number in range(6):
        key = jax.random.key(number)
        matrix, _ = dense.renewed(problem, w, evaluation.uncertainty, matrix, key)
        space, _ = rows.renewed(problem, w, evaluation.uncertainty, space, key)
    found = np.asarray(space.root[:, None] * space.rows)
    np.testing.assert_allclose(np.tril(space.gram), np.tril(found @ found.T), rtol=1e-9, atol=1e-12)
    # The matrix gives its first sample the weight of all before it; the rows share it out.
    expected = symmetric(matrix.a)
    assert np.trace(found.T @ found) == pytest.approx(np.trace(expected), rel=0.5 if averaging else 1e-9)
    if not averaging:
        assert relative_error(found.T @ found, expected) < 1e-9


def test_rows_that_are_not_finite_do_not_last():
    problem, w, _ = away_from_start(MLP)
    recipe = Recipe(rows=9, share=0.0, averaging=0.5, precision="highest", cg_tolerance=1e-9, cg_max_steps=100)
    form, uncertainty = SampleSpace(recipe, 4, push_through=False), problem.evaluate(w, uncertain=True).uncertainty
    kept, _ = form.renewed(problem, w, uncertainty, form.empty(problem, w), jax.random.key(0))
    lost = kept._replace(rows=kept.rows * np.nan, products=kept.products * np.nan)
    again, _ = form.renewed(problem, w, uncertainty, lost, jax.random.key(0))
    for found, expected in zip(again, kept, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_form_without_averaging_is_none_to_choose_where_it_is_asked_for():
    problem, _, _ = away_from_start(MLP)  # of 280 parameters
    recipe = Recipe(rows=200, share=0.0, averaging=0.5, precision="highest", cg_tolerance=1e-2, cg_max_steps=50)
    forms = [form_flops(problem, dataclasses.replace(recipe, averaging=a), 2).keys() for a in (0.5, 0.0)]
    assert forms == [{"dense", "cg"}, {"dense", "sample", "cg"}]


@pytest.mark.parametrize(("rows", "share", "samples"), [(9, 0.0, 4), (9, 0.5, 3), (200, 0.0, 1)])
def test_sample_space_has_no_more_rows_than_parameters_where_several_samples_are_in_it(rows, share, samples):
    problem, _, _ = away_from_start(MLP)
    recipe = Recipe(rows=rows, share=share, averaging=0.5, precision="highest", cg_tolerance=1e-2, cg_max_steps=50)
    assert (problem.examples, problem.parameters) == (150, 280)
    assert window(problem, recipe) == samples


@pytest.mark.parametrize("linear_solve", ["dense", "sample", "cg"])
@pytest.mark.parametrize("ratio", [0.2, 1.1])
def test_sampled_curvature_descends_in_every_form(linear_solve: str, ratio: float):
    result = fit(MLP, GaussNewton(curvature_ratio=ratio, linear_solve=linear_solve), 12)
    # Steepest descent with a perfect step length is at 0.5 then.
    assert result.loss < 0.2


# --- what may change no result -------------------------------------------------------------------------------------

SOLVERS = {"LBFGS": LBFGS(), "GaussNewton": GaussNewton(), "classical": CLASSICAL}


def tiny_huber(outputs: Array, y: Array) -> Array:
    return 1e-6 * pseudo_huber(outputs, y)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("example", [HUBER, MLP], ids=lambda example: example.name)
def test_scale_of_the_loss_changes_no_iterate(example: Example, solver: Any):
    ours = fit(example, solver, 12, loss=pseudo_huber)
    tiny = fit(example, solver, 12, loss=tiny_huber, l2=1e-6 * example.l2)
    np.testing.assert_allclose(1e6 * np.array(tiny.history["loss"]), ours.history["loss"], rtol=1e-9)
    np.testing.assert_allclose(tiny.history["sample_grads"], ours.history["sample_grads"])


@pytest.mark.parametrize(
    ("solver", "nested"),
    [(solver, nested) for solver in SOLVERS.values() for nested in (True, False) if nested or solver.fresh_subsets],
)
def test_block_size_changes_results_by_rounding_only(solver: Any, nested: bool):
    growth = Growth(1, 2, nested=nested)
    sizes = (7, 64, None)
    losses = [fit(CNN, solver, 6, growth=growth, until=3, block_size=size).history["loss"] for size in sizes]
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-9)
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("example", [HUBER, CNN], ids=lambda example: example.name)
def test_both_drivers_take_the_same_steps(example: Example, solver: Any):
    host, compiled = (fit(example, solver, 12, growth=Growth(1, 2), driver=name) for name in ("host", "compiled"))
    for column in ("step", "loss", "grad_norm", "sample_grads"):
        np.testing.assert_allclose(compiled.history[column], host.history[column], rtol=1e-6)
    np.testing.assert_allclose(compiled.loss, host.loss, rtol=1e-9)
    np.testing.assert_allclose(ravel_pytree(compiled.params)[0], ravel_pytree(host.params)[0], rtol=1e-6, atol=1e-9)
    assert (compiled.n_steps, compiled.n_evals) == (host.n_steps, host.n_evals)
    assert compiled.sample_grads == pytest.approx(host.sample_grads)
    assert compiled.order.tolist() == host.order.tolist()


ON_DEVICES = """if True:
    import json, jax
    jax.config.update("jax_enable_x64", True)
    from test_oracles import LBFGS, MLP, GaussNewton, Growth, fit

    def losses(solver, driver, count):
        options = {"growth": Growth(1, 2), "devices": jax.devices()[:count], "block_size": 30, "driver": driver}
        return fit(MLP, solver, 4, **options).history["loss"]

    solvers = LBFGS(), *(GaussNewton(linear_solve=form, cg_max_steps=5) for form in ("dense", "sample", "cg"))
    drivers = [("host", (1, 2, 3)), ("compiled", (1, 4))]
    print(json.dumps([[losses(s, d, count)[-1] for d, counts in drivers for count in counts] for s in solvers]))
"""


def test_devices_and_drivers_change_results_by_rounding_only(run_python: Any, request: pytest.FixtureRequest):
    for one, *more in json.loads(run_python("-c", ON_DEVICES, devices=4, cwd=request.path.parent)):
        np.testing.assert_allclose(more, one, rtol=1e-9)
