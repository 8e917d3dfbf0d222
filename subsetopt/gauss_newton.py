"""GaussNewton: damped Gauss-Newton steps with sampled curvature, momentum and picked candidates.

    d = -(A + lam I)^-1 g + m d_prev        A ~ J'HJ, g the gradient of the whole subset

On fresh subsets g may be averaged over steps as A is, the old one carried to the new point by the curvature:

    g = a (g_old + A (w - w_old)) + (1 - a) g_subset

Gauss-Newton and its damping: Nocedal and Wright, Numerical Optimization (2006), section 10.3; Martens, Deep learning
via Hessian-free optimization (2010), for J'HJ with the output Hessian H and curvature on a sample. Ours, all of them
heuristics chosen by measurement (experiments/ablations.py): one random row an example drawn by uncertainty and slope, a
little averaging over steps (of the gradient: for a linear model, a Kalman filter of constant gain), and damping,
momentum and length picked among candidates by the loss on a small sample instead of a gain ratio.
"""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from subsetopt import checks
from subsetopt.curvature import PRECISIONS, Form, Recipe, form_of
from subsetopt.drivers import Sample
from subsetopt.growth import Growth
from subsetopt.problem import GRADIENT, LOSS, PRODUCT, ROW, Evaluation, Problem, counted
from subsetopt.solve import State, Status, charged, ended, evaluated, moved, start

_MAX_REJECTIONS = 10  # one after the other; each raises the damping, by 4, 8, 16 and so on: nine by 16 orders
_LEAST_TRIAL, _PARAMETERS_PER_TRIAL = 100, 20  # examples that compare candidates (heuristic, measured)
_LENGTHS = 0.2, 5.0  # of one step: from beyond them it is changed no further (heuristic)
_NO_CURVATURE = 1e-17  # of the gradient's norm: it asks for steps longer than what rejections bring down (heuristic)
_DOUBTFUL = 10  # mean deviations of the examples' losses, and falls foretold, by which a mean may rise (heuristic)
_ROUNDING = 0.1  # of the loss's eps: what summed differences resolve (heuristic)


class Memory(NamedTuple):
    """What a step leaves to the next.

    kept: the curvature, as its form keeps it. current: whether it was taken at this point (a rejected step never
    recomputes it). damping: lam, -1 before the first curvature. previous: (P,) the last accepted step. gradient:
    (P,) the averaged one, at the point origin (P,). misled: whether a step was rejected on this subset.
    highest: loss on the next subset above which the step from the origin is doubted.
    """

    key: Array
    kept: Any
    current: Any
    damping: Any
    previous: Array
    gradient: Array
    origin: Array
    rejections: Any
    misled: Any
    highest: Any


class Choice(NamedTuple):
    """The best candidate so far: its step (P,), its loss difference on the trial sample, and its damping.

    tried: candidates compared. foretold: what the loss falls by to first order, at most, along any solution.
    """

    move: Array
    difference: Array
    damping: Array
    tried: Any
    foretold: Any


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """Damped Gauss-Newton on the subset's loss; a step that raises it is rejected.

    On a fresh subset that shows in the next step, on another one: where that one's loss is far higher, and was lower
    before, the step is undone. The last step of a fit is not looked at again.

    curvature_ratio: rows of the curvature sample per parameter, one random row an example; None: all M rows of the
        whole subset every step, nothing averaged, the classical method with fast local convergence.
    curvature_share: rows per example of the subset, where that is more.
    averaging: weight of the older curvature, A = averaging A_old + (1 - averaging) A_new; in the CG form, the share of
        examples kept from step to step.
    gradient_averaging: weight of the older gradient on fresh subsets, carried to the new point by the curvature; 0.2
        takes a third of the noise out. No gain on digits and CIFAR-10 (heuristic, experiments/ablations.py). The
        classical method averages none.
    curvature_precision: of the matrix products in A, as for jax.default_matmul_precision; "tensorfloat32" or
        "bfloat16" use fast matrix units. "bfloat16" rounds the rows of the dense form on CPUs, too: faster where P is
        large, more steps where the loss gets small. Losses and gradients are always at "highest".
    damping: first lam, as a fraction of the mean diagonal of A, or of the gradient's norm where A is next to zero, as
        for the absolute error: there steps are those of gradient descent. At least eps.
    damping_factors: candidates for the next lam, relative to the last one picked.
    momenta: candidates for m.
    length_factor: the picked candidate is lengthened by this factor, again while that is better, for steps end short of
        the minimum where loss and curvature fall together; where no candidate lowers the loss, it is shortened until it
        does. Until it is five times, or a fifth, as long; 1: as it is.
    trial_examples: examples on which candidates are compared; the whole subset where that is at most twice as large,
        and, unless it is fresh, from the first rejected step on. None: one for 20 parameters, at least 100; the whole
        subset for the classical method, unless it is fresh.
    linear_solve: "dense" (Cholesky of A, P x P), "sample" (Cholesky in the space of the rows), "cg" (matrix-free), or
        "auto", the cheapest one by the cost model of `curvature.form_flops`.
    cg_tolerance, cg_max_steps: relative residual at which CG ends, and its cap (the best iterate is kept). A solve
        keeps 2 cg_max_steps P numbers.
    tolerance: CONVERGED when the gradient norm is this fraction of the largest one met; None: 1e-5 in float32, 1e-8
        in float64.
    """

    curvature_ratio: float | None = 0.5
    curvature_share: float = 0.25
    averaging: float = 0.3
    gradient_averaging: float = 0.0
    curvature_precision: str = "highest"
    damping: float = 1.0
    damping_factors: tuple[float, ...] = (0.4, 1.5)
    momenta: tuple[float, ...] = (0.3, 0.6)
    length_factor: float = 1.5
    trial_examples: int | None = None
    linear_solve: str = "auto"
    cg_tolerance: float = 1e-2
    cg_max_steps: int = 50
    tolerance: float | None = None

    growth: ClassVar[Growth] = Growth(start=4, factor=1.1, nested=False)
    until: ClassVar[str | int] = 1
    max_steps: ClassVar[int] = 80
    check_every: ClassVar[int] = 1
    fresh_subsets: ClassVar[bool] = True

    def __post_init__(self):
        if self.curvature_ratio is not None:
            checks.positive("GaussNewton.curvature_ratio", self.curvature_ratio)
        checks.real_number("GaussNewton.curvature_share", self.curvature_share, 0)
        checks.real_number("GaussNewton.averaging", self.averaging, 0, 1)
        checks.real_number("GaussNewton.gradient_averaging", self.gradient_averaging, 0, 1)
        checks.real_number("GaussNewton.damping", self.damping, 0)
        checks.tuple_of(checks.positive, "GaussNewton.damping_factors", self.damping_factors)
        checks.tuple_of(checks.real_number, "GaussNewton.momenta", self.momenta, 0, 1)
        checks.real_number("GaussNewton.length_factor", self.length_factor, 1)
        if self.trial_examples is not None:
            checks.whole_number("GaussNewton.trial_examples", self.trial_examples, 1)
        checks.choice("GaussNewton.linear_solve", self.linear_solve, ("auto", "dense", "sample", "cg"))
        checks.choice("GaussNewton.curvature_precision", self.curvature_precision, PRECISIONS)
        checks.positive("GaussNewton.cg_tolerance", self.cg_tolerance)
        checks.whole_number("GaussNewton.cg_max_steps", self.cg_max_steps, 1)
        if self.tolerance is not None:
            checks.real_number("GaussNewton.tolerance", self.tolerance, 0, 1)
        checks.with_plain_numbers(self)

    def init(self, problem: Problem, w: Array) -> State:
        """The state before the first step from w (P,); `problem.seed` seeds the curvature samples."""
        kept = self._form(problem).empty(problem, w)
        none, unknown = jnp.zeros((), np.int32), -jnp.ones((), w.dtype)
        never = none > 0
        steps = never, unknown, w * 0, w * 0, w, none, never, jnp.full((), jnp.inf, w.dtype)
        memory = Memory(jax.random.key(problem.seed), kept, *steps)
        return start(problem, w, memory, uncertain=True)

    def step(self, problem: Problem, state: State) -> State:
        """Gradient, curvature, candidates, the best of them, and its test on the whole subset."""
        memory: Memory = state.memory
        tried = memory.rejections, memory.misled
        known = _of_this_subset(state.known, memory.current, memory.damping, *tried)
        state = state.replace(memory=memory._replace(**known))
        scale = state.grad_scale
        state = evaluated(problem, state, uncertain=True)
        doubtful = _is_doubtful(state.evaluation.value, state.memory.highest)
        state = problem.driver.cond(doubtful, partial(self._doubted, problem, scale), lambda state: state, state)
        # Steps on fresh subsets are accepted before they are evaluated, the last of them first on the whole set.
        w, known = _back_from_nowhere(state.w, state.known, state.status, state.memory.origin)
        state, runs = ended(problem, state.replace(w=w, known=known), self._tolerance(problem.dtype))
        return problem.driver.cond(runs, partial(self._advance, problem), lambda state: state, state)

    def _doubted(self, problem: Problem, scale: Any, state: State) -> State:
        """The state before the last step, with more damping, if the loss of this subset is lower there.

        scale: the largest gradient met, without the one that the step has led to.
        """
        memory: Memory = state.memory
        damped = memory._replace(damping=4 * memory.damping, previous=memory.previous * 0)
        before = state.replace(w=memory.origin, known=jnp.zeros_like(state.known, dtype=bool), memory=damped)
        before = evaluated(problem, before.replace(grad_scale=scale), uncertain=True)
        state = state.replace(cost=before.cost, evals=before.evals)
        lower = before.evaluation.value < state.evaluation.value
        return problem.driver.cond(lower, lambda: before, lambda: state)

    def _advance(self, problem: Problem, state: State) -> State:
        form, driver = self._form(problem), problem.driver
        renew = partial(self._with_curvature, problem, form)
        state = driver.cond(state.memory.current, lambda state: state, renew, state)
        state, choice = self._best_candidate(problem, form, state)
        test, reject = partial(self._tested, problem, choice), partial(self._rejected, problem, choice)
        return driver.cond(choice.difference < 0, test, reject, state)

    # --- curvature -------------------------------------------------------------------------------------------------

    def _form(self, problem: Problem) -> Form:
        rows = None if self.curvature_ratio is None else math.ceil(self.curvature_ratio * problem.parameters)
        sampling = rows, self.curvature_share, self.averaging
        recipe = Recipe(*sampling, self.curvature_precision, self.cg_tolerance, self.cg_max_steps)
        return form_of(problem, recipe, self.linear_solve, len(self.damping_factors))

    def _score(self, known: Evaluation) -> Array:
        """(N,) by which examples are drawn: uncertainty and slope, each over its mean (heuristic, measured)."""
        return _over_mean(known.uncertainty) + _over_mean(known.slope)

    def _with_curvature(self, problem: Problem, form: Form, state: State) -> State:
        """The state with a curvature sample and the gradient taken at its point, and a damping where there was none."""
        memory: Memory = state.memory
        key, draw, probe = jax.random.split(memory.key, 3)
        kept, rows = form.renewed(problem, state.w, self._score(state.evaluation), memory.kept, draw)
        state = charged(state, ROW, rows)
        gradient, examples = self._gradient(problem, form, state, kept)
        memory = memory._replace(key=key, kept=kept, current=jnp.ones_like(memory.current))
        memory = memory._replace(gradient=gradient, origin=state.w, highest=jnp.full_like(memory.highest, jnp.inf))
        state = charged(state, PRODUCT, examples).replace(memory=memory)

        def first_damping(state: State) -> State:
            scale, examples = form.mean_diagonal(problem, state.w, kept, probe)
            scale = _scale(scale, state.evaluation.value, state.evaluation.norm)
            least = float(jnp.finfo(scale.dtype).eps)  # zero could not be raised where a step is rejected
            damping = max(self.damping, least) * jnp.where(scale > 0, scale, 1)
            return charged(state, PRODUCT, examples).replace(memory=memory._replace(damping=damping))

        return problem.driver.cond(memory.damping < 0, first_damping, lambda state: state, state)

    def _gradient(self, problem: Problem, form: Form, state: State, kept: Any) -> tuple[Array, Any]:
        """The subset's gradient, averaged on fresh subsets, and the examples of which a product was computed."""
        memory, new = state.memory, state.evaluation.grad
        if not problem.fresh or self.curvature_ratio is None or self.gradient_averaging == 0:
            return new, 0
        change = state.w - memory.origin
        product, examples = form.times(problem, state.w, kept, change)
        share = jnp.where(memory.damping < 0, 0, self.gradient_averaging).astype(new.dtype)
        return share * (memory.gradient + product) + (1 - share) * new, examples

    # --- candidates ------------------------------------------------------------------------------------------------

    def _best_candidate(self, problem: Problem, form: Form, state: State) -> tuple[State, Choice]:
        """The step with the lowest loss difference on some examples; none lowers the loss unless it is negative."""
        memory: Memory = state.memory
        key, draw = jax.random.split(memory.key)
        dampings = memory.damping * jnp.asarray(self.damping_factors, memory.damping.dtype)
        solutions, kept, products = form.solve(problem, state.w, memory.kept, dampings, memory.gradient)

        def on_all() -> tuple[Choice, Array]:
            return self._picked(problem, state, problem.whole(), state.evaluation.losses, dampings, solutions)

        def on_some() -> tuple[Choice, Array]:
            size = min(self._trial(problem), problem.examples)
            positions, sample = problem.draw(draw, self._score(state.evaluation), size, np.int32(size))
            return self._picked(problem, state, sample, state.evaluation.losses[positions], dampings, solutions)

        choice, examples = problem.driver.cond(self._asks_all(problem, memory), on_all, on_some)
        state = charged(charged(state, PRODUCT, products), LOSS, examples)
        return state.replace(memory=memory._replace(key=key, kept=kept)), choice

    def _asks_all(self, problem: Problem, memory: Memory) -> Any:
        """Whether candidates are compared on the whole subset: where a sample is half of it, or has misled.

        Near a minimum a sample's loss falls where the subset's rises, and rises where that falls.
        """
        few = problem.count <= 2 * self._trial(problem)
        return few if problem.fresh else few | memory.misled

    def _picked(
        self, problem: Problem, state: State, sample: Sample, losses0: Array, dampings: Array, solutions: Any
    ) -> tuple[Choice, Any]:
        """The best candidate on a sample, and the number of losses that were asked for.

        Where a step was rejected dampings are compared first, and momentum is added while more of it is better: near a
        minimum none is best, and on the whole subset each candidate is dear.
        """
        memory: Memory = state.memory
        momenta = jnp.asarray(self._momenta(), memory.damping.dtype)
        previous = memory.previous if problem.fresh else jnp.where(memory.misled, 0, memory.previous)
        # Without a previous step all momenta are the same.
        stride = jnp.where(jnp.any(previous != 0), 1, len(momenta)).astype(np.int32)

        def compare(carry: tuple[Choice, Array]) -> tuple[Choice, Array]:
            best, number = carry
            damping, momentum = number // len(momenta), momenta[number % len(momenta)]
            move = solutions[damping] + momentum * previous
            return self._compare(problem, state.w, sample, losses0, dampings[damping], move, best), number + stride

        zero = jnp.zeros((), np.int32)
        foretold = jnp.max(jnp.abs(solutions @ memory.gradient))
        nothing = Choice(memory.previous, jnp.full_like(memory.damping, jnp.inf), memory.damping, zero, foretold)
        candidates = len(dampings) * len(momenta)
        choice, _ = problem.driver.while_loop(lambda carry: carry[1] < candidates, compare, (nothing, zero))
        if not problem.fresh:
            choice = self._with_momentum(problem, state, sample, losses0, choice)
        if self.length_factor > 1:
            choice = self._rescaled(problem, state.w, sample, losses0, choice)
        return choice, counted(choice.tried, sample.count)

    def _compare(
        self, problem: Problem, w: Array, sample: Sample, losses0: Array, damping: Array, move: Array, best: Choice
    ) -> Choice:
        """The better of two candidates."""
        losses = problem.losses(w + move, sample)
        difference = problem.difference(w + move, w, losses, losses0, sample.weights)
        keep = best._replace(tried=best.tried + 1)
        new = keep._replace(move=move, difference=difference, damping=damping)
        return problem.driver.select(difference < best.difference, new, keep)

    def _with_momentum(self, problem: Problem, state: State, sample: Sample, losses0: Array, picked: Choice) -> Choice:
        """The picked step, with momentum while more of it is better; as it is where it may have some already."""
        memory: Memory = state.memory
        more = sorted(momentum for momentum in self.momenta if momentum > 0)
        if not more:
            return picked
        momenta = jnp.asarray(more, memory.damping.dtype)

        def on(carry: tuple[Choice, Array, Any]) -> Any:
            _, number, goes_on = carry
            return goes_on & (number < len(momenta))

        def add(carry: tuple[Choice, Array, Any]) -> tuple[Choice, Array, Any]:
            best, number, _ = carry
            move = picked.move + momenta[number] * memory.previous
            new = self._compare(problem, state.w, sample, losses0, picked.damping, move, best)
            return new, number + 1, new.difference < best.difference

        may = memory.misled & jnp.any(memory.previous != 0) & jnp.isfinite(picked.difference)
        return problem.driver.while_loop(on, add, (picked, jnp.zeros((), np.int32), may))[0]

    def _rescaled(self, problem: Problem, w: Array, sample: Sample, losses0: Array, picked: Choice) -> Choice:
        """The picked step, longer while that is better; where it raises the loss, shorter until it lowers it."""
        lowers, (shortest, longest) = picked.difference < 0, _LENGTHS
        factor = jnp.where(lowers, self.length_factor, 1 / self.length_factor).astype(w.dtype)

        def on(carry: tuple[Choice, Array, Any]) -> Any:
            _, length, goes_on = carry
            return goes_on & (length > shortest) & (length < longest)

        def rescale(carry: tuple[Choice, Array, Any]) -> tuple[Choice, Array, Any]:
            best, length, _ = carry
            length = factor * length
            new = self._compare(problem, w, sample, losses0, picked.damping, length * picked.move, best)
            return new, length, jnp.where(lowers, new.difference < best.difference, ~(new.difference < 0))

        begin = picked, jnp.ones_like(factor), jnp.isfinite(picked.difference)
        return problem.driver.while_loop(on, rescale, begin)[0]

    def _momenta(self) -> tuple[float, ...]:
        """Candidates for m; zero as well for the classical method."""
        return self.momenta if self.curvature_ratio is not None else tuple(sorted({0.0, *self.momenta}))

    def _trial(self, problem: Problem) -> int:
        """Examples in it.

        All of them for the classical method, whose rows cost more: near a minimum a sample's loss may rise where the
        subset's falls.
        """
        if self.trial_examples is not None:
            return self.trial_examples
        if self.curvature_ratio is None and not problem.fresh:
            return problem.examples
        return max(_LEAST_TRIAL, problem.parameters // _PARAMETERS_PER_TRIAL)

    # --- acceptance ------------------------------------------------------------------------------------------------

    def _tested(self, problem: Problem, choice: Choice, state: State) -> State:
        """The state after the step, unless the whole subset's loss rises. A fresh subset is not asked twice."""
        memory: Memory = state.memory
        memory = memory._replace(damping=choice.damping, previous=choice.move, current=jnp.zeros_like(memory.current))
        memory = memory._replace(rejections=jnp.zeros_like(memory.rejections))
        w, before = state.w + choice.move, state.evaluation
        if problem.fresh:
            highest = before.value + _DOUBTFUL * (self._spread(problem, before) - choice.difference)
            memory = memory._replace(highest=highest)
            return state.replace(w=w, memory=memory, known=jnp.zeros_like(state.known, dtype=bool))
        after = problem.evaluate(w, uncertain=True)
        state = charged(state, GRADIENT, problem.count, evals=1)
        difference = problem.difference(w, state.w, after.losses, before.losses, problem.weights)
        # A decrease that the loss cannot hold is none: without this, rounding would be accepted for ever.
        lower = difference < -_resolution(before.value)
        lower &= jnp.isfinite(after.norm)  # from a point without a gradient no step goes on

        def accepted(state: State) -> State:
            return moved(state, w, after).replace(memory=memory)

        return problem.driver.cond(lower, accepted, partial(self._rejected, problem, choice), state)

    def _spread(self, problem: Problem, known: Evaluation) -> Array:
        """The mean absolute deviation of the examples' losses: squares would leave the range of the dtype."""
        total, weights = problem.driver.total, problem.weights
        return total(weights, abs(known.losses - total(weights, known.losses)))

    def _rejected(self, problem: Problem, choice: Choice, state: State) -> State:
        """The same point with more damping and no momentum; STALLED where that has happened too often.

        Or where not even the longest step could lower the loss by what its dtype holds: more damping makes it shorter.
        """
        longest = jnp.inf if problem.fresh else _LENGTHS[1] * self.length_factor * choice.foretold
        hopeless = longest < _resolution(state.evaluation.value)
        memory, status = _damped(state.memory._replace(kept=None), state.status, hopeless)
        return state.replace(memory=memory._replace(kept=state.memory.kept), status=status)

    def _tolerance(self, dtype: np.dtype) -> float:
        default = 1e-5 if dtype == np.float32 else 1e-8
        return default if self.tolerance is None else self.tolerance


@jax.jit
def _is_doubtful(value: Array, highest: Array) -> Array:
    return jnp.isfinite(value) & (value > highest)


@jax.jit
def _over_mean(values: Array) -> Array:
    return values / jnp.maximum(jnp.mean(values), jnp.finfo(values.dtype).tiny)


@jax.jit
def _of_this_subset(known: Array, current: Array, damping: Array, rejections: Array, misled: Array) -> dict[str, Array]:
    """A memory's fields without what was taken and rejected on another subset."""
    raised = rejections * (rejections + 3) / 2  # the exponents of `_damped`, 2 + 3 + ... + (rejections + 1)
    before = damping / jnp.exp2(raised).astype(damping.dtype)
    return {
        "current": current & known,
        "damping": jnp.where(known, damping, before),
        "rejections": jnp.where(known, rejections, 0),
        "misled": misled & known,
    }


@jax.jit
def _back_from_nowhere(w: Array, known: Array, status: Array, origin: Array) -> tuple[Array, Array]:
    """Where the loss is not finite, the point before, which is the last one that a curvature was taken at."""
    lost = status == Status.NONFINITE
    return jnp.where(lost, origin, w), known & ~lost


@jax.jit
def _scale(mean_diagonal: Array, value: Array, norm: Array) -> Array:
    """Of the damping: the mean diagonal, or what makes gradient steps of length 1 where there is next to no curvature.

    Unless the loss is so large that such steps would not change it: then there is curvature, far from a minimum.
    """
    none = (mean_diagonal <= _NO_CURVATURE * norm) & (norm > _resolution(value))
    return jnp.where(none | (mean_diagonal <= 0), norm, mean_diagonal)


@jax.jit
def _resolution(value: Array) -> Array:
    """What summed differences of a loss resolve."""
    return _ROUNDING * float(jnp.finfo(value.dtype).eps) * jnp.abs(value)


@jax.jit
def _damped(memory: Memory, status: Array, hopeless: Array) -> tuple[Memory, Array]:
    rejections = memory.rejections + 1
    stalled = hopeless | (rejections >= _MAX_REJECTIONS)
    status = jnp.where(stalled, jnp.full_like(status, Status.STALLED), status)
    damping = jnp.maximum(memory.damping, jnp.finfo(memory.damping.dtype).tiny)
    damping = jnp.ldexp(damping, rejections + 1)  # doubled from one to the next: Nielsen, IMM-REP-1999-05
    misled = jnp.ones_like(memory.misled)
    return memory._replace(damping=damping, previous=memory.previous * 0, rejections=rejections, misled=misled), status
