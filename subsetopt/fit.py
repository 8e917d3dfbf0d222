"""fit_subset: the stage loop. A subset is solved, it grows, its solution starts the next; the last is the whole set."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from subsetopt import checks
from subsetopt.checkpoint import Checkpoint, Resumable
from subsetopt.drivers import Sample
from subsetopt.finetune import warm_up
from subsetopt.gauss_newton import GaussNewton
from subsetopt.growth import Growth, draw_fresh, draw_order
from subsetopt.model import Model, Params, mask_tree
from subsetopt.problem import LOSS, Problem, identity, make_problem, placed, subset_of
from subsetopt.progress import Bar
from subsetopt.solve import Progress, Solver, State, Status, Step, advance, evaluated

PROBE_EXAMPLES, PROBE_SHARE = (1000, 0.1)  # the probe: 1,000 examples, but at most a tenth of the training set
WARM_UP_EXAMPLES = 320  # tell whether the loss has fallen in the warm-up, where its mini-batches leave doubts
FORMAT = 3  # of a checkpoint: another one where what is kept means something else
REPRESENTATIVE = 0.005  # a stage goes on while the probe's loss falls by 0.5 % from check to check

_STAGE = ("examples", "ratio", "status", "steps", "evals", "sample_grads", "loss", "probe_loss", "seconds")
_HISTORY = ("stage", "examples", "ratio", "step", "loss", "probe_loss", "grad_norm", "sample_grads", "seconds")


@dataclasses.dataclass(frozen=True)
class FitResult:
    """Outcome of `fit_subset`.

    params: shaped like the model's own. loss, grad_norm: on the last subset, at params (l2 included); NaN where Ctrl-C
    came while they were measured. n_steps, n_evals: solver steps and evaluations of a subset's loss and gradient.
    sample_grads: everything the fit computed, in gradients of one example, but a look at 32 examples that checks the
    model before the start. seconds: without compile_seconds. order:
    (N,) the permutation whose prefixes are the nested subsets; with fresh subsets, the order of the first stages' pool
    with the probe at its end. stages: a row a stage. history: equal-long lists, an entry a step. There `loss` is the
    subset's loss after the step, but before it where the subset is fresh: then it is an all but unbiased look at the
    training loss; steps that were one program share its `seconds` in proportion to their cost. driver: "host" or
    "compiled". precision: dtype, and that of matrix products, in the loss and its gradient (matmul) and in the
    curvature.
    """

    params: Params
    loss: float
    grad_norm: float
    status: Status
    message: str
    n_steps: int
    n_evals: int
    sample_grads: float
    seconds: float
    compile_seconds: float
    order: np.ndarray
    stages: list[dict[str, Any]]
    history: dict[str, list]
    driver: str
    precision: dict[str, str]

    @property
    def success(self) -> bool:
        """Whether the fit ended at a goal of its own: converged, representative, or target reached."""
        return self.status.success

    def __str__(self) -> str:
        head = (
            f"{self.status.name}: {self.message}\nloss {self.loss:.4g} after {self.n_steps} steps, "
            f"{self.sample_grads:,.0f} sample_grads, {self.seconds:.1f} s (+ {self.compile_seconds:.1f} s compiling)"
        )
        return "\n".join([head, _table(self.stages)])


def _table(stages: list[dict[str, Any]], most: int = 12) -> str:
    rows = [f"{'stage':>5} {'examples':>9} {'ratio':>8} {'steps':>6} {'loss':>10} {'probe':>10}  status"]
    for i, s in enumerate(stages):
        if len(stages) > most and most // 2 <= i < len(stages) - most // 2:
            if i == most // 2:
                rows.append(f"{'...':>5} {len(stages) - 2 * (most // 2)} more stages")
            continue
        probe = "" if s["probe_loss"] is None else f"{s['probe_loss']:.4g}"
        numbers = f"{i:>5} {s['examples']:>9,} {s['ratio']:>8.3g} {s['steps']:>6} {s['loss']:>10.4g} {probe:>10}"
        rows.append(f"{numbers}  {s['status']}")
    return "\n".join(rows)


def fit_subset(
    model: Any,
    data: tuple[Any, Any],
    params: Params | None = None,
    *,
    trainable: Any = None,
    loss: str | Callable[[Array, Array], Array] = "softmax_cross_entropy",
    solver: Solver | None = None,
    growth: Growth | None = None,
    until: str | int | None = None,
    warmup_epochs: float = 1.0,
    seed: int = 0,
    l2: float = 0.0,
    max_steps: int | None = None,
    target_loss: float | None = None,
    block_size: int | None = None,
    devices: Any = None,
    driver: str = "auto",
    callback: Callable[[Progress], Any] | None = None,
    progress: bool = True,
    checkpoint: Any = None,
) -> FitResult:
    """Minimise a model's loss on a growing subset of the training data, by a second-order solver.

    Args:
        model: flax.linen.Module, flax.nnx.Module (in eval mode), or apply(params, x) -> outputs (n, ...).
        data: (x, y), N examples along the first axis: NumPy arrays, a memmap, or JAX arrays. On a CPU, NumPy arrays of
            up to 64 MiB are copied once, to where JAX can read them, larger ones in every evaluation, block by block,
            which a dense network notices; JAX arrays never.
        params: start; None: linen init from `seed`, or the nnx module's own.
        trainable: bools or boolean arrays shaped like params: what may move. P counts the True entries.
        loss: "softmax_cross_entropy", "squared_error" (1/2 sum of squares), or a function (outputs, y) -> (n,).
        solver: GaussNewton() (None) or LBFGS().
        growth: ratios of the stages; None: the solver's own, `solver.growth`.
        until: when a stage ends. "representative": the probe's loss falls by less than 0.5 % between two checks;
            "converged": the subset's minimum; a number: that many steps, and more where the last one was rejected on a
            fresh subset. None: the solver's own. The last stage goes on until it has converged, target_loss or
            max_steps; with "representative" and a subset as last stage, the probe ends that one too.
        warmup_epochs: Adam on mini-batches of 32 before the first step, in epochs of all examples but the probe, also
            where growth stops at a subset; 0: none. Its rate rises to
            min(25 steps^-1/2, 2) P^-1/2 over the first tenth of its steps and decays as a cosine; no l2. Where it
            raises the loss, its parameters are dropped, and the message says so.
        seed: of initialisation, order, probe and samples. Same seed, same machine: same bits.
        l2: adds l2/2 |w|^2 over trainable parameters.
        max_steps: solver steps in all stages together; None: the solver's own.
        target_loss: ends the last stage (one that is not redrawn); a smaller subset's loss never ends the fit.
        block_size: examples evaluated at once; changes no result beyond rounding.
        devices: JAX devices of this process to spread blocks over; None: all there are, of all processes that
            `jax.distributed.initialize()` has joined (each of them makes the same call with the same data).
        driver: "host": blocks from Python, also from data larger than the device; "compiled": many steps in one
            program, data on the device; "auto": compiled on accelerators that hold the data, and on CPUs where
            `solver.check_every` is above 1 (LBFGS), the data have at most 64 MiB and nothing convolves; else host.
        callback: called with a `Progress` after each step (compiled: each `solver.check_every` steps); return True to
            stop. Of several processes each calls its own, if it has one, and one that says so stops all.
        progress: show a progress bar (plain lines in a log).
        checkpoint: folder to save to and to resume from.

    Returns:
        FitResult. A failed solve is a status, never an exception. Ctrl-C, once the first step has begun, gives STOPPED
        with the best parameters so far: of several processes after the step that all are in, a second time at once.

    Raises:
        ValueError: for any misuse, before the first step.
    """
    solver = GaussNewton() if solver is None else solver
    checks.solver(solver, Solver)
    growth = checks.growth(solver.growth if growth is None else growth, Growth, solver.fresh_subsets)
    until = checks.until(solver.until if until is None else until)
    max_steps = solver.max_steps if max_steps is None else max_steps
    checks.whole_number("max_steps", max_steps, 1)
    checks.seed(seed)
    checks.folder("checkpoint", checkpoint)
    checks.real_number("warmup_epochs", warmup_epochs, 0)
    checks.function("callback", callback)
    if target_loss is not None:
        checks.real_number("target_loss", target_loss)
    with jax.default_matmul_precision("highest"):  # the GPU default, TF32, is too coarse for a line search
        problem, w = make_problem(
            model,
            data,
            params,
            loss=loss,
            trainable=trainable,
            seed=seed,
            l2=l2,
            block_size=block_size,
            devices=devices,
        )
        max_steps, seed, warmup_epochs = int(max_steps), int(seed), float(warmup_epochs)  # JSON knows no NumPy numbers
        own = problem.driver.devices
        with own.context():
            by_driver = placed(problem, driver, solver.check_every)
            target = -math.inf if target_loss is None else float(target_loss)
            fit = _Fit(problem, by_driver, solver, growth, until, max_steps, target, seed)
            plan = {} if checkpoint is None else fit.description(w, warmup_epochs)
            saver = Checkpoint(checkpoint, plan, own)
            mask = (
                None
                if trainable is None
                else mask_tree(problem.objective.model.unflatten(w, problem.constants), trainable)
            )
            with fit.together():
                with Bar("fit_subset", max_steps, progress) as bar:
                    fit.run(w, mask, warmup_epochs, callback, bar, saver)
                return fit.result()


_unflatten = jax.jit(Model.unflatten, static_argnums=0)


class _Fit(Resumable):
    """One fit: the stages, where it stands, and what it has cost."""

    numbers = ("diverged", "stage", "n_steps", "stage_steps", "stage_begin", "ended", "stages")
    numbers += ("probe_cost", "best_probe", "best_loss", "last_check")
    arrays = ("state", "best_w", "slopes", "problem")

    def __init__(self, host, problem, solver, growth, until, max_steps, target_loss, seed):
        super().__init__(_HISTORY, host.driver.devices)
        # The same problem twice: for what is done from Python (probe, result), and for the driver.
        self.host, self.problem = host, problem
        self.solver, self.growth, self.until = solver, growth, until
        self.max_steps, self.target_loss, self.seed = max_steps, target_loss, seed
        n = problem.examples
        # A fresh subset's loss is an unbiased look by itself; only the rule that needs a probe pays for one.
        probe = min(PROBE_EXAMPLES, int(PROBE_SHARE * n)) if growth.nested or until == "representative" else 0
        self.sizes = growth.sizes(n, problem.parameters, problem.outputs, probe)
        self.order = draw_order(host.y, seed).astype(np.int32)
        watched = probe > 0 and self.sizes[0] < n
        self.probe: Sample | None = subset_of(self.order[n - probe :], problem.dtype) if watched else None
        self.pool = self.order[: n - probe]
        # Of each example, when it was last looked at; nested subsets are not drawn by them.
        self.slopes = np.full(0 if growth.nested else n, np.nan, problem.dtype)
        # Where the fit stands.
        self.stage, self.n_steps, self.stage_steps, self.probe_cost = 0, 0, 0, 0.0
        self.status, self.ended = Status.RUNNING, Status.RUNNING  # of the fit; whether its stage is over, and why
        self.diverged = False  # the warm-up
        self.stages: list[dict[str, Any]] = []
        self.best_probe, self.best_loss, self.last_check = math.inf, math.inf, math.inf
        self.stage_begin = (0.0, 0, 0.0)  # sample_grads, evals, seconds at the stage's start
        if self.fresh:
            checks.until_ends(until, probe)

    def description(self, w: Array, warmup_epochs: float) -> dict[str, Any]:
        """What a resumed run must share with the first one."""
        plan = {"call": "fit_subset", "format": FORMAT, "solver": repr(self.solver), "growth": repr(self.growth)}
        plan |= {"until": self.until, "warmup_epochs": warmup_epochs, "seed": self.seed, "l2": self.problem.l2}
        return plan | identity(self.host, w)

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self, w: Array, mask: Any, warmup_epochs: float, callback: Any, bar: Bar, saver: Checkpoint) -> None:
        """All stages, from w or from where the checkpoint left them."""
        self.state, self.best_w = self.solver.init(self.problem, w), w
        try:
            with self.kept():
                if not self.resume(saver):
                    if warmup_epochs:
                        self._warm_up(w, mask, warmup_epochs)
                    self._enter_stage()
                    self.complete()
                while self._goes_on():
                    progress = self._step()
                    self.complete()
                    bar.update(self.n_steps, f"{progress.examples:,} examples, loss {progress.loss:.4g}")
                    if self.stopped_by(callback, progress):
                        self.status = Status.STOPPED
        except KeyboardInterrupt:
            self.status = Status.STOPPED
        if self.status == Status.STOPPED:
            self._close_stage(self.ended or Status.STOPPED)

    def _warm_up(self, w: Array, mask: Any, epochs: float) -> None:
        pool = self.pool if self.probe is not None else self.order
        after, cost, slopes, doubtful = warm_up(self._here(self.problem.on(pool)), w, mask, epochs, self.seed)
        if not self.growth.nested:
            self.slopes = slopes
        if doubtful:
            shown = subset_of(pool[:WARM_UP_EXAMPLES], self.problem.dtype)
            cost += 2 * LOSS * len(shown.indices)
            self.diverged = not self._mean_loss(after, shown) <= self._mean_loss(w, shown)
        self.state = self.state.replace(w=w if self.diverged else after, cost=cost)

    def _goes_on(self) -> bool:
        """Whether there is another step to take; a stage that has ended is left for the next one."""
        out_of_steps = Status.MAX_STEPS if self.n_steps >= self.max_steps else Status.RUNNING
        if self.status == Status.RUNNING and (ended := self.ended or out_of_steps):
            self._leave_stage(ended)
        return self.status == Status.RUNNING

    def _leave_stage(self, ended: Status) -> None:
        self._close_stage(ended)
        if self._is_last_stage() or ended == Status.NONFINITE:
            self.status = ended
        elif self.n_steps >= self.max_steps:
            self.status = Status.MAX_STEPS
        else:
            self.stage += 1
            self._enter_stage()

    def _enter_stage(self) -> None:
        """The problem of this stage, with the warm start in the state."""
        self.problem, self.ended = self._subset().fetch(), Status.RUNNING
        self.state = self.state.replace(known=False, status=Status.RUNNING)
        self.stage_steps, self.best_w = 0, self.state.w
        self.best_probe, self.best_loss, self.last_check = math.inf, math.inf, math.inf
        self.stage_begin = (self._cost(), int(self.state.evals), self.watch.seconds)

    @property
    def fresh(self) -> bool:
        """Whether every step of this stage draws another subset."""
        return not self.growth.nested and self.sizes[self.stage] < self.problem.examples

    def _subset(self) -> Problem:
        """The first K of the order, or K fresh ones of the pool, the same for the same seed and step."""
        size = self.sizes[self.stage]
        if size == self.problem.examples:
            return self.problem.using(self.host.whole())
        if not self.fresh:
            return self.problem.on(self.order[:size])
        rng = np.random.default_rng((self.seed, self.n_steps))
        chosen, weights = draw_fresh(self.slopes[self.pool], size, self.growth.importance, rng)
        return self.problem.on(self.pool[chosen], weights)

    def _step(self) -> Progress:
        target = self.target_loss if self._is_last_stage() and not self.fresh else -math.inf
        begin = float(self.state.cost), self.watch.seconds
        self.state, steps = advance(self.problem, self.solver, self.state, self._steps_at_once(), target)
        self.stage_steps += len(steps)
        if self.fresh:
            self._remember_slopes()
        progress = self._record(steps, *begin)
        self.ended = self._stage_status()
        stays = not self.ended or self._is_last_stage()  # else the next stage draws a subset of its own size
        if self.fresh and stays and not self._rejected():
            self.problem = self._subset().fetch()
        return progress

    def _rejected(self) -> bool:
        """Whether the last step on a fresh subset was not taken; the next one tries again there, at no new gradient."""
        return self.fresh and bool(self.state.known)

    def _stayed(self) -> bool:
        """Whether the last step was rejected on any subset, which leaves loss and gradient as they were."""
        looks = (self.history[name][-2:] for name in ("loss", "grad_norm"))
        same = self.stage_steps > 1 and all(now == before for before, now in looks)
        return self._rejected() if self.fresh else same

    def _remember_slopes(self) -> None:
        """What this subset has shown of its examples."""
        seen = np.asarray(self.problem.subset)[: int(self.problem.count)]
        self.slopes = self.slopes.copy()  # the last complete step keeps the old ones
        self.slopes[seen] = np.asarray(self.state.evaluation.slope)[: len(seen)]

    def _steps_at_once(self) -> int:
        """Steps until something has to be looked at from here."""
        if self.fresh:
            return 1
        to_check = self.solver.check_every - self.stage_steps % self.solver.check_every
        to_growth = (
            self.until - self.stage_steps if isinstance(self.until, int) and not self._is_last_stage() else to_check
        )
        return min(to_check, to_growth, self.max_steps - self.n_steps)

    def _stage_status(self) -> Status:
        """Whether the stage ends here by a rule of its own, and why."""
        last = self._is_last_stage()
        if self.state.status != Status.RUNNING:
            return Status(int(self.state.status))
        if last and not self.fresh and self.state.known and self._loss() <= self.target_loss:
            return Status.TARGET_REACHED
        if self.until == "representative" and self.probe is not None and self._probe_is_outside():
            if self._told_all():
                return Status.REPRESENTATIVE
        elif not last and isinstance(self.until, int) and self.stage_steps >= self.until and not self._rejected():
            return Status.MAX_STEPS
        return Status.RUNNING

    def _told_all(self) -> bool:
        """Whether the probe's loss has fallen by less than 0.5 % since the last check; keeps its best parameters."""
        if self.stage_steps % self.solver.check_every:
            return False
        if self._stayed():
            return False
        loss = self.history["probe_loss"][-1]
        if loss < self.best_probe:
            self.best_probe, self.best_loss, self.best_w = loss, self._loss(), self.state.w
        told = not loss + REPRESENTATIVE * abs(loss) < self.last_check
        self.last_check = loss
        if told:
            same = np.array_equal(self._here(self.best_w), self._here(self.state.w))
            self.state = self.state.replace(w=self.best_w, known=self.state.known and same)
        return told

    def _is_last_stage(self) -> bool:
        return self.stage == len(self.sizes) - 1

    def _probe_is_outside(self) -> bool:
        return self.sizes[self.stage] <= len(self.pool)

    # --- the record ------------------------------------------------------------------------------------------------

    def _record(self, steps: list[Step], cost: float, seconds: float) -> Progress:
        """A row a step; from these costs and seconds on, steps of one program share its seconds by their cost."""
        *early, last = steps
        pace = (self.watch.seconds - seconds) / max(last.cost - cost, LOSS)
        for step in early:
            self._append(step, None, seconds + pace * (step.cost - cost))
        probe = None if self.stage_steps % self.solver.check_every else self._probe_loss()
        return Progress(*self._append(last, probe, self.watch.seconds), params=self._params(self.state.w))

    def _append(self, step: Step, probe: float | None, seconds: float) -> tuple[Any, ...]:
        self.n_steps += 1
        row = (
            *(self.stage, int(self.problem.count), float(self.problem.ratio), self.n_steps),
            *(step.loss, probe, step.grad_norm, step.cost + self.probe_cost, seconds),
        )
        for column, value in zip(self.history.values(), row, strict=True):
            column.append(value)
        return row

    def _probe_loss(self) -> float | None:
        """The probe's loss; None once the probe is part of the subset."""
        if self.probe is None or not self._probe_is_outside():
            return None
        self.probe_cost += LOSS * len(self.probe.indices)
        return self._mean_loss(self.state.w, self.probe)

    def _close_stage(self, status: Status) -> None:
        if self.stage_steps == 0:  # interrupted before its first step: nothing is known of it
            return
        cost, evals, seconds = self.stage_begin
        looked = not self.stage_steps % self.solver.check_every
        if looked or status == Status.STOPPED:  # a stop costs nothing: the run may be resumed
            probe = self.history["probe_loss"][-1] if looked else None
        else:
            probe = self._probe_loss()
        # A stage that the probe has ended ends where that was best.
        back = status == Status.REPRESENTATIVE and self.best_probe < math.inf
        losses = (self.best_loss, self.best_probe) if back else (self._loss(), probe)
        row = (
            *(int(self.problem.count), float(self.problem.ratio), status.name),
            *(self.stage_steps, int(self.state.evals) - evals),
            *(self._cost() - cost, *losses, self.watch.seconds - seconds),
        )
        self.stages = [*self.stages, dict(zip(_STAGE, row, strict=True))]

    def _mean_loss(self, w: Array, sample: Sample) -> float:
        return self.host.mean_loss(self._here(w), sample)

    def _loss(self) -> float:
        return float(self.state.evaluation.value)

    def _cost(self) -> float:
        return float(self.state.cost) + self.probe_cost

    def _here(self, tree: Any) -> Any:
        return self.devices.here(tree)

    def _params(self, w: Array) -> Params:
        return _unflatten(self.host.objective.model, self._here(w), self.host.constants)

    def result(self) -> FitResult:
        """The result at the current point, whose loss on the last subset is evaluated if it is not known."""
        loss = norm = math.nan
        try:
            self._arrive()
            loss, norm = self._loss(), float(self.state.evaluation.norm)
        except KeyboardInterrupt:  # nothing is lost but these
            self.status = Status.STOPPED
        message = self.status.message
        if self.diverged:
            message += " The warm-up raised the loss: the first step started from the parameters before it."
        if self.problem.ratio < 1:
            message += (
                f" The ratio is {self.problem.ratio:.2g}, below 1: more parameters than constraints, so the minimum is "
                "not unique and says little about unseen data; use more data or fewer parameters."
            )
        return FitResult(
            *(self._params(self.state.w), loss, norm, self.status, message),
            *(self.n_steps, int(self.state.evals), self._cost(), self.watch.seconds, self.watch.compile_seconds),
            *(self.order, self.stages, self.history, self.problem.driver.name, self._precision()),
        )

    def _arrive(self) -> None:
        """Look at where the last step on a fresh subset went; where nothing is finite there, the solver goes back."""
        subset = self.host.using(self.problem.whole())
        unknown, state = not self.state.known, self._here(self.state)
        self.state: State = evaluated(subset, state)
        if unknown and int(self.state.status) == Status.NONFINITE:
            self.status = Status.NONFINITE
            self.state = self.solver.step(subset, self.state)
            self.state = evaluated(subset, self.state)

    def _precision(self) -> dict[str, str]:
        curvature = getattr(self.solver, "curvature_precision", "highest")
        return {"dtype": str(self.problem.dtype), "matmul": "highest", "curvature": curvature}

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def tree(self, values: dict[str, Any]) -> Any:
        """Of the problem its subset, which on fresh ones depends on what was known when it was drawn."""
        return super().tree(values | {"problem": values["problem"].whole()})

    def restore(self, tree: Any) -> None:
        """The subset goes back into the problem."""
        *others, subset = tree
        super().restore((*others, self.problem.using(subset, self.fresh).fetch()))
        self.ended = Status(self.ended)
        if self.ended == Status.TARGET_REACHED:  # which may be another one now
            self.ended = self._stage_status()
