"""The ablation study, on a few examples; and what it says of made-up runs."""

import math
import shutil

import pytest

from experiments import ablations, runs
from experiments.problems import PROBLEMS
from experiments.records import read
from subsetopt import Growth, fit_subset

CHANGES = ("warm-up", "draws", "candidates")


@pytest.fixture
def few_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults and a change of each kind: the start, the drawing of rows, the choice of a step."""
    kept = {name: dict(list(ablations.STUDIES[name].items())[:1]) for name in ("defaults", *CHANGES)}
    monkeypatch.setattr(ablations, "STUDIES", kept)


def test_each_study_is_kept_and_the_record_is_made_once(few_studies: None, smoke, monkeypatch: pytest.MonkeyPatch):
    run, folder = smoke(ablations)
    run("--only", "problem=digits,study=defaults")
    with monkeypatch.context() as changed:
        changed.setitem(ablations.SEEDS, "digits", (7,))
        for other in ("warm-up", "draws"):
            with pytest.raises(SystemExit, match=r"defaults.* was kept with another seeds, and .* anew by --again"):
                run("--only", f"problem=digits,study={other}", "--again")
        assert len(list(folder.rglob("*.json"))) == 2  # the part and its run
    assert not list(folder.glob("results/**/*.json"))
    assert "defaults: has a result already" in run("--only", "problem=digits")
    record = read(folder / "results" / "ablations" / "digits-smoke.json")
    assert {name for variants in record["final"].values() for name in variants} == {
        "defaults",
        "no Adam first",
        "rows drawn uniformly",
        "gain ratio, one candidate",
    }
    ends = [found["median"][-1] for variants in record["final"].values() for found in variants.values()]
    assert all(0 < loss < math.log(10) + 0.5 for loss in ends)
    assert len(set(ends)) == len(ends)  # every change changes something
    assert {path.suffix for path in folder.glob("out/ablations-digits-smoke.*")} == {".pdf", ".png"}
    shutil.rmtree(folder / "out" / "parts")
    with pytest.raises(SystemExit, match=r"--again of draws alone would lose the record"):
        run("--only", "problem=digits,study=draws", "--again")
    assert "defaults: has a result already" in run("--only", "problem=digits")


@pytest.mark.parametrize(
    ("study", "variant", "extra"),
    [
        # Products of every example for each of two dampings, at least; the loss of a step's part, twice.
        ("full matrix", "all rows, by CG", 2 * 5 / 3),
        ("second step", "a second step on a quarter", 2 / 4),
    ],
)
def test_a_solver_of_the_study_lowers_the_loss_and_is_charged_for_its_work(study: str, variant: str, extra: float):
    problem = PROBLEMS["digits"].tiny()
    options = {"growth": Growth(1, stop=1, nested=False), "max_steps": 3, "warmup_epochs": 0, "progress": False}
    usual = fit_subset(problem.network, problem.train, **options)
    changed = fit_subset(problem.network, problem.train, **options | ablations.STUDIES[study][variant])
    assert usual.n_steps == changed.n_steps == 3
    assert changed.loss < 0.8 * changed.history["loss"][0]
    assert changed.loss != usual.loss
    assert changed.sample_grads > usual.sample_grads + 3 * extra * usual.stages[0]["examples"]


def test_losses_at_equal_cost_are_interpolated_in_logarithms():
    run = [{"sample_grads": 10.0 * i, "full_loss": loss} for i, loss in enumerate((None, 4.0, 1.0, 0.25))]
    found = ablations.loss_at(run, [5, 10, 15, 20, 100])
    assert found[0] is None
    assert found[1:] == pytest.approx([4, 2, 1, 0.25])
    assert ablations.loss_at(run[:1], [5]) == [None]
    run.append({"sample_grads": 40.0, "full_loss": 0.0})
    assert ablations.loss_at(run, [30, 40, 50]) == pytest.approx([0.25, ablations.LEAST, ablations.LEAST])


def test_the_steps_beside_the_costs_are_all_that_interpolation_needs():
    run = [{"sample_grads": 1.3 * i, "full_loss": 5.0 / i} for i in range(1, 20)]
    spent, costs = [row["sample_grads"] for row in run], [1.0, 2.0, 2.5, 13.0, 14.0, 30.0]
    near = ablations.beside(spent, costs)
    assert len(near) < len(run)
    assert ablations.loss_at([run[i] for i in near], costs) == ablations.loss_at(run, costs)


@pytest.mark.parametrize(("values", "expected"), [((1.0, None, 3.0), 3.0), ((1.0, 2.0, None), 2.0), ((None,), None)])
def test_a_loss_that_is_not_finite_counts_as_infinite(values: tuple, expected: float | None):
    assert runs.median(values) == expected


def test_an_unknown_study_is_refused(smoke):
    run, _ = smoke(ablations)
    with pytest.raises(SystemExit, match="study"):
        run("--only", "study=luck")
