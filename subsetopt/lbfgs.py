"""LBFGS: limited-memory BFGS with a Wolfe line search on the subset's deterministic loss.

Nocedal and Wright, Numerical Optimization (2006), Algorithms 7.4 (two-loop recursion) and 7.5. Their s_k, y_k, rho_k,
gamma_k are s, y, rho, gamma here. Differs in: pairs are accepted by a test free of the loss's scale; the memory is
cleared where the subset changes (another objective) and once where a line search fails.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from subsetopt import checks, linesearch
from subsetopt.growth import Growth
from subsetopt.problem import GRADIENT, Problem
from subsetopt.solve import State, Status, converged, evaluated, moved, start


class Pairs(NamedTuple):
    """The last m pairs, newest at the end; s, y (m, P), rho (m,): 1 / s.y, zero for an empty place."""

    s: Array
    y: Array
    rho: Array
    gamma: Array


@jax.jit
def _direction(pairs: Pairs, grad: Array) -> tuple[Array, Array]:
    """-H g by the two-loop recursion, Algorithm 7.4, and its slope g.d."""
    m = pairs.rho.shape[0]

    def newest_first(i: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        q, alphas = carry
        j = m - 1 - i
        alpha = pairs.rho[j] * jnp.vdot(pairs.s[j], q)
        return q - alpha * pairs.y[j], alphas.at[j].set(alpha)

    def oldest_first(j: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        r, alphas = carry
        beta = pairs.rho[j] * jnp.vdot(pairs.y[j], r)
        return r + (alphas[j] - beta) * pairs.s[j], alphas

    q, alphas = lax.fori_loop(0, m, newest_first, (grad, jnp.zeros_like(pairs.rho)))
    r, _ = lax.fori_loop(0, m, oldest_first, (pairs.gamma * q, alphas))
    return -r, -jnp.vdot(grad, r)


@jax.jit
def _remember(pairs: Pairs, s: Array, y: Array, threshold: Array) -> Pairs:
    """The pairs with (s, y) appended, unless its curvature s.y is not clearly positive."""
    sy, yy, ss = jnp.vdot(s, y), jnp.vdot(y, y), jnp.vdot(s, s)
    good = sy > threshold * jnp.sqrt(ss) * jnp.sqrt(yy)

    def push(stack: Array, new: Array) -> Array:
        return jnp.concatenate([stack[1:], new[None]])

    safe = jnp.where(good, sy, 1)
    new = Pairs(push(pairs.s, s), push(pairs.y, y), push(pairs.rho, 1 / safe), sy / jnp.where(good, yy, 1))
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, pairs)


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
        return start(w, self._empty(w))

    def step(self, problem: Problem, state: State) -> State:
        """One quasi-Newton step: direction, line search, memory."""
        if not state.known:
            state = evaluated(problem, state).replace(memory=self._empty(state.w))
        if state.status == Status.NONFINITE:
            return state
        if converged(state, self._tolerance(problem.dtype)):
            return state.replace(status=Status.CONVERGED)
        after = self._search(problem, state)
        if after.evaluation is state.evaluation and bool(np.any(state.memory.rho)):
            # A memory that gives no improving step is thrown away once; steepest descent has the last word.
            after = self._search(problem, after.replace(memory=self._empty(state.w)))
        if after.evaluation is state.evaluation:
            return after.replace(status=Status.STALLED)
        return after

    def _tolerance(self, dtype: np.dtype) -> float:
        default = 1e-4 if dtype == np.float32 else 1e-7
        return default if self.tolerance is None else self.tolerance

    def _empty(self, w: Array) -> Pairs:
        stack = jnp.zeros((self.memory, w.size), w.dtype)
        return Pairs(stack, stack, jnp.zeros(self.memory, w.dtype), jnp.zeros((), w.dtype))

    def _search(self, problem: Problem, state: State) -> State:
        """The state after a line search; the same evaluation where no trial lowers the loss."""
        before = state.evaluation
        direction, slope = _first_or_quasi_newton(state.memory, before.grad)
        search = linesearch.begin(float(slope), float(before.value), problem.dtype)
        best, best_phi, t, trials = None, 0.0, 1.0, 0
        whole = problem.whole()
        while trials < self.max_trials and search.slope0 < 0:
            w = state.w + problem.dtype.type(t) * direction
            trial = problem.evaluate(w)
            trials += 1
            phi = problem.difference(w, state.w, trial.losses, before.losses, whole.weights)
            point = linesearch.Point(t, float(phi), float(jnp.vdot(trial.grad, direction)))
            if np.isfinite(point.slope) and point.phi < best_phi:
                best, best_phi = (w, trial), point.phi
            if linesearch.accepts(search, point):
                break
            search = linesearch.narrow(search, point)
            t = linesearch.propose(search)
        state = state.replace(cost=state.cost + GRADIENT * trials * problem.count, evals=state.evals + trials)
        if best is None:
            return state
        w, evaluation = best
        memory = _remember(
            state.memory, w - state.w, evaluation.grad - before.grad, problem.dtype.type(self.pair_threshold)
        )
        return moved(problem, state, w, evaluation).replace(memory=memory)


def _first_or_quasi_newton(pairs: Pairs, grad: Array) -> tuple[Array, Array]:
    return _direction(pairs, grad) if bool(np.any(pairs.rho)) else _steepest(grad)


@jax.jit
def _steepest(grad: Array) -> tuple[Array, Array]:
    """A first step of length one, whatever the loss's scale."""
    norm = jnp.linalg.norm(grad)
    return -grad / norm, -norm
