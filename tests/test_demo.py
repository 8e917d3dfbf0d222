"""The demo end to end, on a few hundred examples; and the progress it shows."""

import io
import sys

import pytest

from experiments import demo, records
from subsetopt import progress


def test_demo_runs_part_by_part_to_a_record_a_table_and_figures(smoke):
    run, folder = smoke(demo)
    assert run("--list").count("to do") == 3
    run("--only", "method=lbfgs")
    assert run("--list").count("to do") == 2
    printed = run()
    assert "lbfgs: has a result already" in printed
    assert all(name in printed for name in ("Gauss-Newton", "L-BFGS", "fine-tuning", "Adam"))
    assert {path.suffix for path in (folder / "out").glob("demo-*")} == {".pdf", ".png"}
    record = records.read(folder / "results/demo/digits-smoke.json")
    assert record["final"].keys() >= {"gauss_newton", "lbfgs", "gauss_newton_finetune", "adam"}
    assert record["config"]["parameters"] == 1446
    assert run("--list").count("done") == 3
    assert run("--list", "--seed", "1").count("to do") == 3


def test_bar_writes_plain_lines_to_a_log(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with progress.Bar("fit", 44, show=True) as bar:
        clock[0] = 50  # of compiling; 39 steps are those of another run
        bar.update(40, "loss 3")
        clock[0] = 52
        bar.update(41, "loss 2")
    written = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert written.splitlines() == ["fit: 40/44 loss 3", "fit: 41/44 loss 2 (0.5 a second, about 6 s left)"]


def test_bar_is_silent_where_it_is_off(capfd: pytest.CaptureFixture):
    with progress.Bar("fit", 4, show=False) as bar:
        bar.update(4, "loss 2")
    assert capfd.readouterr() == ("", "")


def test_bar_on_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Bar("fit", 4, show=True) as bar:
        bar.update(4, "loss 2")
    assert "4/4" in terminal.getvalue()
    assert "loss 2" in terminal.getvalue()


def test_only_names_the_parts_there_are(smoke):
    run, _ = smoke(demo)
    with pytest.raises(SystemExit, match="method=NAME"):
        run("--only", "solver=adam")
