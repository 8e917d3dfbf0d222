"""What a solver is: two pure functions on a flat vector, a state they share, and the statuses a solve ends with."""

import dataclasses
import enum
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from subsetopt.drivers import Host
from subsetopt.growth import Growth
from subsetopt.problem import GRADIENT, Evaluation, Problem, counted


class Status(enum.IntEnum):
    """Why a stage or a fit ended; `message` says it in words."""

    RUNNING = 0
    CONVERGED = 1
    REPRESENTATIVE = 2
    TARGET_REACHED = 3
    MAX_STEPS = 4
    STALLED = 5
    NONFINITE = 6
    STOPPED = 7

    @property
    def message(self) -> str:
        """One sentence for a person."""
        return _MESSAGES[self]

    @property
    def success(self) -> bool:
        """Whether the solve ended at a goal of its own."""
        return self in (Status.CONVERGED, Status.REPRESENTATIVE, Status.TARGET_REACHED)


_MESSAGES = {
    Status.RUNNING: "The solve is still running.",
    Status.CONVERGED: "The gradient is down to the solver's tolerance, a share of the largest one met.",
    Status.REPRESENTATIVE: "The subset has told all it knows: the loss of unseen training examples falls no more.",
    Status.TARGET_REACHED: "The target loss is reached.",
    Status.MAX_STEPS: "All steps are used; the loss may still fall: raise max_steps to go on.",
    Status.STALLED: "No step improves the loss at this floating-point precision.",
    Status.NONFINITE: "The loss or its gradient is not finite; kept are parameters at which a subset's loss was.",
    Status.STOPPED: "Stopped by the callback or the keyboard; the best parameters so far are kept.",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a solve stands.

    w: (P,) current point, the best one of the subset. known: whether `evaluation`, loss and gradient at w, belongs to
    the current subset. grad_scale: largest gradient norm met, what convergence is measured against. cost: sample_grads
    spent. evals: evaluations of the subset. memory: the solver's own. Structure, shapes and dtypes never change: a
    state is what a compiled loop carries.
    """

    w: Array
    known: Any
    evaluation: Evaluation
    status: Any
    grad_scale: Any
    cost: Any
    evals: Any
    memory: Any

    def replace(self, **changes: Any) -> "State":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def start(problem: Problem, w: Array, memory: Any, uncertain: bool = False) -> State:
    """The state before the first step; uncertain: whether the solver's evaluations give it."""
    zero, zeros = np.zeros((), w.dtype), np.zeros(problem.examples, w.dtype)
    nothing = Evaluation(zero, jnp.zeros_like(w), zero, zeros, *((zeros, zeros) if uncertain else (None, None)))
    return State(w, False, nothing, int(Status.RUNNING), zero, 0.0, 0, problem.driver.devices.adopt(memory))


def charged(state: State, price: float, examples: Any, evals: Any = 0) -> State:
    """The state with `price` sample_grads added for each of so many examples, and so many evaluations."""
    return state.replace(cost=state.cost + price * counted(examples), evals=state.evals + evals)


def evaluated(problem: Problem, state: State, uncertain: bool = False) -> State:
    """The state with loss and gradient on the problem's subset, whatever was known before."""

    def look(state: State) -> State:
        state = charged(state, GRADIENT, problem.count, evals=1)
        return moved(state, state.w, problem.evaluate(state.w, uncertain))

    return problem.driver.cond(state.known, lambda state: state, look, state)


def moved(state: State, w: Array, evaluation: Evaluation) -> State:
    """The state at another point; status NONFINITE where the loss or gradient is."""
    known, grad_scale, status = _arrived(evaluation.value, evaluation.norm, state.grad_scale, state.status)
    return state.replace(w=w, known=known, evaluation=evaluation, grad_scale=grad_scale, status=status)


@jax.jit
def _arrived(value: Array, norm: Array, scale: Array, status: Array) -> tuple[Array, Array, Array]:
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    nonfinite = jnp.full_like(status, Status.NONFINITE)
    known = jnp.ones((), bool)
    return known, jnp.where(finite, jnp.maximum(scale, norm), scale), jnp.where(finite, status, nonfinite)


def ended(problem: Problem, state: State, tolerance: float) -> tuple[State, Any]:
    """The state with status CONVERGED where it is, and whether the solve goes on.

    CONVERGED: the gradient is `tolerance` times the largest one of this fit, which is free of the loss's scale; on a
    fresh subset, which is gone after this step, only where it is zero.
    """
    least = 0.0 if problem.fresh else tolerance
    status, runs = _ended(state.status, state.evaluation.norm, state.grad_scale, least)
    return state.replace(status=status), runs


@jax.jit
def _ended(status: Array, norm: Array, scale: Array, tolerance: Array) -> tuple[Array, Array]:
    runs = status == Status.RUNNING
    status = jnp.where(runs & (norm <= tolerance * scale), jnp.full_like(status, Status.CONVERGED), status)
    return status, status == Status.RUNNING


class Step(NamedTuple):
    """How a solve stood after a step: loss, gradient norm, sample_grads spent."""

    loss: Any
    grad_norm: Any
    cost: Any


def _stood(state: State) -> Step:
    return Step(state.evaluation.value, state.evaluation.norm, state.cost)


def advance(problem: Problem, solver: "Solver", state: State, steps: int, target: float) -> tuple[State, list[Step]]:
    """The state after steps of the solver, and how it stood after each.

    The host driver takes one. The compiled one takes up to `steps`, at most `solver.check_every`, fewer where the solve
    ends or its loss is down to `target`, in a single program.
    """
    if isinstance(problem.driver, Host):
        state = solver.step(problem, state)
        return state, [Step(*map(float, _stood(state)))]
    cost, evals = state.cost, state.evals  # counted in Python, where numbers do not overflow
    typed = _typed(state.replace(cost=0.0, evals=0))
    arrays = problem.driver.devices.replicate((problem, typed, np.int32(steps), problem.dtype.type(target)))
    state, taken, after = problem.driver.devices.compiled(_steps)(solver, *arrays)
    rows = zip(*(np.asarray(column)[: int(taken)].tolist() for column in after), strict=True)
    found = [Step(loss, norm, cost + round(3 * spent) / 3) for loss, norm, spent in rows]  # prices are thirds
    return state.replace(cost=found[-1].cost, evals=evals + int(state.evals)), found


def _typed(state: State) -> State:
    """Numbers of Python as arrays of the dtypes that a compiled loop keeps."""
    dtypes = {"known": bool, "status": np.int32, "grad_scale": state.w.dtype, "cost": np.float32, "evals": np.int32}
    return state.replace(**{name: jnp.asarray(getattr(state, name), dtype) for name, dtype in dtypes.items()})


_Carry = tuple[State, Array, Step]


def _steps(solver: "Solver", problem: Problem, state: State, steps: Array, target: Array) -> _Carry:
    def on(carry: _Carry) -> Array:
        state, taken, _ = carry
        reached = state.known & (state.evaluation.value <= target)
        return (taken == 0) | ((taken < steps) & (state.status == Status.RUNNING) & ~reached)

    def step(carry: _Carry) -> _Carry:
        state, taken, after = carry
        state = solver.step(problem, state)
        return state, taken + 1, jax.tree.map(lambda column, value: column.at[taken].set(value), after, _stood(state))

    none = jax.tree.map(lambda value: jnp.zeros(solver.check_every, value.dtype), _stood(state))
    return lax.while_loop(on, step, (state, jnp.zeros_like(steps), none))


@runtime_checkable
class Solver(Protocol):
    """A method: hyperparameters only. A new one is a frozen dataclass with `init` and `step`.

    One source serves both drivers: what depends on computed values goes through `problem.driver.cond`, `select` and
    `while_loop`, never through Python's `if`.

    growth, until, max_steps: the schedule of fit_subset that suits the method, used where the caller gives none.
    check_every: steps between two looks at the probe; the compiled driver takes so many in one program.
    fresh_subsets: whether every step may get another subset; its evaluations then have slopes (`uncertain=True`).
    """

    growth: ClassVar[Growth]
    until: ClassVar[str | int]
    max_steps: ClassVar[int]
    check_every: ClassVar[int]
    fresh_subsets: ClassVar[bool]

    def init(self, problem: Problem, w: Array) -> State:
        """The state before the first step from w (P,)."""
        ...

    def step(self, problem: Problem, state: State) -> State:
        """One step; raises the subset's loss by no more than rounding. On another subset `state.known` is False."""
        ...


class Progress(NamedTuple):
    """What a callback sees after every step (fit_subset) or epoch (finetune); return True from it to stop.

    Fields as in a result's history; params: the current parameters.
    """

    stage: int
    examples: int
    ratio: float
    step: int
    loss: float
    probe_loss: float | None
    grad_norm: float
    sample_grads: float
    seconds: float
    params: Any
