"""GaussNewton: damped Gauss-Newton steps with sampled curvature, momentum and picked candidates.

    d = -(A + lam I)^-1 g + m d_prev        A ~ J'HJ, g the gradient of the whole subset

Gauss-Newton and its damping: Nocedal and Wright, Numerical Optimization (2006), section 10.3; Martens, Deep learning
via Hessian-free optimization (2010), for J'HJ with the output Hessian H and curvature on a sample. Ours, all of them
heuristics chosen by measurement: one random row an example drawn by output uncertainty, averaging over steps, and
damping and momentum picked among candidates by the loss on a small sample instead of a gain ratio.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from subsetopt import checks
from subsetopt.growth import Growth
from subsetopt.problem import GRADIENT, LOSS, PRODUCT, ROW, Evaluation, Problem, Sample
from subsetopt.solve import State, Status, converged, evaluated, moved, start

DENSE_LIMIT = 20_000  # parameters up to which a P x P matrix is kept (1.6 GB in float32)
_RAISE, _MAX_REJECTIONS = 4.0, 12  # damping after a rejected step; 4^12: seven orders of magnitude
_ROUNDING = 0.1  # of the loss's eps: what summed differences resolve (heuristic)


class Memory(NamedTuple):
    """What a step leaves to the next.

    matrix: (P, P) lower triangle of A (dense form). sample: the examples whose products stand for A (CG form).
    current: whether they were taken at this point (a rejected step never recomputes them). damping: lam, NaN before
    the first curvature. previous: (P,) the last accepted step. solution: (P,) warm start of CG.
    """

    key: Array
    matrix: Array
    sample: Sample
    current: bool
    damping: float
    previous: Array
    solution: Array
    rejections: int


@jax.jit
def _solve_dense(a: Array, damping: Array, grad: Array) -> Array:
    """-(A + lam I)^-1 g by Cholesky of the lower triangle; NaN where the matrix is not positive definite."""
    diagonal = jnp.arange(a.shape[0])
    factor = lax.linalg.cholesky(a.at[diagonal, diagonal].add(damping), symmetrize_input=False)
    half = lax.linalg.triangular_solve(factor, -grad[:, None], left_side=True, lower=True)
    return lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)[:, 0]


@jax.jit
def _average(old: Array, new: Array, weight: Array) -> Array:
    return weight * old + (1 - weight) * new


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """Damped Gauss-Newton on the subset's loss; a step that raises it is rejected.

    curvature_ratio: rows of the curvature sample per parameter, one random row an example; None: all M rows of the
        whole subset every step, nothing averaged, the classical method with fast local convergence.
    averaging: weight of the older curvature, A = averaging A_old + (1 - averaging) A_new (dense form; the CG form
        takes a new sample each step).
    damping: first lam, as a fraction of the mean diagonal of A.
    damping_factors: candidates for the next lam, relative to the last one picked.
    momenta: candidates for m.
    trial_examples: examples on which candidates are compared; the whole subset where that is not much larger.
    linear_solve: "dense" (P x P Cholesky), "cg" (matrix-free) or "auto": dense up to 20,000 parameters.
    cg_tolerance, cg_max_steps: relative residual at which CG ends, and its cap (the best iterate is kept).
    tolerance: CONVERGED when the gradient norm is this fraction of the largest one met; None: 1e-5 in float32, 1e-8
        in float64.
    """

    curvature_ratio: float | None = 1.1
    averaging: float = 0.5
    damping: float = 0.1
    damping_factors: tuple[float, ...] = (0.4, 1.5)
    momenta: tuple[float, ...] = (0.3, 0.6)
    trial_examples: int = 1000
    linear_solve: str = "auto"
    cg_tolerance: float = 1e-2
    cg_max_steps: int = 50
    tolerance: float | None = None

    growth: ClassVar[Growth] = Growth(start=4, factor=1.13, nested=False)
    until: ClassVar[str | int] = 1
    max_steps: ClassVar[int] = 60
    check_every: ClassVar[int] = 1
    fresh_subsets: ClassVar[bool] = True

    def __post_init__(self):
        if self.curvature_ratio is not None:
            checks.positive("GaussNewton.curvature_ratio", self.curvature_ratio)
        checks.real_number("GaussNewton.averaging", self.averaging, 0, 1)
        checks.real_number("GaussNewton.damping", self.damping, 0)
        checks.tuple_of(checks.positive, "GaussNewton.damping_factors", self.damping_factors)
        checks.tuple_of(checks.real_number, "GaussNewton.momenta", self.momenta, 0, 1)
        checks.whole_number("GaussNewton.trial_examples", self.trial_examples, 1)
        checks.choice("GaussNewton.linear_solve", self.linear_solve, ("auto", "dense", "cg"))
        checks.positive("GaussNewton.cg_tolerance", self.cg_tolerance)
        checks.whole_number("GaussNewton.cg_max_steps", self.cg_max_steps, 1)
        if self.tolerance is not None:
            checks.real_number("GaussNewton.tolerance", self.tolerance, 0, 1)

    def init(self, problem: Problem, w: Array) -> State:
        """The state before the first step from w (P,); `problem.seed` seeds the curvature samples."""
        zero, key = jnp.zeros_like(w), jax.random.key(problem.seed)
        empty = Sample(np.empty(0, int), np.empty(0))
        return start(w, Memory(key, jnp.zeros((0, 0), w.dtype), empty, False, math.nan, zero, zero, 0))

    def step(self, problem: Problem, state: State) -> State:
        """Gradient, curvature, candidates, the best of them, and its test on the whole subset."""
        state = evaluated(problem, state, uncertain=True)
        if state.status == Status.NONFINITE:
            return state
        if not problem.fresh and converged(state, self._tolerance(problem.dtype)):
            return state.replace(status=Status.CONVERGED)
        state = self._with_curvature(problem, state)
        state, move, damping = self._best_candidate(problem, state)
        if move is None:
            return self._rejected(state)
        return self._tested(problem, state, move, damping)

    # --- curvature -------------------------------------------------------------------------------------------------

    def _with_curvature(self, problem: Problem, state: State) -> State:
        """The state with a curvature sample taken at its point; unchanged after a rejected step."""
        memory: Memory = state.memory
        if memory.current:
            return state
        key, draw, signs = jax.random.split(memory.key, 3)
        sample, u = self._curvature_sample(problem, state, draw, signs)
        memory = memory._replace(key=key, current=True)
        if self._dense(problem):
            matrix = problem.gram(state.w, sample, u)
            cost = ROW * len(u)
            if memory.matrix.size and self.curvature_ratio is not None:
                matrix = _average(memory.matrix, matrix, problem.dtype.type(self.averaging))
            memory = memory._replace(matrix=matrix)
        else:
            memory, cost = memory._replace(sample=sample), 0.0
        if math.isnan(memory.damping):
            scale, extra = self._mean_diagonal(problem, state.w, memory)
            memory, cost = memory._replace(damping=self.damping * scale), cost + extra
        return state.replace(cost=state.cost + cost, memory=memory)

    def _mean_diagonal(self, problem: Problem, w: Array, memory: Memory) -> tuple[float, float]:
        """trace(A) / P and what it cost; the CG form estimates it by one random vector (Hutchinson)."""
        if self._dense(problem):
            return float(jnp.mean(jnp.diagonal(memory.matrix))), 0.0
        v = jax.random.rademacher(memory.key, w.shape, problem.dtype)
        product = problem.product(w, v, memory.sample)
        return float(jnp.vdot(v, product)) / problem.parameters - problem.l2, PRODUCT * len(memory.sample.indices)

    def _curvature_sample(self, problem: Problem, state: State, draw: Array, signs: Array) -> tuple[Sample, np.ndarray]:
        """Examples and their row combinations u (n, M)."""
        if self.curvature_ratio is None:
            return _all_rows(problem) if self._dense(problem) else (problem.whole(), np.empty(0))
        n = math.ceil(self.curvature_ratio * problem.parameters)
        _, sample = problem.draw(draw, state.evaluation.uncertainty, n)
        return sample, np.asarray(jax.random.rademacher(signs, (n, problem.outputs), problem.dtype))

    def _dense(self, problem: Problem) -> bool:
        return self.linear_solve == "dense" or (self.linear_solve == "auto" and problem.parameters <= DENSE_LIMIT)

    # --- candidates ------------------------------------------------------------------------------------------------

    def _best_candidate(self, problem: Problem, state: State) -> tuple[State, Array | None, float]:
        """The step with the lowest loss difference on the trial sample, None where none lowers it; and its damping."""
        memory: Memory = state.memory
        before = state.evaluation
        key, draw = jax.random.split(memory.key)
        positions, sample = self._trial_sample(problem, before, draw)
        losses0 = before.losses[positions]
        best, best_difference, best_damping = None, 0.0, memory.damping
        for factor in self.damping_factors:
            damping = memory.damping * factor
            state, solution = self._solve(problem, state, damping)
            for momentum in self._momenta(state):
                move = solution + problem.dtype.type(momentum) * memory.previous
                w = state.w + move
                losses = problem.losses(w, sample)
                state = state.replace(cost=state.cost + LOSS * len(losses))
                difference = float(problem.difference(w, state.w, losses, losses0, sample.weights))
                if difference < best_difference:
                    best, best_difference, best_damping = move, difference, damping
        return state.replace(memory=state.memory._replace(key=key)), best, best_damping

    def _momenta(self, state: State) -> tuple[float, ...]:
        """Candidates for m: one zero where there is no previous step; zero as well for the classical method."""
        if not bool(jnp.any(state.memory.previous)):
            return (0.0,)
        return self.momenta if self.curvature_ratio is not None else tuple(sorted({0.0, *self.momenta}))

    def _trial_sample(self, problem: Problem, before: Evaluation, key: Array) -> tuple[np.ndarray, Sample]:
        if problem.count <= 2 * self.trial_examples:
            return np.arange(problem.count), problem.whole()
        return problem.draw(key, before.uncertainty, self.trial_examples)

    def _solve(self, problem: Problem, state: State, damping: float) -> tuple[State, Array]:
        memory: Memory = state.memory
        grad, lam = state.evaluation.grad, problem.dtype.type(damping)
        if self._dense(problem):
            return state, _solve_dense(memory.matrix, lam + problem.dtype.type(problem.l2), grad)
        products = 0

        def product(v: Array) -> Array:
            nonlocal products
            products += 1
            return problem.product(state.w, v, memory.sample) + lam * v

        solution = conjugate_gradient(product, -grad, memory.solution, self.cg_tolerance, self.cg_max_steps)
        cost = state.cost + PRODUCT * products * len(memory.sample.indices)
        return state.replace(cost=cost, memory=memory._replace(solution=solution)), solution

    # --- acceptance ------------------------------------------------------------------------------------------------

    def _tested(self, problem: Problem, state: State, move: Array, damping: float) -> State:
        """The state after the step, unless the whole subset's loss rises. A fresh subset is not asked twice."""
        memory: Memory = state.memory._replace(damping=damping, previous=move, current=False, rejections=0)
        w = state.w + move
        if problem.fresh:
            return state.replace(w=w, memory=memory)
        before = state.evaluation
        after = problem.evaluate(w, uncertain=True)
        state = state.replace(cost=state.cost + GRADIENT * problem.count, evals=state.evals + 1)
        difference = problem.difference(w, state.w, after.losses, before.losses, problem.whole().weights)
        # A decrease that the loss cannot hold is none: without this, rounding would be accepted for ever.
        if not difference < -_ROUNDING * np.finfo(problem.dtype).eps * abs(before.value):
            return self._rejected(state)
        return moved(problem, state, w, after).replace(memory=memory)

    def _rejected(self, state: State) -> State:
        """The same point with more damping and no momentum; STALLED where that has happened too often."""
        memory: Memory = state.memory
        damping = (memory.damping or float(np.finfo(state.w.dtype).eps)) * _RAISE
        memory = memory._replace(damping=damping, previous=jnp.zeros_like(state.w), rejections=memory.rejections + 1)
        stalled = memory.rejections >= _MAX_REJECTIONS
        return state.replace(memory=memory, status=Status.STALLED if stalled else state.status)

    def _tolerance(self, dtype: np.dtype) -> float:
        default = 1e-5 if dtype == np.float32 else 1e-8
        return default if self.tolerance is None else self.tolerance


def _all_rows(problem: Problem) -> tuple[Sample, np.ndarray]:
    """Every example M times, with the M unit vectors: the exact curvature of the subset."""
    whole = problem.whole()
    unit = np.eye(problem.outputs, dtype=problem.dtype)
    repeated = Sample(np.repeat(whole.indices, problem.outputs), np.repeat(whole.weights, problem.outputs))
    return repeated, np.tile(unit, (problem.count, 1))


def conjugate_gradient(product: Any, b: Array, x: Array, tolerance: float, max_steps: int) -> Array:
    """A x = b by conjugate gradients (Nocedal and Wright, Algorithm 5.2), warm-started at x.

    Ends at |b - A x| <= tolerance |b|, or after max_steps with the iterate of smallest residual. b is normalised
    first: no constant in here knows a scale.
    """
    norm = jnp.linalg.norm(b)
    if not norm > 0:
        return jnp.zeros_like(b)
    b, x = b / norm, x / norm
    r = b - product(x) if bool(jnp.any(x)) else b
    if not jnp.linalg.norm(r) < 1:  # a warm start worse than nothing
        x, r = jnp.zeros_like(x), b
    p, rr = r, jnp.vdot(r, r)
    best, best_rr = x, rr
    for _ in range(max_steps):
        if best_rr <= tolerance**2:
            break
        ap = product(p)
        x, r, p, rr = _cg_update(x, r, p, ap, rr)
        if not bool(jnp.isfinite(rr)):
            break
        if rr < best_rr:
            best, best_rr = x, rr
    return best * norm


@jax.jit
def _cg_update(x: Array, r: Array, p: Array, ap: Array, rr: Array) -> tuple[Array, Array, Array, Array]:
    alpha = rr / jnp.vdot(p, ap)
    x, r = x + alpha * p, r - alpha * ap
    new = jnp.vdot(r, r)
    return x, r, r + new / rr * p, new
