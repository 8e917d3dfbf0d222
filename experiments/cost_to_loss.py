"""What it costs to reach a training loss: Gauss-Newton on growing subsets, beside first-order training tuned for it.

    python -m experiments.cost_to_loss                                     everything, days on 2 cores
    python -m experiments.cost_to_loss --only problem=digits               one problem
    python -m experiments.cost_to_loss --only problem=cifar16,method=adam  one method there

A target is the loss that Adam ends with at a budget of epochs, its rate and batch size tuned for that budget: the
least that a user who knows the budget beforehand has to pay for this loss. Every run is a part of its own: what is
interrupted goes on with the first unfinished one. The methods:

    gauss_newton           fit_subset and every default of the package, snapshots along the way
    lbfgs                  the same with the other solver
    gauss_newton_finetune  Gauss-Newton up to part of the training set, then Adam on all of it, its rate tuned
    paper                  a subset of four constraints a parameter by Adam at 1e-3, then the whole set
    adam, sgd              cosine decay to zero over each budget, rate and batch size tuned for it

On a GPU, whose records are called NAME-gpu, Gauss-Newton alone is run. What first-order training reaches in so many
steps is known from the record of CPUs; its seconds are taken there, epoch by epoch beside the fits.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import tyro
from rich.console import Console
from rich.table import Table

from experiments import jobs, races, records
from experiments.problems import PROBLEMS, Problem
from experiments.races import COSTS, TESTS, Row, lowest
from experiments.runs import OPTIMIZERS, adam, columns, finite, first_order, linear_algebra_flops, loss_and_accuracy
from paper_figures import cost_to_loss as figure
from subsetopt import (
    LBFGS,
    FinetuneResult,
    GaussNewton,
    Progress,
    draw_order,
    finetune,
    fit_subset,
    overdetermination_ratio,
)

SOLVERS = {"gauss_newton": GaussNewton(), "lbfgs": LBFGS()}
SNAPSHOTS = {"gauss_newton": 1, "lbfgs": 10}  # steps from one to the next, all of them paid for where it has the loss
OURS = (*SOLVERS, "gauss_newton_finetune")
ON_CPU = jax.default_backend() == "cpu"
METHODS = (*OURS, "paper", *OPTIMIZERS) if ON_CPU else ("gauss_newton", *OPTIMIZERS)
BATCHES = (128, 512)
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # those that are tried
FEW_EPOCHS = 30  # below it Adam wants larger rates
FINETUNE_RATES = (1e-3, 2e-3, 5e-3, 1e-2)
FINETUNE_SHARES = (1 / 8, 1 / 2)  # of the training set: up to a subset of so much of it Gauss-Newton goes
PAPER_RATIO, PAPER_RATE, PAPER_BATCH, PAPER_MOST = (4, 1e-3, 512, 100)  # most: the subset's share of cost, in epochs
SLICE_STEPS, SLICES_EVERY = (12, 4)  # steps of first-order training timed at least, and fit steps between two timings
MEASURED = ("full_loss", *TESTS)
Recipe = tuple[float, int]  # share of the training set that Gauss-Newton goes up to, epochs of Adam
DIVERGED = 100.0  # a loss above it; guessing costs log(10)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a problem is run.

    budgets: epochs of first-order runs. untuned: those that take rate and batch size of the next smaller budget.
    same_batch: those that take its batch size only, and tune the rate at it.
    fit_epochs, lbfgs_epochs: cost at which a fit ends. max_steps: of a fit, beyond what it needs. batch_sizes: tried.
    rates: how many are tried at first. extensions: how many more at most, while the best is at an edge.
    finetune_epochs: of runs after a fit. paper_epochs: passes over the subset. paper_whole: over the whole set, at
    each a snapshot.
    """

    budgets: tuple[int, ...]
    untuned: tuple[int, ...] = ()
    same_batch: tuple[int, ...] = ()
    fit_epochs: float = 40
    lbfgs_epochs: float = 60
    max_steps: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_sizes: tuple[int, ...] = BATCHES
    rates: int = 4
    extensions: int = 3
    finetune_epochs: tuple[int, ...] = (3, 10)
    paper_epochs: int = 1000
    paper_whole: tuple[int, ...] = (10, 30)

    def tiny(self) -> "Setting":
        """So short that all of it takes seconds."""
        runs: Row = {
            "budgets": (1, 2),
            "untuned": (2,),
            "same_batch": (),
            "seeds": (0, 1),
            "max_steps": 5,
            "finetune_epochs": (1,),
        }
        tuning: Row = {"batch_sizes": (128,), "rates": 2, "extensions": 0}
        return dataclasses.replace(self, **runs, **tuning, paper_epochs=2, paper_whole=(1, 2))


# Where an epoch takes ten seconds; 512 examples a batch are behind 128 there at 3 and 10 epochs, so 30 try no others.
LONG_EPOCHS: Row = {
    "budgets": (3, 10, 30, 100),
    "untuned": (100,),
    "same_batch": (30,),
    "lbfgs_epochs": 15,
    "paper_epochs": 300,
    "paper_whole": (10,),
}
SETTINGS = {
    "digits": Setting((3, 10, 30, 100, 300, 1000), fit_epochs=100, lbfgs_epochs=100),
    "mnist14": Setting((3, 10, 30, 100), untuned=(100,), fit_epochs=12, lbfgs_epochs=40),
    "mnist28": Setting(**LONG_EPOCHS, fit_epochs=11),
    "cifar16": Setting((3, 10, 30, 100, 300, 1000), untuned=(1000,), fit_epochs=35),
    "cifar32-4k": Setting(**LONG_EPOCHS, fit_epochs=20),
    "cifar32": Setting(**LONG_EPOCHS, fit_epochs=20),
}


@dataclasses.dataclass(frozen=True)
class Arguments(jobs.Options):
    """Measure what it costs to reach the losses of tuned first-order training."""

    out: Path = Path("out/cost_to_loss")
    """Folder of figures and finished runs."""


def main(arguments: Arguments) -> None:
    """Run what has no result yet, then print and draw it."""
    picked = jobs.chosen(arguments.only, {"problem": SETTINGS, "method": METHODS})
    problems = [Job(name, arguments) for name in SETTINGS if picked.get("problem") in (None, name)]
    made = []
    for record in jobs.run(problems, arguments, picked.get("method")):
        print_table(record)
        made.append(record)
    if made:
        for path in figure.draw(made, arguments.out):
            print(f"figure: {path}")


def measured(problem: Problem, params: Any) -> Row:
    """Losses and accuracy of parameters; never part of a cost."""
    full, _ = loss_and_accuracy(problem.network, params, problem.train)
    test, accuracy = loss_and_accuracy(problem.network, params, problem.test)
    return {"full_loss": finite(full), "test_loss": finite(test), "test_accuracy": accuracy}


# --- first-order training ------------------------------------------------------------------------------------------


def ladder(method: str, epochs: int) -> tuple[float, ...]:
    """The rates that are tried first; few steps want larger ones."""
    if method == "sgd":
        return (0.05, 0.1, 0.2, 0.5)
    return (5e-3, 1e-2, 2e-2, 5e-2) if epochs < FEW_EPOCHS else (2e-3, 5e-3, 1e-2, 2e-2)


def tried(run: Callable[[float], Row], rates: Sequence[float], extensions: int) -> list[Row]:
    """A run at each rate, and at further ones as long as the best is at an edge."""
    rows = [run(rate) for rate in rates]
    for _ in range(extensions):
        best = lowest(rows)["rate"]
        if best == rows[0]["rate"]:
            rows = [run(RATES[RATES.index(best) - 1]), *rows]
        elif best == rows[-1]["rate"]:
            rows = [*rows, run(RATES[RATES.index(best) + 1])]
    return rows


def outcome(problem: Problem, result: FinetuneResult) -> Row:
    """What a run reached; null where it diverged, for a record holds no NaN and such a loss says nothing."""
    found = measured(problem, result.params)
    # Without success these are the last finite parameters, not those of the end.
    fine = result.success and found["full_loss"] is not None and found["full_loss"] < DIVERGED
    return found if fine else dict.fromkeys(MEASURED)


def trained(problem: Problem, choice: Row) -> Row:
    """One run of first-order training, from the start that its seed gives."""
    names = ("method", "rate", "budget_epochs", "seed", "batch_size")
    result = first_order(problem.network, problem.train, None, *(choice[name] for name in names))
    cost = {"sample_grads": result.sample_grads, "seconds": result.seconds}
    return choice | outcome(problem, result) | cost


# --- fits ----------------------------------------------------------------------------------------------------------


class Compiling:
    """Seconds that JAX spends tracing and compiling, which a fit's clock leaves out by itself."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        self.seconds += duration_secs if event.startswith("/jax/core/compile/") else 0.0


COMPILING = Compiling()


class Slices:
    """About a tenth of an epoch of first-order training, timed again and again while a fit runs; on a GPU, all of it.

    So both meet the same machine, which a grid of runs that takes a night does not.
    """

    def __init__(self, problem: Problem):
        self.problem, self.kinds = problem, list(itertools.product(OPTIMIZERS, BATCHES))
        self.seconds: dict[str, list[float]] = {f"{name}-{batch_size}": [] for name, batch_size in self.kinds}
        self.add()  # compiles
        for values in self.seconds.values():
            values.clear()
        self.add()

    def add(self) -> None:
        """Time one slice of each kind, outside of the precision and device of a fit, for which all is compiled anew."""
        with jax.default_matmul_precision(None), jax.default_device(None):
            for kind in self.kinds:
                self._slice(*kind)

    def _slice(self, optimizer: str, batch_size: int) -> None:
        x, y = self.problem.train
        epoch = -(-len(x) // batch_size)
        # Not fewer than 12 steps, unless they are a whole epoch: finetune does a little once an epoch, too.
        examples = batch_size * (min(epoch, max(SLICE_STEPS, epoch // 10)) if ON_CPU else epoch)
        data = x[:examples], y[:examples]
        result = first_order(self.problem.network, data, None, optimizer, 1e-3, 1, 0, batch_size)
        self.seconds[f"{optimizer}-{batch_size}"].append(result.seconds / result.n_steps * epoch)

    def per_epoch(self) -> dict[str, float]:
        """Median seconds of an epoch, by optimizer and batch size."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}


class Watch:
    """A fit's callback: keeps snapshots with their costs and ends the fit at `most` sample_grads.

    Its own time, that of slices above all, is none of the fit's.
    """

    def __init__(self, every: int, most: float, slices: Slices | None = None):
        self.every, self.most, self.slices = every, most, slices
        self.rows: list[Row] = []
        self.last: Row = {}
        self.examples: list[int] = []  # of each step
        self._own = 0.0

    def __call__(self, progress: Progress) -> bool:
        begun = time.perf_counter() - COMPILING.seconds
        self.examples.append(progress.examples)
        cost = {"sample_grads": progress.sample_grads, "seconds": progress.seconds - self._own}
        self.last = {"step": progress.step, "examples": progress.examples} | cost | {"params": progress.params}
        if progress.step % self.every == 0:
            self.rows.append(self.last)
        if self.slices is not None and progress.step % SLICES_EVERY == 0:
            self.slices.add()
        self._own += time.perf_counter() - COMPILING.seconds - begun
        return progress.sample_grads > self.most

    def snapshots(self) -> list[Row]:
        """The rows, the end among them."""
        return self.rows if self.rows and self.rows[-1] is self.last else [*self.rows, self.last]


def fitted(problem: Problem, setting: Setting, method: str, seed: int) -> Row:
    """A fit with the package's defaults, and what an epoch of first-order training took meanwhile."""
    epochs = setting.lbfgs_epochs if method == "lbfgs" else setting.fit_epochs
    slices = Slices(problem)
    watch, solver = Watch(SNAPSHOTS[method], epochs * problem.price.examples, slices), SOLVERS[method]
    options: Any = {"solver": solver, "seed": seed, "max_steps": setting.max_steps, "progress": False}
    fit = fit_subset(problem.network, problem.train, callback=watch, **options)
    rows = []
    for row in watch.snapshots():
        reached = measured(problem, row.pop("params"))
        rows.append({"seed": seed} | with_flops(problem, solver, row, watch.examples) | reached)
    part = {"seed": seed, "status": fit.status.name, "compile_seconds": fit.compile_seconds, "rows": rows}
    return part | {"seconds_per_epoch": slices.per_epoch()}


def with_flops(problem: Problem, solver: Any, row: Row, examples: Sequence[int]) -> Row:
    """A snapshot of a fit with its operations, the solver's own algebra on the examples of each step included."""
    extra = float(linear_algebra_flops(solver, problem.parameters, examples)[row["step"] - 1])
    return row | {"flops": problem.price.of(row["sample_grads"], 0.0, extra)["flops"]}


def fine_tuned(problem: Problem, setting: Setting, seed: int, rates: Mapping[Recipe, Sequence[float]]) -> Row:
    """Gauss-Newton up to each share of the training set, then Adam on all of it, at these rates for each recipe.

    Where there are several, at further ones as long as the best is at an edge.
    """
    solver, n, slices = GaussNewton(), len(problem.train[0]), Slices(problem)
    most = int(max(share for share, _ in rates) * n)
    ratio = overdetermination_ratio(most, problem.network.classes, problem.parameters)
    growth = dataclasses.replace(GaussNewton.growth, stop=max(ratio, GaussNewton.growth.start))
    watch = Watch(1, math.inf, slices)

    def at_most(progress: Progress) -> bool:
        """The last stage would go on to its minimum, which the next step leaves."""
        return watch(progress) or progress.examples >= most

    options: Any = {"growth": growth, "seed": seed, "max_steps": setting.max_steps, "progress": False}
    fit_subset(problem.network, problem.train, solver=solver, callback=at_most, **options)

    def tuned(share: float, epochs: int, rate: float) -> Row:
        before = next(row for row in watch.rows if row["examples"] >= int(share * n))
        cost = {f"fit_{key}": with_flops(problem, solver, before, watch.examples)[key] for key in COSTS}
        result = adam(problem.network, problem.train, before["params"], rate, epochs, seed)
        choice = {"method": "gauss_newton_finetune", "fit_share": share, "budget_epochs": epochs}
        return choice | {"rate": rate, "seed": seed} | cost | outcome(problem, result)

    rows: list[Row] = []
    for recipe, first in rates.items():
        rows += tried(functools.partial(tuned, *recipe), first, setting.extensions if len(first) > 1 else 0)
    return {"seed": seed, "rows": rows, "seconds_per_epoch": slices.per_epoch()}


def paper(problem: Problem, setting: Setting, seed: int) -> list[Row]:
    """The paper's recipe: Adam at a fixed rate on a nested subset, then on the whole set."""
    x, y = problem.train
    size = min(len(x), math.ceil(PAPER_RATIO * problem.parameters / problem.network.classes))
    subset, epochs = draw_order(y, seed)[:size], min(setting.paper_epochs, PAPER_MOST * len(x) // size)
    options: Any = {"optimizer": optax.adam(PAPER_RATE), "batch_size": PAPER_BATCH, "seed": seed, "progress": False}
    first = finetune(problem.network, (x[subset], y[subset]), epochs=epochs, **options)
    rows: list[Row] = []

    def keep(epoch: int, cost: float, params: Any) -> None:
        rows.append({"seed": seed, "whole_epochs": epoch, "sample_grads": cost} | measured(problem, params))

    def snapshot(progress: Progress) -> None:
        epoch = round(progress.sample_grads / len(x))
        if epoch in setting.paper_whole:
            keep(epoch, first.sample_grads + progress.sample_grads, progress.params)

    keep(0, first.sample_grads, first.params)
    epochs = setting.paper_whole[-1]
    finetune(problem.network, problem.train, first.params, epochs=epochs, callback=snapshot, **options)
    return rows


# --- the job -------------------------------------------------------------------------------------------------------


class Job(jobs.Job):
    """One problem, a part a method."""

    experiment, labels = "cost_to_loss", ("problem", "method")

    def __init__(self, name: str, arguments: Arguments):
        super().__init__(name, METHODS, arguments)
        self.plain_name, self.known = name, {}
        if not (ON_CPU or arguments.smoke):
            self.known = records.read(records.RESULTS / self.experiment / f"{name}.json")["curves"]
        self.setting = SETTINGS[name].tiny() if arguments.smoke else SETTINGS[name]
        self.problem = PROBLEMS[name].tiny() if arguments.smoke else PROBLEMS[name]

    def measure(self, part: str) -> list[Row]:
        """All runs of a method."""
        if part in OPTIMIZERS:
            return self._known(part) if self.known else self._first_order(part)
        if part == "gauss_newton_finetune":
            return self._fine_tuned()
        setting = self.setting
        if part == "paper":
            runs = [self.kept(part, f"seed={seed}", paper, self.problem, setting, seed) for seed in setting.seeds]
            return [row for run in runs for row in run]
        return [self.kept(part, f"seed={seed}", fitted, self.problem, setting, part, seed) for seed in setting.seeds]

    def _known(self, method: str) -> list[Row]:
        """The runs in the record of CPUs, without what they took there."""
        curve = {key: values for key, values in self.known[method].items() if key not in (*COSTS, "own_seconds")}
        return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]

    def _first_order(self, method: str) -> list[Row]:
        """All runs: those that tune, on the first seed, and the winner of each budget on the others."""
        rows: list[Row] = []
        batch_size, rate = 0, 0.0
        first, *others = self.setting.seeds
        for epochs in self.setting.budgets:
            if epochs in self.setting.untuned:
                rows.append(self._single(method, epochs, batch_size, first, rate))
            else:
                same = epochs in self.setting.same_batch
                tuning = self._tuning(method, epochs, (batch_size,) if same else self.setting.batch_sizes)
                batch_size, rate = (lowest(tuning)[key] for key in ("batch_size", "rate"))
                rows += tuning
            rows += [self._single(method, epochs, batch_size, seed, rate) for seed in others]
        return rows

    def _tuning(self, method: str, epochs: int, batch_sizes: Sequence[int]) -> list[Row]:
        setting, rows = self.setting, []
        for batch_size in batch_sizes:
            run = functools.partial(self._single, method, epochs, batch_size, setting.seeds[0])
            rows += tried(run, ladder(method, epochs)[: setting.rates], setting.extensions)
        return rows

    def _single(self, method: str, epochs: int, batch_size: int, seed: int, rate: float) -> Row:
        choice = {"method": method, "budget_epochs": epochs, "batch_size": batch_size, "rate": rate, "seed": seed}
        run = f"epochs={epochs},batch={batch_size},rate={rate:g},seed={seed}"
        return self.kept(method, run, trained, self.problem, choice)

    def _fine_tuned(self) -> list[Row]:
        """All runs: every rate on the first seed, the best one for each recipe on the others."""
        first, *others = self.setting.seeds
        recipes = itertools.product(FINETUNE_SHARES, self.setting.finetune_epochs)
        tuning = self._fine_tuned_once(first, dict.fromkeys(recipes, FINETUNE_RATES))
        runs: dict[Recipe, list[Row]] = {}
        for row in tuning["rows"]:
            runs.setdefault((row["fit_share"], row["budget_epochs"]), []).append(row)
        rates = {recipe: (lowest(rows)["rate"],) for recipe, rows in runs.items()}
        return [tuning, *(self._fine_tuned_once(seed, rates) for seed in others)]

    def _fine_tuned_once(self, seed: int, rates: Mapping[Recipe, Sequence[float]]) -> Row:
        run, arguments = f"seed={seed}", (self.problem, self.setting, seed, rates)
        return self.kept("gauss_newton_finetune", run, fine_tuned, *arguments)

    # --- the record ------------------------------------------------------------------------------------------------

    def contents(self, parts: dict[str, Any]) -> tuple[dict, dict]:
        """A curve a method, of all its runs; the races."""
        per_epoch = seconds_per_epoch(parts["gauss_newton"])
        rows = Pricing(self.problem, per_epoch).rows(parts)
        rivals = [method for method in METHODS if method not in OPTIMIZERS]
        final = races.summary(rows, self.setting.budgets, rivals) | {"seconds_per_epoch": per_epoch}
        final |= {"status": {name: [part["status"] for part in parts[name]] for name in SOLVERS if name in parts}}
        return {method: columns(rows[method]) for method in METHODS}, final

    def config(self) -> dict[str, Any]:
        """What the result depends on, in full."""
        setting = self.setting
        ladders = {
            name: {str(epochs): ladder(name, epochs)[: setting.rates] for epochs in setting.budgets}
            for name in OPTIMIZERS
        }
        recipe = {"ratio": PAPER_RATIO, "rate": PAPER_RATE, "batch_size": PAPER_BATCH, "subset_most_epochs": PAPER_MOST}
        solvers = {name: repr(solver) for name, solver in SOLVERS.items()}
        growth = {name: repr(solver.growth) for name, solver in SOLVERS.items()}
        return {
            "problem": self.plain_name,
            **self.problem.config(),
            **dataclasses.asdict(setting),
            "ladders": ladders,
            "finetune_rates": FINETUNE_RATES,
            "finetune_shares": FINETUNE_SHARES,
            "paper": recipe,
            "solvers": solvers,
            "growth": growth,
        }


# --- prices --------------------------------------------------------------------------------------------------------


def seconds_per_epoch(fits: Sequence[Row]) -> dict[str, float]:
    """Median over the fits, by optimizer and batch size."""
    found = [fit["seconds_per_epoch"] for fit in fits]
    return {name: statistics.median(seconds[name] for seconds in found) for name in found[0]}


@dataclasses.dataclass(frozen=True)
class Pricing:
    """Rows of all methods with the three costs; first-order training at the seconds that it took beside the fits.

    Machines are noisy: own_seconds were taken, seconds are those at the speed of the median fit.
    """

    problem: Problem
    per_epoch: dict[str, float]

    def rows(self, parts: dict[str, Any]) -> dict[str, list[Row]]:
        """By method."""
        return {method: self._of(method, found) for method, found in parts.items()}

    def _of(self, method: str, found: list[Row]) -> list[Row]:
        if method in OURS:
            priced = self._fitted if method in SOLVERS else self._fine_tuned
            return [priced(row, self._speed(fit)) for fit in found for row in fit["rows"]]
        if method == "paper":
            return [row | self._cost(row["sample_grads"], f"adam-{PAPER_BATCH}") for row in found]
        return [self._first_order(row) for row in found]

    def _cost(self, sample_grads: float, kind: str) -> Row:
        price = self.problem.price
        seconds = sample_grads / price.examples * self.per_epoch[kind]
        return {"sample_grads": sample_grads, "seconds": seconds, "flops": price.of(sample_grads, seconds)["flops"]}

    def _first_order(self, row: Row) -> Row:
        """At its whole budget, also where it diverged; own_seconds None: not run on this device."""
        kind = f"{row['method']}-{row['batch_size']}"
        cost = self._cost(row["budget_epochs"] * self.problem.price.examples, kind)
        return row | {"own_seconds": row.get("seconds")} | cost

    def _speed(self, fit: Row) -> float:
        """Where first-order training took longer beside this fit than beside the median one, so did the fit."""
        own = fit["seconds_per_epoch"]
        return statistics.median(self.per_epoch[kind] / own[kind] for kind in own)

    def _fitted(self, row: Row, speed: float) -> Row:
        return row | {"seconds": row["seconds"] * speed, "own_seconds": row["seconds"]}

    def _fine_tuned(self, row: Row, speed: float) -> Row:
        """own_seconds are those of the fit."""
        own = row["fit_seconds"]
        row = row | {"fit_seconds": own * speed, "own_seconds": own}
        cost = self._cost(row["budget_epochs"] * self.problem.price.examples, "adam-128")
        return row | {key: row[f"fit_{key}"] + cost[key] for key in COSTS}


# --- the table -------------------------------------------------------------------------------------------------------


def print_table(record: dict[str, Any]) -> None:
    """A row a budget of Adam's; ratios are Adam's costs over those of the method."""
    config, final = record["config"], record["final"]
    sizes = f"{config['examples']:,} examples, P = {config['parameters']:,}, Q = {config['ratio']:.3g}"
    caption = (
        "ours: Adam's cost over ours at Adam's loss, in sample_grads/FLOPs/seconds; above 1 ours costs less; "
        "in brackets SGD's over Gauss-Newton's at SGD's"
    )
    table = Table(title=f"{record['name']}: {sizes}", title_justify="left", caption=caption, caption_justify="left")
    headings = ("epochs", "rate, batch", "Adam's loss", "test", "Gauss-Newton", "L-BFGS", "+ fine-tuning", "SGD's loss")
    for heading in headings:
        table.add_column(heading, justify="right")
    for epochs, target in final["targets"].items():
        adam, ratios = target["adam"], [_ratios(target[name]) if name in target else "" for name in OURS]
        choice, accuracy = f"{adam['rate']:g}, {adam['batch_size']}", f"{adam['test_accuracy']:.2%}"
        spread = f"{adam['loss']:.4g} ({_range(adam['losses'])})"
        table.add_row(epochs, choice, spread, accuracy, *ratios, _beside_sgd(target["sgd"]))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for name in [name for name in OURS if name in final["break_even"]]:
        budgets = (f"{_number(epochs)} ({cost})" for cost, epochs in final["break_even"][name].items())
        print(f"{name} costs no more from this budget of Adam's on: {', '.join(budgets)}")


def _range(losses: Sequence[float | None]) -> str:
    """Over the seeds that did not diverge."""
    found = [loss for loss in losses if loss is not None]
    return f"{min(found):.3g}-{max(found):.3g}"


def _beside_sgd(sgd: Row) -> str:
    """Its loss, and what that costs Gauss-Newton."""
    return "-" if sgd["loss"] is None else f"{_number(sgd['loss'])} ({_ratios(sgd['gauss_newton'])})"


def _ratios(race: Row) -> str:
    return "/".join(_number(race[f"{key}_ratio"]["median"], 2) for key in COSTS)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
