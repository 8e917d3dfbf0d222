"""The measurements of scaling on tiny points: they run, resume, and are held against their bars; and their figures."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from experiments import records, scaling
from paper_figures import scaling as figure
from paper_figures import style


def test_memmap_runs_to_a_record_and_a_bar_and_is_not_measured_twice(smoke):
    run, folder = smoke(scaling)
    only = ("--only", "part=memmap")
    assert run("--list", *only).count("to do") == 1
    assert "peak bytes over" in run(*only)
    assert run("--list", *only).count("done") == 1
    assert "has a result already" in run(*only)
    assert run("--list").count("to do") > 0  # of the other parts
    record = records.read(folder / "results/scaling/memmap-smoke.json")
    (bar,) = record["final"]["bars"]
    (peak,) = record["curves"]["lbfgs"]["peak_bytes"]
    assert bar["measured"] == pytest.approx(peak / (2000 * 256 * 4))
    assert not list(scaling.records.RESULTS.parents[1].glob("tmp*"))  # the file it wrote is gone


def test_finished_points_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cut off after its first point, a part goes on with the second one."""
    measured = []

    def once(point: scaling.Point) -> list[scaling.Row]:
        measured.append(point["parameters"])
        if len(measured) == 2:
            raise KeyboardInterrupt
        rates = {"product_rate": 2.0, "gram_rate": 1.0, "cholesky_rate": 1.5}
        return [{"series": "rates", "parameters": point["parameters"], "rows": point["rows"]} | rates]

    monkeypatch.setattr(scaling, "in_own_process", once)
    job = scaling.Job("linalg", scaling.Arguments(out=tmp_path / "out", results=tmp_path / "results"))
    with pytest.raises(KeyboardInterrupt):
        job.record()
    record = job.record()
    assert measured == [3000, 9400, 9400]
    assert [bar["holds"] for bar in record["final"]["bars"]] == [False, True, False, True]


def test_only_names_the_parts_there_are(smoke):
    run, _ = smoke(scaling)
    with pytest.raises(SystemExit, match="part=NAME"):
        run("--only", "part=speed")


def test_file_of_the_teacher_holds_what_it_makes_in_memory(tmp_path: Path):
    labels = scaling.Teacher((3,)).write(20_001, tmp_path / "x.npy")
    x, y = scaling.Teacher((3,)).fill(20_001)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), x)
    np.testing.assert_array_equal(labels, y)
    assert len(np.unique(y)) > 5


def test_residuals_of_conjugate_gradients_do_not_know_the_scale():
    rows = scaling.residuals_of_a_matrix(64, 500)
    assert max(row["residual"] for row in rows) <= 1e-4
    products = [row["products"] for row in rows]
    assert max(products) <= 1.1 * min(products)


def test_peak_memory_is_not_below_the_present_one():
    assert 0 < scaling.memory("VmRSS") <= scaling.memory("VmHWM")


# --- bars ----------------------------------------------------------------------------------------------------------


def example_rows(large: int) -> list[dict[str, Any]]:
    sizes = {1000: 90, 10_000: 100, 100_000: 150, 1_000_000: large}
    rows = [{"examples": n, "peak_bytes": peak, "data_bytes": n // 1000} for n, peak in sizes.items()]
    prices = [{"microseconds_per_example": 2.0 - i / 2} for i in range(4)]
    pairs = itertools.product(("lbfgs", "dense"), zip(rows, prices, strict=True))
    return [{"series": solver} | row | price for solver, (row, price) in pairs]


@pytest.mark.parametrize(("large", "holds"), [(1110, True), (1111, False)])
def test_memory_may_grow_by_the_data_and_a_tenth(large: int, holds: bool):
    assert [bar["holds"] for bar in scaling.example_bars(example_rows(large))] == [holds, holds]


def test_losses_are_compared_with_the_first():
    rows = [{"series": "lbfgs-float32", "loss": loss} for loss in (1.0, 1.0 + 5e-7, 1.0 - 2e-6)]
    (bar,) = scaling.device_bars(rows)
    assert bar["measured"] == pytest.approx(2e-6)
    assert not bar["holds"]


def form_rows(auto: str) -> list[dict[str, Any]]:
    price = {"dense": 1.0, "sample": 2.0, "cg": 4.0}
    sizes = {"small": (1000, 1), "large": (10_000, 100)}
    return [
        {"series": f"{form}-1.1", "model": model, "ratio": 1.1, "form": form, "auto": auto}
        | {"parameters": p, "price_per_step": factor * price[form]}
        for model, (p, factor) in sizes.items()
        for form in price
    ]


@pytest.mark.parametrize(("auto", "dearer"), [("dense", 1.0), ("cg", 4.0)])
def test_choice_is_compared_with_the_cheapest_form(auto: str, dearer: float):
    bars = scaling.parameter_bars(form_rows(auto))
    assert [bar["measured"] for bar in bars] == [dearer, dearer]
    assert [bar["holds"] for bar in bars] == [dearer <= 1.5] * 2


def test_price_of_a_step_is_its_seconds_and_those_of_its_gradients():
    steps = [(1.0, 100.0), (9.0, 300.0), (2.0, 200.0)]
    price = scaling._price(steps, {"seconds_per_gradient": 0.01})
    assert price == {"seconds_per_step": 2.0, "grads_per_step": 200.0, "price_per_step": 4.0}


# --- figures -------------------------------------------------------------------------------------------------------


def record(part: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    curves = {name: scaling.series(rows, name) for name in dict.fromkeys(row["series"] for row in rows)}
    return {"name": part, "config": {"part": part}, "curves": curves, "final": {"bars": scaling.PARTS[part].bars(rows)}}


def test_figures_are_drawn_for_the_parts_that_have_one(tmp_path: Path):
    drawn = [record("examples", example_rows(1100)), record("parameters", form_rows("cg"))]
    paths = figure.draw([*drawn, {"name": "cg", "config": {"part": "cg"}}], tmp_path)
    assert [path.name for path in paths] == [
        f"scaling-{part}.{kind}" for part in ("examples", "parameters") for kind in ("pdf", "png")
    ]


def test_axes_are_named_with_units():
    with matplotlib.rc_context(style.RC):
        memory, time = figure.examples(record("examples", example_rows(1100))).axes
        (seconds,) = figure.parameters(record("parameters", form_rows("cg"))).axes
    assert "megabytes" in memory.get_ylabel()
    assert "microseconds" in time.get_ylabel()
    assert "seconds" in seconds.get_ylabel()
    assert seconds.get_xlabel() == "parameters P"


def test_title_tells_the_worst_choice():
    told = figure.picked_message(record("parameters", form_rows("cg")))
    assert "at most 4 times" in told
