"""Our solvers beside optax, jaxopt, optimistix, scipy and torch: the same losses, starts and float32, one by one.

    python -m experiments.solver_speed                                   everything, an hour and a half on 2 cores
    python -m experiments.solver_speed --only problem=mlp                one problem
    python -m experiments.solver_speed --only problem=cnn,solver=scipy   one run

Each run is a part of its own: what is interrupted goes on with the first unfinished one. Every L-BFGS remembers 20
pairs, every other setting is its library's default. Libraries that are not installed are left out (torch is in no
extra: `pip install torch`).
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

from experiments import jobs
from experiments.data import load
from experiments.models import FAMILY, MLP
from experiments.runs import Arrays, Price, columns, count, fit_whole, gradient_flops
from paper_figures import solver_speed as figure
from subsetopt import LBFGS, GaussNewton, Progress

MEMORY = 20  # pairs of every L-BFGS: our default, where the peers' is 10
OWN_LBFGS = LBFGS(memory=MEMORY, tolerance=0)  # takes all the steps it is given
LONGER = 2  # ours runs on for this many times the steps, to show when it has a peer's last loss
SLOW, SLOW_STEPS = (10.0, 30)  # a run ends, from step 30 on, where a step takes more than 10 s on average
SAME_LOSS = 1e-3  # a loss counts as reached within 0.1 %: on a plateau the last digits are rounding


@dataclasses.dataclass(frozen=True)
class Setting:
    """A problem: model, data, and how it is run. blocks: sizes of which the fastest bare gradient picks ours."""

    model: nn.Module
    data: str
    examples: int
    loss: str = "softmax_cross_entropy"
    steps: int = 100
    blocks: tuple[int, ...] = (128,)
    l2: float = 1e-4
    overhead_steps: int = 30


SETTINGS = {
    "cnn": Setting(FAMILY["mnist28-11k"].model, "mnist", 10_000),
    "mlp": Setting(MLP((120,)), "mnist", 10_000, blocks=(128, 512, 2048, 10_000)),
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
    for record in jobs.run(problems, arguments, picked.get("solver")):
        print_table(record)
        for path in figure.draw([record], arguments.out):
            print(f"figure: {path}")


# --- problems ------------------------------------------------------------------------------------------------------


class Problem:
    """One loss, with the start and the data that every solver gets."""

    def __init__(self, setting: Setting, seed: int):
        self.setting, self.model = setting, setting.model
        self.x, self.y = _data(setting, seed)
        self.params: Any = self.model.init(jax.random.key(seed), self.x[:1])["params"]
        self.on_device = jnp.asarray(self.x), jnp.asarray(self.y)

    def losses(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Per-example losses (n,)."""
        outputs: Any = self.model.apply({"params": params}, x)
        if self.setting.loss == "squared_error":
            return jnp.sum(optax.l2_loss(outputs, y), axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y)

    def objective(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """The whole loss, as users of the peers write it."""
        return jnp.mean(self.losses(params, x, y)) + self.setting.l2 / 2 * optax.tree.norm(params, squared=True)

    def residuals(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Half their sum of squares is the objective of a regression, the penalty included."""
        outputs: Any = self.model.apply({"params": params}, x)
        penalty = self.setting.l2**0.5 * ravel_pytree(params)[0]
        return jnp.concatenate([(outputs - y).ravel() / len(self.x) ** 0.5, penalty])

    def fit(self, solver: Any, block_size: int, **options: Any) -> Any:
        """Our solver on the whole set from the common start."""
        options = {"loss": self.setting.loss, "l2": self.setting.l2, "block_size": block_size} | options
        return fit_whole(self.model, self.on_device, solver, self.params, **options)


def _data(setting: Setting, seed: int) -> Arrays:
    n, rng = setting.examples, np.random.default_rng(seed)
    if setting.data not in ("clusters", "teacher"):
        x, y = load(setting.data, "train")
        return x[:n], y[:n]
    if setting.data == "teacher":
        x = rng.normal(size=(n, 32))
        y = np.tanh(x @ rng.normal(size=(32, 32)) / 32**0.5) @ rng.normal(size=(32, 10)) / 32**0.5
        return x.astype(np.float32), (y + 0.1 * rng.normal(size=y.shape)).astype(np.float32)
    # Overlapping clusters: separable, but only by large weights, so that the loss ends small and not at zero.
    centres, y = 0.6 * rng.normal(size=(10, 32)), rng.integers(0, 10, n)
    return (centres[y] + rng.normal(size=(n, 32))).astype(np.float32), y.astype(np.int32)


# --- a run's rows --------------------------------------------------------------------------------------------------


class Meter:
    """The rows of a run, and when it has run for long enough.

    evaluations: of loss and gradient on the whole set; what else is computed counts by its price in these (a loss
    alone 1/3, a row of the Jacobian of every example 1).
    """

    def __init__(self, steps: int):
        self.limit, self.rows = steps, []
        self.ended = "steps used"
        self._made = time.perf_counter()

    def begin(self) -> None:
        """The clock starts: everything is compiled."""
        self._begun = time.perf_counter()
        self.first_call_seconds = self._begun - self._made

    @property
    def going(self) -> bool:
        """Whether another step is wanted."""
        return not self.rows or self.rows[-1]["step"] < self.limit

    def add(self, step: int, evaluations: float, loss: float, seconds: float | None = None) -> None:
        """A row; one of the same step is replaced."""
        seconds = time.perf_counter() - self._begun if seconds is None else seconds
        if step < 1:
            return
        if self.rows and self.rows[-1]["step"] == step:
            self.rows.pop()
        if step >= SLOW_STEPS and seconds / step > SLOW:
            self.limit = min(self.limit, step)
        row = {"step": int(step), "evaluations": float(evaluations), "seconds": seconds, "loss": float(loss)}
        self.rows.append(row)


def probe() -> float:
    """Seconds of a fixed matrix product: shows what else the machine is doing."""
    product, a = jax.jit(jnp.dot), jnp.ones((1500, 1500), jnp.float32)
    return statistics.median(_seconds(product, a, a) for _ in range(6))


def _seconds(function: Callable, *arguments: Any) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun


# --- solvers -------------------------------------------------------------------------------------------------------


def ours(problem: Problem, meter: Meter, block_size: int, solver: Any, driver: str = "auto") -> None:
    """One of our solvers; its loss and seconds are those that it reports, after each step or each program of steps."""

    def keep(progress: Progress) -> bool:
        evaluations = progress.sample_grads / len(problem.x)
        meter.add(progress.step, evaluations, progress.loss, progress.seconds)
        return not meter.going

    problem.fit(solver, block_size, max_steps=2, driver=driver)
    meter.begin()
    result = problem.fit(solver, block_size, max_steps=meter.limit, callback=keep, driver=driver)
    if meter.going:
        meter.ended = result.status.name


def our_lbfgs(problem: Problem, meter: Meter, block_size: int) -> None:
    ours(problem, meter, block_size, OWN_LBFGS)


def our_compiled_lbfgs(problem: Problem, meter: Meter, block_size: int) -> None:
    """By the other driver, which on a CPU has to be asked for."""
    ours(problem, meter, block_size, OWN_LBFGS, "compiled")


def our_gauss_newton(problem: Problem, meter: Meter, block_size: int) -> None:
    """The classical method where Levenberg-Marquardt is its rival."""
    classical = problem.setting.loss == "squared_error"
    ours(problem, meter, block_size, GaussNewton(curvature_ratio=None) if classical else GaussNewton())


def drive(step: Any, carry: Any, data: Any, meter: Meter) -> None:
    """Compile and repeat a jitted step (carry, x, y) -> carry, (step, evaluations, loss, ended)."""
    compiled = step.lower(carry, *data).compile()
    meter.begin()
    while meter.going:
        carry, row = compiled(carry, *data)
        done, evaluations, loss, ended = jax.device_get(row)
        meter.add(done, evaluations, loss)
        if ended:
            meter.ended = "ended itself"
            break


def optax_lbfgs(problem: Problem, meter: Meter, _: int) -> None:
    optimizer: Any = optax.lbfgs(memory_size=MEMORY)
    value_and_grad = optax.value_and_grad_from_state(problem.objective)

    @jax.jit
    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, state, done, evaluations = carry
        value, grad = value_and_grad(params, x, y, state=state)
        known = {"value": value, "grad": grad, "value_fn": problem.objective}
        updates, state = optimizer.update(grad, state, params, **known, x=x, y=y)
        search: Any = state[-1]
        evaluations = evaluations + search.info.num_linesearch_steps
        carry = optax.apply_updates(params, updates), state, done + 1, evaluations
        return carry, (done + 1, evaluations, search.value, False)

    drive(step, (problem.params, optimizer.init(problem.params), 0, 1), problem.on_device, meter)


def jaxopt_lbfgs(problem: Problem, meter: Meter, _: int) -> None:
    with _quiet():  # it says on import that nobody maintains it
        import jaxopt

    solver = jaxopt.LBFGS(problem.objective, history_size=MEMORY)

    @jax.jit
    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, state = solver.update(*carry, x, y)
        return (params, state), (state.iter_num, state.num_fun_eval, state.value, False)

    start = problem.params, jax.jit(solver.init_state)(problem.params, *problem.on_device)
    drive(step, start, problem.on_device, meter)


def optimistix_lbfgs(problem: Problem, meter: Meter, _: int) -> None:
    """A rejected point costs a loss alone."""
    import optimistix

    solver = optimistix.LBFGS(rtol=1e-9, atol=1e-9, history_length=MEMORY)
    _optimistix(problem, meter, solver, problem.objective, price=lambda tried, kept: kept + (tried - kept) / 3)


def levenberg_marquardt(problem: Problem, meter: Meter, _: int) -> None:
    """Every trial costs its residuals and a Jacobian, priced by its rows though the library takes its columns."""
    import optimistix

    solver = optimistix.LevenbergMarquardt(rtol=1e-9, atol=1e-9)
    rows = problem.y.shape[1]
    _optimistix(problem, meter, solver, problem.residuals, price=lambda tried, kept: tried * (rows + 1 / 3))


def _optimistix(problem: Problem, meter: Meter, solver: Any, of: Callable, price: Callable) -> None:
    """The body of optimistix's own loop, called step by step: outside a loop XLA:CPU compiles it no slower."""
    import equinox

    def fn(params: Any, args: Any) -> tuple[jax.Array, None]:
        return of(params, *args), None

    data, tags, options = problem.on_device, frozenset(), {}
    outputs = jax.eval_shape(of, problem.params, *data)
    state = solver.init(fn, problem.params, data, options, outputs, None, tags)
    arrays, static = equinox.partition(state, equinox.is_array)

    @jax.jit
    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, arrays, tried = carry
        before = equinox.combine(arrays, static)
        params, state, _ = solver.step(fn, params, (x, y), options, before, tags)
        kept, tried = state.num_accepted_steps, tried + 1
        row = kept - 1, price(tried, kept), state.f_info.as_min(), state.terminate
        return (params, equinox.filter(state, equinox.is_array), tried), row

    drive(step, (problem.params, arrays, 0), data, meter)


def scipy_lbfgs(problem: Problem, meter: Meter, _: int) -> None:
    """Fortran's vectors are float64; the loss and its gradient are float32, as everywhere."""
    import scipy.optimize

    start, unravel = ravel_pytree(problem.params)
    evaluations = 0

    @jax.jit
    def value_and_grad(w: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        return jax.value_and_grad(lambda w: problem.objective(unravel(w), x, y))(w)

    def evaluate(w: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations
        evaluations += 1
        value, grad = value_and_grad(np.float32(w), *problem.on_device)
        return float(value), np.asarray(grad, np.float64)

    def keep(intermediate_result: Any) -> None:
        meter.add(len(meter.rows) + 1, evaluations, intermediate_result.fun)
        if not meter.going:
            raise StopIteration

    evaluate(np.asarray(start))
    meter.begin()
    evaluations, endless = 0, {"maxiter": meter.limit, "maxfun": 10**9, "ftol": 0, "gtol": 0}
    options = {"maxcor": MEMORY} | endless
    result = scipy.optimize.minimize(
        evaluate, np.asarray(start), jac=True, method="L-BFGS-B", callback=keep, options=options
    )
    if meter.going:
        meter.ended = f"ended itself: {result.message}"


def torch_lbfgs(problem: Problem, meter: Meter, _: int) -> None:
    """An iteration's row is its last evaluation's, with the lowest loss so far, which is the one that it keeps."""
    torch, data = _torch()
    leaves, objective = torch_twin(problem)
    x, y = data(problem.x), data(problem.y)
    x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x
    y = y.long() if y.ndim == 1 else y
    _same_start(objective(x, y).item(), float(jax.jit(problem.objective)(problem.params, *problem.on_device)))
    lbfgs = functools.partial(torch.optim.LBFGS, history_size=MEMORY, line_search_fn="strong_wolfe", tolerance_grad=0)
    optimizer = lbfgs(leaves, max_iter=meter.limit, max_eval=10**9)
    evaluations, lowest = 0, math.inf

    def closure() -> Any:
        nonlocal evaluations, lowest
        step = optimizer.state[leaves[0]].get("n_iter", 0)
        if step > meter.limit:
            raise StopIteration
        optimizer.zero_grad()
        value = objective(x, y)
        value.backward()
        evaluations, lowest = evaluations + 1, min(lowest, value.item())
        meter.add(step, evaluations, lowest)
        return value

    meter.begin()
    with contextlib.suppress(StopIteration):
        optimizer.step(closure)
    if meter.going:
        meter.ended = "ended itself"


def _same_start(theirs: float, ours: float) -> None:
    if not math.isclose(theirs, ours, rel_tol=1e-5):
        raise ValueError(f"The network in torch starts at a loss of {theirs}, in JAX at {ours}: it is another one.")


def _torch() -> tuple[Any, Callable[[np.ndarray], Any]]:
    """The library, which no extra of the project installs, and how an array enters it."""
    with _quiet():
        torch = importlib.import_module("torch")
    return torch, lambda a: torch.from_numpy(np.array(a, order="C"))


def torch_twin(problem: Problem) -> tuple[list[Any], Callable]:
    """The same network with the same weights: leaves and their objective."""
    torch, data = _torch()
    layers = []
    for layer in problem.params.values():
        kernel = np.asarray(layer["kernel"])
        weights = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        layers.append([data(a).requires_grad_() for a in (weights, layer["bias"])])
    leaves = [leaf for layer in layers for leaf in layer]

    def outputs(x: Any) -> Any:
        *hidden, last = layers
        model: Any = problem.model
        windows = () if isinstance(model, MLP) else model.windows or (2,) * len(hidden)
        for i, window in enumerate(windows):
            step, padding = (2 if i == 0 else 1, 0) if model.strided else (1, "same")
            x = torch.nn.functional.conv2d(x, *hidden[i], step, padding).tanh()
            x = torch.nn.functional.avg_pool2d(x, window)
        if x.ndim == 4:
            x = x.permute(0, 2, 3, 1)  # flax flattens channels last
        x = x.flatten(1)
        for layer in hidden[len(windows) :]:
            x = torch.nn.functional.linear(x, *layer).tanh()
        return torch.nn.functional.linear(x, *last)

    def objective(x: Any, y: Any) -> Any:
        f, penalty = outputs(x), sum((leaf * leaf).sum() for leaf in leaves)
        squared = problem.setting.loss == "squared_error"
        loss = ((f - y) ** 2).sum(1).mean() / 2 if squared else torch.nn.functional.cross_entropy(f, y)
        return loss + problem.setting.l2 / 2 * penalty

    return leaves, objective


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Solver: what runs it, and the library that it needs.
OUR_LBFGS = {"subsetopt": our_lbfgs, "compiled": our_compiled_lbfgs}
OURS = OUR_LBFGS | {"gauss_newton": our_gauss_newton}
PEERS = {
    "optax": (optax_lbfgs, "optax"),
    "jaxopt": (jaxopt_lbfgs, "jaxopt"),
    "optimistix": (optimistix_lbfgs, "optimistix"),
    "levenberg_marquardt": (levenberg_marquardt, "optimistix"),
    "scipy": (scipy_lbfgs, "scipy"),
    "torch": (torch_lbfgs, "torch"),
}
RUNS = OURS | {name: run for name, (run, _) in PEERS.items()}
PARTS = ("blocks", *RUNS, "overhead", "scale")


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
    """Seconds of the bare gradient for each block size, the best of seven."""
    seconds = {}
    for size in problem.setting.blocks:
        evaluate = bare_gradient(problem, size)
        seconds[size] = min(_seconds(evaluate, problem.params) for _ in range(8))
    return {"block_size": min(seconds, key=lambda size: seconds[size]), "bare_seconds": seconds}


def overhead(problem: Problem, block_size: int) -> dict[str, float]:
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

    problem.fit(OWN_LBFGS, block_size, max_steps=problem.setting.overhead_steps, callback=alternate)
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
        squared = self.setting.loss == "squared_error"
        # Inside a compiled loop XLA:CPU's convolutions are as slow for us as for the peers.
        fits = {"levenberg_marquardt": squared, "scale": name == "float32", "compiled": name != "cnn"}
        left_out = {part for part, it_fits in fits.items() if not it_fits}
        parts = [part for part in PARTS if part not in left_out and _installed(name, part)]
        super().__init__(name, parts, arguments, f"-seed{arguments.seed}")

    @functools.cached_property
    def problem(self) -> Problem:
        """The data and the start, once they are needed."""
        return Problem(self.setting, self.seed)

    def measure(self, part: str) -> dict[str, Any]:
        """A solver's run, or what all runs need to know."""
        if part == "blocks":
            return fastest_block(self.problem)
        block_size = self._block_size()
        if part in ("overhead", "scale"):
            return {"overhead": overhead, "scale": scale}[part](self.problem, block_size)
        busy, longer = probe(), LONGER if part in OUR_LBFGS else 1
        meter = Meter(longer * self.setting.steps)
        RUNS[part](self.problem, meter, block_size)
        seconds = {"probe_seconds": busy, "first_call_seconds": meter.first_call_seconds}
        return {"curve": columns(meter.rows), "ended": meter.ended, **seconds}

    def _block_size(self) -> int:
        if not self.path("blocks").exists():
            self.run("blocks")
        return json.loads(self.path("blocks").read_text())["block_size"]

    # --- the record ------------------------------------------------------------------------------------------------

    def contents(self, parts: dict[str, Any]) -> tuple[dict, dict, dict]:
        """A curve a solver; the race."""
        curves = {name: self._priced(part["curve"]) for name, part in parts.items() if name in RUNS}
        return self.config(), curves, summary(parts, self.setting.steps)

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
        setting, model=model, data=data, examples=60, steps=10, blocks=(32, 60), overhead_steps=6
    )


# --- what came out -------------------------------------------------------------------------------------------------


def summary(parts: dict[str, Any], steps: int) -> dict[str, Any]:
    """Each run's loss within the common number of steps, and when ours had the loss that a peer ended with.

    Ours: by the faster of its two drivers.
    """
    drivers = {name: parts[name]["curve"] for name in OUR_LBFGS if name in parts}
    fastest = min(drivers, key=lambda name: drivers[name]["seconds"][-1] / drivers[name]["step"][-1])
    final: dict[str, Any] = {part: parts[part] for part in ("blocks", "overhead", "scale") if part in parts}
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
    size, share = final["blocks"]["block_size"], final["overhead"]["overhead"]
    print(f"blocks of {size}; ours over the bare gradient: {share:+.1%}; ended: {_ends(record)}")
    if "scale" in final:
        print(f"largest difference of parameters, loss scaled: {final['scale']}")


def _ends(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {record['final'][name]['ended']}" for name in record["curves"])


if __name__ == "__main__":
    main(tyro.cli(Arguments))
