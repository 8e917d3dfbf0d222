"""The main job, end to end: subset stages by Gauss-Newton and by L-BFGS, fine-tuning, and a tuned Adam beside them.

    make demo                                      digits, about a minute on 2 cores
    python -m experiments.demo --dataset mnist     28x28, 60,000 examples, about 30 minutes
    python -m experiments.demo --dataset cifar10   32x32, 50,000 examples, about 30 minutes

Prints a table, writes the record and a figure (PDF, PNG) and says where. Each method is a part of its own: a run that
is interrupted goes on with the first unfinished part. `--only method=adam` runs one part.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments import jobs
from experiments.problems import PROBLEMS, Problem
from experiments.runs import adam, fit_curve, loss_and_accuracy, tuned_adam
from paper_figures import demo as figure
from subsetopt import LBFGS, GaussNewton, Progress, fit_subset

SOLVERS = {"gauss_newton": GaussNewton(), "lbfgs": LBFGS()}
METHODS = (*SOLVERS, "adam")
NAMES = {"gauss_newton": "Gauss-Newton", "lbfgs": "L-BFGS"}
# Adam's rates: few steps want larger ones. Wide enough for the best one to lie inside.
LOW, HIGH, HIGHEST = (2e-3, 5e-3, 1e-2, 2e-2), (5e-3, 1e-2, 2e-2, 5e-2), (2e-2, 5e-2, 1e-1, 2e-1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A problem, Adam's budgets (epochs: rates tried) and epochs of fine-tuning.

    lbfgs_steps: where the default would take hours. target_loss: where the fits end; None: at the minimum.
    """

    problem: Problem
    budgets: dict[int, tuple[float, ...]]
    finetune_epochs: int
    finetune_rate: float = 1e-3
    lbfgs_steps: int | None = None
    target_loss: float | None = None


SETTINGS = {
    "digits": Setting(PROBLEMS["digits"], {10: HIGHEST, 30: HIGHEST, 100: HIGHEST}, 5),
    "mnist": Setting(Problem("mnist", "mnist28"), {3: HIGH, 10: HIGH, 30: LOW}, 3, lbfgs_steps=200, target_loss=0.003),
    # Not stopped: what the minimum itself is worth for a larger network.
    "mnist-9k": Setting(Problem("mnist", "mnist28-9k"), {3: HIGH, 10: HIGH}, 3, lbfgs_steps=60),
    "cifar10": Setting(PROBLEMS["cifar32-4k"], {3: HIGH, 10: HIGH, 30: LOW}, 3, lbfgs_steps=200),
}


@dataclasses.dataclass(frozen=True)
class Arguments(jobs.Options):
    """Run the demo on one data set."""

    dataset: Literal["digits", "mnist", "mnist-9k", "cifar10"] = "digits"
    """Which images; mnist-9k is mnist with a larger network and without a target loss."""
    seed: int = 0
    """Seed of initialisation, subsets and shuffling."""
    out: Path = Path("out/demo")
    """Folder of figures and finished parts."""


def main(arguments: Arguments) -> None:
    """Run what has no result yet, then print and draw it."""
    method = jobs.chosen(arguments.only, {"method": METHODS}).get("method")
    for record in jobs.run([Job(arguments)], arguments, method):
        print_table(record)
        for path in figure.draw([record], arguments.out):
            print(f"figure: {path}")


class Job(jobs.Job):
    """One data set, a part a method."""

    experiment, labels = "demo", ("--dataset", "method")

    def __init__(self, arguments: Arguments):
        super().__init__(arguments.dataset, METHODS, arguments, arguments.seed)
        self.dataset, self.seed, self.setting = arguments.dataset, arguments.seed, SETTINGS[arguments.dataset]
        self.problem = self.setting.problem.tiny() if arguments.smoke else self.setting.problem

    # --- parts -----------------------------------------------------------------------------------------------------

    def measure(self, part: str) -> dict[str, Any]:
        """Curves and final numbers of a method."""
        return self.run_adam() if part == "adam" else self.run_fit(part)

    def run_fit(self, method: str) -> dict[str, Any]:
        """Subset stages with the package's defaults, then fine-tuning; losses of snapshots measured afterwards."""
        solver, snapshots = SOLVERS[method], {}

        def keep(progress: Progress) -> None:
            if progress.step % solver.check_every == 0 or progress.step == 1:
                snapshots[progress.step] = progress.params

        steps = 6 if self.arguments.smoke else self.setting.lbfgs_steps if method == "lbfgs" else None
        options = {"seed": self.seed, "max_steps": steps, "target_loss": self.setting.target_loss, "callback": keep}
        fit = fit_subset(self.problem.network, self.problem.train, solver=solver, **options)
        print(fit)
        snapshots[fit.n_steps] = fit.params
        curve = fit_curve(self.problem.network, fit, snapshots, self.problem.train, self.problem.price, solver)
        final = {"loss": fit.loss, "status": fit.status.name, "steps": fit.n_steps, "evals": fit.n_evals}
        final |= {"compile_seconds": fit.compile_seconds} | self._tested(fit.params)
        cost = {key: curve[key][-1] for key in ("epochs", "flops", "seconds")}
        tuned, final_tuned = self._finetune(fit.params, cost)
        curves = {method: curve, f"{method}_finetune": tuned}
        return {"curves": curves, "final": {method: final | cost, f"{method}_finetune": final_tuned}}

    def _finetune(self, params: Any, before: dict[str, float]) -> tuple[dict[str, list], dict[str, Any]]:
        """Adam from the fit's parameters on; costs go on from `before`."""
        rows: list[dict[str, Any]] = []

        def measure(progress: Progress) -> None:
            cost = self.problem.price.of(progress.sample_grads, progress.seconds)
            rows.append({key: before[key] + cost[key] for key in cost} | {"params": progress.params})

        problem, epochs, rate = self.problem, self.setting.finetune_epochs, self.setting.finetune_rate
        result = adam(problem.network, problem.train, params, rate, epochs, self.seed, callback=measure)
        for row in rows:
            parameters = row.pop("params")
            row["full_loss"] = loss_and_accuracy(problem.network, parameters, problem.train)[0]
            row["test_accuracy"] = loss_and_accuracy(problem.network, parameters, problem.test)[1]
        curve = {key: [row[key] for row in rows] for key in rows[0]}
        final = {key: rows[-1][key] for key in ("epochs", "flops", "seconds")}
        return curve, final | {"loss": result.loss, "status": result.status.name} | self._tested(result.params)

    def _tested(self, params: Any) -> dict[str, float]:
        loss, accuracy = loss_and_accuracy(self.problem.network, params, self.problem.test)
        return {"test_loss": loss, "test_accuracy": accuracy}

    def run_adam(self) -> dict[str, Any]:
        """Adam, tuned at each budget, with the same seed and so the same start."""
        budgets: dict[int, tuple[float, ...]] = {2: (1e-2,)} if self.arguments.smoke else self.setting.budgets
        problem = self.problem
        curve = tuned_adam(problem.network, problem.train, problem.test, budgets, problem.price, self.seed, say)
        best = min(range(len(curve["full_loss"])), key=curve["full_loss"].__getitem__)
        final = {key: curve[key][best] for key in ("test_loss", "test_accuracy", "flops", "seconds", "rate")}
        final |= {"loss": curve["full_loss"][best], "epochs": curve["budget_epochs"][best], "status": "MAX_STEPS"}
        return {"curves": {"adam": curve}, "final": {"adam": final}}

    # --- the record ------------------------------------------------------------------------------------------------

    def contents(self, parts: dict[str, Any]) -> tuple[dict, dict]:
        """The curves and final numbers of all methods."""
        curves = {key: curve for part in parts.values() for key, curve in part["curves"].items()}
        final = {key: value for part in parts.values() for key, value in part["final"].items()}
        return curves, final

    def config(self) -> dict[str, Any]:
        """What the result depends on, in full."""
        setting = dataclasses.asdict(self.setting)
        del setting["problem"]  # self.problem is that, or a tiny one
        solvers = {name: repr(solver) for name, solver in SOLVERS.items()}
        return {"dataset": self.dataset, "seed": self.seed} | setting | self.problem.config() | solvers


def say(text: str) -> None:
    """A line for the log, at once."""
    print(text, flush=True)


def print_table(record: dict[str, Any]) -> None:
    """What each method reached, at what cost; the best run of each Adam budget."""
    config = record["config"]
    title = (
        f"{config['dataset']}: {config['examples']:,} examples, P = {config['parameters']:,}, Q = {config['ratio']:.3g}"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("method", "train loss", "test accuracy", "cost (epochs)", "TFLOP", "seconds", "status"):
        table.add_column(heading, justify="left" if heading in ("method", "status") else "right")
    for method, name in NAMES.items():
        _row(table, f"{name}, subsets to whole set", record["final"][method])
        _row(table, "  + fine-tuning", record["final"][f"{method}_finetune"])
    for run in best_of_budgets(record["curves"]["adam"]):
        _row(table, f"Adam, rate {run['rate']:g}, cosine", run | {"loss": run["full_loss"], "status": ""})
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _row(table: Table, name: str, run: dict[str, Any]) -> None:
    epochs = run.get("epochs", run.get("budget_epochs"))
    cells = (f"{run['loss']:.3g}", f"{run['test_accuracy']:.2%}", f"{epochs:.1f}", f"{run['flops'] / 1e12:.3g}")
    table.add_row(name, *cells, f"{run['seconds']:.1f}", run["status"])


def best_of_budgets(curve: dict[str, list]) -> list[dict[str, Any]]:
    """The run of lowest training loss at each budget."""
    runs = [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]
    budgets = dict.fromkeys(curve["budget_epochs"])
    return [min((r for r in runs if r["budget_epochs"] == b), key=lambda r: r["full_loss"]) for b in budgets]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
