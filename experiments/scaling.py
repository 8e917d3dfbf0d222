"""How memory and time grow with examples, parameters and devices, each held against a bar.

    python -m experiments.scaling                     everything, more than an hour on 2 cores
    python -m experiments.scaling --only part=memmap  one part

Each point is measured in a process of its own, so that its peak memory is its own; what is interrupted goes on with
the first unfinished point. Memory is read from /proc, which is Linux's; on a GPU it is the GPU's, all parts but memmap
and devices are measured there, and records are called NAME-gpu. The parts:

    examples    memory and time a step for up to a million examples
    memmap      L-BFGS on a memory-mapped file: memory below the file's size
    devices     losses with 1 to 4 CPU devices, both drivers, several block sizes
    parameters  seconds and gradients of a step in each form of Gauss-Newton's system, and what the cost model picks
    linalg      our Gram update and Cholesky factorisation against XLA's matrix product
    cg          residuals that conjugate gradients reach, and what the preconditioner saves
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console
from rich.table import Table

from experiments import jobs, records
from experiments.models import CNN, MLP
from experiments.runs import WHOLE, Arrays, columns, count, fit_whole
from paper_figures import scaling as figure
from subsetopt import LBFGS, FitResult, GaussNewton, Growth, curvature, linalg

ON_CPU = jax.default_backend() == "cpu"
CHUNK = 10_000  # examples made at once
Point = dict[str, Any]  # arguments of a measurement
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arguments(jobs.Options):
    """Measure how the solvers scale."""

    out: Path = Path("out/scaling")
    """Folder of figures and finished points."""
    worker: str | None = None
    """Measure one point, given as JSON, in this process, and print its rows: what the command starts by itself."""


def main(arguments: Arguments) -> None:
    """Measure what has no result yet, then print and draw it."""
    if arguments.worker is not None:
        point = json.loads(arguments.worker)
        print(json.dumps(PARTS[point.pop("part")].measure(**point)))
        return
    part = jobs.chosen(arguments.only, {"part": PARTS}).get("part")
    parts = [Job(name, arguments) for name in PARTS if part in (None, name) and (ON_CPU or name not in OF_THE_HOST)]
    if arguments.list:
        for job in parts:
            job.show()
        return
    made = [job.record() for job in parts]
    print_table(made)
    for path in figure.draw(made, arguments.out):
        print(f"figure: {path}")


# --- data, fits, memory --------------------------------------------------------------------------------------------


class Teacher:
    """Normal inputs, labelled by a random network of one hidden layer; in chunks, so that only the data fill memory."""

    def __init__(self, shape: Sequence[int]):
        self.shape, self.rng = tuple(shape), np.random.default_rng(0)
        features = int(np.prod(shape))
        self.inner = self.rng.standard_normal((features, 32), np.float32) / np.float32(features) ** 0.5
        self.outer = self.rng.standard_normal((32, 10), np.float32)

    def chunk(self, n: int) -> Arrays:
        """The next n examples."""
        x = self.rng.standard_normal((n, *self.shape), np.float32)
        scores = np.tanh(2 * x.reshape(n, -1) @ self.inner) @ self.outer
        return x, scores.argmax(axis=1).astype(np.int32)

    def fill(self, n: int) -> Arrays:
        """n examples in memory."""
        x, y = np.empty((n, *self.shape), np.float32), np.empty(n, np.int32)
        for start in range(0, n, CHUNK):
            part = slice(start, min(start + CHUNK, n))
            x[part], y[part] = self.chunk(part.stop - start)
        return x, y

    def write(self, n: int, path: Path) -> np.ndarray:
        """n inputs into an .npy file; their labels."""
        labels = []
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (n, *self.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, n, CHUNK):
                x, y = self.chunk(min(CHUNK, n - start))
                file.write(x.tobytes())
                labels.append(y)
        return np.concatenate(labels)


def seconds_per_step(result: FitResult) -> float:
    """Median, without compiling and, where there are more, without the first step: it looks at the start."""
    seconds = np.diff(result.history["seconds"], prepend=0)
    return float(np.median(seconds[min(1, len(seconds) - 1) :]))


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far. (getrusage counts the parent before exec as well.)

    On an accelerator those that arrays take there.
    """
    if not ON_CPU:
        stats: Any = jax.local_devices()[0].memory_stats()
        return stats[{"VmRSS": "bytes_in_use", "VmHWM": "peak_bytes_in_use"}[field]]
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@dataclasses.dataclass(frozen=True)
class Looking:
    """A solver that shows the problem and its start before the first step: the public way to both."""

    solver: Any
    look: Callable[[Any, Array], None]

    growth: ClassVar[Growth] = WHOLE
    until: ClassVar[str | int] = "converged"
    max_steps: ClassVar[int] = 1
    check_every: ClassVar[int] = 1
    fresh_subsets: ClassVar[bool] = False

    def init(self, problem: Any, w: Array) -> Any:
        self.look(problem, w)
        return self.solver.init(problem, w)

    def step(self, problem: Any, state: Any) -> Any:
        return self.solver.step(problem, state)


def recipe_of(solver: GaussNewton, parameters: int) -> curvature.Recipe:
    """What a solver asks of a form of its system."""
    rows = int(np.ceil((solver.curvature_ratio or 1) * parameters))
    precision, steps = solver.curvature_precision, solver.cg_max_steps
    return curvature.Recipe(rows, solver.curvature_share, solver.averaging, precision, solver.cg_tolerance, steps)


def clocked(function: Callable, *arguments: Any) -> tuple[Any, float]:
    """What it returns, and the seconds it takes."""
    begun = time.perf_counter()
    value = jax.block_until_ready(function(*arguments))
    return value, time.perf_counter() - begun


def holds(bar: str, measured: float, at_most: float | None = None, at_least: float | None = None) -> Row:
    """A bar, what was measured, and whether it holds."""
    limit, sign = (at_most, "<=") if at_least is None else (at_least, ">=")
    assert limit is not None
    fine = measured <= limit if sign == "<=" else measured >= limit
    return {"bar": bar, "measured": measured, "sign": sign, "limit": limit, "holds": fine}


# --- examples ------------------------------------------------------------------------------------------------------


def example_points(smoke: bool) -> list[Point]:
    numbers = (200, 400, 800) if smoke else (1000, 10_000, 100_000, 1_000_000)
    size = {"width": 4 if smoke else 64, "block_size": 100 if smoke else 1000}
    return [{"solver": s, "examples": n, "steps": k} | size for s, k in (("lbfgs", 10), ("dense", 3)) for n in numbers]


def measure_examples(solver: str, examples: int, steps: int, width: int, block_size: int) -> list[Row]:
    """setup_seconds: checks, order and initialisation, before the first step."""
    x, y = Teacher((64,)).fill(examples)
    base, method = memory("VmRSS"), LBFGS(tolerance=0) if solver == "lbfgs" else GaussNewton(linear_solve="dense")
    options = {"max_steps": steps, "block_size": block_size}
    driver = "host" if ON_CPU else "compiled"  # whatever the size, so that sizes compare
    run = functools.partial(fit_whole, MLP((width,)), (x, y), method, driver=driver, **options)
    result, seconds = clocked(run)
    step = seconds_per_step(result)
    row = {"seconds_per_step": step, "microseconds_per_example": 1e6 * step / examples, "loss": result.loss}
    row |= {"evaluations": result.n_evals, "setup_seconds": seconds - result.seconds - result.compile_seconds}
    size = {"peak_bytes": memory("VmHWM"), "base_bytes": base, "data_bytes": x.nbytes + y.nbytes}
    return [{"series": solver, "examples": examples, "parameters": count(result.params), "steps": steps} | row | size]


def example_bars(rows: list[Row]) -> list[Row]:
    """From the second size to the largest: what the data need, and a tenth."""
    bars = []
    for solver in ("lbfgs", "dense"):
        _, small, *_, large = (row for row in rows if row["series"] == solver)
        limit = 1.1 * small["peak_bytes"] + large["data_bytes"]
        bars.append(holds(f"{solver}: peak bytes, {large['examples']:,} examples", large["peak_bytes"], limit))
    return bars


# --- memmap --------------------------------------------------------------------------------------------------------


def memmap_points(smoke: bool) -> list[Point]:
    return [{"examples": 2000 if smoke else 1_000_000, "steps": 5, "width": 4 if smoke else 64}]


def measure_memmap(examples: int, steps: int, width: int) -> list[Row]:
    """peak_before_bytes: of the checks, before the solver begins."""
    peaks = []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # here: /tmp may itself be memory
        path = Path(folder) / "x.npy"
        y = Teacher((256,)).write(examples, path)
        x, base = np.load(path, mmap_mode="r"), memory("VmRSS")
        solver = Looking(LBFGS(tolerance=0), lambda problem, w: peaks.append(memory("VmHWM")))
        result = fit_whole(MLP((width,)), (x, y), solver, max_steps=steps, block_size=1000, driver="host")
        size = {"peak_bytes": memory("VmHWM"), "peak_before_bytes": peaks[0], "base_bytes": base}
    step = seconds_per_step(result)
    row = {"seconds_per_step": step, "microseconds_per_example": 1e6 * step / examples, "loss": result.loss}
    return [{"series": "lbfgs", "examples": examples, "steps": steps, "file_bytes": x.nbytes} | row | size]


def memmap_bars(rows: list[Row]) -> list[Row]:
    (row,) = rows
    return [holds("lbfgs: peak bytes over those of the file", row["peak_bytes"] / row["file_bytes"], 1.0)]


# --- devices -------------------------------------------------------------------------------------------------------


def device_points(smoke: bool) -> list[Point]:
    """Blocks of several sizes for one device and for all of them."""
    size = {"examples": 200, "steps": 3} if smoke else {"examples": 2000, "steps": 20}
    dtypes, numbers = (("float32",), (1, 2)) if smoke else (("float32", "float64"), (1, 2, 3, 4))
    blocks = {n: [250] if smoke or n in (2, 3) else [250, 60, 1000] for n in numbers}
    runs = [(dtype, driver, n) for dtype in dtypes for driver in ("host", "compiled") for n in numbers]
    names = ("dtype", "driver", "devices")
    return [dict(zip(names, run, strict=True)) | {"blocks": blocks[run[2]]} | size for run in runs]


def measure_devices(dtype: str, driver: str, devices: int, blocks: list[int], examples: int, steps: int) -> list[Row]:
    """The start is the same in both dtypes."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    x, y = Teacher((32,)).fill(examples)
    model, x = MLP((16,)), x.astype(dtype)
    params: Any = model.init(jax.random.key(0), np.float32(x[:1]))["params"]
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    placed = {"devices": jax.devices()[:devices], "driver": driver, "max_steps": steps}
    rows = []
    newton = {form: GaussNewton(tolerance=0, linear_solve=form) for form in ("dense", "sample", "cg")}
    for name, solver in ({"lbfgs": LBFGS(tolerance=0)} | newton).items():
        for block in blocks:
            result = fit_whole(model, (x, y), solver, params, block_size=block, **placed)
            row = {"driver": driver, "devices": devices, "block_size": block, "examples": examples}
            row |= {"loss": result.loss, "seconds_per_step": seconds_per_step(result), "steps": result.n_steps}
            rows.append({"series": f"{name}-{dtype}"} | row)
    return rows


def device_bars(rows: list[Row]) -> list[Row]:
    """Against one device and the host driver, which come first."""
    bars = []
    for name in sorted({row["series"] for row in rows}):
        losses = series(rows, name)["loss"]
        worst = max(abs(loss / losses[0] - 1) for loss in losses)
        bars.append(holds(f"{name}: largest relative difference of losses", worst, 1e-6))
    return bars


# --- parameters ----------------------------------------------------------------------------------------------------

IMAGE, FEATURES = (16, 16, 3), (64,)
MODELS = {
    "mlp14": (MLP((14,)), FEATURES),  # P = 1,060
    "cnn3k": (CNN((8, 12)), IMAGE),
    "mlp65": (MLP((65,)), FEATURES),  # 4,885
    "cnn10k": (CNN((16, 32)), IMAGE),
    "mlp265": (MLP((265,)), FEATURES),  # 19,885
}


def parameter_points(smoke: bool) -> list[Point]:
    """At P = 20,000 with few rows only: a row a parameter takes a CPU a minute a step. A GPU compiles for longer."""
    if smoke:
        return [{"model": "mlp14", "ratio": 0.2, "examples": 200, "rounds": 1}]
    if not ON_CPU:
        runs = (("mlp14", 0.5), ("cnn3k", 0.5), ("cnn10k", 0.5), ("cnn10k", 0.05), ("mlp265", 0.5), ("mlp265", 0.05))
        return [{"model": name, "ratio": ratio, "examples": 4000, "rounds": 3} for name, ratio in runs]
    ratios = dict.fromkeys(MODELS, (1.1, 0.2, 0.05)) | {"mlp265": (0.05,)}
    rounds = dict.fromkeys(MODELS, 3) | {"cnn10k": 1, "mlp265": 1}
    runs = [{"model": name, "ratio": ratio} for name in MODELS for ratio in ratios[name]]
    return [run | {"examples": 4000, "rounds": rounds[run["model"]]} for run in runs]


def measure_parameters(model: str, ratio: float, examples: int, rounds: int) -> list[Row]:
    """The forms in turns: noise strikes all of them. auto: what the cost model picks, from modelled_flops.

    Of the later half of the steps: conjugate gradients need more products there. price_per_step: seconds, and those of
    as many gradients as the step's sample_grads, for these are what products are paid for with.
    """
    (network, shape), names = MODELS[model], ("dense", "sample", "cg")
    data, solver = Teacher(shape).fill(examples), GaussNewton(curvature_ratio=ratio)
    picked: Row = {}

    def look(problem: Any, w: Array) -> None:
        forms = {curvature.Dense: "dense", curvature.SampleSpace: "sample", curvature.MatrixFree: "cg"}
        recipe, dampings = recipe_of(solver, w.size), len(solver.damping_factors)
        picked["auto"] = forms[type(curvature.form_of(problem, recipe, "auto", dampings))]
        picked["modelled_flops"] = curvature.form_flops(problem, recipe, dampings)
        picked["parameters"], picked["gradient_flops"] = w.size, curvature.gradient_flops(problem)
        evaluate = problem.evaluate if ON_CPU else functools.partial(jax.jit(type(problem).evaluate), problem)
        evaluate(w)  # compiles
        gradients.append(clocked(evaluate, w)[1] / examples)

    gradients: list[float] = []  # seconds of one
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            looking = Looking(dataclasses.replace(solver, linear_solve=name), look)
            steps[name] += later_steps(fit_whole(network, data, looking, max_steps=6))
    row = {"model": model, "ratio": ratio, "examples": examples} | picked
    row["seconds_per_gradient"] = statistics.median(gradients)
    return [{"series": f"{name}-{ratio}", "form": name} | row | _price(steps[name], row) for name in names]


def later_steps(result: FitResult) -> list[tuple[float, float]]:
    """Seconds and sample_grads of each step of the later half."""
    costs = (np.diff(result.history[name], prepend=0).tolist() for name in ("seconds", "sample_grads"))
    return list(zip(*costs, strict=True))[result.n_steps // 2 :]


def _price(steps: list[tuple[float, float]], row: Row) -> Row:
    seconds, grads = (statistics.median(values) for values in zip(*steps, strict=True))
    price = seconds + grads * row["seconds_per_gradient"]
    return {"seconds_per_step": seconds, "grads_per_step": grads, "price_per_step": price}


def parameter_bars(rows: list[Row]) -> list[Row]:
    """auto's choice against the cheapest form."""
    bars = []
    for model, ratio in dict.fromkeys((row["model"], row["ratio"]) for row in rows):
        prices = {row["form"]: row for row in rows if (row["model"], row["ratio"]) == (model, ratio)}
        picked, best = next(iter(prices.values()))["auto"], min(row["price_per_step"] for row in prices.values())
        dearer = prices[picked]["price_per_step"] / best
        bars.append(holds(f"{model}, ratio {ratio}: auto ({picked}) over the cheapest form", dearer, 1.5))
    return bars


# --- linalg --------------------------------------------------------------------------------------------------------


def linalg_points(smoke: bool) -> list[Point]:
    if smoke:
        return [{"parameters": 300, "rows": 2048, "side": 512, "repeats": 2}]
    sizes = ((3000, 20_000, 5), (9400, 10_000, 3))
    return [{"parameters": p, "rows": n, "side": 4096, "repeats": repeats} for p, n, repeats in sizes]


def measure_linalg(parameters: int, rows: int, side: int, repeats: int) -> list[Row]:
    """Operations a second, symmetric ones counted by half: n P^2 and P^3 / 3. In turns: noise strikes all three."""
    block, square = (Teacher((width,)).fill(n)[0] for n, width in ((1024, parameters), (side, side)))
    add, factor = jax.jit(linalg.add_gram, donate_argnums=0), jax.jit(linalg.cholesky)
    product = jax.jit(functools.partial(jnp.dot, precision="highest"))
    blocks, block, square = -(-rows // 1024), jnp.asarray(block), jnp.asarray(square)
    ridge = jnp.eye(parameters, dtype=block.dtype)

    def gram() -> Array:
        total = jnp.zeros_like(ridge)
        for _ in range(blocks):
            total = add(total, block)
        return total

    rates: dict[str, list[float]] = {"product": [], "gram": [], "cholesky": []}
    for _ in range(repeats + 1):  # the first time compiles
        _, seconds = clocked(product, square, square)
        rates["product"].append(2 * side**3 / seconds)
        total, seconds = clocked(gram)
        rates["gram"].append(blocks * 1024 * parameters**2 / seconds)
        a = total / (blocks * 1024) + ridge
        _, seconds = clocked(factor, jax.block_until_ready(a))
        rates["cholesky"].append(parameters**3 / 3 / seconds)
    middle = {f"{name}_rate": statistics.median(values[1:]) for name, values in rates.items()}
    return [{"series": "rates", "parameters": parameters, "rows": rows} | middle]


def linalg_bars(rows: list[Row]) -> list[Row]:
    bars = []
    for row in rows:
        for name in ("gram", "cholesky"):
            ratio = row[f"{name}_rate"] / row["product_rate"]
            bars.append(holds(f"P = {row['parameters']:,}: rate of {name} over the product's", ratio, at_least=0.6))
    return bars


# --- cg ------------------------------------------------------------------------------------------------------------


def cg_points(smoke: bool) -> list[Point]:
    """most: products that a solve may take."""
    if smoke:
        return [{"what": "matrix", "size": 64, "most": 500}, {"what": "network", "size": 200, "most": 10}]
    return [{"what": "matrix", "size": 1000, "most": 2000}, {"what": "network", "size": 4000, "most": 500}]


def measure_cg(what: str, size: int, most: int) -> list[Row]:
    return (residuals_of_a_matrix if what == "matrix" else products_of_a_network)(size, most)


def residuals_of_a_matrix(size: int, most: int) -> list[Row]:
    """float32 on a matrix of known spectrum, from 1 to 1e-3; the residual in float64."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    a, b = np.float32(basis * np.logspace(0, -3, size) @ basis.T), rng.standard_normal(size)
    rows, on_device = [], jnp.asarray(a)
    for norm in (1.0, 1e-2, 1e-4, 1e-6):
        right = np.float32(norm * b / np.linalg.norm(b))
        start, solve = jnp.zeros(size, np.float32), curvature.conjugate_gradient
        x, products = solve(
            jax.lax.while_loop, on_device.__matmul__, lambda v: v, jnp.asarray(right), start, 1e-5, 2000
        )
        left = np.float64(right) - np.float64(a) @ np.asarray(x, np.float64)
        residual = np.linalg.norm(left) / np.linalg.norm(np.float64(right))
        rows.append({"series": "matrix", "norm": norm, "residual": float(residual), "products": int(products)})
    return rows


def products_of_a_network(examples: int, most: int) -> list[Row]:
    """The Gauss-Newton system of a network after five steps, without a preconditioner and with some."""
    model, data = CNN((8, 12)), Teacher(IMAGE).fill(examples)
    params = fit_whole(model, data, GaussNewton(), max_steps=5).params
    rows: list[Row] = []

    def look(problem: Any, w: Array) -> None:
        evaluation = problem.evaluate(w, uncertain=True)
        for preconditioner in (0, 64, 256, 1024):
            rows.extend(_systems(problem, w, evaluation, preconditioner, most))
        rows.extend(_norms(problem, w, evaluation, most))

    fit_whole(model, data, Looking(GaussNewton(), look), params)
    return rows


def _form(problem: Any, w: Array, uncertainty: Any, rows: int, bounds: tuple[float, int]) -> tuple[Any, Any, float]:
    """The matrix-free form, with its sample taken, and the seconds of that; bounds: tolerance and most steps of CG."""
    recipe = recipe_of(GaussNewton(cg_tolerance=bounds[0], cg_max_steps=bounds[1]), w.size)
    form = curvature.MatrixFree(recipe, max(rows, 1))
    renew = functools.partial(form.renewed, problem, w, uncertainty, form.empty(problem, w), jax.random.key(0))
    renew()  # compiles
    (kept, _), seconds = clocked(renew)
    return form, kept, seconds


def _systems(problem: Any, w: Array, evaluation: Any, preconditioner: int, most: int) -> list[Row]:
    """Products to a residual of 1e-2, our default."""
    form, kept, sampling = _form(problem, w, evaluation.uncertainty, preconditioner, (1e-2, most))
    scale, _ = form.mean_diagonal(problem, w, kept, jax.random.key(1))
    solve = functools.partial(_solve, form, problem, w, kept, evaluation.grad, preconditioner)
    solve(scale)  # compiles
    rows = []
    for fraction in (1e-1, 1e-2, 1e-3):
        (_, products), seconds = clocked(solve, fraction * scale)
        row = {"preconditioner": preconditioner, "damping": fraction, "products": int(products)}
        rows.append({"series": "network"} | row | {"solve_seconds": seconds, "sample_seconds": sampling})
    return rows


def _solve(
    form: Any, problem: Any, w: Array, kept: Any, grad: Array, preconditioner: int, damping: Array
) -> tuple[Array, Any]:
    """The solution, and the products that it took."""
    if preconditioner:
        (solution,), _, examples = form.solve(problem, w, kept, damping[None], grad)
        return solution, examples // kept.sample.count

    def product(v: Array) -> Array:
        return problem.product(w, v, kept.sample) + damping * v

    loop, recipe = problem.driver.while_loop, form.recipe
    bounds = recipe.cg_tolerance, recipe.cg_max_steps
    return curvature.conjugate_gradient(loop, product, lambda v: v, -grad, kept.solution, *bounds)


def _norms(problem: Any, w: Array, evaluation: Any, most: int) -> list[Row]:
    """Residuals of the network's own system, its right-hand side scaled."""
    form, kept, _ = _form(problem, w, evaluation.uncertainty, 256, (1e-5, most))
    scale, _ = form.mean_diagonal(problem, w, kept, jax.random.key(1))
    rows, damping = [], 1e-1 * scale
    for norm in (1.0, 1e-2, 1e-4, 1e-6):
        right = evaluation.grad * (norm / evaluation.norm)
        solution, products = _solve(form, problem, w, kept, right, 256, damping)
        left = right + problem.product(w, solution, kept.sample) + damping * solution
        residual = float(jnp.linalg.norm(left / norm))  # divided first: squares of 1e-12 do not fit float32
        rows.append({"series": "network-norms", "norm": norm, "residual": residual, "products": int(products)})
    return rows


def cg_bars(rows: list[Row]) -> list[Row]:
    bars = []
    for name in ("matrix", "network-norms"):
        worst = max(series(rows, name)["residual"])
        bars.append(holds(f"{name}: largest relative residual of right-hand sides from 1 to 1e-6", worst, 1e-4))
    return bars


# --- the parts -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """points: the arguments of each measurement, less of them for a smoke test. bars: what all rows must hold."""

    points: Callable[[bool], list[Point]]
    measure: Callable[..., list[Row]]
    bars: Callable[[list[Row]], list[Row]]


PARTS = {
    "examples": Part(example_points, measure_examples, example_bars),
    "memmap": Part(memmap_points, measure_memmap, memmap_bars),
    "devices": Part(device_points, measure_devices, device_bars),
    "parameters": Part(parameter_points, measure_parameters, parameter_bars),
    "linalg": Part(linalg_points, measure_linalg, linalg_bars),
    "cg": Part(cg_points, measure_cg, cg_bars),
}


OF_THE_HOST = {"memmap", "devices"}


class Job:
    """One part: its points, and the record that they make together."""

    def __init__(self, name: str, arguments: Arguments):
        self.arguments, self.part, self.plain_name = arguments, PARTS[name], name
        self.name = records.named(name, arguments.smoke)
        self.points = self.part.points(arguments.smoke)

    @property
    def record_path(self) -> Path:
        """Where the record of the part is, or will be."""
        return self.arguments.results / "scaling" / f"{self.name}.json"

    def path(self, point: Point) -> Path:
        """Where the rows of a point are kept."""
        values = ("+".join(map(str, v)) if isinstance(v, list) else str(v) for v in point.values())
        names = ",".join(f"{key}={value}" for key, value in zip(point, values, strict=True))
        return self.arguments.out / "parts" / self.name / f"{names}.json"

    def show(self) -> None:
        """Print the state of every point."""
        for point in self.points:
            path = self.path(point)
            done = self.record_path.exists() or path.exists()
            print(f"part={self.name} {path.stem}: {'done' if done else 'to do'}")

    def record(self) -> dict[str, Any]:
        """The part's record, measured unless there is one."""
        if self.arguments.again:
            for path in (self.record_path, *map(self.path, self.points)):
                path.unlink(missing_ok=True)
        if self.record_path.exists():
            print(f"{self.name}: has a result already (--again runs it anew)")
        else:
            records.environment()  # reads the commit now: when a point is kept there may be another one
            rows = [row for point in self.points for row in self._rows(point)]
            curves = {name: series(rows, name) for name in dict.fromkeys(row["series"] for row in rows)}
            config = {"part": self.plain_name, "points": self.points}
            final, kept = {"bars": self.part.bars(rows)}, list(map(self.path, self.points))
            record = records.new("scaling", self.name, config, curves, final, kept)
            records.write(record, self.arguments.results)
        print(f"record: {self.record_path}")
        return records.read(self.record_path)

    def _rows(self, point: Point) -> list[Row]:
        path = self.path(point)
        if not path.exists():
            print(f"{self.name}: {path.stem}", flush=True)
            records.keep(in_own_process({"part": self.plain_name} | point), path, point)
        return records.kept(path)


def in_own_process(point: Point) -> list[Row]:
    """The rows of a point, measured where nothing else has used memory; CPU devices where it wants several."""
    several = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # else this process holds most of a GPU's memory
    environment = os.environ | own | (several if "devices" in point else {})
    command = [sys.executable, "-m", "experiments.scaling", "--worker", json.dumps(point)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def series(rows: list[Row], name: str) -> dict[str, list]:
    """The curve of that name."""
    return columns([{k: v for k, v in row.items() if k != "series"} for row in rows if row["series"] == name])


def print_table(made: list[dict[str, Any]]) -> None:
    """A row a bar."""
    table = Table(title="scaling: what was measured against its bar", title_justify="left")
    for heading in ("part", "bar", "measured", "limit", "holds"):
        table.add_column(heading, justify="right" if heading in ("measured", "limit") else "left")
    for record in made:
        for bar in record["final"]["bars"]:
            numbers = f"{bar['measured']:.4g}", f"{bar['sign']} {bar['limit']:.4g}"
            table.add_row(record["name"], bar["bar"], *numbers, "yes" if bar["holds"] else "NO")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
