"""The main job, end to end: subset stages by Gauss-Newton and by L-BFGS, fine-tuning, and a tuned Adam beside them.

    make demo                                      digits, about a minute on 2 cores
    python -m experiments.demo --dataset mnist     28x28, 60,000 examples, about 30 minutes
    python -m experiments.demo --dataset cifar10   32x32, 50,000 examples, about 30 minutes

Prints a table, writes the record and a figure (PDF, PNG) and says where. Each method is a part of its own: a run that
is interrupted goes on with the first unfinished part. `--only method=adam` runs one part.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments import records
from experiments.data import load
from experiments.models import FAMILY
from experiments.runs import (
    Arrays,
    Options,
    Price,
    adam,
    chosen,
    count,
    fit_curve,
    gradient_flops,
    loss_and_accuracy,
    tuned_adam,
)
from paper_figures import demo as figure
from subsetopt import LBFGS, GaussNewton, Progress, fit_subset, overdetermination_ratio

SOLVERS = {"gauss_newton": GaussNewton(), "lbfgs": LBFGS()}
METHODS = (*SOLVERS, "adam")
NAMES = {"gauss_newton": "Gauss-Newton", "lbfgs": "L-BFGS"}
# Adam's rates: few steps want larger ones. Wide enough for the best one to lie inside.
LOW, HIGH, HIGHEST = (2e-3, 5e-3, 1e-2, 2e-2), (5e-3, 1e-2, 2e-2, 5e-2), (2e-2, 5e-2, 1e-1, 2e-1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A data set's model, Adam's budgets (epochs: rates tried) and epochs of fine-tuning.

    lbfgs_steps: where the default would take hours. target_loss: where the fits end; None: at the minimum.
    """

    model: str
    budgets: dict[int, tuple[float, ...]]
    finetune_epochs: int
    finetune_rate: float = 1e-3
    lbfgs_steps: int | None = None
    target_loss: float | None = None


SETTINGS = {
    "digits": Setting("digits", {10: HIGHEST, 30: HIGHEST, 100: HIGHEST}, 5),
    "mnist": Setting("mnist28", {3: HIGH, 10: HIGH, 30: LOW}, 3, lbfgs_steps=200, target_loss=0.003),
    # Not stopped: what the minimum itself is worth, for this network and a larger one.
    "mnist-minimum": Setting("mnist28", {3: HIGH, 10: HIGH, 30: LOW}, 3, lbfgs_steps=200),
    "mnist-9k": Setting("mnist28-9k", {3: HIGH, 10: HIGH}, 3, lbfgs_steps=60),
    "cifar10": Setting("cifar32-4k", {3: HIGH, 10: HIGH, 30: LOW}, 3, lbfgs_steps=200),
}


@dataclasses.dataclass(frozen=True)
class Arguments(Options):
    """Run the demo on one data set."""

    dataset: Literal["digits", "mnist", "mnist-minimum", "mnist-9k", "cifar10"] = "digits"
    """Which images; mnist-minimum and mnist-9k are mnist without a target loss."""
    seed: int = 0
    """Seed of initialisation, subsets and shuffling."""
    out: Path = Path("out/demo")
    """Folder of figures and unfinished parts."""
    only: str | None = None
    """Run one part: method=gauss_newton, method=lbfgs or method=adam."""


def main(arguments: Arguments) -> None:
    """Run what has no result yet, then print and draw it."""
    picked = chosen(arguments.only, {"method": METHODS})
    job = Job(arguments)
    if arguments.list:
        job.show()
        return
    if arguments.again:
        job.forget()
    for method in picked.values() or METHODS:
        job.run(method)
    if job.complete():
        record = job.record()
        print_table(record)
        for path in figure.draw([record], arguments.out):
            print(f"figure: {path}")


class Job:
    """One data set: its parts, one a method, and the record that they make together."""

    def __init__(self, arguments: Arguments):
        self.arguments, self.setting = arguments, SETTINGS[arguments.dataset]
        self.name = arguments.dataset + ("-smoke" if arguments.smoke else "")
        self.parts = arguments.out / "parts" / f"{self.name}-seed{arguments.seed}"
        self.images = arguments.dataset.partition("-")[0]
        self.model: Any = FAMILY[self.setting.model].model

    # --- parts -----------------------------------------------------------------------------------------------------

    def path(self, method: str) -> Path:
        """Where a finished part waits for the others."""
        return self.parts / f"{method}.json"

    def finished(self) -> bool:
        """Whether the record of the whole job is there."""
        return records.exists("demo", self.name, self.arguments.results)

    def complete(self) -> bool:
        """Whether nothing is left to run."""
        return self.finished() or all(self.path(method).exists() for method in METHODS)

    def forget(self) -> None:
        """Remove this job's parts and record."""
        shutil.rmtree(self.parts, ignore_errors=True)
        (self.arguments.results / "demo" / f"{self.name}.json").unlink(missing_ok=True)

    def show(self) -> None:
        """Print the state of every part."""
        for method in METHODS:
            done = self.finished() or self.path(method).exists()
            print(f"dataset={self.name} method={method}: {'done' if done else 'to do'}")

    def run(self, method: str) -> None:
        """Run one part, unless it is done."""
        if self.finished() or self.path(method).exists():
            print(f"{self.name}, {method}: has a result already (--again runs it anew)")
            return
        self.load()
        part = self.run_adam() if method == "adam" else self.run_fit(method)
        records.keep(part, self.path(method))

    def load(self) -> None:
        """The data, once."""
        if hasattr(self, "train"):
            return
        n = 300 if self.arguments.smoke else None
        self.train: Arrays = _first(load(self.images, "train"), n)
        self.test: Arrays = _first(load(self.images, "test"), n)
        shape = self.train[0].shape[1:]
        self.price = Price(len(self.train[0]), gradient_flops(self.model, shape))

    def run_fit(self, method: str) -> dict[str, Any]:
        """Subset stages with the package's defaults, then fine-tuning; losses of snapshots measured afterwards."""
        solver, snapshots = SOLVERS[method], {}

        def keep(progress: Progress) -> None:
            if progress.step % solver.check_every == 0 or progress.step == 1:
                snapshots[progress.step] = progress.params

        say(f"{self.name}: {NAMES[method]} on growing subsets")
        steps = 6 if self.arguments.smoke else self.setting.lbfgs_steps if method == "lbfgs" else None
        target, seed = self.setting.target_loss, self.arguments.seed
        fit = fit_subset(
            self.model, self.train, solver=solver, seed=seed, max_steps=steps, target_loss=target, callback=keep
        )
        print(fit)
        snapshots[fit.n_steps] = fit.params
        curve = fit_curve(self.model, fit, snapshots, self.train, self.price, solver)
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
            cost = self.price.of(progress.sample_grads, progress.seconds)
            rows.append({key: before[key] + cost[key] for key in cost} | {"params": progress.params})

        epochs, rate = self.setting.finetune_epochs, self.setting.finetune_rate
        result = adam(self.model, self.train, params, rate, epochs, self.arguments.seed, callback=measure)
        for row in rows:
            parameters = row.pop("params")
            row["full_loss"] = loss_and_accuracy(self.model, parameters, self.train)[0]
            row["test_accuracy"] = loss_and_accuracy(self.model, parameters, self.test)[1]
        curve = {key: [row[key] for row in rows] for key in rows[0]}
        final = {key: rows[-1][key] for key in ("epochs", "flops", "seconds")}
        return curve, final | {"loss": result.loss, "status": result.status.name} | self._tested(result.params)

    def _tested(self, params: Any) -> dict[str, float]:
        loss, accuracy = loss_and_accuracy(self.model, params, self.test)
        return {"test_loss": loss, "test_accuracy": accuracy}

    def run_adam(self) -> dict[str, Any]:
        """Adam, tuned at each budget, with the same seed and so the same start."""
        say(f"{self.name}: Adam, its rate tuned at each budget")
        budgets: dict[int, tuple[float, ...]] = {2: (1e-2,)} if self.arguments.smoke else self.setting.budgets
        curve = tuned_adam(self.model, self.train, self.test, budgets, self.price, self.arguments.seed, say)
        best = min(range(len(curve["full_loss"])), key=curve["full_loss"].__getitem__)
        final = {key: curve[key][best] for key in ("test_loss", "test_accuracy", "flops", "seconds", "rate")}
        final |= {"loss": curve["full_loss"][best], "epochs": curve["budget_epochs"][best], "status": "MAX_STEPS"}
        return {"curves": {"adam": curve}, "final": {"adam": final}}

    # --- the record ------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """The whole job's record, put together from its parts the first time."""
        path = self.arguments.results / "demo" / f"{self.name}.json"
        if not self.finished():
            self.load()
            parts = [json.loads(self.path(method).read_text()) for method in METHODS]
            curves = {key: curve for part in parts for key, curve in part["curves"].items()}
            final = {key: value for part in parts for key, value in part["final"].items()}
            records.write(records.new("demo", self.name, self.config(), curves, final), self.arguments.results)
            shutil.rmtree(self.parts)
        print(f"record: {path}")
        return records.read(path)

    def config(self) -> dict[str, Any]:
        """What the result depends on, in full."""
        examples, shape = len(self.train[0]), self.train[0].shape[1:]
        parameters = count(self.model.init(_key(), self.train[0][:1])["params"])
        outputs = int(self.train[1].max()) + 1
        ratio = overdetermination_ratio(examples, outputs, parameters)
        setting = dataclasses.asdict(self.setting) | {"model": repr(self.model), "examples": examples}
        sizes = {"shape": shape, "parameters": parameters, "outputs": outputs, "ratio": ratio}
        solvers = {name: repr(solver) for name, solver in SOLVERS.items()}
        return {"dataset": self.arguments.dataset, "seed": self.arguments.seed} | setting | sizes | solvers


def _key() -> Any:
    import jax

    return jax.random.key(0)


def _first(data: Arrays, n: int | None) -> Arrays:
    return data[0][:n], data[1][:n]


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
