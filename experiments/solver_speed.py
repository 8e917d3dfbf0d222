"""Our solvers beside optax, jaxopt, optimistix, scipy and torch: the same losses, starts and float32, one by one.

On a GPU all of them compute there, in float32 and not in its coarser TF32; records of it are called NAME-gpu.

    python -m experiments.solver_speed                                   everything, three hours on 2 cores
    python -m experiments.solver_speed --only problem=mlp                one problem
    python -m experiments.solver_speed --only problem=cnn,solver=scipy   one run

Each run is a part of its own: what is interrupted goes on with the first unfinished one. Libraries that are not
installed are left out (torch is in no extra: `pip install torch`). How they are run: peers.py.
"""

import dataclasses
import functools
import importlib.util
import math
import operator
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

from experiments import jobs, records
from experiments.models import FAMILY, MLP
from experiments.peers import MEMORY, PEERS, SLOW, SLOW_STEPS, Meter, Problem, Setting
from experiments.runs import Price, columns, count, gradient_flops
from paper_figures import solver_speed as figure
from subsetopt import LBFGS, GaussNewton, Progress

OWN_LBFGS = LBFGS(memory=MEMORY, tolerance=0)  # takes all the steps it is given
LONGER = 2  # ours runs on for this many times the steps, to show when it has a peer's last loss
ON_CPU = jax.default_backend() == "cpu"
OWN_DRIVER = "host" if ON_CPU else "compiled"
SAME_LOSS = 1e-3  # a loss counts as reached within 0.1 %: on a plateau the last digits are rounding

SETTINGS = {
    "cnn": Setting(FAMILY["mnist28-11k"].model, "mnist", 10_000),
    "digits": Setting(FAMILY["digits"].model, "digits", 1437, steps=200, blocks=(128, 1437), overhead_steps=200),
    "mlp": Setting(
        MLP((120,)), "mnist", 10_000, blocks=(128, 512, 2048, 10_000), overhead_steps=200, overhead_examples=(60_000,)
    ),
    # Where float32 line searches lose their way: the last 300 steps see only rounding.
    "float32": Setting(MLP((32,)), "clusters", 400, steps=600, blocks=(128, 400), overhead_steps=200),
    "regression": Setting(MLP((32,)), "teacher", 400, "squared_error", blocks=(128, 400), overhead_steps=200),
}


@dataclasses.dataclass(frozen=True)
class Arguments(jobs.Options):
    """Time solvers side by side on full-batch problems."""

    seed: int = 0
    """Seed of initialisation and synthetic data."""
    out: Path = Path("out/solver_speed")
    """Folder of figures and finished parts."""


def main(arguments: Arguments) -> None:
    """Run what has no result yet, then print and draw it."""
    picked = jobs.chosen(arguments.only, {"problem": SETTINGS, "solver": PARTS})
    problems = [Job(name, arguments) for name in SETTINGS if picked.get("problem") in (None, name)]
    with jax.default_matmul_precision("highest"):  # the default of GPUs is TF32, in which ours would race nobody
        for record in jobs.run(problems, arguments, picked.get("solver")):
            print_table(record)
            for path in figure.draw([record], arguments.out):
                print(f"figure: {path}")


def probe() -> float:
    """Seconds of a fixed matrix product: shows what else the machine is doing."""
    product, a = jax.jit(jnp.dot), jnp.ones((1500, 1500), jnp.float32)
    return statistics.median(_seconds(product, a, a) for _ in range(6))


def _seconds(function: Callable, *arguments: Any) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun


# --- our solvers ---------------------------------------------------------------------------------------------------


def ours(problem: Problem, meter: Meter, block_size: int, solver: Any, driver: str = "auto") -> None:
    """One of our solvers; a row is a step of its history, whose seconds and losses are those that it reports."""

    def enough(progress: Progress) -> bool:
        return meter.slow(progress.step, progress.seconds)

    problem.fit(solver, block_size, max_steps=2, driver=driver)
    meter.begin()
    result = problem.fit(solver, block_size, max_steps=meter.limit, callback=enough, driver=driver)
    kept = (result.history[key] for key in ("step", "sample_grads", "loss", "seconds"))
    for step, cost, loss, seconds in zip(*kept, strict=True):
        meter.add(step, cost / len(problem.x), loss, seconds)
    if meter.going:
        meter.ended = result.status.name


def our_lbfgs(problem: Problem, meter: Meter, block_size: int) -> None:
    """By the driver that is the default for large data."""
    ours(problem, meter, block_size, OWN_LBFGS, OWN_DRIVER)


def our_compiled_lbfgs(problem: Problem, meter: Meter, block_size: int) -> None:
    """By the other driver, on a CPU the default for small data of which nothing is convolved."""
    ours(problem, meter, block_size, OWN_LBFGS, "compiled")


def our_gauss_newton(problem: Problem, meter: Meter, block_size: int) -> None:
    """The classical method where Levenberg-Marquardt is its rival."""
    classical = problem.setting.loss == "squared_error"
    ours(problem, meter, block_size, GaussNewton(curvature_ratio=None) if classical else GaussNewton())


OUR_LBFGS = {"subsetopt": our_lbfgs, "compiled": our_compiled_lbfgs}
OURS = OUR_LBFGS | {"gauss_newton": our_gauss_newton}
RUNS = (*OURS, *PEERS)
LBFGS_RUNS = [name for name in RUNS if name not in ("gauss_newton", "levenberg_marquardt")]
PARTS = ("blocks", *RUNS, "rounds", "overhead", "scale", "seeds")
ROUNDS = 5  # in which every L-BFGS runs once: what else the machine does strikes single runs, and not the same ones
SEEDS = (0, 1, 2, 3, 4, 5, 6)  # of data and starts, to compare last losses: they are those of different minima


# --- what our solver adds to its evaluations -----------------------------------------------------------------------


def bare_gradient(problem: Problem, block_size: int) -> Callable[[Any], Any]:
    """Loss and gradient as a loop over jitted blocks, all of them on the device: the least that a step must do."""
    setting, n = problem.setting, len(problem.x)
    blocks = [tuple(a[i : i + block_size] for a in problem.on_device) for i in range(0, n, block_size)]

    @jax.jit
    def add(sums: Any, params: Any, x: jax.Array, y: jax.Array) -> Any:
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(lambda p: jnp.sum(problem.losses(p, x, y)) / n)(params))

    @jax.jit
    def penalty(params: Any) -> Any:
        return jax.value_and_grad(lambda p: setting.l2 / 2 * optax.tree.norm(p, squared=True))(params)

    def evaluate(params: Any) -> Any:
        sums = penalty(params)
        for x, y in blocks:
            sums = add(sums, params, x, y)
        return sums

    return evaluate


def fastest_block(problem: Problem) -> dict[str, Any]:
    """Seconds of the bare gradient for each block size, the best of seven in turns; accelerators want large ones.

    Chosen is the largest that is within 3 % of the fastest: fewer blocks are fewer calls, and one is never gathered.
    """
    n = len(problem.x)
    bare = {size: bare_gradient(problem, size) for size in (problem.setting.blocks if ON_CPU else (-(-n // 4), n))}
    rounds = [{size: _seconds(evaluate, problem.params) for size, evaluate in bare.items()} for _ in range(8)]
    seconds = {size: min(found[size] for found in rounds) for size in bare}
    chosen = max(size for size in bare if seconds[size] <= 1.03 * min(seconds.values()))
    return {"block_size": chosen, "bare_seconds": seconds}


def overheads(problem: Problem, block_size: int, compiled: bool) -> dict[str, Any]:
    """Of the host driver on a CPU, of the compiled one where asked for, and on as many examples as the setting says."""
    other = {"compiled": overhead(problem, block_size, "compiled")} if compiled else {}
    settings = [dataclasses.replace(problem.setting, examples=n) for n in problem.setting.overhead_examples]
    more = {f"{setting.examples}": overhead(Problem(setting, problem.seed), block_size) for setting in settings}
    return overhead(problem, block_size) | other | ({"examples": more} if more else {})


def overhead(problem: Problem, block_size: int, driver: str = OWN_DRIVER) -> dict[str, float]:
    """Seconds an evaluation of our L-BFGS over those of the bare gradient, taken in turns: noise strikes both."""
    evaluate = bare_gradient(problem, block_size)
    steps: list[float] = []
    bares: list[float] = []
    before = [0.0, 0.0]

    def alternate(progress: Progress) -> None:
        seconds, evaluations = time.perf_counter() - before[0], progress.sample_grads / len(problem.x)
        steps.append(seconds / (evaluations - before[1]))
        bares.append(_seconds(evaluate, progress.params))
        before[:] = time.perf_counter(), evaluations

    most = problem.setting.overhead_steps
    problem.fit(OWN_LBFGS, block_size, max_steps=most, callback=alternate, driver=driver)
    compiled = min(3, len(steps) - 1)
    step, bare = statistics.median(steps[compiled:]), statistics.median(bares[compiled:])
    return {"overhead": step / bare - 1, "seconds_per_evaluation": step, "bare_seconds": bare}


def scale(problem: Problem, block_size: int) -> dict[str, float]:
    """Largest difference of parameters after 50 steps, over the largest parameter, when the loss is scaled.

    A power of two scales without rounding: there only an absolute constant could make a difference.
    """
    steps = min(50, problem.setting.steps)

    def parameters(factor: float) -> jax.Array:
        def losses(f: jax.Array, y: jax.Array) -> jax.Array:
            return factor * optax.softmax_cross_entropy_with_integer_labels(f, y)

        options = {"loss": losses, "l2": factor * problem.setting.l2, "max_steps": steps}
        return ravel_pytree(problem.fit(OWN_LBFGS, block_size, **options).params)[0]

    reference = parameters(1.0)
    largest = jnp.max(jnp.abs(reference))
    factors = {"1e-6": 1e-6, "2^-20": 2.0**-20}
    return {name: float(jnp.max(jnp.abs(parameters(f) - reference)) / largest) for name, f in factors.items()}


# --- the job -------------------------------------------------------------------------------------------------------


class Job(jobs.Job):
    """One problem, a part a solver."""

    experiment, labels = "solver_speed", ("problem", "solver")

    def __init__(self, name: str, arguments: Arguments):
        self.setting, self.seed = _tiny(SETTINGS[name]) if arguments.smoke else SETTINGS[name], arguments.seed
        self.seeds, self.rounds = (SEEDS[:1], 1) if arguments.smoke else (SEEDS, ROUNDS)
        squared = self.setting.loss == "squared_error"
        # Inside a compiled loop XLA:CPU's convolutions are as slow for us as for the peers. On a GPU it is our default.
        quick = name != "cnn" or not ON_CPU
        fits = {"levenberg_marquardt": squared, "compiled": quick and ON_CPU, "rounds": quick, "jaxopt_run": not quick}
        fits |= {"scale": name == "float32", "seeds": name == "float32" and ON_CPU}
        left_out = {part for part, it_fits in fits.items() if not it_fits}
        parts = [part for part in PARTS if part not in left_out and _installed(name, part)]
        super().__init__(name, parts, arguments, arguments.seed)

    @functools.cached_property
    def problem(self) -> Problem:
        """The data and the start, once they are needed."""
        return Problem(self.setting, self.seed)

    def measure(self, part: str) -> dict[str, Any]:
        """A solver's run, or what all runs need to know."""
        if part == "blocks":
            return fastest_block(self.problem)
        block_size = self._block_size()
        if part == "overhead":
            return overheads(self.problem, block_size, "compiled" in self.parts)
        if part == "scale":
            return scale(self.problem, block_size)
        if part in ("rounds", "seeds"):
            return {"rounds": self._rounds, "seeds": self._last_losses}[part]()
        busy, longer = probe(), LONGER if part in OUR_LBFGS else 1
        meter = Meter(longer * self.setting.steps)
        self._solve(part, self.problem, meter)
        seconds = {"probe_seconds": busy, "first_call_seconds": meter.first_call_seconds}
        return {"curve": columns(meter.rows), "ended": meter.ended, **seconds}

    def _solve(self, name: str, problem: Problem, meter: Meter) -> None:
        if name in OURS:
            OURS[name](problem, meter, self._block_size())
        else:
            PEERS[name][0](problem, meter)

    def _rounds(self) -> dict[str, list[float]]:
        """Milliseconds a step of every L-BFGS in each round."""
        rows = self._repeated("rounds", "round", range(self.rounds), lambda _: self.problem)
        return {name: [1e3 * runs[-1]["seconds"] / runs[-1]["step"] for runs in found] for name, found in rows.items()}

    def _last_losses(self) -> dict[str, list[float]]:
        """The lowest loss of every L-BFGS from each start."""
        rows = self._repeated("seeds", "seed", self.seeds, functools.partial(Problem, self.setting))
        return {name: [min(row["loss"] for row in runs) for runs in found] for name, found in rows.items()}

    def _repeated(self, part: str, label: str, numbers: Sequence[int], problem: Callable) -> dict[str, list[list]]:
        """The rows of every L-BFGS, a run for each number, all solvers in turns."""

        def rows(name: str, number: int) -> list[dict[str, Any]]:
            meter = Meter(self.setting.steps)
            self._solve(name, problem(number), meter)
            return meter.rows

        names = [name for name in self.parts if name in LBFGS_RUNS]
        runs = [[self.kept(part, f"{name}, {label}={k}", rows, name, k) for name in names] for k in numbers]
        return {name: list(found) for name, *found in zip(names, *runs, strict=True)}

    def _block_size(self) -> int:
        if not self.path("blocks").exists():
            self.run("blocks")
        return records.kept(self.path("blocks"))["block_size"]

    # --- the record ------------------------------------------------------------------------------------------------

    def contents(self, parts: dict[str, Any]) -> tuple[dict, dict]:
        """A curve a solver; the race."""
        parts = steadied(parts, self.setting.steps)
        curves = {name: self._priced(part["curve"]) for name, part in parts.items() if name in RUNS}
        return curves, summary(parts, self.setting.steps)

    def _priced(self, curve: dict[str, list]) -> dict[str, list]:
        """The curve with its other two costs; operations are the model's, not the solver's own algebra."""
        n = len(self.problem.x)
        price = Price(n, gradient_flops(self.problem.model, self.problem.x.shape[1:]))
        sample_grads = [n * evaluations for evaluations in curve["evaluations"]]
        operations = [price.of(cost, 0.0)["flops"] for cost in sample_grads]
        return curve | {"sample_grads": sample_grads, "flops": operations}

    def config(self) -> dict[str, Any]:
        """What the result depends on, in full."""
        model, problem = self.problem.model, self.problem
        sizes = {"model": repr(model), "parameters": count(problem.params), "shape": problem.x.shape[1:]}
        libraries = {library for name, (_, library) in PEERS.items() if name in self.parts}
        rules = {"memory": MEMORY, "slow_steps": SLOW_STEPS, "slow_seconds": SLOW, "same_loss": SAME_LOSS}
        versions = {"versions": {library: version(library) for library in sorted(libraries)}}
        return {"seed": self.seed} | dataclasses.asdict(self.setting) | sizes | rules | versions


def _installed(problem: str, part: str) -> bool:
    library = PEERS[part][1] if part in PEERS else "jax"
    found = importlib.util.find_spec(library) is not None
    if not found:
        print(f"{problem}, {part}: skipped, {library} is not installed")
    return found


def _tiny(setting: Setting) -> Setting:
    model, data = setting.model, setting.data
    if data == "mnist":
        model, data = MLP((16,)) if isinstance(model, MLP) else FAMILY["digits"].model, "digits"
    return dataclasses.replace(
        setting,
        model=model,
        data=data,
        examples=60,
        steps=10,
        blocks=(32, 60),
        overhead_steps=6,
        overhead_examples=(90,) if setting.overhead_examples else (),
    )


# --- what came out -------------------------------------------------------------------------------------------------


def summary(parts: dict[str, Any], steps: int) -> dict[str, Any]:
    """Each run's loss within the common number of steps, and when ours had the loss that a peer ended with.

    Ours: by the faster of its two drivers.
    """
    drivers = {name: parts[name]["curve"] for name in OUR_LBFGS if name in parts}
    fastest = min(drivers, key=lambda name: drivers[name]["seconds"][-1] / drivers[name]["step"][-1])
    final: dict[str, Any] = {
        part: parts[part] for part in ("blocks", "rounds", "overhead", "scale", "seeds") if part in parts
    }
    final["fastest"] = fastest
    for name in [name for name in RUNS if name in parts]:
        run = dict(parts[name])
        curve = _first(run.pop("curve"), steps)
        run |= {key: curve[key][-1] for key in ("evaluations", "seconds")} | {"steps": curve["step"][-1]}
        run |= {"loss": min(curve["loss"]), "evaluations_per_step": run["evaluations"] / run["steps"]}
        run |= {"milliseconds_per_step": 1e3 * run["seconds"] / run["steps"]}
        final[name] = run if name in OUR_LBFGS else run | _race(curve, drivers[fastest])
    peers = [name for name in PEERS if name in parts]
    final["best_peer"] = min(peers, key=lambda name: final[name]["loss"])
    return final


def steadied(parts: dict[str, Any], steps: int) -> dict[str, Any]:
    """Each run's seconds as if its steps had taken the median of the rounds."""

    def steady(name: str, part: Any) -> Any:
        if name not in parts.get("rounds", {}):
            return part
        curve, milliseconds = part["curve"], statistics.median(parts["rounds"][name])
        common = _first(curve, steps)
        factor = milliseconds * common["step"][-1] / (1e3 * common["seconds"][-1])
        return part | {"curve": curve | {"seconds": [factor * seconds for seconds in curve["seconds"]]}}

    return {name: steady(name, part) for name, part in parts.items()}


def _first(curve: dict[str, list], steps: int) -> dict[str, list]:
    length = sum(step <= steps for step in curve["step"])
    return {key: values[:length] for key, values in curve.items()}


def _race(theirs: dict[str, list], mine: dict[str, list]) -> dict[str, Any]:
    """When both have their lowest loss, to 0.1 %; None where ours never has."""
    target = min(theirs["loss"]) * (1 + SAME_LOSS)
    seconds, _ = _reached(theirs, target) or (math.inf, 0)
    found = _reached(mine, target)
    ours, evaluations = found or (None, None)
    ratio = seconds / ours if ours else None
    return {"target_loss": target, "seconds_to_target": seconds} | {
        "our_seconds_to_target": ours,
        "our_evaluations_to_target": evaluations,
        "speedup": ratio,
    }


def _reached(curve: dict[str, list], target: float) -> tuple[float, float] | None:
    rows = zip(curve["loss"], curve["seconds"], curve["evaluations"], strict=True)
    return next(((seconds, evaluations) for loss, seconds, evaluations in rows if loss <= target), None)


def print_table(record: dict[str, Any]) -> None:
    """A row a solver, then what ours adds to its evaluations."""
    config, final = record["config"], record["final"]
    title = f"{record['name']}: {config['examples']:,} examples, P = {config['parameters']:,}, float32"
    table = Table(title=title, title_justify="left")
    headings = ("steps", "loss", "evaluations a step", "ms a step", "seconds to its loss", "ours there", "times faster")
    table.add_column("solver")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name in record["curves"]:
        run = final[name]
        cells = (f"{run['loss']:.5g}", f"{run['evaluations_per_step']:.3f}", f"{run['milliseconds_per_step']:.3g}")
        race = (run.get(key) for key in ("seconds_to_target", "our_seconds_to_target", "speedup"))
        table.add_row(name, str(run["steps"]), *cells, *("" if value is None else f"{value:.3g}" for value in race))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"blocks of {final['blocks']['block_size']}; ended: {_ends(record)}")
    print(f"ours over the bare gradient: {_overheads(final['overhead'])}")
    if "scale" in final:
        print(f"largest difference of parameters, loss scaled: {final['scale']}")
    if "seeds" in final:
        print(f"last losses over ours, medians of seeds: {_beside_ours(final['seeds'])}")


def _beside_ours(losses: dict[str, list[float]]) -> str:
    ours = losses["subsetopt"]
    ratios = {name: statistics.median(map(operator.truediv, theirs, ours)) for name, theirs in losses.items()}
    return ", ".join(f"{name} {ratio:.4f}" for name, ratio in ratios.items() if name != "subsetopt")


def _overheads(found: dict[str, Any]) -> str:
    more = {f"{int(n):,} examples": by for n, by in found.get("examples", {}).items()}
    more |= {"by the compiled driver": found["compiled"]} if "compiled" in found else {}
    return ", ".join([f"{found['overhead']:+.1%}", *(f"{by['overhead']:+.1%} {name}" for name, by in more.items())])


def _ends(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {record['final'][name]['ended']}" for name in record["curves"])


if __name__ == "__main__":
    main(tyro.cli(Arguments))
