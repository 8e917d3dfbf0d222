"""What a solver is: two pure functions on a flat vector, a state they share, and the statuses a solve ends with."""

import dataclasses
import enum
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax import Array

from subsetopt.growth import Growth
from subsetopt.problem import GRADIENT, Evaluation, Problem


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
    Status.CONVERGED: "The gradient has vanished: this is a minimum to the solver's tolerance.",
    Status.REPRESENTATIVE: "The subset has told all it knows: the loss of unseen training examples falls no more.",
    Status.TARGET_REACHED: "The target loss is reached.",
    Status.MAX_STEPS: "All steps are used; the loss may still fall: raise max_steps to go on.",
    Status.STALLED: "No step improves the loss at this floating-point precision.",
    Status.NONFINITE: "The loss or its gradient is not finite; the last finite parameters are kept.",
    Status.STOPPED: "Stopped by the callback or the keyboard; the best parameters so far are kept.",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a solve stands.

    w: (P,) current point, the best one of the subset. known: whether `evaluation`, loss and gradient at w, belongs to
    the current subset. grad_scale: largest gradient norm met, what convergence is measured against. cost: sample_grads
    spent. evals: evaluations of the subset. memory: the solver's own. The structure never changes, only the arrays:
    what is not there yet is an empty one.
    """

    w: Array
    known: bool
    evaluation: Evaluation
    status: int
    grad_scale: Any
    cost: float
    evals: int
    memory: Any

    def replace(self, **changes: Any) -> "State":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def start(w: Array, memory: Any) -> State:
    """The state before the first step."""
    nothing = Evaluation(np.zeros((), w.dtype), w[:0], np.empty(0, w.dtype), np.empty(0, w.dtype))
    return State(w, False, nothing, Status.RUNNING, np.zeros((), w.dtype), 0.0, 0, memory)


def evaluated(problem: Problem, state: State, uncertain: bool = False) -> State:
    """The state with loss and gradient on the problem's subset, whatever was known before."""
    if state.known:
        return state
    return moved(problem, state, state.w, problem.evaluate(state.w, uncertain)).replace(
        cost=state.cost + GRADIENT * problem.count, evals=state.evals + 1
    )


def moved(problem: Problem, state: State, w: Array, evaluation: Evaluation) -> State:
    """The state at another point; status NONFINITE where the loss or gradient is."""
    norm = np.linalg.norm(np.asarray(evaluation.grad))
    finite = np.isfinite(evaluation.value) and np.isfinite(norm)
    return state.replace(
        w=w,
        known=True,
        evaluation=evaluation,
        grad_scale=max(state.grad_scale, norm) if finite else state.grad_scale,
        status=state.status if finite else Status.NONFINITE,
    )


def converged(state: State, tolerance: float) -> bool:
    """Whether the gradient is `tolerance` times the largest gradient of this fit: free of the loss's scale."""
    return bool(np.linalg.norm(np.asarray(state.evaluation.grad)) <= tolerance * state.grad_scale)


@runtime_checkable
class Solver(Protocol):
    """A method: hyperparameters only. A new one is a frozen dataclass with `init` and `step`.

    growth, until, max_steps: the schedule of fit_subset that suits the method, used where the caller gives none.
    check_every: steps between two looks at the probe. fresh_subsets: whether every step may get another subset.
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
        """One step; never raises the subset's loss. Where the subset is another one, `state.known` is False."""
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
