"""LBFGS: limited-memory BFGS with a Wolfe line search on the subset's deterministic loss.

Nocedal and Wright, Numerical Optimization (2006), Algorithm 7.5. Their s_k, y_k, H_k^0 are s, y, h0 here. Differs in:
H_k^0 is a diagonal learned from the pairs, not a multiple of the identity; the direction comes from matrix products;
pairs are accepted by a test free of the loss's scale; the memory is cleared where the subset changes (another
objective) and once where a line search fails.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from subsetopt import checks, linesearch
from subsetopt.growth import Growth
from subsetopt.problem import GRADIENT, Evaluation, Problem
from subsetopt.solve import State, Status, charged, ended, evaluated, moved, start

# Heuristics, measured: how fast the curvature met forgets, and what share of its mean every parameter has at least.
_KEEP, _FLOOR = 0.95, 0.1


class Pairs(NamedTuple):
    """The last m pairs, oldest first; s, y: (m, P), rows of zeros in empty places.

    r (m, m): s_i.y_j for i <= j, ones on the diagonal for empty places; what is below it is not in use.
    curvature (P,): the diagonal of sum y y' / s.y over all pairs met, the older ones fading.
    h0 (P,): the diagonal of the matrix that the pairs correct, zeros without any.
    """

    s: Array
    y: Array
    r: Array
    curvature: Array
    h0: Array


class Line(NamedTuple):
    """A line search on its way: along `direction` from w0, of slope `slope0`; next comes w, at step length t.

    remembers: whether the direction is that of the memory; goes_on: whether the search does; again: only once more,
    without a memory.
    """

    search: linesearch.Search
    direction: Array
    slope0: Array
    remembers: Array
    t: Array
    w: Array
    trials: Array
    goes_on: Array
    again: Array


class Best(NamedTuple):
    """The lowest point of a line search, and its loss difference to the start; found: whether it is not the start."""

    w: Array
    evaluation: Evaluation
    difference: Array
    found: Array


class Walk(NamedTuple):
    """What the loop over trials carries; evals: all trials, those of a search given up included."""

    line: Line
    best: Best
    pairs: Pairs
    evals: Any


def _quasi_newton(pairs: Pairs, grad: Array) -> Array:
    """-H g, the two loops of Algorithm 7.4 as solutions with the triangle r: their alpha_i are R^-1 S'g.

    That form is of Byrd, Nocedal and Schnabel (Math. Programming 63, 1994, Theorem 2.2), but for q, which is computed
    as in the loops: Y'q by Y'g and Y'Y would lose digits where q is short beside g.
    """
    s, y, r, _, h0 = pairs
    alpha = solve_triangular(r, s @ grad)
    q = h0 * (grad - alpha @ y)
    return -(q + solve_triangular(r, jnp.diag(r) * alpha - y @ q, trans=1) @ s)


@jax.jit
def _direction(pairs: Pairs, grad: Array) -> tuple[Array, Array, Array]:
    """A descent direction, its slope, and whether it is that of the memory: else of length one against the gradient."""
    norm = jnp.linalg.norm(grad)
    direction = _quasi_newton(pairs, grad)
    slope = jnp.vdot(grad, direction)
    descends = slope < 0  # never without pairs, which give zeros
    return jnp.where(descends, direction, -grad / norm), jnp.where(descends, slope, -norm), descends


@jax.jit
def _begin(pairs: Pairs, w: Array, grad: Array, value: Array) -> Line:
    direction, slope, remembers = _direction(pairs, grad)
    none = jnp.zeros((), np.int32)
    search = linesearch.begin(slope, value)
    return Line(search, direction, slope, remembers, jnp.ones_like(value), w + direction, none, none == 0, none > 0)


@partial(jax.jit, static_argnums=0)
def _judge(max_trials: int, line: Line, w0: Array, grad: Array, difference: Array, best: Best) -> tuple[Line, Array]:
    """The search after a trial with this gradient, and whether that is the best point so far."""
    scale = jnp.abs(line.slope0)
    point = linesearch.Point(line.t, difference / scale, jnp.vdot(grad, line.direction) / scale)
    accepted = linesearch.accepts(line.search, point)
    # Near the end of precision the gradient still falls where rounding hides the loss's fall: there the approximate
    # conditions decide, and an accepted point may lie above the start by their allowance.
    better = jnp.isfinite(point.slope) & (difference < best.difference) | (accepted & ~best.found)
    trials = line.trials + 1
    goes_on = ~accepted & (trials < max_trials)
    search = linesearch.narrow(line.search, point)
    t = linesearch.propose(search)
    # A memory that gives no improving step is thrown away once: steepest descent has the last word.
    again = ~goes_on & ~better & ~best.found & line.remembers
    after = line._replace(search=search, t=t, w=w0 + t * line.direction, trials=trials)
    return after._replace(goes_on=goes_on, again=again), better


@jax.jit
def _remember(pairs: Pairs, w: Array, w0: Array, grad: Array, grad0: Array, threshold: Array) -> Pairs:
    """The pairs with one more, the oldest gone; unless the new one's s.y is not clearly positive."""
    s, y = w - w0, grad - grad0
    good = jnp.vdot(s, y) > threshold * jnp.linalg.norm(s) * jnp.linalg.norm(y)
    return jax.tree.map(partial(jnp.where, good), _pushed(pairs, s, y), pairs)


def _pushed(pairs: Pairs, s: Array, y: Array) -> Pairs:
    ss, ys = (jnp.concatenate([old[1:], new[None]]) for old, new in ((pairs.s, s), (pairs.y, y)))
    products = ss @ y
    r = jnp.pad(pairs.r[1:, 1:], (0, 1)).at[:, -1].set(products)
    sy = products[-1]
    curvature = _KEEP * pairs.curvature + y * y / sy
    return Pairs(ss, ys, r, curvature, _h0(curvature, y, sy))


def _h0(curvature: Array, y: Array, sy: Array) -> Array:
    """Proportional to curvature^-1/2, its mean and the floor applied; y.h0 y = s.y for the last pair, as in (7.20).

    The root, a heuristic, evens out what a few pairs tell of a parameter. A multiple of the identity took 1.5 times the
    evaluations on digits, 1.4 on MNIST (convolutional networks, 4 and 2 starts), as many on a dense network.
    """
    shape = jax.lax.rsqrt(curvature / jnp.mean(curvature) + _FLOOR)
    return shape * sy / jnp.vdot(y, shape * y)


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS; costs about one evaluation of the subset a step.

    memory: pairs kept, of 2 P numbers each.
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
        state, runs = ended(problem, evaluated(problem, state).replace(memory=memory), self._tolerance(problem.dtype))
        return problem.driver.cond(runs, partial(self._search, problem), lambda state: state, state)

    def _tolerance(self, dtype: np.dtype) -> float:
        default = 1e-4 if dtype == np.float32 else 1e-7
        return default if self.tolerance is None else self.tolerance

    def _empty(self, w: Array) -> Pairs:
        none = jnp.zeros((self.memory, w.size), w.dtype)
        return Pairs(none, none, jnp.eye(self.memory, dtype=w.dtype), jnp.zeros_like(w), jnp.zeros_like(w))

    def _search(self, problem: Problem, state: State) -> State:
        """The state after a line search; STALLED where no trial lowers the loss."""
        before = state.evaluation
        line = _begin(state.memory, state.w, before.grad, before.value)
        start = Walk(
            line, Best(state.w, before, jnp.zeros_like(before.value), line.again), state.memory, 0 * line.trials
        )
        walk = problem.driver.while_loop(lambda walk: walk.line.goes_on, partial(self._trial, problem, state), start)
        state = charged(state, GRADIENT, walk.evals * problem.count, walk.evals)

        def accept(state: State) -> State:
            best, threshold = walk.best, problem.real(self.pair_threshold)
            grads = best.evaluation.grad, state.evaluation.grad
            memory = _remember(walk.pairs, best.w, state.w, *grads, threshold)
            return moved(state, best.w, best.evaluation).replace(memory=memory)

        def stall(state: State) -> State:
            return state.replace(status=jnp.full_like(state.status, Status.STALLED))

        return problem.driver.cond(walk.best.found, accept, stall, state)

    def _trial(self, problem: Problem, state: State, walk: Walk) -> Walk:
        """One evaluation, and what follows from it."""
        w, before = walk.line.w, state.evaluation
        trial = problem.evaluate(w)
        difference = problem.difference(w, state.w, trial.losses, before.losses, problem.weights)
        line, better = _judge(self.max_trials, walk.line, state.w, trial.grad, difference, walk.best)
        best = problem.driver.cond(
            better, lambda best: Best(w, trial, difference, better), lambda best: best, walk.best
        )
        walk = Walk(line, best, walk.pairs, walk.evals + 1)

        def anew(walk: Walk) -> Walk:
            empty = self._empty(w)
            return walk._replace(line=_begin(empty, state.w, before.grad, before.value), pairs=empty)

        return problem.driver.cond(line.again, anew, lambda walk: walk, walk)
