"""LBFGS: limited-memory BFGS with a Wolfe line search on the subset's deterministic loss.

Nocedal and Wright, Numerical Optimization (2006), Algorithm 7.5. Their s_k, y_k, H_k^0 are s, y, h0 here. Differs in:
H_k^0 is learned from the pairs (kronecker.py), not a multiple of the identity; the direction comes from matrix
products; pairs are accepted by a test free of the loss's scale; the memory is cleared where the subset changes (another
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
from subsetopt.kronecker import Kronecker, learned, unlearned
from subsetopt.linalg import norm
from subsetopt.problem import GRADIENT, Evaluation, Problem, counted
from subsetopt.solve import State, Status, charged, ended, evaluated, moved, start

_ROOTS_EVERY = 20  # pairs, and at each power of two before: heuristic, measured


class Pairs(NamedTuple):
    """The last m pairs, a ring: pair number k is in place k mod m, so that a compiled loop writes two rows a step.

    s, y: (m, P), by place; what is in the places of pairs that are not there is not in use.
    met: pairs since the memory was cleared; its last m are there.
    r (m, m): s_i.y_j for i <= j, oldest first, ones on the diagonal before the first pair; what is below it is not in
    use.
    curvature: of the pairs that were there when it was last learned; its power -1/2, scaled, is what the pairs correct.
    """

    s: Array
    y: Array
    met: Array
    r: Array
    curvature: Kronecker

    def by_age(self, values: Array) -> Array:
        """A value for each place (m,), oldest pair first, zeros before the first one."""
        ages = jnp.arange(len(values), dtype=np.int32)
        return jnp.where(ages >= len(values) - self.met, values[(ages + self.met) % len(values)], 0)

    def by_place(self, values: Array) -> Array:
        """The other way round."""
        return values[(jnp.arange(len(values), dtype=np.int32) - self.met) % len(values)]


class Line(NamedTuple):
    """A line search on its way: along `direction` from w0, of slope `slope0`; next comes w, at step length t.

    remembers: whether the direction is that of the memory; keeps: whether the memory stays; goes_on: whether the search
    does.
    """

    search: linesearch.Search
    direction: Array
    slope0: Array
    remembers: Array
    keeps: Array
    goes_on: Array
    t: Array
    w: Array
    trials: Array


class Best(NamedTuple):
    """The lowest point of a line search, and its loss difference to the start; found: whether it is not the start."""

    w: Array
    evaluation: Evaluation
    difference: Any
    found: Any


class Walk(NamedTuple):
    """What the loop over trials carries; evals: all trials, those of a search given up included."""

    line: Line
    best: Best
    evals: Any


def _quasi_newton(pairs: Pairs, grad: Array) -> Array:
    """-H g, the two loops of Algorithm 7.4 as solutions with the triangle r: their alpha_i are R^-1 S'g.

    That form is of Byrd, Nocedal and Schnabel (Math. Programming 63, 1994, Theorem 2.2), but for q, which is computed
    as in the loops: Y'q by Y'g and Y'Y would lose digits where q is short beside g.
    """
    s, y, r = pairs.s, pairs.y, pairs.r
    alpha = solve_triangular(r, pairs.by_age(s @ grad))
    q = _h0(pairs, grad - pairs.by_place(alpha) @ y)
    return -(q + pairs.by_place(solve_triangular(r, jnp.diag(r) * alpha - pairs.by_age(y @ q), trans=1)) @ s)


def _h0(pairs: Pairs, v: Array) -> Array:
    """C^-1/2 v, scaled so that y.h0 y = s.y for the last pair, as in (7.20); zeros without pairs."""
    sy = pairs.r[-1, -1]
    unit = jnp.ldexp(jnp.ones_like(sy), -jnp.frexp(sy)[1] // 2)  # near (s.y)^-1/2, exact: no square underflows
    y = unit * pairs.y[(pairs.met - 1) % len(pairs.y)]
    v, h0y = pairs.curvature.times(v), pairs.curvature.times(y)
    return jnp.where(pairs.met > 0, unit * sy * unit / jnp.vdot(y, h0y), 0) * v


@jax.jit
def _begin(pairs: Pairs, keeps: Array, w: Array, grad: Array, length: Array, value: Array, goes_on: Array) -> Line:
    """A search along the direction of the memory, unless it is that of another objective or does not descend."""
    direction = _quasi_newton(pairs, grad)
    slope = jnp.vdot(grad, direction)
    remembers = keeps & (slope < 0)  # never without pairs, which give zeros
    direction, slope = jnp.where(remembers, direction, -grad / length), jnp.where(remembers, slope, -length)
    return _line(w, value, direction, slope, remembers, keeps, goes_on)


def _line(w: Array, value: Array, direction: Array, slope: Array, *flags: Array | bool) -> Line:
    search, none = linesearch.begin(slope, value), jnp.zeros((), np.int32)
    remembers, keeps, goes_on = (jnp.asarray(flag, bool) for flag in flags)  # Python's would compile all once more
    return Line(search, direction, slope, remembers, keeps, goes_on, jnp.ones_like(value), w + direction, none)


@partial(jax.jit, static_argnums=0)
def _judge(
    max_trials: int,
    line: Line,
    best: tuple[Array, Array],
    start: tuple[Array, Array, Array, Array],
    grad: Array,
    difference: Array,
) -> tuple[Line, Array]:
    """The search after a trial with this gradient and loss difference, and whether it is the best point so far.

    best: the difference of the best point before, and whether there is one. start: its point, gradient, the gradient's
    norm, and its loss.
    """
    (lowest, found), (w0, grad0, norm0, value0) = best, start
    scale = jnp.abs(line.slope0)
    point = linesearch.Point(line.t, difference / scale, jnp.vdot(grad, line.direction) / scale)
    accepted = linesearch.accepts(line.search, point)
    # Near the end of precision the gradient still falls where rounding hides the loss's fall: there the approximate
    # conditions decide, and an accepted point may lie above the start by their allowance.
    better = jnp.isfinite(point.slope) & (difference < lowest) | (accepted & ~found)
    trials = line.trials + 1
    goes_on = ~accepted & (trials < max_trials)
    search = linesearch.narrow(line.search, point)
    t = linesearch.propose(search)
    after = line._replace(search=search, t=t, w=w0 + t * line.direction, trials=trials, goes_on=goes_on)
    # A memory that gives no improving step is thrown away once: steepest descent has the last word.
    again = ~goes_on & ~better & ~found & line.remembers
    steepest = _line(w0, value0, -grad0 / norm0, -norm0, False, False, True)
    return jax.tree.map(partial(jnp.where, again), steepest, after), better


@jax.jit
def _remember(pairs: Pairs, keeps: Array, w: Array, w0: Array, grad: Array, grad0: Array, threshold: Array) -> Pairs:
    """The pairs, if any of them are kept, with one more in place of the oldest: if its s.y is clearly positive."""
    pairs = _kept(pairs, keeps)
    s, y = w - w0, grad - grad0
    sy = jnp.vdot(s, y)
    good = sy > threshold * norm(s) * norm(y)
    place = pairs.met % len(pairs.s)
    ss, ys = (old.at[place].set(jnp.where(good, new, old[place])) for old, new in ((pairs.s, s), (pairs.y, y)))
    pushed = pairs._replace(s=ss, y=ys, met=pairs.met + 1)
    r = jnp.pad(pairs.r[1:, 1:], (0, 1)).at[:, -1].set(pushed.by_age(ss @ y))
    pushed = _learned(pushed._replace(r=r))
    return jax.tree.map(partial(jnp.where, good), pushed, pairs._replace(s=ss, y=ys))


def _kept(pairs: Pairs, keeps: Array) -> Pairs:
    """The pairs, or none: what is in their places is not touched."""
    r = jnp.where(keeps, pairs.r, jnp.eye(len(pairs.r), dtype=pairs.r.dtype))
    return pairs._replace(met=jnp.where(keeps, pairs.met, 0), r=r)


def _learned(pairs: Pairs) -> Pairs:
    """With the curvature of the pairs that are there now, from time to time, for that is dear.

    The power -1/2, not -1, is a heuristic: it evens out what few pairs tell. To the last loss of a multiple of the
    identity this takes 0.38 of its evaluations on digits, 0.51 on MNIST with a dense network and 0.73 on a regression
    (geometric means of 4, 2 and 8 starts); the diagonal alone 0.70, 0.91 and, of 4 starts, 0.82.
    """

    def learn() -> Kronecker:
        sy = jnp.diag(pairs.r)
        weights = pairs.by_place(pairs.by_age(jnp.ones_like(sy)) / jnp.sqrt(sy))  # zero where no pair is
        return learned(pairs.curvature.shapes, weights[:, None] * pairs.y)

    due = (pairs.met & (pairs.met - 1) == 0) | (pairs.met % _ROOTS_EVERY == 0)
    return pairs._replace(curvature=jax.lax.cond(due, learn, lambda: pairs.curvature))


@jax.jit
def _unless_stalled(status: Array, found: Array, runs: Array) -> Array:
    return jnp.where(found | ~runs, status, jnp.full_like(status, Status.STALLED))


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS; costs about one evaluation of the subset a step.

    memory: pairs kept, of 2 P numbers each, beside a factored curvature of P to 16 P.
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
        checks.with_plain_numbers(self)

    def init(self, problem: Problem, w: Array) -> State:
        """The state before the first step from w (P,): an empty memory."""
        return start(problem, w, self._empty(problem, w))

    def step(self, problem: Problem, state: State) -> State:
        """One quasi-Newton step: direction, line search, memory."""
        keeps = state.known  # another subset is another objective
        state, runs = ended(problem, evaluated(problem, state), self._tolerance(problem.dtype))
        return self._search(problem, state, keeps, runs)

    def _tolerance(self, dtype: np.dtype) -> float:
        default = 1e-4 if dtype == np.float32 else 1e-7
        return default if self.tolerance is None else self.tolerance

    def _empty(self, problem: Problem, w: Array) -> Pairs:
        none = jnp.zeros((self.memory, w.size), w.dtype)
        none_yet, r = jnp.zeros((), np.int32), jnp.eye(self.memory, dtype=w.dtype)
        return Pairs(none, none, none_yet, r, unlearned(problem.shapes, w.dtype))

    def _search(self, problem: Problem, state: State, keeps: Array, runs: Array) -> State:
        """The state after a line search, without a trial unless it runs; STALLED where no trial lowers the loss."""
        w, before = state.w, state.evaluation
        line = _begin(state.memory, keeps, w, before.grad, before.norm, before.value, runs)
        start = Walk(line, Best(w, before, problem.real(0.0), np.False_), np.int32(0))
        walk = problem.driver.while_loop(lambda walk: walk.line.goes_on, partial(self._trial, problem, state), start)
        state = charged(state, GRADIENT, counted(walk.evals, problem.count), walk.evals)
        best, threshold = walk.best, problem.real(self.pair_threshold)
        memory = _remember(state.memory, walk.line.keeps, best.w, w, best.evaluation.grad, before.grad, threshold)
        state = moved(state, best.w, best.evaluation).replace(memory=memory)
        return state.replace(status=_unless_stalled(state.status, best.found, runs))

    def _trial(self, problem: Problem, state: State, walk: Walk) -> Walk:
        """One evaluation, and what follows from it."""
        w, before = walk.line.w, state.evaluation
        trial = problem.evaluate(w)
        difference = problem.difference(w, state.w, trial.losses, before.losses, problem.weights)
        best, start = (walk.best.difference, walk.best.found), (state.w, before.grad, before.norm, before.value)
        line, better = _judge(self.max_trials, walk.line, best, start, trial.grad, difference)
        best = problem.driver.select(better, Best(w, trial, difference, better), walk.best)
        return Walk(line, best, walk.evals + 1)
