"""The demo end to end, on a few hundred examples; and the progress it shows."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import demo, records
from subsetopt import progress


def test_demo_runs_part_by_part_to_a_record_a_table_and_figures(smoke, capsys: pytest.CaptureFixture[str]):
    """In this process, where the parts share what they compile; the command tells what there is."""
    command, folder = smoke("demo")

    def run(**options: Any) -> str:
        arguments = demo.Arguments(smoke=True, out=folder / "out", results=folder / "results", **options)
        demo.main(arguments)
        return capsys.readouterr().out

    assert run(list=True).count("to do") == 3
    run(only="method=lbfgs")
    assert command("--list").count("to do") == 2
    printed = run()
    assert "lbfgs: has a result already" in printed
    assert all(name in printed for name in ("Gauss-Newton", "L-BFGS", "fine-tuning", "Adam"))
    assert {path.suffix for path in (folder / "out").glob("demo-*")} == {".pdf", ".png"}
    record = records.read(folder / "results/demo/digits-smoke.json")
    assert record["final"].keys() >= {"gauss_newton", "lbfgs", "gauss_newton_finetune", "adam"}
    assert record["config"]["parameters"] == 1446
    assert run(list=True).count("done") == 3


def test_bar_writes_plain_lines_to_a_log(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.Bar("fit", 4, show=True) as bar:
        bar.update(1, "loss 2")
    written = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert written.startswith("fit: 1/4 loss 2 (")
    assert "s left" in written


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


def test_only_names_the_parts_there_are(tmp_path: Path):
    with pytest.raises(SystemExit, match="method=NAME"):
        demo.main(demo.Arguments(only="solver=adam", out=tmp_path, results=tmp_path))
