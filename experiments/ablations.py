"""What makes Gauss-Newton on growing subsets cheap: one change from the defaults at a time, several seeds each.

    python -m experiments.ablations                                     everything, hours on 2 cores
    python -m experiments.ablations --only problem=digits               one problem
    python -m experiments.ablations --only problem=cifar16,study=rows   one study there

A variant runs to a fixed cost (sample_grads); what counts is the loss of the whole training set there. The spread
between seeds is as large as many effects: the record holds every seed, the table medians. Every run is a part of its
own: what is interrupted goes on with the first unfinished one.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import jobs
from experiments.problems import PROBLEMS
from experiments.runs import WHOLE, columns, finite, linear_algebra_flops, loss_and_accuracy, median
from paper_figures import ablations as figure
from subsetopt import GaussNewton, Progress, fit_subset

# Most where a fit takes seconds, and where its loss differs most between them.
SEEDS = {"digits": (0, 1, 2, 3, 4, 5, 6, 7, 8), "cifar16": (0, 1, 2), "mnist14": (0, 1, 2)}
LEAST = 1e-10  # what a loss of zero counts as, whose every example float32 rounds away
# Epochs of cost at which losses are compared; the last one ends a run.
COSTS = {"digits": (4, 8, 12, 16, 20), "cifar16": (2, 3, 4, 5, 6), "mnist14": (2, 3, 4, 5, 6)}


@dataclasses.dataclass(frozen=True)
class OtherDraw(GaussNewton):
    """Curvature rows and trial examples drawn by one thing only."""

    draw: str = "uniform"

    def _score(self, known: Any) -> Any:
        trace = known.uncertainty**2
        scores = {
            "uniform": jnp.ones_like(trace),
            "uncertainty": known.uncertainty,
            "trace": trace,
            "slope": known.slope,
        }
        return scores[self.draw]


@dataclasses.dataclass(frozen=True)
class GainRatio(GaussNewton):
    """One candidate a step; damping follows the gain ratio (Nocedal and Wright, Algorithm 4.1) on the trial sample."""

    damping_factors: tuple[float, ...] = (1.0,)
    momenta: tuple[float, ...] = (0.6,)
    length_factor: float = 1.0

    def _best_candidate(self, problem: Any, form: Any, state: Any) -> Any:
        state, choice = super()._best_candidate(problem, form, state)
        # A quadratic model's decrease is half of the linear one at its minimum.
        ratio = choice.difference / (0.5 * jnp.vdot(state.evaluation.grad, choice.move))
        factor = jnp.where(ratio < 0.25, 2.0, jnp.where(ratio > 0.75, 0.5, 1.0)).astype(choice.damping.dtype)
        return state, choice._replace(damping=choice.damping * factor)


@dataclasses.dataclass(frozen=True)
class FullMatrix(GaussNewton):
    """The matrix of all rows of the whole subset, by conjugate gradients on a factorisation of sampled rows."""

    linear_solve: str = "cg"

    def _form(self, problem: Any) -> Any:
        form: Any = super()._form(problem)
        recipe = dataclasses.replace(form.recipe, rows=None)
        return dataclasses.replace(form, recipe=recipe, preconditioner=problem.parameters)


@dataclasses.dataclass(frozen=True)
class SecondStep(GaussNewton):
    """A second step with the same matrix, on one of so many parts of each fresh subset; for the host driver.

    The part's gradient is corrected by what it misses of the subset's where the first step began (SVRG: Johnson and
    Zhang, Accelerating stochastic gradient descent using predictive variance reduction, 2013).
    """

    parts: int = 4

    def _advance(self, problem: Any, state: Any) -> Any:
        first = super()._advance(problem, state)
        if not problem.fresh or first.known:  # the whole set, whose gradient was needed anyway; a rejected first step
            return first
        key, draw = jax.random.split(first.memory.key)
        part = self._part(problem, first.evaluation, draw)
        before, here = part.evaluate(state.w), part.evaluate(first.w, uncertain=True)
        memory = first.memory._replace(key=key, gradient=first.memory.gradient + here.grad - before.grad)
        state = first.replace(evaluation=here, memory=memory, cost=first.cost + 2 * part.count)
        state, choice = self._best_candidate(part, self._form(part), state)
        second = self._tested(part, choice, state) if choice.difference < 0 else state
        return second.replace(evaluation=first.evaluation)

    def _part(self, problem: Any, known: Any, key: Any) -> Any:
        n = -(-int(problem.count) // self.parts)
        _, drawn = problem.draw(key, self._score(known), n, np.int32(n))
        indices, weights = (np.pad(np.asarray(a), (0, problem.examples - n)) for a in drawn[:2])
        return problem.using(drawn._replace(indices=indices, weights=weights), fresh=True)


def solver(**changes: Any) -> dict[str, Any]:
    """Options of a fit with another setting of the solver."""
    return {"solver": GaussNewton(**changes)}


def growth(**changes: Any) -> dict[str, Any]:
    """Options of a fit with another setting of growth."""
    return {"growth": dataclasses.replace(GaussNewton.growth, **changes)}


STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "defaults": {"defaults": {}},
    "subsets": {
        "nested subsets": growth(nested=True),
        "fresh, drawn uniformly": growth(importance=0.0),
        "fresh, half by slope": growth(importance=0.5),
        "no subsets: the whole set": {"growth": WHOLE},
    },
    "growth": {
        "from Q = 2": growth(start=2.0),
        "from Q = 8": growth(start=8.0),
        "by 1.05 a step": growth(factor=1.05),
        "by 1.2 a step": growth(factor=1.2),
        "stages end by the probe": {"until": "representative"} | growth(factor=2.0),
    },
    "warm-up": {
        "no Adam first": {"warmup_epochs": 0},
        "half an epoch of Adam": {"warmup_epochs": 0.5},
        "two epochs of Adam": {"warmup_epochs": 2.0},
    },
    "rows": {
        "0.25 rows a parameter": solver(curvature_ratio=0.25),
        "0.4 rows a parameter": solver(curvature_ratio=0.4),
        "1 row a parameter": solver(curvature_ratio=1.0),
        "0.15 rows an example": solver(curvature_share=0.15),
        "all rows of every example": solver(curvature_ratio=None),
        "rows rounded to bfloat16": solver(curvature_precision="bfloat16"),
    },
    "full matrix": {
        "all rows, by CG": {"solver": FullMatrix()},
        "all rows, two steps of CG": {"solver": FullMatrix(cg_max_steps=2)},
    },
    "second step": {
        "a second step on a quarter": {"solver": SecondStep(), "driver": "host"},
        "a second step on half": {"solver": SecondStep(parts=2), "driver": "host"},
    },
    "draws": {
        "rows drawn uniformly": {"solver": OtherDraw(draw="uniform")},
        "rows drawn by uncertainty": {"solver": OtherDraw(draw="uncertainty")},
        "rows drawn by tr H": {"solver": OtherDraw(draw="trace")},
        "rows drawn by slope": {"solver": OtherDraw(draw="slope")},
    },
    "averaging": {
        "no averaging": solver(averaging=0.0),
        "averaging 0.5": solver(averaging=0.5),
        "averaging 0.7": solver(averaging=0.7),
        "gradients averaged by 0.2": solver(gradient_averaging=0.2),
        "gradients averaged by 0.3": solver(gradient_averaging=0.3),
        "gradients averaged by 0.5": solver(gradient_averaging=0.5),
    },
    "momentum": {
        "no momentum": solver(momenta=(0.0,)),
        "momentum 0.6 alone": solver(momenta=(0.6,)),
        "momentum 0.3, 0.6, 0.9": solver(momenta=(0.3, 0.6, 0.9)),
    },
    "candidates": {
        "gain ratio, one candidate": {"solver": GainRatio()},
        "three dampings": solver(damping_factors=(0.4, 1.0, 2.5)),
        "one length": solver(length_factor=1.0),
        "50 trial examples": solver(trial_examples=50),
        "250 trial examples": solver(trial_examples=250),
        "500 trial examples": solver(trial_examples=500),
    },
}


@dataclasses.dataclass(frozen=True)
class Arguments(jobs.Options):
    """Measure what each part of the method is worth."""

    out: Path = Path("out/ablations")
    """Folder of figures and finished runs."""


def main(arguments: Arguments) -> None:
    """Run what has no result yet, then print and draw it."""
    picked = jobs.chosen(arguments.only, {"problem": COSTS, "study": STUDIES})
    problems = [Job(name, arguments) for name in COSTS if picked.get("problem") in (None, name)]
    for record in jobs.run(problems, arguments, picked.get("study")):
        print_table(record)
        for path in figure.draw([record], arguments.out):
            print(f"figure: {path}")


class Job(jobs.Job):
    """One problem, a part a study."""

    experiment, labels = "ablations", ("problem", "study")

    def __init__(self, name: str, arguments: Arguments):
        super().__init__(name, tuple(STUDIES), arguments)
        self.problem = PROBLEMS[name].tiny() if arguments.smoke else PROBLEMS[name]
        self.costs = (6, 12) if arguments.smoke else COSTS[name]
        self.seeds = SEEDS[name][:1] if arguments.smoke else SEEDS[name]

    def measure(self, part: str) -> list[dict[str, Any]]:
        """The rows of every variant and seed."""
        runs = [(variant, seed) for variant in STUDIES[part] for seed in self.seeds]
        kept = [self.kept(part, f"{variant}, seed={seed}", self._fit, part, variant, seed) for variant, seed in runs]
        return [row for rows in kept for row in rows]

    def _fit(self, study: str, variant: str, seed: int) -> list[dict[str, Any]]:
        """Costs and the loss of the whole training set, at the steps beside the common costs of one fit."""
        rows, costs = [], self._common_costs()

        def keep(progress: Progress) -> bool:
            cost = {"sample_grads": progress.sample_grads, "seconds": progress.seconds}
            rows.append(cost | {"examples": progress.examples, "params": progress.params})
            return progress.sample_grads > costs[-1]

        options = {"seed": seed, "max_steps": 10_000, "progress": False} | STUDIES[study][variant]
        fit_subset(self.problem.network, self.problem.train, callback=keep, **options)
        method, examples = options.get("solver", GaussNewton()), [row["examples"] for row in rows]
        extra = linear_algebra_flops(method, self.problem.parameters, examples)
        near = beside([row["sample_grads"] for row in rows], costs)
        return [{"variant": variant, "seed": seed} | self._evaluated(rows[i], float(extra[i])) for i in near]

    def _evaluated(self, row: dict[str, Any], extra: float) -> dict[str, Any]:
        """A step's costs, and the loss of the whole training set at its parameters."""
        loss, _ = loss_and_accuracy(self.problem.network, row.pop("params"), self.problem.train)
        operations = self.problem.price.of(row["sample_grads"], row["seconds"], extra)["flops"]
        return row | {"flops": operations, "full_loss": finite(loss)}

    def _common_costs(self) -> list[float]:
        """Those at which losses are compared, in sample_grads."""
        return [cost * self.problem.price.examples for cost in self.costs]

    def contents(self, parts: dict[str, Any]) -> tuple[dict, dict]:
        """A curve a study, of all its runs; medians at the common costs."""
        curves = {study: columns(rows) for study, rows in parts.items()}
        return curves, {study: self._summary(study, rows) for study, rows in parts.items()}

    def _summary(self, study: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Losses at the common costs: by variant, then one list a seed, and their medians."""
        result = {}
        for variant in STUDIES[study]:
            runs = [[row for row in rows if row["variant"] == variant and row["seed"] == seed] for seed in self.seeds]
            losses = [loss_at(run, self._common_costs()) for run in runs]
            result[variant] = {"losses": losses, "median": [median(at) for at in zip(*losses, strict=True)]}
        return result

    def config(self) -> dict[str, Any]:
        """What the result depends on, in full."""
        studies = {name: {v: repr(options) for v, options in variants.items()} for name, variants in STUDIES.items()}
        defaults = {"solver": repr(GaussNewton()), "growth": repr(GaussNewton.growth)}
        grid = {"epochs": self.costs, "seeds": self.seeds, "studies": studies, "defaults": defaults}
        return self.problem.config() | grid


def beside(spent: list[float], costs: list[float]) -> list[int]:
    """The steps just before and after each cost: whose losses `loss_at` needs."""
    after = np.searchsorted(spent, costs)
    return np.unique(np.clip([after - 1, after], 0, len(spent) - 1)).tolist()


def loss_at(run: list[dict[str, Any]], costs: list[float]) -> list[float | None]:
    """The loss at given sample_grads, its logarithm linear between two steps; None before the first, or not finite."""
    known = [row for row in run if row["full_loss"] is not None]
    spent, losses = [row["sample_grads"] for row in known], [math.log(max(row["full_loss"], LEAST)) for row in known]
    # A run that ended before, at its minimum, stays there.
    return [float(np.exp(np.interp(cost, spent, losses))) if spent and cost >= spent[0] else None for cost in costs]


def print_table(record: dict[str, Any]) -> None:
    """A row a variant: the median loss at each cost."""
    title = f"{record['name']}: loss of the whole training set after so many epochs of cost, medians"
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for epochs in record["config"]["epochs"]:
        table.add_column(str(epochs), justify="right")
    for variants in record["final"].values():
        for name, found in variants.items():
            table.add_row(name, *("-" if loss is None else f"{loss:.4g}" for loss in found["median"]))
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
