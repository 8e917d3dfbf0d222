"""finetune: optax on mini-batches of the full set. Also every Adam and SGD baseline, and the warm-up of fit_subset."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from subsetopt import checks
from subsetopt.checkpoint import Checkpoint, Resumable
from subsetopt.drivers import Compiled
from subsetopt.model import Params, mask_tree
from subsetopt.pages import Pages
from subsetopt.problem import GRADIENT, LOSS, Objective, Problem, checksum, held_out, identity, make_problem, placed
from subsetopt.progress import Bar
from subsetopt.solve import Progress, Status

WARM_UP_BATCH = 32  # measured, at fixed rates: twice as far in an epoch as batches of 128
_SHOWN_SCALES = 1e-3, 1.0, 1e3, 1.0  # of gradients by whose updates an optimizer is known again
_TELLING_STEPS = 20  # of fewer a tenth is one batch
_STEPS_OF_PAGES = 32  # after which mapped pages go back: an example of a random place maps 64 kB, however small it is


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """Outcome of `finetune`.

    params: the best parameters (lowest validation loss; without validation data the last ones). loss: mean loss of the
    full training set at params, measured once at the end and not part of the cost; NaN where Ctrl-C came then.
    validation_loss: at params, or None. sample_grads: gradients of training examples, and a third for each validation
    example evaluated. seconds: without compile_seconds. history: equal-long lists, one entry an epoch (epoch, step,
    loss: mean over the epoch's mini-batches as they were met, validation_loss, sample_grads, seconds).
    """

    params: Params
    loss: float
    validation_loss: float | None
    status: Status
    n_steps: int
    epochs: int
    sample_grads: float
    seconds: float
    compile_seconds: float
    history: dict[str, list]

    @property
    def message(self) -> str:
        """Why it ended, in words."""
        return _MESSAGES.get(self.status, self.status.message)

    @property
    def success(self) -> bool:
        """Whether it ran to its planned end or to its early stop."""
        return self.status in _MESSAGES

    def __str__(self) -> str:
        validation = "" if self.validation_loss is None else f", validation loss {self.validation_loss:.4g}"
        return (
            f"{self.status.name}: {self.message}\nloss {self.loss:.4g}{validation} after {self.epochs} epochs, "
            f"{self.sample_grads:,.0f} sample_grads, {self.seconds:.1f} s (+ {self.compile_seconds:.1f} s compiling)"
        )


_ADAM = optax.adam(1e-3)  # one object, so that equal calls compile their step once
_MESSAGES = {
    Status.MAX_STEPS: "All epochs are done.",
    Status.CONVERGED: "The validation loss has not improved for `patience` epochs; the best parameters are kept.",
}


def finetune(
    model: Any,
    data: tuple[Any, Any],
    params: Params | None = None,
    *,
    loss: str | Callable[[Array, Array], Array] = "softmax_cross_entropy",
    optimizer: optax.GradientTransformation | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    trainable: Any = None,
    validation: tuple[Any, Any] | None = None,
    patience: int | None = None,
    devices: Any = None,
    driver: str = "auto",
    callback: Callable[[Progress], Any] | None = None,
    progress: bool = True,
    checkpoint: Any = None,
) -> FinetuneResult:
    """Train on mini-batches of the full set with an optax optimizer.

    Args:
        model, data, params, loss, trainable, seed, devices: as in `fit_subset`; the seed shuffles (and initialises a
            linen module when params is None). Steps are taken on the first device, losses spread over all.
        optimizer: any optax transformation, schedules included; None: optax.adam(1e-3). It sees the whole parameter
            tree; updates of entries that are not trainable are dropped.
        epochs: passes over the data. The last mini-batch of an epoch may be smaller than `batch_size`.
        validation: (x, y) whose loss is measured after each epoch; the best parameters are kept.
        patience: epochs without a new best validation loss after which to stop; None: never.
        driver: "host": a program a mini-batch, also from data larger than the device; "compiled": one an epoch, data on
            the device; "auto": compiled on accelerators that hold the data, host elsewhere.
        callback: called with a `Progress` after each epoch; return True to stop.
        progress: show a progress bar (plain lines in a log).
        checkpoint: folder to save to and to resume from.

    Raises:
        ValueError: for any misuse, before the first step.
    """
    checks.whole_number("epochs", epochs, 1)
    checks.whole_number("batch_size", batch_size, 1)
    checks.seed(seed)
    checks.folder("checkpoint", checkpoint)
    epochs, batch_size, seed = int(epochs), int(batch_size), int(seed)  # JSON knows no NumPy numbers
    checks.function("callback", callback)
    with jax.default_matmul_precision("highest"):  # as in fit_subset: losses that compare
        problem, w = make_problem(model, data, params, loss=loss, trainable=trainable, seed=seed, devices=devices)
        own = problem.driver.devices
        with own.context():
            checks.patience(patience, validation)
            watched = None if validation is None else held_out(problem, validation, loss, w)
            optimizer = _ADAM if optimizer is None else optimizer
            batch_size = min(batch_size, problem.examples)
            run = _Run(problem, placed(problem, driver), w, optimizer, trainable, batch_size, seed, watched)
            plan = {"call": "finetune", "batch_size": batch_size, "seed": seed}
            saver = Checkpoint(checkpoint, {} if checkpoint is None else plan | run.description(w), own)
            with run.together():
                with Bar("finetune", epochs, progress) as bar:
                    run.loop(epochs, patience, callback, bar, saver)
                return run.result()


class _Run(Resumable):
    """One fine-tuning run: what changes from epoch to epoch, and the loop over epochs."""

    numbers = ("nonfinite", "epoch", "steps", "cost", "best_loss", "best_epoch")
    arrays = ("params", "opt_state", "best")

    def __init__(self, host, problem, w, optimizer, trainable, batch_size, seed, held_out):
        super().__init__(
            ("epoch", "step", "loss", "validation_loss", "sample_grads", "seconds"), problem.driver.devices
        )
        # The same problem twice: for losses, and for the steps, which the first device takes.
        self.problem, self.stepped = host, self.devices.here(problem)
        self.optimizer, self.batch_size, self.seed = (optimizer, batch_size, seed)
        self.held_out, self.status, self.epoch, self.steps, self.cost = (held_out, Status.RUNNING, 0, 0, 0.0)
        params = host.objective.model.unflatten(w, host.constants)
        self.mask = None if trainable is None else mask_tree(params, trainable)
        checks.optimizer(optimizer, params)
        self.params, self.opt_state = params, self.devices.adopt(optimizer.init(params))
        self.best, self.best_loss, self.best_epoch = params, math.inf, 0
        self.nonfinite = False  # the last epoch's result, which was dropped

    # --- one epoch -------------------------------------------------------------------------------------------------

    def loop(self, epochs: int, patience: int | None, callback: Any, bar: Bar, saver: Checkpoint) -> None:
        try:
            with self.kept():
                if not self.resume(saver):
                    self.complete()
                while self._goes_on(epochs, patience):
                    progress = self.one_epoch()
                    self.complete()
                    bar.update(self.epoch, f"loss {progress.loss:.4g}")
                    if self.stopped_by(callback, progress):
                        self.status = Status.STOPPED
        except KeyboardInterrupt:
            self.status = Status.STOPPED

    def _goes_on(self, epochs: int, patience: int | None) -> bool:
        """Whether there is another epoch to train; asked first of all, for a run read back may have ended."""
        if self.status == Status.RUNNING:
            self.status = self._ended(epochs, patience)
        return self.status == Status.RUNNING

    def _ended(self, epochs: int, patience: int | None) -> Status:
        if self.nonfinite:
            return Status.NONFINITE
        if patience is not None and self.epoch - self.best_epoch >= patience:
            return Status.CONVERGED
        return Status.MAX_STEPS if self.epoch >= epochs else Status.RUNNING

    def one_epoch(self) -> Progress:
        batches = list(minibatches(self.problem.examples, self.batch_size, self.seed, self.epoch))
        at, means, _ = descend(
            self.stepped, self.optimizer, (self.params, self.opt_state), self.mask, batches, self.batch_size
        )
        loss = float(np.dot(means, [len(batch) for batch in batches])) / self.problem.examples
        finite = math.isfinite(loss) and bool(jnp.all(jnp.isfinite(_flatten(self.problem, at[0]))))
        self.nonfinite = not finite
        if finite:  # else the parameters before this epoch stay
            self.params, self.opt_state = at
        self.epoch, self.steps = self.epoch + 1, self.steps + len(batches)
        self.cost += GRADIENT * self.problem.examples
        return self._record(loss, self._keep_best())

    def _keep_best(self) -> float | None:
        """By the validation loss, which it gives."""
        if self.held_out is None:
            self.best = self.params
            return None
        loss = _mean_loss(self.held_out, _flatten(self.problem, self.params))
        self.cost += LOSS * self.held_out.examples
        # NaN is what anything is better than, so that what was trained is kept, and the result tells.
        if self.best_epoch == 0 or math.isnan(self.best_loss) or loss < self.best_loss:
            self.best, self.best_loss, self.best_epoch = self.params, loss, self.epoch
        return loss

    def _record(self, loss: float, validation_loss: float | None) -> Progress:
        row = (self.epoch, self.steps, loss, validation_loss, self.cost, self.watch.seconds)
        for column, value in zip(self.history.values(), row, strict=True):
            column.append(value)
        p, params = self.problem, jax.tree.map(lambda a: a, self.params)  # a callback may change its own tree
        where = (-1, p.examples, p.ratio, self.steps)
        return Progress(*where, loss, validation_loss, math.nan, self.cost, row[-1], params)

    # --- begin and end ---------------------------------------------------------------------------------------------

    def description(self, w: Array) -> dict[str, Any]:
        """What a resumed run must share with the first one, beside its numbers."""
        validation = None if self.held_out is None else [checksum(self.held_out.x), checksum(self.held_out.y)]
        optimizer = _first_lengths(self.optimizer, self.params, self.opt_state).tolist()
        return {"validation": validation, "lengths of the first updates": optimizer} | identity(self.problem, w)

    def result(self) -> FinetuneResult:
        seconds, compile_seconds, loss = self.watch.seconds, self.watch.compile_seconds, math.nan
        try:
            loss = _mean_loss(self.problem, _flatten(self.problem, self.best))
        except KeyboardInterrupt:  # nothing is lost but this
            self.status = Status.STOPPED
        validation = self.best_loss if self.best_epoch else None  # interrupted before it was measured
        totals = (self.steps, self.epoch, self.cost, seconds, compile_seconds)
        return FinetuneResult(self.best, loss, validation, self.status, *totals, self.history)


def minibatches(examples: int, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """One epoch's mini-batches of indices; the order depends on seed and epoch only, so a resumed run has the same."""
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    for start in range(0, examples, batch_size):
        yield order[start : start + batch_size]


def descend(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    at: tuple[Params, Any],
    mask: Params | None,
    batches: Sequence[np.ndarray],
    batch_size: int,
) -> tuple[tuple[Params, Any], np.ndarray, np.ndarray]:
    """Optimizer steps from `at`, params and opt_state, on mini-batches of examples, whose data one device holds.

    Also each one's mean loss before its step (steps,), and the slopes of its examples (steps, batch_size).
    """
    static, shared = (problem.objective, optimizer), (mask, problem.constants["state"])
    rows, weights = _filled(batches, batch_size, problem.dtype)
    if isinstance(problem.driver, Compiled):
        at, told = _steps(static, shared, at, (problem.x, problem.y), (rows, weights))
        return at, *jax.device_get(told)
    each, pages = [], Pages(problem.x, problem.y)
    for step, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        at, told = _step(static, shared, at, (problem.x[row], problem.y[row], weight))
        each.append(told)
        if step % _STEPS_OF_PAGES == 0:
            pages.release()
    pages.release()
    losses, slopes = zip(*jax.device_get(each), strict=True)  # read only now: no step waits for them
    return at, np.stack(losses), np.stack(slopes)


def _filled(batches: Sequence[np.ndarray], batch_size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Rows and weights (steps, batch_size): a smaller batch is filled up with copies of weight zero."""
    rows = np.stack([np.resize(batch, batch_size) for batch in batches])
    sizes = np.array([[len(batch)] for batch in batches])
    return rows, ((np.arange(batch_size) < sizes) / sizes).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def _steps(static: Any, shared: Any, at: Any, data: tuple[Array, Array], batches: tuple[Array, Array]) -> Any:
    """As many steps as there are batches, in one program."""
    x, y = data

    def step(at: Any, batch: tuple[Array, Array]) -> Any:
        rows, weights = batch
        return _step(static, shared, at, (x[rows], y[rows], weights))

    return lax.scan(step, at, batches)


@functools.partial(jax.jit, static_argnums=0)
def _step(static: tuple[Objective, Any], shared: tuple[Any, Any], at: tuple[Params, Any], block: Any) -> Any:
    (objective, optimizer), (mask, state), (params, opt_state), (x, y, weights) = static, shared, at, block

    def mean(params: Params) -> tuple[Array, Array]:
        outputs = objective.model.apply(params, state, x)
        return jnp.sum(weights * objective.loss.values(outputs, y)), objective.loss.slope(outputs, y)

    told, grads = jax.value_and_grad(mean, has_aux=True)(params)
    if mask is not None:
        grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, mask)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers, which strict promotion forbids
        updates, opt_state = optimizer.update(grads, opt_state, params)
        if mask is not None:
            updates = jax.tree.map(lambda u, m: jnp.where(m, u, 0), updates, mask)
        return (optax.apply_updates(params, updates), opt_state), told


@functools.partial(jax.jit, static_argnums=0)
def _first_lengths(optimizer: optax.GradientTransformation, params: Params, opt_state: Any) -> Array:
    """Of updates for random gradients of several scales: by them another optimizer, or another setting, is told.

    But for a schedule that differs only later. Large parameters show a small decay of weights.
    """
    large, lengths = jax.tree.map(lambda p: jnp.full_like(p, 1e3), params), []
    with jax.numpy_dtype_promotion("standard"):
        for i, scale in enumerate(_SHOWN_SCALES):
            gradients = optax.tree.random_like(jax.random.key(i), params)
            updates, opt_state = optimizer.update(optax.tree.scale(scale, gradients), opt_state, large)
            lengths.append(optax.tree.norm(updates))
    return jnp.stack(lengths)


def _flatten(problem: Problem, params: Params) -> Array:
    full = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])
    return full[problem.constants["index"]] if "index" in problem.constants else full


def _mean_loss(problem: Problem, w: Array) -> float:
    return problem.mean_loss(w, problem.whole())


def warm_up(
    problem: Problem, w: Array, mask: Params | None, epochs: float, seed: int
) -> tuple[Array, float, np.ndarray, bool]:
    """Adam on mini-batches of the problem's subset, whose data one device holds; cosine decay to zero.

    Returns the new w (P,), the sample_grads spent, the slopes (N,) that each example showed when it was last met, NaN
    where it never was, and whether it is in doubt that the loss has fallen: by the mini-batches of the first and of the
    last tenth of the steps it has not, or they are too few to say. A first-order start: far from a minimum a
    Gauss-Newton model is not worth its price (heuristic, measured).
    """
    examples = int(problem.count)
    batch_size = min(WARM_UP_BATCH, examples)
    per_epoch = -(-examples // batch_size)
    steps = max(1, round(epochs * per_epoch))
    optimizer = _warm_up_optimizer(steps, problem.parameters)
    params = problem.objective.model.unflatten(w, problem.constants)
    at, cost = (params, problem.driver.devices.adopt(optimizer.init(params))), 0.0
    slopes = np.full(problem.examples, np.nan, problem.dtype)
    losses, sizes = [], []
    for epoch in range(-(-steps // per_epoch)):
        order = itertools.islice(minibatches(examples, batch_size, seed, epoch), steps - epoch * per_epoch)
        batches = [problem.subset[indices] for indices in order]
        at, means, met = descend(problem, optimizer, at, mask, batches, batch_size)
        losses += means.tolist()
        sizes += map(len, batches)
        for batch, slope in zip(batches, met, strict=True):
            slopes[batch] = slope[: len(batch)]
            cost += GRADIENT * len(batch)
    tenth = max(1, steps // 10)
    first = np.average(losses[:tenth], weights=sizes[:tenth])
    last = np.average(losses[-tenth:], weights=sizes[-tenth:])
    return _flatten(problem, at[0]), cost, slopes, steps < _TELLING_STEPS or not last < first


@functools.lru_cache(maxsize=64)  # the same optimizer object, so that the same fit compiles its step once
def _warm_up_optimizer(steps: int, parameters: int) -> optax.GradientTransformation:
    """Adam at a rate of min(25 steps^-1/2, 2) P^-1/2: steps as long whatever P, and shorter where they are many.

    A heuristic, measured on seven problems of 45 to 1,875 steps, as is the rise over the first tenth of them. A fixed
    rate fails on larger networks; without the number of steps it goes too short a way where they are few.
    """
    rate = min(25 / math.sqrt(steps), 2.0) / math.sqrt(parameters)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    # Its eps, and the underflow of its squares, are then relative to the loss's scale.
    return optax.chain(_by_first_gradient(), optax.adam(schedule, eps=1e-12))


def _by_first_gradient() -> optax.GradientTransformation:
    """Gradients over the largest entry of the first one."""

    def init(params: Params) -> Array:
        return jnp.zeros((), jax.tree.leaves(params)[0].dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        largest = optax.tree.norm(updates, ord="inf")
        scale = jnp.where(state > 0, state, largest)
        return jax.tree.map(lambda g: g / jnp.where(scale > 0, scale, 1), updates), scale

    return optax.GradientTransformation(init, update)
