"""What the README says works: its Python code runs, and the commands it names exist."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "experiments/results/cost_to_loss"
ABLATIONS = ROOT / "experiments/results/ablations"
RACES = ROOT / "experiments/results/solver_speed"


def python_blocks_alone(markdown: str) -> str:
    """All ```python blocks as one script; other lines become empty, so line numbers stay true."""
    lines, inside = [], False
    for line in markdown.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line.strip() == "```python" if fence else inside
    return "\n".join(lines) + "\n"


def commands(markdown: str) -> set[tuple[str, str]]:
    """Pairs ("make", target) and ("-m", module) in fenced or inline code, without placeholders."""
    fenced, inline = r"^```.*?^```", r"`[^`\n]+`"
    code = "\n".join(re.findall(f"{fenced}|{inline}", markdown, flags=re.DOTALL | re.MULTILINE))
    return set(re.findall(r"(?<!\w)(make|(?<=python )-m) ([\w.-]+)(?=[\s`]|$)", code))


def table_rows(record: dict) -> list[str]:
    """The rows that the README shows of a record of the demo."""
    final, config, adam = record["final"], record["config"], record["curves"]["adam"]
    runs = [dict(zip(adam, values, strict=True)) for values in zip(*adam.values(), strict=True)]
    longest = [run for run in runs if run["budget_epochs"] == max(adam["budget_epochs"])]
    best = min(longest, key=lambda run: run["full_loss"])
    best |= {"loss": best["full_loss"], "epochs": best["budget_epochs"]}
    named = {
        "Gauss-Newton": final["gauss_newton"],
        "Gauss-Newton + fine-tuning": final["gauss_newton_finetune"],
        "L-BFGS": final["lbfgs"],
        "L-BFGS + fine-tuning": final["lbfgs_finetune"],
        "Adam, tuned": best,
    }
    setting = f"{config['dataset']}, N = {config['examples']:,}, P = {config['parameters']:,}"
    return [
        f"| {setting} | {name} | {run['loss']:.3g} | {run['test_accuracy']:.2%} "
        f"| {run['epochs']:.0f} | {run['flops'] / 1e12:.2g} | {run['seconds']:.0f} |"
        for name, run in named.items()
    ]


def headline_rows(record: dict) -> list[str]:
    """The rows that the README shows of a record of `cost_to_loss`."""
    config = record["config"]
    name = f"{config['problem']}, N = {config['examples']:,}, P = {config['parameters']:,}"
    targets = record["final"]["targets"].items()
    return [f"| {name} | {int(epochs):,} | {' | '.join(headline(config['examples'], t))} |" for epochs, t in targets]


def headline(examples: int, target: dict) -> list[str]:
    """What Adam and SGD reach in a budget, and what ours costs there; dashes where it never has Adam's loss."""
    adam, ours = target["adam"], target["gauss_newton"]
    sgd, ratio = target["sgd"], target["sgd"]["gauss_newton"]["sample_grads_ratio"]["median"]
    spent = ours["sample_grads"]["median"]
    ratios = [ours[f"{key}_ratio"]["median"] for key in ("sample_grads", "flops", "seconds")]
    reached = [f"{spent / examples:.1f}", *(f"{ratio:.2g}" for ratio in ratios)] if spent else ["-"] * 4
    tests = adam["test_accuracy"], ours["test_accuracy"]["median"]
    beside = f"{sgd['loss']:.3g} ({ratio:.2g})"
    return [f"{adam['loss']:.3g}", beside, *reached, *(f"{test:.1%}" if test else "-" for test in tests)]


def change_rows(readme: str) -> list[list[str]]:
    """The cells of the rows that the README shows of the ablations, the name of the change first."""
    table = readme.split("<!-- ablations -->")[1].split("<!-- end of ablations -->")[0].strip()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def race_row(record: dict) -> str:
    """The row that the README shows of a record of `solver_speed`: each peer's time to its loss over ours."""
    config, final = record["config"], record["final"]
    own = "host" if record["environment"]["device"] == "cpu" else "compiled"  # by default
    driver = {"subsetopt": own, "compiled": "compiled"}[final["fastest"]]
    name = f"{record['name']}, N = {config['examples']:,}, P = {config['parameters']:,} | {driver}"
    peers = ("optax", "jaxopt", "optimistix", "scipy", "torch")
    ratios = [ratio(final[peer]["speedup"]) for peer in peers]
    found = final["overhead"]
    bares = [f"{1 + by['overhead']:.3g}" for by in (found, found.get("compiled")) if by]
    ours = final["subsetopt"]["evaluations_per_step"]
    return f"| {name} | {ours:.3g} | {', '.join(bares)} | {' | '.join(ratios)} |"


def ratio(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2g}" if speedup < 100 else f"{speedup:.0f}"


def is_runnable(module: str) -> bool:
    """Whether `python -m module` finds something to run."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    return spec is not None


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_python_code_of_the_readme_runs(readme: str, run_python, tmp_path: Path):
    code = python_blocks_alone(readme)
    assert code.strip(), "README.md has no ```python block"
    script = tmp_path / "README.py"
    script.write_text(code)
    run_python(script, cwd=tmp_path)


def test_commands_named_in_the_readme_exist(readme: str):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = commands(readme)
    assert named, "README.md names no command"
    assert {name for kind, name in named if kind == "make"} <= targets
    assert not {name for kind, name in named if kind == "-m" and not is_runnable(name)}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # for other tests import it
@pytest.mark.parametrize("name", ["ablations", "cost_to_loss", "demo", "scaling", "solver_speed"])
def test_experiments_start_as_modules(name: str, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr("sys.argv", [name, "--list", "--smoke", "--out", str(tmp_path), "--results", str(tmp_path)])
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    assert "to do" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_numbers_in_the_readme_stand_in_the_records(readme: str, dataset: str):
    record = json.loads((ROOT / f"experiments/results/demo/{dataset}.json").read_text())
    assert [row for row in table_rows(record) if row not in readme] == []


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_the_headline_of_the_readme_stands_in_the_records(readme: str, path: Path):
    assert [row for row in headline_rows(json.loads(path.read_text())) if row not in readme] == []


@pytest.mark.parametrize("path", sorted(RACES.glob("*.json")), ids=lambda path: path.stem)
def test_the_races_of_the_readme_stand_in_the_records(readme: str, path: Path):
    assert race_row(json.loads(path.read_text())) in readme


@pytest.mark.parametrize(("place", "problem"), [(1, "digits"), (2, "mnist14"), (3, "cifar16")])
def test_the_ablations_of_the_readme_stand_in_the_records(readme: str, place: int, problem: str):
    final = json.loads((ABLATIONS / f"{problem}.json").read_text())["final"]
    medians = {name: found["median"][-1] for study in final.values() for name, found in study.items()}
    rows = change_rows(readme)
    assert rows
    assert [row[place] for row in rows] == [f"{medians[row[0]] / medians['defaults']:.3g}" for row in rows]


def test_blocks_keep_their_lines_and_their_order():
    text = "a\n```python\nx = 1\n```\n```sh\nmake demo\n```\n```python\nx += 1\n```\n"
    assert python_blocks_alone(text).splitlines() == ["", "", "x = 1"] + [""] * 5 + ["x += 1", ""]


def test_commands_are_read_from_code_only():
    text = """To make sure: `make demo`, `python -m experiments.<name>`.
```sh
PYTHON=a make test
.venv/bin/python -m paper_figures adam
```
"""
    assert commands(text) == {("make", "demo"), ("make", "test"), ("-m", "paper_figures")}
    assert is_runnable("json.tool")
    assert not is_runnable("json")
    assert not is_runnable("no_such_module")
