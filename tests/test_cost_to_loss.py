"""Cost to a loss on a tiny problem: it runs, resumes, tunes and interpolates; and its figure."""

import itertools
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import pytest

from experiments import cost_to_loss, records, runs
from experiments.cost_to_loss import Arguments, Job, Row, Setting, Watch
from experiments.data import load
from experiments.problems import PROBLEMS
from paper_figures import cost_to_loss as figure
from paper_figures import curves, style
from subsetopt import Progress


def test_race_runs_to_a_record_a_table_and_a_figure_and_is_not_run_twice(smoke):
    run, folder = smoke(cost_to_loss)
    methods = len(cost_to_loss.METHODS)
    assert "Adam's loss" in run("--only", "problem=digits")
    assert {path.suffix for path in (folder / "out").glob("cost_to_loss*")} == {".pdf", ".png"}
    check_record(records.read(folder / "results/cost_to_loss/digits-smoke.json"))
    assert run("--only", "problem=digits").count("has a result already") == methods
    listed = run("--list")
    assert listed.count("done") == methods
    assert listed.count("to do") == methods * (len(cost_to_loss.SETTINGS) - 1)


def check_record(record: dict[str, Any]) -> None:
    """Both seeds of every method, every cost rising along a fit, and a price for each way to train."""
    assert record["curves"].keys() == set(cost_to_loss.METHODS)
    assert all(set(curve["seed"]) == {0, 1} for curve in record["curves"].values())
    newton = record["curves"]["gauss_newton"]
    for cost in cost_to_loss.COSTS:  # in the seconds, the slices timed after the fourth step must not show
        assert 0 < newton[cost][0] < newton[cost][3] <= newton[cost][4]
    adam, final = record["curves"]["adam"], record["final"]
    seconds = final["seconds_per_epoch"]["adam-128"]
    assert adam["seconds"] == pytest.approx([epochs * seconds for epochs in adam["budget_epochs"]])
    assert final["seconds_per_epoch"].keys() == {"adam-128", "adam-512", "sgd-128", "sgd-512"}
    assert final["targets"].keys() == {"1", "2"}
    assert final["targets"]["1"]["adam"]["sample_grads"] == 300


def test_seconds_of_a_fit_are_those_at_the_speed_of_the_median_fit():
    beside = {"adam-128": 6.0, "sgd-128": 3.0}  # a machine at half of the median's speed
    parts: dict[str, Any] = {method: [] for method in cost_to_loss.METHODS}
    parts["gauss_newton"] = [{"seconds_per_epoch": beside, "rows": [{"seconds": 10.0}]}]
    parts["lbfgs"] = [{"seconds_per_epoch": {"adam-128": 1.5, "sgd-128": 0.75}, "rows": [{"seconds": 10.0}]}]
    rows = cost_to_loss.Pricing(PROBLEMS["digits"], {"adam-128": 3.0, "sgd-128": 1.5}).rows(parts)
    assert rows["gauss_newton"] == [{"seconds": 5.0, "own_seconds": 10.0}]
    assert rows["lbfgs"] == [{"seconds": 20.0, "own_seconds": 10.0}]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the experiment can tell."""
    monkeypatch.setattr(records.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cost_to_loss, "ON_CPU", False)
    monkeypatch.setattr(cost_to_loss, "METHODS", ("gauss_newton", "adam", "sgd"))


@pytest.fixture
def counted_as_users_do(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operations are those of a program by the code generator that users have, and the records are of."""
    options: Any = {"xla_cpu_use_fusion_emitters": True}
    compiled = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compiled(lowered, options))
    runs.gradient_flops.cache_clear()  # what other tests have counted
    yield
    runs.gradient_flops.cache_clear()


@pytest.mark.usefixtures("on_gpu", "counted_as_users_do")
def test_a_gpu_prices_the_first_order_runs_of_cpus_at_its_own_seconds(committed: Row, tmp_path: Path):
    job = Job("digits", Arguments(out=tmp_path, results=tmp_path))
    assert job.record_path == tmp_path / "cost_to_loss/digits-gpu.json"
    parts = {method: job.measure(method) for method in ("adam", "sgd")}
    assert not parts["adam"][0].keys() & {*cost_to_loss.COSTS, "own_seconds"}
    newton, cost = committed["curves"]["gauss_newton"], (*cost_to_loss.COSTS, *cost_to_loss.MEASURED)
    rows = [dict(zip(cost, values, strict=True)) for values in zip(*(newton[key] for key in cost), strict=True)]
    rows = [{"seed": seed} | row for seed, row in zip(newton["seed"], rows, strict=True)]
    epoch = dict.fromkeys(("adam-128", "adam-512", "sgd-128", "sgd-512"), 0.01)
    parts["gauss_newton"] = [{"status": "CONVERGED", "seconds_per_epoch": epoch, "rows": rows}]
    record = records.new("cost_to_loss", job.name, job.config(), *job.contents(parts))
    records.write(record, tmp_path)
    mine, theirs = (found["final"]["targets"]["100"] for found in (record, committed))
    assert mine.keys() == {"adam", "sgd", "gauss_newton"}
    assert mine["adam"]["loss"] == theirs["adam"]["loss"]
    assert mine["adam"]["seconds"] == pytest.approx(1.0)
    assert mine["gauss_newton"]["flops_ratio"] == theirs["gauss_newton"]["flops_ratio"]
    cost_to_loss.print_table(record)
    names = {path.name for path in figure.draw([committed, record], tmp_path) if path.suffix == ".png"}
    assert names == {f"cost_to_loss{end}.png" for end in ("", "-gpu", "-digits", "-digits-gpu")}


def test_only_names_the_parts_there_are(smoke):
    run, _ = smoke(cost_to_loss)
    with pytest.raises(SystemExit, match="problem=NAME"):
        run("--only", "solver=adam")
    with pytest.raises(SystemExit, match="problem one of digits"):
        run("--only", "problem=mnist")


# --- tuning --------------------------------------------------------------------------------------------------------


def run(loss: float | None, **choice: Any) -> Row:
    return {"full_loss": loss, "test_loss": loss, "test_accuracy": 0.5} | choice


def bowl(best: float) -> Any:
    """A run whose loss is lowest at that rate."""
    return lambda rate: run(abs(math.log(rate / best)), rate=rate)


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (1e-2, [5e-3, 1e-2, 2e-2]),
        (2e-2, [5e-3, 1e-2, 2e-2, 5e-2]),
        (2e-3, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]),
        (1.0, [5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2]),
    ],
)
def test_ladder_goes_on_while_the_best_rate_is_at_its_edge(best: float, rates: list[float]):
    rows = cost_to_loss.tried(bowl(best), (5e-3, 1e-2, 2e-2), extensions=3)
    assert [row["rate"] for row in rows] == rates


def test_budget_with_the_same_batch_tunes_the_rate_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def trained(_problem: Any, choice: Row) -> Row:
        return run(abs(math.log(choice["rate"] / 1e-2)) + choice["batch_size"] / 1000, **choice)

    setting = Setting((1, 3, 10), untuned=(10,), same_batch=(3,))
    monkeypatch.setattr(cost_to_loss, "trained", trained)
    monkeypatch.setitem(cost_to_loss.SETTINGS, "digits", setting)
    rows = Job("digits", Arguments(out=tmp_path, results=tmp_path)).measure("adam")
    tried = {epochs: [row for row in rows if row["budget_epochs"] == epochs] for epochs in setting.budgets}
    assert {row["batch_size"] for row in tried[1]} == {128, 512}
    assert {row["batch_size"] for row in tried[3]} == {128}
    assert len({row["rate"] for row in tried[3]}) >= 3
    assert {(row["batch_size"], row["rate"], row["seed"]) for row in tried[10]} == {
        (128, 1e-2, seed) for seed in range(3)
    }


def test_every_ladder_can_be_extended():
    ladders = [cost_to_loss.ladder(method, epochs) for method in ("adam", "sgd") for epochs in (3, 1000)]
    places = [cost_to_loss.RATES.index(rate) for rates in ladders for rate in rates]
    assert min(places) >= 3
    assert max(places) + 3 < len(cost_to_loss.RATES)


def test_ladder_goes_down_from_rates_that_all_diverge():
    rows = cost_to_loss.tried(lambda rate: run(None if rate > 2e-3 else rate, rate=rate), (5e-3, 1e-2), extensions=1)
    assert [row["rate"] for row in rows] == [2e-3, 5e-3, 1e-2]


@pytest.mark.parametrize("rate", [1e4, 1e38])  # a loss that is huge, and one that is not finite
def test_run_that_diverges_has_no_loss(rate: float, tmp_path: Path):
    choice = {"method": "sgd", "budget_epochs": 1, "batch_size": 128, "rate": rate, "seed": 0}
    row = cost_to_loss.trained(PROBLEMS["digits"].tiny(), choice)
    assert row["full_loss"] is None
    assert row["test_accuracy"] is None
    assert row["sample_grads"] == 300
    assert records.kept(records.keep(row, tmp_path / "row.json", {})) == row


def test_inputs_are_standardised_over_the_training_examples():
    problem = PROBLEMS["digits"]
    x, _ = problem.train
    np.testing.assert_allclose([x.mean(dtype=float), x.std(dtype=float)], [0, 1], atol=1e-6)
    pixels, tests = (load("digits", split)[0] for split in ("train", "test"))
    expected = (tests - pixels.mean(dtype=float)) / pixels.std(dtype=float)
    np.testing.assert_allclose(problem.test[0], expected, rtol=1e-5, atol=1e-6)
    assert problem.test[0].dtype == np.float32


class Grid:
    """First-order runs that take no time; the third one is interrupted."""

    def __init__(self):
        self.made: list[Row] = []

    def __call__(self, _: Any, choice: Row) -> Row:
        self.made.append(choice)
        if len(self.made) == 3:
            raise KeyboardInterrupt
        return choice | run(bowl(1e-2)(choice["rate"])["full_loss"] + choice["batch_size"])


def test_interrupted_grid_goes_on_with_its_first_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    grid = Grid()
    monkeypatch.setattr(cost_to_loss, "trained", grid)
    monkeypatch.setitem(cost_to_loss.SETTINGS, "digits", cost_to_loss.SETTINGS["cifar16"])
    job = Job("digits", Arguments(out=tmp_path, results=tmp_path))
    with pytest.raises(KeyboardInterrupt):
        job.run("adam")
    assert not job.done("adam")
    job.run("adam")
    assert job.done("adam")
    assert grid.made[3] == grid.made[2]
    keys = [tuple(choice.values()) for choice in grid.made]
    assert len(set(keys)) == len(keys) - 1  # the one that was interrupted
    assert [choice["seed"] for choice in grid.made if choice["budget_epochs"] == 1000] == [0, 1, 2]
    assert {(c["rate"], c["batch_size"]) for c in grid.made if c["budget_epochs"] == 1000} == {(1e-2, 128)}
    assert {c["batch_size"] for c in grid.made if c["budget_epochs"] == 300} == {128, 512}


def test_ctrl_c_in_a_run_keeps_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PROBLEMS, "digits", PROBLEMS["digits"].tiny())
    first_order, before = cost_to_loss.first_order, signal.signal(signal.SIGINT, signal.default_int_handler)

    def pressed(*arguments: Any) -> Any:
        return first_order(*arguments, callback=lambda _: signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr(cost_to_loss, "first_order", pressed)
    try:
        with pytest.raises(KeyboardInterrupt):
            Job("digits", Arguments(out=tmp_path, results=tmp_path)).run("adam")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.rglob("*.json"))


def test_fine_tuning_is_tuned_for_each_share_and_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def adam(_network: Any, _train: Any, params: Any, rate: float, epochs: int, _seed: int) -> Any:
        """The more there is left to learn, the larger the best rate."""
        examples, _ = params
        return {"full_loss": abs(math.log(rate * examples / epochs)) / examples}

    def fit_subset(_network: Any, _train: Any, callback: Any, **_: Any) -> None:
        for step, examples in enumerate((100, 200, 400, 718), start=1):
            seen = Progress(0, examples, 1.0, step, 1.0, None, 0.1, 100.0 * step, 1.0 * step, params=(examples, step))
            assert callback(seen) == (examples == 718)

    for name, fake in {"adam": adam, "fit_subset": fit_subset, "outcome": lambda _, result: result}.items():
        monkeypatch.setattr(cost_to_loss, name, fake)
    monkeypatch.setattr(cost_to_loss, "Slices", lambda _: FakeSlices())
    tuning, *others = Job("digits", Arguments(out=tmp_path, results=tmp_path)).measure("gauss_newton_finetune")
    chosen = {(row["fit_share"], row["budget_epochs"]): row for row in others[0]["rows"]}
    assert chosen.keys() == set(itertools.product(cost_to_loss.FINETUNE_SHARES, (3, 10)))
    assert {row["seed"] for part in others for row in part["rows"]} == {1, 2}
    assert len(tuning["rows"]) > 4 * len(cost_to_loss.FINETUNE_RATES)  # some had to go beyond an edge
    for (share, epochs), row in chosen.items():
        examples = 200 if share < 0.5 else 718
        assert row["rate"] == min(cost_to_loss.RATES, key=lambda rate: abs(math.log(rate * examples / epochs)))
        assert row["fit_sample_grads"] == (200 if share < 0.5 else 400)


class FakeSlices:
    """Slices that take no time."""

    def add(self) -> None: ...

    def per_epoch(self) -> Row:
        return {"adam-128": 1.0}


# --- fits ----------------------------------------------------------------------------------------------------------


def progress(step: int, seconds: float) -> Progress:
    return Progress(0, 100, 1.0, step, 1.0, None, 0.1, 100.0 * step, seconds, params=None)


class SlowSlices:
    """Slices that take 20 ms of the machine, and 5 ms of them in the compiler."""

    def add(self) -> None:
        time.sleep(0.02)
        cost_to_loss.COMPILING.seconds += 0.005


def test_seconds_of_a_fit_are_its_own():
    watch: Any = Watch(1, math.inf, SlowSlices())  # pyright: ignore[reportArgumentType]
    for step in range(1, 7):
        watch(progress(step, 1.0 * step))
    seconds = [row["seconds"] for row in watch.rows]
    assert seconds[:4] == pytest.approx([1, 2, 3, 4], abs=1e-3)
    assert 0.015 <= 5 - seconds[4] < 0.5


def test_fit_ends_at_its_cost_and_its_end_is_a_snapshot():
    watch = Watch(10, most=1150)
    ended = [watch(progress(step, step)) for step in range(1, 13)]
    assert ended == [False] * 11 + [True]
    assert [row["step"] for row in watch.snapshots()] == [10, 12]


def test_setting_leaves_no_budget_without_a_rate():
    for setting in (*cost_to_loss.SETTINGS.values(), Setting((3, 10)).tiny()):
        assert setting.budgets[0] not in setting.untuned
        assert setting.budgets[0] not in setting.same_batch
        assert {*setting.untuned, *setting.same_batch} <= set(setting.budgets)


# --- the figure ----------------------------------------------------------------------------------------------------


def record(problem: str, ratios: dict[int, list[float | None]], even: float | None = 12.0) -> dict[str, Any]:
    def race(values: list[float | None]) -> Row:
        middle = float(np.median([np.inf if value is None else value for value in values]))
        ratio = {"by_seed": values, "median": middle if math.isfinite(middle) else None}
        return {f"{cost}_ratio": ratio for cost in cost_to_loss.COSTS}

    targets = {str(epochs): {"gauss_newton": race(values)} for epochs, values in ratios.items()}
    final = {"targets": targets, "break_even": {"gauss_newton": dict.fromkeys(cost_to_loss.COSTS, even)}}
    return {"name": problem, "config": {"problem": problem}, "final": final}


def made_up() -> list[dict[str, Any]]:
    digits = record("digits", {3: [0.2, 0.3, 0.25], 10: [0.8, 0.9, 0.7], 30: [3, 2, 2.5], 100: [9, None, 7]})
    return [record("cifar16", {3: [0.5, 0.6, 0.4], 10: [1.5, 1.2, 1.4]}, None), digits]


@pytest.fixture
def committed() -> Row:
    return records.read(records.RESULTS / "cost_to_loss" / "digits.json")


def test_figure_names_its_axes_and_every_problem():
    with matplotlib.rc_context(style.RC):
        drawn = figure.figure(made_up())
    assert [axes.get_title("left") for axes in drawn.axes] == list(figure.COSTS.values())
    assert "epochs" in drawn.axes[1].get_xlabel()
    assert "ratio" in drawn.axes[0].get_ylabel()
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["digits", "cifar16"]


def test_curves_show_every_method_over_every_cost(committed: Row, tmp_path: Path):
    with matplotlib.rc_context(style.RC):
        drawn = curves.figure(committed)
    assert [axes.get_xlabel() for axes in drawn.axes[3:]] == list(curves.COSTS.values())
    assert [axes.get_ylabel() for axes in drawn.axes[::3]] == list(curves.RESULTS.values())
    (legend,) = drawn.legends
    assert len(legend.get_texts()) == len(curves.RUNS) + len(curves.BUDGETS)
    ends = [np.asarray(line.get_ydata())[-1] for line in drawn.axes[0].get_lines() if line.get_label() == "Adam, tuned"]
    assert ends == [committed["final"]["targets"]["1000"]["adam"]["loss"]]
    names = {path.name for path in figure.draw([committed], tmp_path)}
    assert names == {f"cost_to_loss{problem}.{suffix}" for problem in ("", "-digits") for suffix in ("pdf", "png")}


def test_band_ends_where_a_seed_never_has_the_loss():
    *_, last = figure.ratios(made_up()[1], "seconds")
    assert last[:2] == (100, 9)
    assert all(map(math.isnan, last[2:]))


def test_title_tells_from_where_on_ours_takes_fewer_seconds():
    assert "tuned for 12 epochs or more, on 1 of 2 problems" in figure.message(made_up())
    assert "Tuned Adam takes fewer seconds" in figure.message(made_up()[:1])
