import itertools
import json
import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import demo, style
from paper_figures.__main__ import FIGURES, main

Capture = pytest.CaptureFixture[str]


def falling(costs: list[float], start: float, end: float) -> list[float]:
    """Losses falling geometrically from start to end."""
    last = len(costs) - 1
    return [start * (end / start) ** (i / last) for i in range(len(costs))]


def subset_curve(steps: int, end: float) -> dict[str, list]:
    """A stage every second step; the probe joins the last stage, and the full loss is rare."""
    epochs = [0.5 * (i + 1) for i in range(steps)]
    loss = falling(epochs, 2.0, end)
    stage = [i // 2 for i in range(steps)]
    return {
        "epochs": epochs,
        "flops": [1e9 * cost for cost in epochs],
        "seconds": [0.1 * cost for cost in epochs],
        "examples": [100 * (s + 1) for s in stage],
        "ratio": [1.5 * (s + 1) for s in stage],
        "stage": stage,
        "subset_loss": [0.5 * value for value in loss],
        "probe_loss": [1.2 * loss[i] if stage[i] < stage[-1] else None for i in range(steps)],
        "full_loss": [value if i % 2 else None for i, value in enumerate(loss)],
    }


def finetune_curve(before: dict[str, list], end: float) -> dict[str, list]:
    epochs = [before["epochs"][-1] + i for i in (1, 2, 3)]
    return {
        "epochs": epochs,
        "flops": [1e9 * cost for cost in epochs],
        "seconds": [0.1 * cost for cost in epochs],
        "full_loss": falling(epochs, before["full_loss"][-1], end),
        "test_accuracy": [0.9, 0.95, 0.97],
    }


@pytest.fixture
def record() -> dict:
    newton, lbfgs = subset_curve(20, 0.02), subset_curve(60, 0.1)
    adam = {
        "budget_epochs": [3, 10, 30, 30, 100],
        "rate": [1e-2, 1e-2, 1e-2, 3e-3, 3e-3],
        "full_loss": [0.5, 0.2, 0.07, 0.05, 0.015],
        "test_accuracy": [0.85, 0.9, 0.95, 0.96, 0.97],
        "flops": [3e9, 1e10, 3e10, 3e10, 1e11],
        "seconds": [0.3, 1.0, 3.0, 3.0, 10.0],
    }
    return {
        "schema": 1,
        "experiment": "demo",
        "name": "digits",
        "config": {"dataset": "digits", "examples": 1437, "parameters": 1446, "outputs": 10},
        "curves": {
            "gauss_newton": newton,
            "gauss_newton_finetune": finetune_curve(newton, 0.01),
            "lbfgs": lbfgs,
            "lbfgs_finetune": finetune_curve(lbfgs, 0.05),
            "adam": adam,
        },
        "final": {method: {"test_accuracy": 0.97} for method in ("gauss_newton", "lbfgs", "adam")},
    }


@pytest.fixture
def drawn(record: dict) -> Figure:
    with matplotlib.rc_context(style.RC):
        figure = demo.figure(record)
        figure.draw_without_rendering()
    return figure


def labelled(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_xlabel()]


def test_demo_figure_is_written_as_pdf_and_png(record: dict, tmp_path: Path):
    pdf, png = demo.draw([record], tmp_path / "new" / "folder")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert (pdf.stem, png.stem) == ("demo-digits", "demo-digits")


def test_demo_figure_has_the_width_of_two_columns(record: dict, tmp_path: Path):
    _, png = demo.draw([record], tmp_path)
    (pixels,) = struct.unpack(">I", png.read_bytes()[16:20])
    assert pixels == style.TWO_COLUMNS * style.RC["savefig.dpi"]


def test_same_record_gives_the_same_bytes(record: dict, tmp_path: Path):
    first, second = (demo.draw([record], tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_each_record_gets_its_own_figure(record: dict, tmp_path: Path):
    paths = demo.draw([record, record | {"name": "mnist"}], tmp_path)
    assert sorted({path.stem for path in paths}) == ["demo-digits", "demo-mnist"]


def test_axes_are_logarithmic_and_named_with_units(drawn: Figure):
    panels = labelled(drawn)
    assert [axes.get_title("left") for axes in panels] == ["Gauss-Newton", "L-BFGS"]
    assert all("epochs" in axes.get_xlabel() for axes in panels)
    assert "nats" in panels[0].get_ylabel()
    assert {(axes.get_xscale(), axes.get_yscale()) for axes in panels} == {("log", "log")}


def test_legend_names_every_loss(drawn: Figure):
    (legend,) = drawn.legends
    text = " / ".join(entry.get_text() for entry in legend.get_texts())
    assert all(word in text for word in ("subset", "probe", "whole", "fine-tuning", "Adam"))


def test_nothing_stands_outside_the_figure(drawn: Figure):
    box = drawn.get_tightbbox()
    assert box.x0 >= 0
    assert box.x1 <= drawn.get_figwidth()


def test_arrow_tells_where_the_loss_is_zero_which_has_no_place_on_the_axis(record: dict):
    curve = record["curves"]["gauss_newton"]
    curve["full_loss"][-3:] = [0.0, None, 0.0]
    figure = demo.figure(record)
    texts = [[text.get_text() for text in axes.texts] for axes in labelled(figure)]
    assert "0 from 9.0 epochs on" in texts[0]
    assert not any("0 from" in text for text in texts[1])
    (tuned,) = [line for line in labelled(figure)[0].lines if line.get_label() == demo.FINE_TUNING["label"]]
    assert min(np.asarray(tuned.get_xdata())) > 10  # it does not begin at the last loss above zero


def test_title_tells_who_reaches_adams_loss_and_at_what_cost(record: dict):
    told = "Gauss-Newton reaches Adam's 100-epoch loss (0.015) in 12 epochs; L-BFGS stays above"
    assert demo.message(record["curves"]) == told


def test_title_tells_when_nobody_reaches_adams_loss(record: dict):
    record["curves"]["adam"]["full_loss"][-1] = 1e-4
    told = "Gauss-Newton and L-BFGS stay above Adam's 100-epoch loss (0.0001)"
    assert demo.message(record["curves"]) == told


def test_title_tells_when_both_reach_adams_loss(record: dict):
    record["curves"]["adam"]["full_loss"][-1] = 0.05
    told = "Gauss-Newton reaches Adam's 30-epoch loss (0.05) in 9.0 epochs, L-BFGS in 33"
    assert demo.message(record["curves"]) == told


def test_adam_counts_with_the_best_rate_of_each_budget(record: dict):
    best = [(3, 0.5), (10, 0.2), (30, 0.05), (100, 0.015)]
    assert demo.best_per_budget(record["curves"]) == best


def test_sizes_of_many_stages_do_not_overlap(drawn: Figure):
    for axes in labelled(drawn):
        (top,) = axes.child_axes
        boxes = [label.get_window_extent() for label in top.get_xticklabels()]
        assert 2 <= len(boxes) < 30
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_missing_losses_leave_no_point():
    curve = {"epochs": [0.0, 1.0, 2.0, 3.0], "loss": [2.0, None, 0.5, 0.0]}
    assert demo.points(curve, "loss") == [(2.0, 0.5)]


def test_command_draws_all_figures_and_says_where(record: dict, tmp_path: Path, capsys: Capture):
    folder = tmp_path / "results" / "demo"
    folder.mkdir(parents=True)
    (folder / "digits.json").write_text(json.dumps(record))
    assert main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"demo-digits.pdf", "demo-digits.png"}
    told = capsys.readouterr().out
    assert all(name in told for name in written)


@pytest.mark.parametrize("figure", sorted(FIGURES))
def test_command_says_how_to_make_missing_results(figure: str, tmp_path: Path, capsys: Capture):
    assert main([figure, "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert f"python -m experiments.{figure}" in capsys.readouterr().out


def test_record_of_another_schema_is_not_drawn(record: dict, tmp_path: Path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "digits.json").write_text(json.dumps(record | {"schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        main(["demo", "--results", str(tmp_path), "--out", str(tmp_path / "out")])


def test_drawing_loads_neither_jax_nor_the_package(run_python):
    loaded = run_python("-c", "import sys, paper_figures.__main__; print(*sys.modules)").split()
    assert not {"jax", "flax", "subsetopt", "matplotlib.pyplot"} & set(loaded)
