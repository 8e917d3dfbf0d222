"""LBFGS: limited-memory BFGS with a Wolfe line search on the subset's deterministic loss.

Nocedal and Wright, Numerical Optimization (2006), Algorithms 7.4 (two-loop recursion) and 7.5. Their s_k, y_k, rho_k,
gamma_k are s, y, rho, gamma here. Differs in: pairs are accepted by a test free of the loss's scale; the memory is
cleared where the subset changes (another objective) and once where a line search fails.
"""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from subsetopt import checks, linesearch
from subsetopt.growth import Growth
from subsetopt.problem import GRADIENT, Evaluation, Problem
from subsetopt.solve import State, Status, charged, ended, evaluated, moved, start


class Pairs(NamedTuple):
    """The last m pairs, oldest first; s, y: m vectors (P,) each, a list so that a new pair moves no other.

    rho (m,): 1 / s.y, zero for an empty place.
    """

    s: tuple[Array, ...]
    y: tuple[Array, ...]
    rho: Array
    gamma: Array


class Line(NamedTuple):
    """A line search on its way: along `direction`, of slope `slope0`, next at step length t.

    best, evaluation, phi: the lowest point so far and how far below the start it is (normalised as in linesearch).
    pairs: the memory, empty once steepest descent has its turn.
    """

    search: linesearch.Search
    direction: Array
    slope0: Array
    t: Array
    trials: Array
    evals: Array
    best: Array
    evaluation: Evaluation
    phi: Array
    pairs: Pairs
    done: Array


def _two_loop(pairs: Pairs, grad: Array) -> Array:
    """-H g, Algorithm 7.4."""
    q, alphas = grad, []
    for s, y, rho in reversed(list(zip(pairs.s, pairs.y, pairs.rho, strict=True))):
        alphas.append(rho * jnp.vdot(s, q))
        q = q - alphas[-1] * y
    r = pairs.gamma * q
    for s, y, rho, alpha in zip(pairs.s, pairs.y, pairs.rho, reversed(alphas), strict=True):
        r = r + (alpha - rho * jnp.vdot(y, r)) * s
    return -r


@jax.jit
def _direction(pairs: Pairs, grad: Array) -> tuple[Array, Array]:
    """A descent direction and its slope: of quasi-Newton, or of length one against the gradient without a memory."""
    norm = jnp.linalg.norm(grad)
    direction = _two_loop(pairs, grad)
    slope = jnp.vdot(grad, direction)
    descends = jnp.any(pairs.rho > 0) & (slope < 0)
    return jnp.where(descends, direction, -grad / norm), jnp.where(descends, slope, -norm)


@jax.jit
def _curvature(s: Array, y: Array, threshold: Array) -> tuple[Array, Array, Array]:
    """Whether the pair's curvature s.y is clearly positive; rho; gamma."""
    sy, yy, ss = jnp.vdot(s, y), jnp.vdot(y, y), jnp.vdot(s, s)
    return sy > threshold * jnp.sqrt(ss) * jnp.sqrt(yy), 1 / sy, sy / yy


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS; costs about one evaluation of the subset a step.

    memory: pairs kept.
    tolerance: CONVERGED when the gradient norm is this fraction of the largest one met; None: 1e-4 in float32, 1e-7
        in float64.
    max_trials: evaluations a line search may take; the best point is kept.
    pair_threshold: a pair enters the memory only if s.y exceeds this times |s||y|.
    """

    memory: int = 20
    tolerance: float | None = None
    max_trials: int = 8
    pair_threshold: float = 1e-8

    growth: ClassVar[Growth] = Growth(start=4, factor=2)
    until: ClassVar[str | int] = "representative"
    max_steps: ClassVar[int] = 500
    check_every: ClassVar[int] = 10
    fresh_subsets: ClassVar[bool] = False

    def __post_init__(self):
        checks.whole_number("LBFGS.memory", self.memory, 1)
        checks.whole_number("LBFGS.max_trials", self.max_trials, 1)
        checks.real_number("LBFGS.pair_threshold", self.pair_threshold, 0, 1)
        if self.tolerance is not None:
            checks.real_number("LBFGS.tolerance", self.tolerance, 0, 1)

    def init(self, problem: Problem, w: Array) -> State:
        """The state before the first step from w (P,): an empty memory."""
        return start(problem, w, self._empty(w))

    def step(self, problem: Problem, state: State) -> State:
        """One quasi-Newton step: direction, line search, memory."""
        # Another subset is another objective.
        memory = problem.driver.cond(state.known, lambda m: m, lambda m: self._empty(state.w), state.memory)
        state = ended(problem, evaluated(problem, state).replace(memory=memory), self._tolerance(problem.dtype))
        search = partial(self._search, problem)
        return problem.driver.cond(state.status == Status.RUNNING, search, lambda state: state, state)

    def _tolerance(self, dtype: np.dtype) -> float:
        default = 1e-4 if dtype == np.float32 else 1e-7
        return default if self.tolerance is None else self.tolerance

    def _empty(self, w: Array) -> Pairs:
        stack, zero = (jnp.zeros_like(w),) * self.memory, jnp.zeros((), w.dtype)
        return Pairs(stack, stack, jnp.zeros(self.memory, w.dtype), zero)

    def _search(self, problem: Problem, state: State) -> State:
        """The state after a line search; STALLED where no trial lowers the loss."""
        line = problem.driver.while_loop(
            lambda line: ~line.done,
            partial(self._trial, problem, state),
            _begin(state.memory, state.w, state.evaluation),
        )
        state = charged(state, GRADIENT, line.evals * problem.count, line.evals)

        def accept(state: State) -> State:
            memory = self._remember(problem, line.pairs, *_pair(line.best, state.w, line.evaluation, state.evaluation))
            return moved(state, line.best, line.evaluation).replace(memory=memory)

        def stall(state: State) -> State:
            return state.replace(status=jnp.full_like(state.status, Status.STALLED))

        return problem.driver.cond(line.phi < 0, accept, stall, state)

    def _trial(self, problem: Problem, state: State, line: Line) -> Line:
        """One evaluation, and what follows from it."""
        w = _along(state.w, line.t, line.direction)
        trial, before = problem.evaluate(w), state.evaluation
        difference = problem.difference(w, state.w, trial.losses, before.losses, problem.whole().weights)
        search, t, better, done = _judge(self.max_trials, line._replace(pairs=None), difference, trial.grad)
        line = line._replace(search=search, t=t, trials=line.trials + 1, evals=line.evals + 1, done=done)

        def keep(line: Line) -> Line:
            return line._replace(best=w, evaluation=trial, phi=difference)

        def anew(line: Line) -> Line:
            return _begin(self._empty(w), state.w, before)._replace(evals=line.evals)

        line = problem.driver.cond(better, keep, lambda line: line, line)
        # A memory that gives no improving step is thrown away once: steepest descent has the last word.
        again = line.done & ~(line.phi < 0) & jnp.any(line.pairs.rho > 0)
        return problem.driver.cond(again, anew, lambda line: line, line)

    def _remember(self, problem: Problem, pairs: Pairs, s: Array, y: Array) -> Pairs:
        """The pairs with (s, y) appended, unless its curvature is not clearly positive."""
        good, rho, gamma = _curvature(s, y, problem.dtype.type(self.pair_threshold))

        def push(pairs: Pairs) -> Pairs:
            return Pairs((*pairs.s[1:], s), (*pairs.y[1:], y), _push(pairs.rho, rho), gamma)

        return problem.driver.cond(good, push, lambda pairs: pairs, pairs)


@jax.jit
def _push(values: Array, new: Array) -> Array:
    return jnp.concatenate([values[1:], new[None]])


@jax.jit
def _begin(pairs: Pairs, w: Array, before: Evaluation) -> Line:
    direction, slope = _direction(pairs, before.grad)
    one, zero, none = jnp.ones_like(before.value), jnp.zeros_like(before.value), jnp.zeros((), np.int32)
    search = linesearch.begin(slope, before.value)
    return Line(search, direction, slope, one, none, none, w, before, zero, pairs, none > 0)


@jax.jit
def _along(w: Array, t: Array, direction: Array) -> Array:
    return w + t * direction


@jax.jit
def _pair(w: Array, w0: Array, evaluation: Evaluation, before: Evaluation) -> tuple[Array, Array]:
    return w - w0, evaluation.grad - before.grad


@partial(jax.jit, static_argnums=0)
def _judge(
    max_trials: int, line: Line, difference: Array, grad: Array
) -> tuple[linesearch.Search, Array, Array, Array]:
    """The search after a trial, the next step length, whether this is the best point so far, and whether it ends."""
    scale = jnp.abs(line.slope0)
    point = linesearch.Point(line.t, difference / scale, jnp.vdot(grad, line.direction) / scale)
    better = jnp.isfinite(point.slope) & (difference < line.phi)
    accepted = linesearch.accepts(line.search, point)
    search = linesearch.narrow(line.search, point)
    done = accepted | (line.trials + 1 >= max_trials)
    return search, linesearch.propose(search), better, done
