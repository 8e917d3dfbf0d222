"""fit_subset as a user meets it: stages, ends, models of every kind, masks, interruption."""

import functools
import itertools
import os
import signal
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_breast_cancer, load_digits

from subsetopt import LBFGS, FitResult, GaussNewton, Growth, Progress, Status, drivers, finetune, fit, fit_subset
from subsetopt.checkpoint import Checkpoint
from subsetopt.finetune import warm_up
from subsetopt.timing import compiled_programs

SOLVERS = [GaussNewton(), GaussNewton(linear_solve="cg"), LBFGS()]
QUIET: dict[str, Any] = {"progress": False, "warmup_epochs": 0.5}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(6)(x))
        return nn.Dense(3)(x)


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def product(w, x):
    return x @ w


def linear(params, x):
    return x @ params["w"] + params["b"]


LINEAR = {"w": np.zeros((5, 3), np.float32), "b": np.zeros((1, 3), np.float32)}


@pytest.fixture(scope="module")
def data():
    """300 points of 3 overlapping classes in 5 dimensions."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300).astype(np.int32)
    return (rng.normal(size=(300, 5)) + 1.5 * np.eye(5)[y]).astype(np.float32), y


def leaves(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def assert_same_params(a, b, **tolerance):
    for p, q in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(p, q, **tolerance)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_defaults_grow_to_the_whole_set_and_lower_its_loss(data, solver):
    result = fit_subset(Net(), data, solver=solver, progress=False)
    assert result.stages[-1]["examples"] == 300
    assert result.loss < 0.45
    assert result.status in (Status.CONVERGED, Status.MAX_STEPS, Status.STALLED)
    assert {len(column) for column in result.history.values()} == {result.n_steps}
    assert sum(stage["steps"] for stage in result.stages) == result.n_steps
    assert result.message in str(result)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_same_seed_gives_the_same_bits(data, solver):
    first, second = (fit_subset(Net(), data, solver=solver, max_steps=8, seed=3, **QUIET) for _ in range(2))
    assert_same_params(first.params, second.params, rtol=0)
    assert first.history["loss"] == second.history["loss"]


def test_other_seeds_give_other_subsets(data):
    orders = [fit_subset(Net(), data, max_steps=1, seed=seed, **QUIET).order for seed in (0, 1)]
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize("solver", [GaussNewton(curvature_ratio=None), LBFGS()], ids=repr)
def test_nested_stages_never_raise_their_loss(data, solver):
    result = fit_subset(Net(), data, solver=solver, growth=Growth(3, 2), until="converged", max_steps=80, **QUIET)
    loss, stage = np.array(result.history["loss"]), np.array(result.history["stage"])
    within = stage[1:] == stage[:-1]
    assert (np.diff(loss)[within] <= 1e-6).all()
    assert len(set(stage)) > 1


@pytest.mark.parametrize("driver", ["host", "compiled"])
@pytest.mark.parametrize("form", ["dense", "sample"])
def test_stage_begins_anew_after_one_that_ended_with_a_rejected_step(form, driver):
    """On another subset nothing of the last one is current: neither gradient, nor curvature, nor rejections."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 8)).astype(np.float32)
    y = (x @ rng.normal(size=(8, 3)) + rng.normal(size=(150, 3))).argmax(axis=1).astype(np.int32)

    def fit(growth):
        solver = GaussNewton(curvature_ratio=None, tolerance=0, linear_solve=form)
        options = {"until": "converged", "l2": 1e-2, "max_steps": 300, "driver": driver} | QUIET
        return fit_subset(nn.Dense(3), (x, y), solver=solver, growth=growth, **options)

    result = fit(Growth(2, 2))
    assert [stage["status"] for stage in result.stages] == ["STALLED"] * len(result.stages)  # with tolerance 0
    assert len(result.stages) > 2
    assert result.loss == pytest.approx(fit(Growth(1e9)).loss, rel=1e-6)


def test_fresh_subset_whose_loss_is_not_finite_gives_the_parameters_before():
    """One example of 2,000 is beyond where the loss overflows, and no trial is sure to hold it."""
    x = np.linspace(1, 2, 2000, dtype=np.float32)[:, None]
    x[::100] = 100

    def explode(outputs, y):
        return jnp.exp(jnp.minimum(outputs[:, 0], 1e3) - 3 * y[:, 0]) - outputs[:, 0]

    def fit(max_steps):
        options = {"loss": explode, "growth": Growth(20, stop=20, nested=False), "max_steps": max_steps} | QUIET
        start, solver = np.zeros((1, 1), np.float32), GaussNewton(trial_examples=1)
        return fit_subset(product, (x, np.ones_like(x)), start, solver=solver, **options)

    result = fit(30)
    assert result.status == Status.NONFINITE
    assert not np.isfinite(result.history["loss"][-1])
    assert np.isfinite(result.loss)
    assert np.isfinite(result.params).all()
    # Nor is it the end where the steps end before it has been looked at.
    early = fit(result.n_steps - 1)
    assert early.status == Status.NONFINITE
    assert np.isfinite(early.history["loss"]).all()
    np.testing.assert_array_equal(early.params, result.params)


def test_whole_set_on_which_the_last_fresh_step_is_not_finite_gives_the_parameters_before():
    """Of the fresh subsets of a quarter none holds the one example whose loss overflows, nor does a trial."""
    x = np.linspace(1, 2, 2000, dtype=np.float32)[:, None]
    x[1000] = 1000

    def explode(outputs, y):
        return jnp.exp(jnp.minimum(outputs[:, 0], 1e3) - 3 * y[:, 0]) - outputs[:, 0]

    options: dict[str, Any] = {"loss": explode, "growth": Growth(500, 4, nested=False), "max_steps": 30}
    options |= QUIET | {"warmup_epochs": 0}
    result = fit_subset(product, (x, np.ones_like(x)), np.zeros((1, 1), np.float32), **options)
    assert result.status == Status.NONFINITE
    assert not np.isfinite(result.history["loss"][-1])
    assert result.loss == pytest.approx(np.exp(-3))
    np.testing.assert_array_equal(result.params, 0)


def test_step_to_a_point_without_a_gradient_is_not_taken():
    """The root's slope is infinite at zero, where the loss itself is finite."""
    x = np.linspace(0.5, 1.5, 60, dtype=np.float32)[:, None]

    def apply(w, x):
        return jnp.sqrt(jnp.maximum(x @ w - 0.1, 0))

    options: dict[str, Any] = {"loss": "squared_error", "growth": Growth(1e9), "max_steps": 60, "until": "converged"}
    options |= QUIET | {"warmup_epochs": 0}
    fits = [
        fit_subset(apply, (x, 0.3 * x), np.ones((1, 1), np.float32), solver=solver, **options)
        for solver in (GaussNewton(), GaussNewton(curvature_ratio=None), LBFGS())
    ]
    assert Status.NONFINITE not in {result.status for result in fits}
    assert [result.loss for result in fits] == pytest.approx([fits[-1].loss] * 3, rel=1e-4)


def test_stage_sizes_are_nested_prefixes_of_the_order(data):
    growth = Growth(start=2, factor=2)
    result = fit_subset(Net(), data, solver=LBFGS(), growth=growth, until=1, max_steps=10, **QUIET)
    assert sorted(result.order) == list(range(300))
    assert [s["examples"] for s in result.stages] == growth.sizes(300, 57, 3, probe=30)
    assert [s["ratio"] for s in result.stages] == [s["examples"] * 3 / 57 for s in result.stages]


def test_curvature_rows_follow_the_parameters_or_the_subset_whichever_is_more(data):
    def cost(share: float) -> float:
        solver = GaussNewton(curvature_ratio=0.5, curvature_share=share)
        growth = Growth(8, stop=8, nested=False)
        return fit_subset(Net(), data, solver=solver, growth=growth, max_steps=1, **QUIET).sample_grads

    # Q = 8 of 57 parameters with 3 outputs: 152 examples.
    assert cost(0.1) == cost(0)
    assert cost(0.5) - cost(0) == 76 - 29


@pytest.mark.parametrize(("share", "examples"), [(0.3, 50), (0.6, 25), (0.15, 100)])
def test_a_share_that_rounds_up_in_float32_draws_no_row_too_many(data, share, examples):
    x, y = data
    solver, growth = GaussNewton(curvature_ratio=0.1, curvature_share=share), Growth(1e9)
    result = fit_subset(
        linear, (x[:examples], y[:examples]), LINEAR, solver=solver, growth=growth, max_steps=2, progress=False
    )
    assert result.n_steps == 2
    assert result.loss < np.log(3)


def test_rejected_step_is_tried_again_on_its_subset_and_costs_no_gradient(data):
    """With hardly any damping, first steps go too far."""
    seen: list[Progress] = []
    solver = GaussNewton(damping=1e-6, momenta=(0.0,), length_factor=1.0)
    growth = Growth(4, 1.5, nested=False)
    fit_subset(Net(), data, solver=solver, growth=growth, max_steps=12, callback=seen.append, **QUIET)
    weights = [np.concatenate([leaf.ravel() for leaf in leaves(progress.params)]) for progress in seen]
    rejected = [np.array_equal(old, new) for old, new in itertools.pairwise(weights)]
    assert 0 < sum(rejected[:-1]) < len(rejected)
    for again, (last, new) in zip(rejected, itertools.pairwise(seen[1:]), strict=False):
        if again and last.examples < 300:
            assert new.examples == last.examples
            assert new.sample_grads - last.sample_grads < last.examples


@pytest.mark.parametrize("driver", ["host", "compiled"])
def test_averaged_gradients_take_noise_out_of_fresh_subsets(driver):
    """With undamped steps on a linear model, averaging by a leaves (1 - a) / (1 + a) of the variance: 0.54 at 0.3."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 20)).astype(np.float32)
    y = x @ rng.standard_normal((20, 1)).astype(np.float32) + rng.standard_normal((1000, 1)).astype(np.float32)
    w, residuals, *_ = np.linalg.lstsq(x, y)
    growth = Growth(5, stop=5, nested=False)
    options: dict[str, Any] = {"growth": growth, "until": 24, "max_steps": 24, "warmup_epochs": 0, "progress": False}
    options |= {"loss": lambda f, y: optax.l2_loss(f, y).sum(axis=1), "driver": driver}

    def excess(averaging: float) -> float:
        """Of the sum of squares over its minimum, the mean of the last steps."""
        losses: list[float] = []
        solver = GaussNewton(5.0, gradient_averaging=averaging, momenta=(0.0,), damping=1e-3, length_factor=1)
        for seed in range(3):
            start, steps = np.zeros_like(w), []
            fit_subset(product, (x, y), start, solver=solver, seed=seed, callback=steps.append, **options)
            losses += [np.sum((x @ progress.params - y) ** 2) - residuals[0] for progress in steps[8:]]
        return float(np.mean(losses))

    assert 0.4 < excess(0.3) / excess(0.0) < 0.7


def newton(driver: str, start: float, mistaken: int, steps: int, length_factor: float = 1.5) -> FitResult:
    """Classical steps on 30 points on a line, the first `mistaken` of them in the wrong one of two classes."""
    x = np.linspace(-2, 2, 30, dtype=np.float32)[:, None]
    y, w = ((x[:, 0] > 0) ^ (np.arange(30) < mistaken)).astype(np.int32), np.array([[-start, start]], np.float32)
    solver = GaussNewton(curvature_ratio=None, momenta=(0.0,), damping=1e-3, length_factor=length_factor)
    options: dict[str, Any] = {"growth": Growth(1e9), "driver": driver, "warmup_epochs": 0, "progress": False}
    return fit_subset(product, (x, y), w, solver=solver, max_steps=steps, **options)


@pytest.mark.parametrize("driver", ["host", "compiled"])
def test_steps_that_end_short_of_the_minimum_are_lengthened(driver):
    """On separable data the loss falls for ever: a Newton step adds one to every margin, whatever the distance."""
    short, long = newton(driver, 0, 0, 6, 1.0), newton(driver, 0, 0, 6)
    assert long.loss < 0.1 * short.loss
    # What it costs: a loss alone is a third of a gradient, on the whole subset here, four times a step at most.
    assert short.sample_grads < long.sample_grads <= short.sample_grads + 6 * 4 * 30 / 3


@pytest.mark.parametrize("driver", ["host", "compiled"])
def test_steps_that_go_too_far_are_shortened(driver):
    """Far out softmax has hardly any curvature."""
    full, shorter = newton(driver, -2, 4, 1, 1.0), newton(driver, -2, 4, 1)
    np.testing.assert_array_equal(full.params, np.array([[2, -2]], np.float32))
    assert shorter.loss < full.loss


def test_fresh_subsets_that_grow_by_schedule_have_no_probe(data):
    fresh = fit_subset(Net(), data, growth=Growth(4, 1.5, nested=False), max_steps=3, **QUIET)
    assert fresh.history["probe_loss"] == [None] * 3
    asked = fit_subset(Net(), data, growth=Growth(4, nested=False), until="representative", max_steps=3, **QUIET)
    assert None not in asked.history["probe_loss"]


def test_until_a_number_is_that_many_steps_a_stage(data):
    result = fit_subset(Net(), data, growth=Growth(3, 2), until=2, max_steps=9, **QUIET)
    assert [s["steps"] for s in result.stages[:-1]] == [2] * (len(result.stages) - 1)


def test_rejected_step_does_not_make_a_subset_representative():
    """The probe's loss is the same after it, for the point is."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 5)).astype(np.float32)
    y = (np.sin(2 * x @ rng.normal(size=(5, 1))) + 0.1 * rng.normal(size=(4000, 1))).astype(np.float32)

    def mlp(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    options: dict[str, Any] = {"loss": "squared_error", "growth": Growth(50, stop=50), "until": "representative"}
    rejected = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        start = {"a": rng.normal(size=(5, 6)).astype(np.float32), "b": rng.normal(size=(6, 1)).astype(np.float32)}
        result = fit_subset(mlp, (x, y), start, seed=seed, warmup_epochs=0, progress=False, **options)
        same = [last == new for last, new in itertools.pairwise(result.history["loss"])]
        rejected += sum(same)
        assert result.status == Status.REPRESENTATIVE
        assert not same[-1]
    assert rejected


def test_raw_inputs_of_all_sizes_are_learned():
    """Damping may have to rise by many orders of magnitude before a step is taken."""
    x, y = load_breast_cancer(return_X_y=True)
    start = {"w": np.random.default_rng(0).normal(size=(30, 2)) / 30**0.5, "b": np.zeros(2)}
    start = {name: values.astype(np.float32) for name, values in start.items()}

    def affine(params, x):
        return x @ params["w"] + params["b"][None]

    result = fit_subset(affine, (x.astype(np.float32), y.astype(np.int32)), start, seed=2, progress=False)
    assert result.loss < 0.06


def test_fit_of_a_start_without_a_gradient_converges():
    x, y = np.ones((300, 2), np.float32), np.zeros((300, 1), np.float32)
    start = {"w": np.zeros((2, 1), np.float32)}
    result = fit_subset(lambda p, x: x @ p["w"], (x, y), start, loss="squared_error", warmup_epochs=0, progress=False)
    assert result.status == Status.CONVERGED


def test_representative_stage_ends_with_its_best_probe_loss(data):
    result = fit_subset(Net(), data, growth=Growth(2, stop=2), until="representative", max_steps=100, progress=False)
    assert result.status == Status.REPRESENTATIVE
    probes = [p for p in result.history["probe_loss"] if p is not None]
    assert probes[-1] > 0.995 * probes[-2]
    probe = result.order[-30:]
    logits: Any = Net().apply({"params": result.params}, data[0][probe])
    losses = -jax.nn.log_softmax(logits)[np.arange(30), data[1][probe]]
    assert float(jnp.mean(losses)) == pytest.approx(min(probes), rel=1e-5)
    (stage,), best = result.stages, result.history["probe_loss"].index(min(probes))
    assert (stage["loss"], stage["probe_loss"]) == (result.history["loss"][best], min(probes))
    assert best < result.n_steps - 1


def test_converged_stage_has_no_gradient_left(data):
    result = fit_subset(
        linear, data, LINEAR, solver=LBFGS(), growth=Growth(4, stop=4), until="converged", l2=1e-2, **QUIET
    )
    assert result.status == Status.CONVERGED
    assert result.grad_norm < 1e-4
    assert len(result.stages) == 1


def test_target_loss_is_that_of_the_last_stage(data):
    result = fit_subset(Net(), data, target_loss=0.6, growth=Growth(3, 3), **QUIET)
    assert result.status == Status.TARGET_REACHED
    assert result.loss <= 0.6
    assert result.stages[-1]["examples"] == 300
    assert all(s["status"] != "TARGET_REACHED" for s in result.stages[:-1])


def test_small_set_is_one_stage(data):
    result = fit_subset(Net(), (data[0][:40], data[1][:40]), growth=Growth(start=4), max_steps=3, **QUIET)
    assert [s["examples"] for s in result.stages] == [40]


def test_ratio_below_one_is_said_in_words(data):
    result = fit_subset(Net(), (data[0][:10], data[1][:10]), max_steps=2, **QUIET)
    assert result.stages[-1]["ratio"] < 1
    assert "below 1" in result.message


@pytest.mark.parametrize("seed", range(3))
def test_first_epoch_of_adam_suits_a_network_of_many_parameters(seed):
    x, y = load_digits(return_X_y=True)
    examples = (x / 16).astype(np.float32), y.astype(np.int32)
    whole: dict[str, Any] = {"solver": LBFGS(), "growth": Growth(1e9), "max_steps": 1}
    result = fit_subset(Deep(), examples, seed=seed, progress=False, **whole)
    assert result.loss < 0.4  # at a rate of 2e-2, which is right for a thousand parameters, 0.60, 1.01 and 0.83


def test_both_drivers_start_from_the_same_warm_up(monkeypatch, data):
    """All examples but the probe's, one and a half times, in batches of which the last is smaller."""
    started = {}

    def watched(problem, *arguments):
        started[problem.driver.name] = warm_up(problem, *arguments)
        return started[problem.driver.name]

    monkeypatch.setattr(fit, "warm_up", watched)
    for driver in ("host", "compiled"):
        fit_subset(Net(), data, solver=LBFGS(), driver=driver, warmup_epochs=1.5, max_steps=1, progress=False)
    (w, cost, slopes, _), (compiled_w, compiled_cost, compiled_slopes, _) = started["host"], started["compiled"]
    np.testing.assert_allclose(compiled_w, w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(compiled_slopes, slopes, rtol=1e-4, atol=1e-5)
    assert compiled_cost == cost == 270 + 5 * 32
    assert np.isnan(slopes).sum() == 30


def test_max_steps_ends_the_fit_wherever_it_is(data):
    result = fit_subset(Net(), data, growth=Growth(2, 1.5), max_steps=2, **QUIET)
    assert (result.status, result.n_steps) == (Status.MAX_STEPS, 2)
    assert np.isfinite(result.loss)


# --- models --------------------------------------------------------------------------------------------------------


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.outer = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.dropout(jnp.tanh(self.inner(x))))


def test_nnx_module_fits_and_takes_its_params_back(data):
    model = NnxNet(nnx.Rngs(0))
    before = leaves(nnx.state(model, nnx.Param))
    result = fit_subset(model, data, max_steps=30, progress=False)
    assert_same_params(before, nnx.state(model, nnx.Param), rtol=0)  # the user's module is left alone
    nnx.update(model, result.params)
    model.eval()
    losses = -jax.nn.log_softmax(model(data[0]))[np.arange(300), data[1]]
    assert float(jnp.mean(losses)) == pytest.approx(result.loss, rel=1e-4)


class Counting(nnx.Module):
    """Writes to its state when it is called."""

    def __init__(self, rngs):
        self.dense, self.calls = nnx.Linear(5, 3, rngs=rngs), nnx.Variable(jnp.array(0, jnp.int32))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.dense(x)


def test_nnx_module_may_write_to_its_state(data):
    model = Counting(nnx.Rngs(0))
    assert fit_subset(model, data, max_steps=3, **QUIET).loss < 1
    assert finetune(model, data, epochs=1, progress=False).loss < 2
    assert model.calls[...] == 0


class Centred(nn.Module):
    mean: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x - self.mean[None])


def test_module_that_holds_an_array_is_built_as_often_as_wanted(data):
    first, second = (fit_subset(Centred(data[0].mean(axis=0)), data, max_steps=3, **QUIET) for _ in range(2))
    assert first.loss == second.loss < 1


def test_modules_that_hold_arrays_of_different_shapes_serve_one_after_the_other(data):
    x, y = data
    for examples in (x, x[:, :3].copy()):
        assert fit_subset(Centred(examples.mean(axis=0)), (examples, y), max_steps=3, **QUIET).loss < 1.1


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_seed_that_is_taken_serves(data, solver):
    result = fit_subset(Net(), data, solver=solver, seed=2**32 - 1, driver="compiled", max_steps=2, **QUIET)
    assert result.n_steps == 2


def test_examples_without_a_second_derivative_are_none_for_the_curvature():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    y = (x @ rng.normal(size=(4, 1)) + 0.3 * rng.normal(size=(300, 1))).astype(np.float32)
    y[:20] = 0  # where |f - y|^1.5 has a gradient and no curvature at the start

    def loss(f, y):
        return jnp.sum(jnp.abs(f - y) ** 1.5, axis=1)

    options = QUIET | {"growth": Growth(1e9), "until": "converged", "warmup_epochs": 0, "loss": loss, "max_steps": 100}
    data, start = (x, y), np.zeros((4, 1), np.float32)
    solvers = GaussNewton(), GaussNewton(curvature_ratio=None), LBFGS()
    fits = [fit_subset(lambda w, x: x @ w, data, start, solver=solver, **options) for solver in solvers]
    np.testing.assert_allclose([fit.loss for fit in fits], fits[-1].loss, rtol=1e-3)


def test_cost_is_that_of_all_examples_looked_at_but_for_a_few(monkeypatch, data):
    looked = [0.0]
    price = {"_gradient_block": 1, "_gram_block": 1, "_rows_block": 1, "_loss_block": 1 / 3, "_product_block": 5 / 3}
    reduce = drivers.Host.reduce

    def counted(driver, kernel, static, sums, shared, data, sample, *rest):
        looked[0] += price[kernel.__name__] * int(sample.count)
        return reduce(driver, kernel, static, sums, shared, data, sample, *rest)

    monkeypatch.setattr(drivers.Host, "reduce", counted)
    options: Any = QUIET | {"warmup_epochs": 0}
    result = fit_subset(Net(), data, driver="host", max_steps=12, **options)
    assert 0 < looked[0] - result.sample_grads < 32


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_plain_function_and_squared_error_fit(data, solver):
    targets = (data[0] @ np.arange(5, dtype=np.float32))[:, None] + 1
    params = {"w": np.zeros((5, 1), np.float32), "b": np.zeros((1, 1), np.float32)}
    result = fit_subset(linear, (data[0], targets), params, loss="squared_error", solver=solver, **QUIET)
    np.testing.assert_allclose(result.params["w"][:, 0], np.arange(5), atol=2e-2)


def test_custom_loss_equals_the_named_one(data):
    def cross_entropy(outputs, y):
        return jax.nn.logsumexp(outputs, axis=-1) - jnp.take_along_axis(outputs, y[:, None], axis=-1)[:, 0]

    solver = GaussNewton(curvature_ratio=None)
    named, custom = (
        fit_subset(linear, data, LINEAR, solver=solver, loss=loss, growth=Growth(3, 2), max_steps=6, l2=1e-2, **QUIET)
        for loss in ("softmax_cross_entropy", cross_entropy)
    )
    np.testing.assert_allclose(named.history["loss"], custom.history["loss"], rtol=2e-4)


def test_labels_may_be_probabilities(data):
    one_hot = np.eye(3, dtype=np.float32)[data[1]]
    a, b = (fit_subset(Net(), (data[0], y), growth=Growth(99), max_steps=3, **QUIET) for y in (data[1], one_hot))
    assert a.stages[-1]["examples"] == b.stages[-1]["examples"] == 300
    assert b.loss < 1.2


def test_memory_mapped_data_fits(tmp_path, data):
    np.save(tmp_path / "x.npy", data[0])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    a, b = (fit_subset(Net(), (x, data[1]), max_steps=4, **QUIET) for x in (data[0], mapped))
    assert_same_params(a.params, b.params, rtol=0)


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_frozen_and_pruned_entries_do_not_move_and_do_not_count(data, solver):
    params = Net().init(jax.random.key(1), data[0][:1])["params"]
    pruned = np.zeros((6, 3), bool)
    pruned[::2] = True
    trainable = {"Dense_0": {"kernel": False, "bias": False}, "Dense_1": {"kernel": pruned, "bias": True}}
    result = fit_subset(Net(), data, params, trainable=trainable, solver=solver, max_steps=6, **QUIET)
    assert result.stages[-1]["ratio"] == result.stages[-1]["examples"] * 3 / (9 + 3)
    assert_same_params(result.params["Dense_0"], params["Dense_0"], rtol=0)
    moved = np.asarray(result.params["Dense_1"]["kernel"] != params["Dense_1"]["kernel"])
    assert not moved[~pruned].any()
    assert moved[pruned].all()


# --- interruption --------------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_can_stop(data):
    seen = []
    result = fit_subset(Net(), data, callback=lambda p: seen.append(p) or len(seen) == 4, **QUIET)
    assert (result.status, result.n_steps) == (Status.STOPPED, 4)
    assert [p.step for p in seen] == [1, 2, 3, 4]
    assert [p.loss for p in seen] == result.history["loss"]
    assert jax.tree.structure(seen[-1].params) == jax.tree.structure(result.params)


@pytest.mark.parametrize("at", [1, 5])
def test_keyboard_interrupt_returns_the_parameters_so_far(data, at):
    def interrupt(progress):
        if progress.step == at:
            raise KeyboardInterrupt

    result = fit_subset(Net(), data, callback=interrupt, **QUIET)
    assert result.status == Status.STOPPED
    assert result.n_steps == at
    assert np.isfinite(result.loss)


def assert_same_run(whole, resumed):
    """The same bits, and nothing counted twice."""
    assert_same_params(whole.params, resumed.params, rtol=0)
    assert_same_stages(whole, resumed)
    for name in whole.history.keys() - {"seconds", "sample_grads"}:
        assert whole.history[name] == resumed.history[name]
    assert whole.history["sample_grads"] == pytest.approx(resumed.history["sample_grads"])
    assert (whole.status, whole.n_evals) == (resumed.status, resumed.n_evals)
    assert whole.sample_grads == pytest.approx(resumed.sample_grads)


def assert_same_stages(whole, resumed):
    for stage, again in zip(whole.stages, resumed.stages, strict=True):
        assert {k: v for k, v in stage.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in again.items() if k != "seconds"}
        )


def stop(progress, at):
    return progress.step >= at


def press_ctrl_c(progress, at):
    if progress.step >= at:
        raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [stop, press_ctrl_c])
@pytest.mark.parametrize("at", [5, 6])  # in a stage, and at its end
@pytest.mark.parametrize(
    ("solver", "driver"), [*((solver, "host") for solver in SOLVERS), (LBFGS(), "compiled")], ids=repr
)
def test_resumed_fit_equals_an_uninterrupted_one(tmp_path, data, solver, driver, at, interrupt):
    options = {"solver": solver, "growth": Growth(3, 2), "until": 3, "max_steps": 12, "driver": driver} | QUIET
    whole = fit_subset(Net(), data, **options)
    first = fit_subset(Net(), data, callback=functools.partial(interrupt, at=at), checkpoint=tmp_path, **options)
    assert first.status == Status.STOPPED
    assert first.n_steps < 12
    assert_same_run(whole, fit_subset(Net(), data, checkpoint=tmp_path, **options))


def test_ctrl_c_while_the_last_loss_is_measured_loses_that_alone(data, monkeypatch):
    options: dict[str, Any] = {"growth": Growth(5, stop=5, nested=False), "max_steps": 3} | QUIET
    whole = fit_subset(Net(), data, **options)

    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "evaluated", pressed)
    result = fit_subset(Net(), data, **options)
    assert result.status == Status.STOPPED
    assert np.isnan([result.loss, result.grad_norm]).all()
    assert_same_params(whole.params, result.params, rtol=0)


@pytest.mark.parametrize("interrupt", [stop, press_ctrl_c])
def test_fit_stopped_at_a_look_at_the_probe_is_resumed_with_its_best_parameters(tmp_path, data, interrupt):
    options = {"solver": LBFGS(), "growth": Growth(2, 2), "max_steps": 60} | QUIET
    whole = fit_subset(Net(), data, **options)
    for at in (10, 20, 30):
        fit_subset(Net(), data, callback=functools.partial(interrupt, at=at), checkpoint=tmp_path, **options)
    assert_same_run(whole, fit_subset(Net(), data, checkpoint=tmp_path, **options))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_fit_stopped_on_a_fresh_subset_is_resumed_on_it(tmp_path, data, at):
    """Also after a rejected step, here each one from the second on: the loss known is that of the subset before."""
    solver = GaussNewton(damping=1e-6, momenta=(0.0,), length_factor=1.0)
    options = {"solver": solver, "growth": Growth(2, 1.5, nested=False), "max_steps": 12} | QUIET
    whole = fit_subset(Net(), data, **options)
    assert whole.history["loss"][1] == whole.history["loss"][2]
    fit_subset(Net(), data, callback=functools.partial(stop, at=at), checkpoint=tmp_path, **options)
    assert_same_run(whole, fit_subset(Net(), data, checkpoint=tmp_path, **options))


@pytest.mark.parametrize("inside", ["advance", "evaluated", "warm_up"])
def test_ctrl_c_in_the_midst_of_a_step_drops_the_whole_step(tmp_path, monkeypatch, data, inside):
    options = {"solver": LBFGS(), "growth": Growth(3, 2), "until": 3, "max_steps": 9, "driver": "host"} | QUIET
    whole, calls = fit_subset(Net(), data, **options), itertools.count(1)
    real = getattr(fit, inside)

    def interrupted(*arguments):
        after = real(*arguments)
        if inside != "advance" or next(calls) == 4:
            raise KeyboardInterrupt
        return after

    with monkeypatch.context() as patch:
        patch.setattr(fit, inside, interrupted)
        stopped = (
            (lambda p: p.step == 3) if inside == "evaluated" else None
        )  # the second time, while a result is made up
        first = fit_subset(Net(), data, checkpoint=tmp_path, callback=stopped, **options)
    assert (first.status, first.n_steps) == (Status.STOPPED, 0 if inside == "warm_up" else 3)
    assert np.isnan(first.loss) == (inside == "evaluated")
    assert_same_run(whole, fit_subset(Net(), data, checkpoint=tmp_path, **options))


@pytest.fixture
def ctrl_c_is_heard():
    """A shell's job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_checkpoint_is_written_waits_for_it(tmp_path, monkeypatch, data, ctrl_c_is_heard):
    options = {"growth": Growth(3, 2, nested=False), "max_steps": 6} | QUIET
    whole, real = fit_subset(Net(), data, **options), Checkpoint._save

    def save(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_save", save)
        first = fit_subset(Net(), data, checkpoint=tmp_path, **options)
    assert (first.status, first.n_steps) == (Status.STOPPED, 0)
    assert_same_run(whole, fit_subset(Net(), data, checkpoint=tmp_path, **options))


def test_fit_whose_callback_fails_is_resumed(tmp_path, data):
    def fail(progress):
        if progress.step == 4:
            raise OSError("no space left")

    options = {"solver": LBFGS(), "driver": "host", "max_steps": 9} | QUIET
    whole = fit_subset(Net(), data, **options)
    with pytest.raises(OSError, match="no space left"):
        fit_subset(Net(), data, checkpoint=tmp_path, callback=fail, **options)
    seen: list[Progress] = []
    assert_same_run(whole, fit_subset(Net(), data, checkpoint=tmp_path, callback=seen.append, **options))
    assert seen[0].step == 5


@pytest.mark.parametrize("solver", [GaussNewton(), LBFGS()], ids=repr)
def test_fit_with_more_steps_goes_on_as_if_it_had_had_them(tmp_path, data, solver):
    options = {"solver": solver, "growth": Growth(3, 2), "until": "representative", **QUIET}
    whole = fit_subset(Net(), data, max_steps=25, **options)
    for steps in (7, 13):
        assert fit_subset(Net(), data, max_steps=steps, checkpoint=tmp_path, **options).n_steps == steps
    assert_same_run(whole, fit_subset(Net(), data, max_steps=25, checkpoint=tmp_path, **options))


def test_fit_with_a_lower_target_goes_on_as_if_it_had_had_it(tmp_path, data):
    options = {"growth": Growth(1e9), "max_steps": 30, "solver": LBFGS(), **QUIET}
    whole = fit_subset(Net(), data, target_loss=0.45, **options)
    first = fit_subset(Net(), data, target_loss=0.6, checkpoint=tmp_path, **options)
    assert first.status == whole.status == Status.TARGET_REACHED
    assert first.n_steps < whole.n_steps
    assert_same_run(whole, fit_subset(Net(), data, target_loss=0.45, checkpoint=tmp_path, **options))


def test_folder_of_something_else_is_refused(tmp_path, data):
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "table.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"checkpoint must be a folder that a call like this one has saved to.* 2024 "):
        fit_subset(Net(), data, max_steps=2, checkpoint=tmp_path, **QUIET)
    assert (tmp_path / "2024" / "table.csv").exists()


def test_a_last_step_that_cannot_be_saved_is_told(tmp_path, monkeypatch, data):
    def fail(progress):
        monkeypatch.setattr(Checkpoint, "_save", lambda *_: 1 / 0)
        raise KeyError("mine")

    with pytest.warns(UserWarning, match="last complete step is not saved"), pytest.raises(KeyError, match="mine"):
        fit_subset(Net(), data, max_steps=4, checkpoint=tmp_path, callback=fail, **QUIET)


def test_finished_fit_is_read_back_from_its_checkpoint(tmp_path, data):
    options = {"max_steps": 200, "solver": LBFGS(), "checkpoint": tmp_path, "l2": 1e-2, **QUIET}
    first, second, third = (fit_subset(linear, data, LINEAR, **options) for _ in range(3))
    assert first.status == Status.CONVERGED
    assert_same_run(first, second)
    assert_same_run(first, third)


def scaled(params, x):
    return 2 * linear(params, x)


def tiny(outputs, y):
    return 1e-10 * optax.softmax_cross_entropy_with_integer_labels(outputs, y)


ONE_LESS = [{"w": np.arange(15).reshape(5, 3) != 0, "b": True}, {"w": np.arange(15).reshape(5, 3) != 1, "b": True}]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"seed": 1}, r"seed = 1, found 0"),
        ({}, {"solver": LBFGS(memory=5)}, r"solver = .LBFGS\(memory=5"),
        ({}, {"data": slice(None, None, -1)}, "data"),
        ({}, {"loss": lambda f, y: optax.sigmoid_focal_loss(f, jax.nn.one_hot(y, 3)).sum(axis=1)}, "losses near"),
        ({}, {"model": scaled}, "losses near"),
        ({"loss": tiny}, {"loss": lambda f, y: 2 * tiny(f, y)}, "losses near"),
        ({"trainable": ONE_LESS[0]}, {"trainable": ONE_LESS[1]}, "trainable"),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, data, first, second, said):
    def run(model=linear, data=slice(None), **changes):
        options: dict[str, Any] = {"solver": LBFGS(), "max_steps": 2, "checkpoint": tmp_path, **QUIET}
        fit_subset(model, (examples[0][data], examples[1][data]), LINEAR, **options | changes)

    examples = data
    run(**first)
    with pytest.raises(ValueError, match=f"checkpoint must hold a run with {said}"):
        run(**second)
    run(**first)


def test_checkpoint_that_is_a_file_is_refused(tmp_path, data):
    (tmp_path / "fit").touch()
    with pytest.raises(ValueError, match="checkpoint must be the path of a folder"):
        fit_subset(Net(), data, checkpoint=tmp_path / "fit", **QUIET)


# --- the warm-up ---------------------------------------------------------------------------------------------------


def test_warm_up_that_diverges_is_dropped_and_the_result_says_so():
    """Poisson regression with one parameter: Adam's rate is two, and exp(2 x) is beyond every number."""
    x = np.linspace(0, 60, 200, dtype=np.float32)[:, None]

    def poisson(outputs, y):
        return (jnp.exp(outputs) - y * outputs)[:, 0]

    start, y = np.zeros((1, 1), np.float32), np.exp(0.03 * x).astype(np.float32)
    result = fit_subset(product, (x, y), start, loss=poisson, progress=False)
    assert result.params[0, 0] == pytest.approx(0.03, rel=0.01)
    assert "warm-up raised the loss" in result.message
    assert "warm-up" not in fit_subset(product, (x, y), start, loss=poisson, warmup_epochs=0, progress=False).message


@pytest.mark.parametrize("examples", [33, 97])
def test_warm_up_is_not_dropped_for_the_noise_of_its_batches(data, examples):
    """The last one may be a single example."""
    part, cold = (data[0][:examples], data[1][:examples]), Net().init(jax.random.key(0), data[0])
    options: dict[str, Any] = {"solver": LBFGS(), "growth": Growth(1e9), "max_steps": 1, "progress": False}
    for seed in range(8):
        result = fit_subset(Net(), part, cold["params"], seed=seed, **options)
        assert "warm-up" not in result.message


def test_warm_up_leaves_a_class_alone_that_never_occurs(data):
    """The squares of its gradients underflow; updates are never more than Adam's rate all the same."""
    params = {"w": np.zeros((5, 4), np.float32), "b": np.array([[0, 0, 0, -42]], np.float32)}
    warm, cold = (fit_subset(linear, data, params, warmup_epochs=e, max_steps=20, progress=False) for e in (1, 0))
    assert warm.loss == pytest.approx(cold.loss, rel=0.05)
    assert np.abs(leaves(warm.params)[1]).max() < 10


def test_warm_up_knows_nothing_of_the_loss_s_scale(data):
    """Down to where the gradients themselves underflow."""

    def at_scale(scale):
        def loss(outputs, y):
            return scale * optax.softmax_cross_entropy_with_integer_labels(outputs, y)

        options: dict[str, Any] = {"solver": LBFGS(), "growth": Growth(1e9), "max_steps": 1, "progress": False}
        return fit_subset(linear, data, LINEAR, loss=loss, **options)

    assert_same_params(at_scale(1.0).params, at_scale(1e-30).params, rtol=1e-3, atol=1e-4)


def test_exploding_loss_is_a_status_with_the_last_finite_parameters():
    x = np.linspace(1, 2, 50, dtype=np.float32)[:, None]

    def explode(params, x):
        return jnp.where(params["w"] > 0.5, jnp.nan, params["w"]) * x

    params = {"w": np.zeros((1, 1), np.float32)}
    result = fit_subset(explode, (x, x), params, loss="squared_error", warmup_epochs=0, progress=False)
    assert np.isfinite(leaves(result.params)[0]).all()
    assert np.isfinite(result.loss)
    assert result.status in (Status.STALLED, Status.NONFINITE, Status.MAX_STEPS)


# --- scales and hard losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [GaussNewton(curvature_ratio=None), *SOLVERS], ids=repr)
@pytest.mark.parametrize(("of_x", "of_y"), [(1, 1e-9), (1e-10, 1), (1e-9, 1e-9), (1e10, 1e10)])
def test_regression_is_solved_at_every_scale_of_its_data(solver, of_x, of_y):
    """The squares of its gradients are beyond the range of float32."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 4))
    y = x @ rng.normal(size=(4, 2)) + 0.1 * rng.normal(size=(200, 2))
    x, y = (of_x * x).astype(np.float32), (of_y * y).astype(np.float32)
    _, residuals, *_ = np.linalg.lstsq(x.astype(float), y.astype(float))
    options: dict[str, Any] = {"loss": "squared_error", "growth": Growth(1e9), "warmup_epochs": 0, "progress": False}
    result = fit_subset(product, (x, y), np.zeros((4, 2), np.float32), solver=solver, **options)
    assert result.loss == pytest.approx(residuals.sum() / 400, rel=1e-5)
    assert result.status in (Status.CONVERGED, Status.STALLED)


@pytest.mark.parametrize("of_x", [1, 100])
def test_loss_without_a_hessian_is_descended(of_x):
    def hinge(outputs, y):
        return jnp.maximum(0, 1 - outputs[:, 0] * y)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    y = np.sign(x @ rng.normal(size=4) + 0.1 * rng.normal(size=200)).astype(np.float32)
    options: dict[str, Any] = {"loss": hinge, "warmup_epochs": 0, "progress": False}
    result = fit_subset(product, (of_x * x, y), np.zeros((4, 1), np.float32), **options)
    assert result.loss < 0.25  # 1 at the start


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_no_nan_comes_up_inside(data, solver):
    with jax.debug_nans(True):
        fit_subset(Net(), data, solver=solver, max_steps=3, **QUIET)


@pytest.mark.parametrize("driver", ["host", "compiled"])
def test_blocks_larger_than_the_data_are_those_of_the_data(data, driver):
    """What is beyond them would be computed, too."""
    options: dict[str, Any] = {"solver": LBFGS(), "driver": driver, "max_steps": 3, **QUIET}
    whole, larger = (fit_subset(Net(), data, block_size=size, **options) for size in (300, 10**8))
    assert_same_params(whole.params, larger.params, rtol=0)


# --- compilation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["host", "compiled"])
@pytest.mark.parametrize("solver", [*SOLVERS, GaussNewton(linear_solve="sample")], ids=repr)
def test_fit_compiles_nothing_for_the_same_shapes_twice(data, solver, driver, caplog):
    """In JAX's own log the programs differ only where their arguments are committed to a device."""
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        fit_subset(Net(), data, solver=solver, driver=driver, max_steps=12, block_size=30, **QUIET)
    told = [record.getMessage() for record in caplog.records]
    programs = {text for text in told if text.startswith("Compiling ")}
    assert len(programs) > 10
    shapes = [text.split("Argument mapping")[0] for text in programs]
    assert sorted(shapes) == sorted(set(shapes))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_growing_subsets_and_equal_models_never_recompile(data, solver):
    def fit(growth):
        # Sequential holds a list, so that it has no hash of its own.
        model = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(3)])
        return fit_subset(model, data, solver=solver, growth=growth, until=1, max_steps=10, **QUIET)

    fit(Growth(3, 3))
    before = compiled_programs()
    result = fit(Growth(2.5, 1.2))
    assert len(result.stages) > 4
    assert compiled_programs() == before


@pytest.mark.parametrize("solver", [GaussNewton(), LBFGS()], ids=repr)
def test_compile_seconds_are_apart(data, solver):
    jax.clear_caches()
    cold = fit_subset(Net(), data, solver=solver, max_steps=2, **QUIET)
    warm = fit_subset(Net(), data, solver=solver, max_steps=2, **QUIET)
    assert cold.compile_seconds > warm.compile_seconds
    assert cold.seconds > 0
