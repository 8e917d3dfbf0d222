"""The race of solvers on tiny problems: it runs, resumes, and counts what it says; and its figure."""

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import peers, records, solver_speed
from experiments.models import FAMILY, MLP
from experiments.peers import Meter, Problem, Setting
from experiments.solver_speed import OWN_LBFGS, SETTINGS
from paper_figures import solver_speed as figure
from paper_figures import style

DIGITS = Setting(FAMILY["digits"].model, "digits", 60)
NETWORKS = {
    "padded convolutions": DIGITS,
    "strided convolutions": Setting(FAMILY["mnist28-11k"].model, "zeros", 4),
    "dense": Setting(MLP((16,)), "digits", 60),
    "regression": SETTINGS["regression"],
}


def test_race_runs_part_by_part_to_a_record_a_table_and_a_figure(smoke):
    run, folder = smoke(solver_speed)
    only = ("--only", "problem=regression")
    parts = run("--list", *only).count("to do")
    run("--only", "problem=regression,solver=scipy")
    assert run("--list", *only).count("to do") == parts - 2  # scipy, and the block size that every run needs
    printed = run(*only)
    assert "scipy: has a result already" in printed
    assert "times faster" in printed
    assert {path.suffix for path in (folder / "out").glob("solver_speed-*")} == {".pdf", ".png"}
    record = records.read(folder / "results/solver_speed/regression-smoke.json")
    check_record(record)
    assert run("--list", *only).count("done") == parts
    assert run("--list").count("to do") > 0  # of the other problems


def test_lbfgs_needs_hardly_more_than_one_evaluation_a_step_where_float32_ends():
    # The median of three seeds: rounding decides each fit, and differs between machines.
    fits = [Problem(SETTINGS["float32"], seed).fit(OWN_LBFGS, 400, max_steps=600) for seed in range(3)]
    assert [result.n_steps for result in fits] == [600] * 3
    assert sorted(result.n_evals for result in fits)[1] <= 1.1 * 600
    _, median, largest = sorted(result.grad_norm / max(result.history["grad_norm"]) for result in fits)
    assert median < 1e-4
    assert largest < 1e-3


def check_record(record: dict[str, Any]) -> None:
    """Every solver lowered the loss and counted what it took; the costs are those of a record."""
    solvers = {"subsetopt", "compiled", "gauss_newton", "optax", "jaxopt", "optimistix", "levenberg_marquardt", "scipy"}
    assert record["curves"].keys() >= solvers
    for name, curve in record["curves"].items():
        assert curve["step"] == list(range(1, len(curve["step"]) + 1))
        assert 0 < curve["evaluations"][0] <= curve["evaluations"][-1]
        assert curve["sample_grads"] == pytest.approx([60 * count for count in curve["evaluations"]])
        assert curve["loss"][-1] <= curve["loss"][0]
        assert record["final"][name]["evaluations_per_step"] >= 1
        assert record["final"][name]["probe_seconds"] > 0
    assert math.isfinite(record["final"]["overhead"]["overhead"])
    assert math.isfinite(record["final"]["overhead"]["compiled"]["overhead"])
    assert record["final"]["best_peer"] in record["curves"]
    for name, (milliseconds,) in record["final"]["rounds"].items():
        assert milliseconds == pytest.approx(record["final"][name]["milliseconds_per_step"])


def test_last_losses_are_those_of_every_lbfgs_from_every_start(smoke):
    run, folder = smoke(solver_speed)
    run("--only", "problem=float32,solver=seeds")
    (path,) = (folder / "out").rglob("seeds.json")
    losses = records.kept(path)
    assert losses.keys() >= {"subsetopt", "compiled", "optax", "jaxopt", "optimistix", "scipy"}
    assert losses["subsetopt"] == pytest.approx(losses["compiled"], rel=1e-3)
    assert losses["scipy"] == pytest.approx(losses["subsetopt"], rel=0.2)
    assert [len(of_one) for of_one in losses.values()] == [1] * len(losses)


def test_only_names_the_parts_there_are(smoke):
    run, _ = smoke(solver_speed)
    with pytest.raises(SystemExit, match="problem=NAME"):
        run("--only", "solver=adam")


@pytest.mark.parametrize("solver", ["optax", "jaxopt", "jaxopt_run"])
def test_peers_count_the_evaluations_that_they_make(solver: str, monkeypatch: pytest.MonkeyPatch):
    """Their own counters, which the race believes, against calls from inside the loss whose result is of use."""
    calls, objective = [], Problem.objective

    def call(_: np.ndarray) -> np.ndarray:
        calls.append(None)
        return np.zeros((), np.float32)

    def counted(self: Problem, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        at = jax.lax.stop_gradient(jax.tree.leaves(params)[0])
        # Pure, so that XLA drops a call as it drops the loss: jaxopt makes one a step for nothing.
        return objective(self, params, x, y) + jax.pure_callback(call, jax.ShapeDtypeStruct((), np.float32), at)

    monkeypatch.setattr(Problem, "objective", counted)
    meter = Meter(20)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        peers.PEERS[solver][0](Problem(SETTINGS["regression"], 0), meter)
    jax.effects_barrier()
    assert meter.rows[-1]["evaluations"] == len(calls)
    assert [row["step"] for row in meter.rows] == list(range(1, 21))


def test_overhead_is_measured_on_more_examples_too():
    setting = dataclasses.replace(SETTINGS["regression"], overhead_steps=6, overhead_examples=(900,))
    found = solver_speed.overheads(Problem(setting, 0), 400, compiled=False)
    assert found.keys() == {"overhead", "seconds_per_evaluation", "bare_seconds", "examples"}
    assert found["examples"].keys() == {"900"}
    assert found["examples"]["900"]["bare_seconds"] > 0


def test_bare_gradient_is_the_gradient():
    problem = Problem(DIGITS, 0)
    value, grad = solver_speed.bare_gradient(problem, 32)(problem.params)
    expected = jax.value_and_grad(problem.objective)(problem.params, *problem.on_device)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    np.testing.assert_allclose(ravel_pytree(grad)[0], ravel_pytree(expected[1])[0], rtol=1e-3, atol=1e-6)


def test_residuals_are_those_of_the_objective():
    problem = Problem(SETTINGS["regression"], 0)
    residuals = problem.residuals(problem.params, *problem.on_device)
    assert float(jnp.vdot(residuals, residuals)) / 2 == pytest.approx(
        float(problem.objective(problem.params, *problem.on_device)), rel=1e-5
    )


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no twin to compare")
@pytest.mark.parametrize("setting", NETWORKS.values(), ids=NETWORKS)
def test_twin_in_torch_starts_at_the_same_loss(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    images = np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype(np.float32), np.arange(4, dtype=np.int32)
    if setting.data == "zeros":
        monkeypatch.setattr(peers, "_data", lambda *_: images)
    problem, meter = Problem(setting, 0), Meter(2)
    peers.torch_lbfgs(problem, meter)  # raises where the starts differ
    assert meter.rows[-1]["loss"] < float(problem.objective(problem.params, *problem.on_device))


def test_scaling_by_a_power_of_two_changes_nothing():
    problem = Problem(SETTINGS["float32"], 0)
    assert solver_speed.scale(problem, 400)["2^-20"] == 0


@pytest.mark.parametrize(("seconds", "going"), [(330, False), (170, True)])
def test_run_ends_early_where_its_first_steps_are_slow_on_the_whole(seconds, going):
    meter = Meter(100)
    meter.add(1, 1, 0.5, seconds=60)  # one slow step, as where a line search tries a second point, does not end it
    assert meter.going
    meter.add(30, 30, 0.4, seconds=seconds)
    assert meter.going == going


def curve(losses: list[float], seconds: float) -> dict[str, list]:
    steps = [i + 1 for i in range(len(losses))]
    return {"step": steps, "evaluations": steps, "seconds": [seconds * step for step in steps], "loss": losses}


def parts(peer: list[float]) -> dict[str, Any]:
    """Ours in steps of 1 s, a peer in steps of 2 s."""
    runs = {"subsetopt": curve([4.0, 2.0, 1.0, 0.5], 1), "optax": curve(peer, 2)}
    return {name: {"curve": run, "ended": "", "probe_seconds": 0.1} for name, run in runs.items()}


def test_race_is_to_the_peers_own_lowest_loss():
    final = solver_speed.summary(parts([4.0, 1.0, 1.0]), steps=3)
    optax = final["optax"]
    assert final["subsetopt"]["loss"] == 1.0  # of as many steps as the peer had
    assert (optax["seconds_to_target"], optax["our_seconds_to_target"], optax["speedup"]) == (4.0, 3.0, 4 / 3)
    assert final["best_peer"] == "optax"


def test_loss_that_ours_never_has_is_none():
    optax = solver_speed.summary(parts([1.0, 0.1]), steps=3)["optax"]
    assert optax["speedup"] is None


def test_the_faster_driver_races():
    runs = parts([4.0, 1.0, 1.0])
    runs["compiled"] = runs["subsetopt"] | {"curve": curve([4.0, 2.0, 1.0, 0.5], 0.5)}
    final = solver_speed.summary(runs, steps=3)
    assert (final["fastest"], final["optax"]["our_seconds_to_target"]) == ("compiled", 1.5)


def test_seconds_are_those_of_the_median_round():
    runs = parts([4.0, 1.0, 1.0]) | {"rounds": {"optax": [1e3, 8e3, 5e3]}}  # 2 s a step in the run itself
    steady = solver_speed.steadied(runs, steps=2)
    assert steady["optax"]["curve"]["seconds"] == [5, 10, 15]
    assert steady["subsetopt"] == runs["subsetopt"]
    assert solver_speed.summary(steady, steps=3)["rounds"] == runs["rounds"]


def record(peer: list[float]) -> dict[str, Any]:
    runs = parts(peer)
    config = {"loss": "squared_error", "data": "teacher", "examples": 400, "parameters": 1386}
    curves = {name: run["curve"] for name, run in runs.items()}
    return {"name": "regression", "config": config, "curves": curves, "final": solver_speed.summary(runs, 4)}


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        ([4.0, 1.0], "has optax's last loss 1.3 times sooner"),
        ([1.0], "takes 1.5 times as long as optax"),
        ([0.1], "stays above the last loss of optax"),
    ],
)
def test_title_tells_who_is_first(peer: list[float], told: str):
    assert told in figure.message(record(peer))


def test_figure_names_its_axes_and_every_solver(tmp_path: Path):
    with matplotlib.rc_context(style.RC):
        drawn = figure.figure(record([4.0, 1.0]))
    (axes,) = drawn.axes
    assert "seconds" in axes.get_xlabel()
    assert "squared error" in axes.get_ylabel()
    (legend,) = drawn.legends
    assert {text.get_text().split(":")[0] for text in legend.get_texts()} == {"subsetopt", "optax"}
    assert {path.suffix for path in figure.draw([record([4.0, 1.0])], tmp_path)} == {".pdf", ".png"}
