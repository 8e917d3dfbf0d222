"""L-BFGS of optax, jaxopt, optimistix, scipy and torch, and Levenberg-Marquardt: all on one loss, from one start.

Problem and Meter are what the race gives to every solver, ours included. Every L-BFGS remembers 20 pairs; every other
setting of a peer is its library's default.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments.data import load
from experiments.models import MLP
from experiments.runs import Arrays, fit_whole

MEMORY = 20  # pairs of every L-BFGS: our default, where the peers' is 10
SLOW, SLOW_STEPS = (10.0, 30)  # a run ends, from step 30 on, where a step takes more than 10 s on average


# --- the problem ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """A problem: model, data, and how it is run.

    blocks: sizes of which the fastest bare gradient picks ours. overhead_examples: further numbers of examples at which
    the overhead is measured: what a step adds to its evaluation hardly grows with them.
    """

    model: nn.Module
    data: str
    examples: int
    loss: str = "softmax_cross_entropy"
    steps: int = 100
    blocks: tuple[int, ...] = (128,)
    l2: float = 1e-4
    overhead_steps: int = 30
    overhead_examples: tuple[int, ...] = ()


class Problem:
    """One loss, with the start and the data that every solver gets."""

    def __init__(self, setting: Setting, seed: int):
        self.setting, self.seed, self.model = setting, seed, setting.model
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

    def slow(self, step: int, seconds: float) -> bool:
        """Whether a run that takes so long ends here."""
        return step >= SLOW_STEPS and seconds / step > SLOW

    def add(self, step: int, evaluations: float, loss: float, seconds: float | None = None) -> None:
        """A row; one of the same step is replaced."""
        seconds = time.perf_counter() - self._begun if seconds is None else seconds
        if step < 1:
            return
        if self.rows and self.rows[-1]["step"] == step:
            self.rows.pop()
        if self.slow(step, seconds):
            self.limit = min(self.limit, step)
        row = {"step": int(step), "evaluations": float(evaluations), "seconds": seconds, "loss": float(loss)}
        self.rows.append(row)


# --- the peers -----------------------------------------------------------------------------------------------------


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


def optax_lbfgs(problem: Problem, meter: Meter) -> None:
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


def jaxopt_lbfgs(problem: Problem, meter: Meter) -> None:
    with _quiet():  # it says on import that nobody maintains it
        import jaxopt

    solver = jaxopt.LBFGS(problem.objective, history_size=MEMORY)

    @jax.jit
    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, state = solver.update(*carry, x, y)
        return (params, state), (state.iter_num, jaxopt_evaluations(state), state.value, False)

    start = problem.params, jax.jit(solver.init_state)(problem.params, *problem.on_device)
    drive(step, start, problem.on_device, meter)


def jaxopt_evaluations(state: Any) -> Any:
    """Without the one that it counts each step for a function's auxiliary output: there is none, and XLA drops it."""
    return state.num_fun_eval - state.iter_num


def jaxopt_run(problem: Problem, meter: Meter) -> None:
    """Its own loop, one program: on a CPU a convolution in it is no longer one outside of a loop.

    For that it is here, and takes the steps of a slow solver: once begun it cannot be stopped.
    """
    with _quiet():
        import jaxopt

    class Watched(jaxopt.LBFGS):
        def update(self, params: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
            done = super().update(params, state, *args, **kwargs)
            row = done.state.iter_num, jaxopt_evaluations(done.state), done.state.value
            jax.debug.callback(meter.add, *row, ordered=True)
            return done

    solver = Watched(problem.objective, history_size=MEMORY, maxiter=min(meter.limit, SLOW_STEPS), tol=0)
    run = jax.jit(solver.run).lower(problem.params, *problem.on_device).compile()
    meter.begin()
    jax.block_until_ready(run(problem.params, *problem.on_device))
    jax.effects_barrier()


def optimistix_lbfgs(problem: Problem, meter: Meter) -> None:
    """A rejected point costs a loss alone."""
    import optimistix

    solver = optimistix.LBFGS(rtol=1e-9, atol=1e-9, history_length=MEMORY)
    _optimistix(problem, meter, solver, problem.objective, price=lambda tried, kept: kept + (tried - kept) / 3)


def levenberg_marquardt(problem: Problem, meter: Meter) -> None:
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


def scipy_lbfgs(problem: Problem, meter: Meter) -> None:
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


def torch_lbfgs(problem: Problem, meter: Meter) -> None:
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
    """The library, which no extra of the project installs, and how an array enters it, where JAX computes, too."""
    with _quiet():
        torch = importlib.import_module("torch")
    torch.backends.cudnn.allow_tf32 = False  # float32 for everybody
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return torch, lambda a: torch.from_numpy(np.array(a, order="C")).to(device)


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


# Peer: what runs it, and the library that it needs.
PEERS = {
    "optax": (optax_lbfgs, "optax"),
    "jaxopt": (jaxopt_lbfgs, "jaxopt"),
    "jaxopt_run": (jaxopt_run, "jaxopt"),
    "optimistix": (optimistix_lbfgs, "optimistix"),
    "levenberg_marquardt": (levenberg_marquardt, "optimistix"),
    "scipy": (scipy_lbfgs, "scipy"),
    "torch": (torch_lbfgs, "torch"),
}
