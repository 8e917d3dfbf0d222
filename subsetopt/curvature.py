"""Three forms of the damped Gauss-Newton system (A + lam I) d = -g, and the cost model that picks one.

A ~ sum_i weight_i J_i' H_i J_i over a curvature sample. A form keeps what it needs of A between steps, as a pytree:

    Dense          the matrix A, P x P; Cholesky.
    SampleSpace    the n rows R of A = R'R, n x P with n < P; Cholesky of R R', n x n.
    MatrixFree     the examples alone; preconditioned conjugate gradients on products with A.

Sources: Nocedal and Wright, Numerical Optimization (2006), section 10.3 and Algorithm 5.3; Martens, Deep learning via
Hessian-free optimization (2010); for the push-through form, Chen et al., NetKet's minSR (2023). Heuristics, chosen by
measurement: one random row an example, drawn by what the solver says of it, and averaging over steps.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from subsetopt.drivers import Sample
from subsetopt.linalg import Factor, cholesky, cholesky_solve, norm, row_products, symmetric_product
from subsetopt.problem import PRODUCT, Problem, counted, gradient_flops

PRECISIONS = ("highest", "float32", "tensorfloat32", "high", "bfloat16", "default")
MATRIX_LIMIT = 20_000  # rows and columns up to which a square matrix is kept: 1.6 GB in float32
_WINDOW = 4  # row samples that SampleSpace averages over: with averaging 0.5, 94 % of all weight
_PRECONDITIONER_ROWS = 256
_REFINEMENTS = 20
_SIGNS_AT_ONCE = 1 << 14  # rows whose random keys are in memory together
_MODEL_RATE, _ROW_RATE, _CALL, _READING = 15.0, 36.0, 5e8, 50.0  # see form_flops


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How curvature is sampled and solved with; a field of GaussNewton says more about each.

    rows: single rows a step, more where `share` of the subset's examples are more; None: all M rows of the whole
    subset, nothing averaged.
    """

    rows: int | None
    share: float
    averaging: float
    precision: str
    cg_tolerance: float
    cg_max_steps: int

    def most_rows(self, problem: Problem) -> int:
        """Rows of one sample where the subset is the whole set."""
        if self.rows is None:
            return problem.examples * problem.outputs
        return max(self.rows, math.ceil(self.share * problem.examples))

    def draw(self, problem: Problem, score: Any, key: Array) -> tuple[Sample, Any]:
        """A sample with random signs u (n, M), one row an example; u None: the whole subset, all rows."""
        if self.rows is None:
            return problem.whole(), None
        draw, signs = jax.random.split(key)
        most = self.most_rows(problem)
        rows = _rows_now(self.rows, most, self.share, problem.count)
        positions, sample = problem.draw(draw, score, most, rows)
        return sample, _signs(problem.outputs, signs, positions)

    def cost(self, problem: Problem, sample: Sample) -> Any:
        """Rows of a sample, what they cost being ROW each."""
        return counted(sample.count, problem.outputs) if self.rows is None else sample.count

    def fast(self) -> contextlib.AbstractContextManager:
        """Matrix products of the curvature may be coarser than those of the gradient."""
        return jax.default_matmul_precision(self.precision)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rows_now(least: int, most: int, share: float, count: Array) -> Array:
    """Never above `most`: in float32, a share of the whole set may round to one row more."""
    return jnp.clip(jnp.ceil(share * count.astype(np.float32)).astype(count.dtype), least, most)


@functools.partial(jax.jit, static_argnums=0)
def _signs(outputs: int, key: Array, positions: Array) -> Array:
    """Random signs (n, M) that belong to the examples, not to their places: one other draw changes one row only.

    A byte each: with a large subset they are most of what a sample takes.
    """
    occurrence = jnp.arange(len(positions), dtype=positions.dtype) - jnp.searchsorted(positions, positions).astype(
        positions.dtype
    )

    def one(place: tuple[Array, Array]) -> Array:
        position, occurrence = place
        own = jax.random.fold_in(jax.random.fold_in(key, position), occurrence)
        return jax.random.rademacher(own, (outputs,), np.int8)

    return lax.map(one, (positions, occurrence), batch_size=_SIGNS_AT_ONCE)


class Form(Protocol):
    """What GaussNewton asks of a form; the rows and products that it counts are priced in `problem`."""

    def empty(self, problem: Problem, w: Array) -> Any:
        """The pytree before the first sample."""
        ...

    def renewed(self, problem: Problem, w: Array, score: Any, kept: Any, key: Array) -> tuple[Any, Any]:
        """The pytree with a new sample taken at w, averaged with what is there, and the rows computed."""
        ...

    def mean_diagonal(self, problem: Problem, w: Array, kept: Any, key: Array) -> tuple[Array, Any]:
        """trace(A) / P, and the examples of which a product was computed."""
        ...

    def times(self, problem: Problem, w: Array, kept: Any, v: Array) -> tuple[Array, Any]:
        """(A + l2 I) v, and the examples of which a product was computed."""
        ...

    def solve(self, problem: Problem, w: Array, kept: Any, dampings: Array, grad: Array) -> tuple[Array, Any, Any]:
        """-(A + (damping + l2) I)^-1 grad for each of the dampings (d,): (d, P).

        With the pytree after it, and the examples of which products were computed. NaN where there is no solution.
        """
        ...


# --- dense ---------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """Lower triangle of A (P, P), and the number of samples in it."""

    a: Array
    samples: Array


@dataclasses.dataclass(frozen=True)
class Dense:
    """A itself: A = averaging A_old + (1 - averaging) A_new."""

    recipe: Recipe

    def empty(self, problem: Problem, w: Array) -> Matrix:
        """A zero matrix."""
        return Matrix(jnp.zeros((w.size, w.size), w.dtype), jnp.zeros((), np.int32))

    def renewed(self, problem: Problem, w: Array, score: Any, kept: Matrix, key: Array) -> tuple[Matrix, Any]:
        """One pass over the new rows."""
        sample, u = self.recipe.draw(problem, score, key)
        old = 0.0 if u is None else self.recipe.averaging
        # The new rows are added onto the old matrix's share, which is a copy: an interrupted step goes back to it.
        onto, weights = _shares(old, kept, jnp.asarray(sample.weights))
        with self.recipe.fast():
            a = problem.gram(w, sample._replace(weights=weights), u, onto, self.recipe.rows)
        return Matrix(a, kept.samples + 1), self.recipe.cost(problem, sample)

    def mean_diagonal(self, problem: Problem, w: Array, kept: Matrix, key: Array) -> tuple[Array, Any]:
        """Of the matrix itself."""
        return jnp.mean(jnp.diagonal(kept.a)), 0

    def times(self, problem: Problem, w: Array, kept: Matrix, v: Array) -> tuple[Array, Any]:
        """From the lower triangle."""
        return _times(kept.a, v) + problem.real(problem.l2) * v, 0

    def solve(self, problem: Problem, w: Array, kept: Matrix, dampings: Array, grad: Array):
        """By Cholesky."""
        return _solve_dense(kept.a, dampings + problem.real(problem.l2), -grad), kept, 0


@functools.partial(jax.jit, static_argnums=0)
def _shares(averaging: float, kept: Matrix, weights: Array) -> tuple[Array, Array]:
    """The old matrix and the new sample's weights, each times its share."""
    lasts = (kept.samples > 0) & jnp.isfinite(jnp.trace(kept.a))
    old = jnp.where(lasts, jnp.asarray(averaging, weights.dtype), 0)
    return jnp.where(old > 0, old * kept.a, 0), (1 - old) * weights


_times = jax.jit(symmetric_product)


@jax.jit
def _solve_dense(a: Array, dampings: Array, b: Array) -> Array:
    return lax.platform_dependent(a, dampings, b, cpu=_one_factor, default=_own_factors)


def _own_factors(a: Array, dampings: Array, b: Array) -> Array:
    """A factorisation for each damping, where substitutions are slow: on accelerators."""
    return jnp.stack([cholesky_solve(cholesky(a, damping), b) for damping in dampings])


def _one_factor(a: Array, dampings: Array, b: Array) -> Array:
    """One factorisation, at the largest damping; on CPUs it costs as much as 40 solves at P = 11,146.

    With M = (A + largest I)^-1, (A + damping I) x = b is (I - (largest - damping) M) x = M b. The condition number of
    this is below largest / damping: where that is 4, CG has three quarters of all digits after 11 products with M. With
    half of them, rounding decided when it ends, and losses showed the number of devices. It makes 20 products at most:
    dampings more than 10 times apart get fewer digits.
    """
    largest = jnp.max(dampings)
    inverse = functools.partial(cholesky_solve, cholesky(a, largest))
    start, tolerance = inverse(b), float(jnp.finfo(b.dtype).eps) ** 0.75

    def solve(damping: Array) -> Array:
        def product(v: Array) -> Array:
            return v - (largest - damping) * inverse(v)

        x, _ = conjugate_gradient(lax.while_loop, product, lambda v: v, start, start, tolerance, _REFINEMENTS)
        return jnp.where(jnp.isfinite(start), x, start)

    return lax.map(lambda damping: lax.cond(damping < largest, solve, lambda _: start, damping), dampings)


# --- sample space --------------------------------------------------------------------------------------------------


class RowSpace(NamedTuple):
    """The rows of the last samples: A = R'R with R = diag(root) rows.

    rows (n, P); root (n,): square roots of the samples' shares; products (n, n): lower triangle of rows rows'; c (n,):
    g = R'c + l2 w, where the rows are the subset's own; samples: how many there are.
    """

    rows: Array
    root: Array
    products: Array
    c: Array
    samples: Array

    @property
    def gram(self) -> Array:
        """The lower triangle of R R'."""
        return jnp.outer(self.root, self.root) * self.products

    @property
    def trace(self) -> Array:
        """Of R R', and of R'R."""
        return jnp.vdot(self.root**2, jnp.diagonal(self.products))

    def times(self, v: Array) -> Array:
        """R v."""
        return self.root * (self.rows @ v)

    def transposed(self, v: Array) -> Array:
        """R'v."""
        return (self.root * v) @ self.rows  # the transpose would be made on CPUs, at sixty times the cost


@dataclasses.dataclass(frozen=True)
class SampleSpace:
    """The rows of the last `window` samples, the k-th last with a share in proportion to averaging^k.

    push_through: the rows are the subset's own, so that the gradient is a combination of them.
    """

    recipe: Recipe
    window: int
    push_through: bool

    def empty(self, problem: Problem, w: Array) -> RowSpace:
        """No rows."""
        n = self.window * self.recipe.most_rows(problem)
        rows, products, zeros = (jnp.zeros(shape, w.dtype) for shape in ((n, w.size), (n, n), (n,)))
        return RowSpace(rows, zeros, products, zeros, jnp.zeros((), np.int32))

    def renewed(self, problem: Problem, w: Array, score: Any, kept: RowSpace, key: Array) -> tuple[RowSpace, Any]:
        """The new rows in front, the oldest ones gone."""
        sample, u = self.recipe.draw(problem, score, key)
        with self.recipe.fast():
            new = problem.rows(w, sample, u)
        rows, c = (new, None) if u is not None else new
        # Their products at full precision: they have to be those of the very rows that solutions are made of.
        return _pushed(self.window, self.recipe.averaging, kept, rows, c), self.recipe.cost(problem, sample)

    def mean_diagonal(self, problem: Problem, w: Array, kept: RowSpace, key: Array) -> tuple[Array, Any]:
        """From the squares of the rows."""
        return kept.trace / problem.parameters, 0

    def times(self, problem: Problem, w: Array, kept: RowSpace, v: Array) -> tuple[Array, Any]:
        """R'R v."""
        return kept.transposed(kept.times(v)) + problem.real(problem.l2) * v, 0

    def solve(self, problem: Problem, w: Array, kept: RowSpace, dampings: Array, grad: Array):
        """By Cholesky of R R'; exact to rounding where the gradient is made of the same rows."""
        l2 = problem.real(problem.l2)
        if self.push_through:
            rest = _not_of_rows(kept, grad, l2 * w)
            solutions = [_push_through(kept, damping + l2, rest) for damping in dampings]
        else:
            solutions = [_refined(kept, damping + l2, grad) for damping in dampings]
        return jnp.stack(solutions), kept, 0


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pushed(window: int, averaging: float, kept: RowSpace, new: Array, c: Array | None) -> RowSpace:
    """The newest sample in front, the oldest one gone, every one weighted by its age."""
    new = new.reshape(-1, new.shape[-1])
    n, lasts = len(new), jnp.isfinite(kept.trace)
    rows = jnp.concatenate([new, jnp.where(lasts, kept.rows[:-n], 0)])
    old = jnp.where(lasts, kept.products[:-n, :-n], 0)
    products = jnp.concatenate([row_products(rows, n), jnp.pad(old, ((n, 0), (0, 0)))], axis=1)
    samples = jnp.minimum(jnp.where(lasts, kept.samples, 0) + 1, window)
    shares = jnp.asarray([averaging**age for age in range(window)], rows.dtype)
    shares = jnp.where(jnp.arange(window, dtype=np.int32) < samples, shares, 0)
    root = jnp.repeat(jnp.sqrt(shares / jnp.sum(shares)), n)
    return RowSpace(rows, root, products, kept.c if c is None else c.reshape(-1), samples)


def _inverse(kept: RowSpace, factor: Factor, damping: Array, v: Array) -> Array:
    """(R'R + damping I)^-1 v by Woodbury: v minus what the rows see of it, over the damping."""
    return (v - kept.transposed(cholesky_solve(factor, kept.times(v)))) / damping


@jax.jit
def _not_of_rows(kept: RowSpace, grad: Array, penalty: Array) -> Array:
    """What of g is not R'c: the penalty's own gradient, unless there is clearly more.

    There is where c is clipped, which has the probabilities as divisors, and where rows are less precise than g.
    """
    rest = grad - kept.transposed(kept.c)
    rounding = float(jnp.finfo(grad.dtype).eps) ** 0.5 * norm(grad)
    return jnp.where(norm(rest - penalty) > rounding, rest, penalty)


@jax.jit
def _push_through(kept: RowSpace, damping: Array, rest: Array) -> Array:
    """-(R'R + damping I)^-1 (R'c + rest); the first part is -R'(R R' + damping I)^-1 c, exact to rounding.

    In float32 at a damping of 1e-7 it has a relative error of 6e-4 where Woodbury has 0.7 (notes of the prototype).
    """
    factor = cholesky(kept.gram, damping)
    own = kept.transposed(cholesky_solve(factor, kept.c))
    return -own - jnp.where(jnp.any(rest != 0), _inverse(kept, factor, damping, rest), 0)


@jax.jit
def _refined(kept: RowSpace, damping: Array, grad: Array) -> Array:
    """-(R'R + damping I)^-1 g: Woodbury loses digits to a small damping, conjugate gradients on top restore them."""
    factor = cholesky(kept.gram, damping)

    def product(v: Array) -> Array:
        return kept.transposed(kept.times(v)) + damping * v

    precondition = functools.partial(_inverse, kept, factor, damping)
    start = jnp.zeros_like(grad)
    return conjugate_gradient(lax.while_loop, product, precondition, -grad, start, 1e-5, _REFINEMENTS)[0]


# --- matrix-free ---------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """The curvature sample, with all M rows of each example; rows: some of A's, for the preconditioner."""

    sample: Sample
    rows: RowSpace
    solution: Array


@dataclasses.dataclass(frozen=True)
class MatrixFree:
    """Conjugate gradients on products with A, at the current point, from the last solution.

    The sample's examples are taken with all their rows, for a product costs the same with one. Averaging keeps that
    share of the examples from step to step: averaging of matrices would need every old sample's products again.
    preconditioner: R'R + lam I of that many sampled rows R, by Woodbury.
    """

    recipe: Recipe
    preconditioner: int

    def empty(self, problem: Problem, w: Array) -> Examples:
        """No examples."""
        n = self._examples(problem)
        sample = Sample(jnp.zeros(n, np.int32), jnp.zeros(n, w.dtype), jnp.zeros((), np.int32))
        rows = self._row_space().empty(problem, w)
        return Examples(sample, rows, jnp.zeros_like(w))

    def renewed(self, problem: Problem, w: Array, score: Any, kept: Examples, key: Array) -> tuple[Examples, Any]:
        """New examples, and new rows for the preconditioner."""
        draw, turn, rows = jax.random.split(key, 3)
        sample = problem.whole()
        if self.recipe.rows is not None:
            n = self._examples(problem)
            _, fresh = problem.draw(draw, score, n, np.int32(n))
            sample = _turned_over(self.recipe.averaging, kept, fresh, turn)
        # Of the sample's own examples, uniformly: rows of others say little about an A of fewer rows than parameters.
        own, alike = problem.using(sample), jnp.ones(len(sample.indices), w.dtype)
        space, cost = self._row_space().renewed(own, w, alike, kept.rows, rows)
        return Examples(sample, space, kept.solution), cost

    def mean_diagonal(self, problem: Problem, w: Array, kept: Examples, key: Array) -> tuple[Array, Any]:
        """By one random vector (Hutchinson)."""
        v = jax.random.rademacher(key, w.shape, problem.dtype)
        # Without l2: taken off afterwards, it would leave its rounding where there is no curvature.
        product = self._product(dataclasses.replace(problem, l2=0.0), w, kept, v)
        return jnp.vdot(v, product) / problem.parameters, kept.sample.count

    def times(self, problem: Problem, w: Array, kept: Examples, v: Array) -> tuple[Array, Any]:
        """One product."""
        return self._product(problem, w, kept, v), kept.sample.count

    def solve(self, problem: Problem, w: Array, kept: Examples, dampings: Array, grad: Array):
        """By conjugate gradients, each from the last solution."""
        solutions, products = [], 0
        for damping in dampings:
            solution, more = self._solve(problem, w, kept, damping, grad)
            kept, products = kept._replace(solution=solution), products + more
            solutions.append(solution)
        return jnp.stack(solutions), kept, counted(products, kept.sample.count)

    def _solve(self, problem: Problem, w: Array, kept: Examples, damping: Array, grad: Array) -> tuple[Array, Any]:
        lam = _own_damping(kept.rows, damping + problem.real(problem.l2))
        factor = _jitted_factor(kept.rows, lam)

        def product(v: Array) -> Array:
            return self._product(problem, w, kept, v) + damping * v

        return conjugate_gradient(
            problem.driver.while_loop,
            product,
            lambda v: _jitted_inverse(kept.rows, factor, lam, v),
            -grad,
            kept.solution,
            self.recipe.cg_tolerance,
            self.recipe.cg_max_steps,
        )

    def _product(self, problem: Problem, w: Array, kept: Examples, v: Array) -> Array:
        with self.recipe.fast():
            return problem.product(w, v, kept.sample)

    def _examples(self, problem: Problem) -> int:
        """As many as have the recipe's number of rows."""
        return min(problem.examples, -(-self.recipe.most_rows(problem) // problem.outputs))

    def _row_space(self) -> SampleSpace:
        return SampleSpace(dataclasses.replace(self.recipe, rows=self.preconditioner, share=0.0), 1, push_through=False)


@jax.jit
def _own_damping(rows: RowSpace, damping: Array) -> Array:
    """Damping of the preconditioner, lam and three tenths of its rows' mean square (heuristic, measured on a CNN).

    Few rows carry the whole trace of A: in their own span they overstate it.
    """
    return damping + 0.3 * rows.trace / len(rows.root)


@jax.jit
def _jitted_factor(rows: RowSpace, damping: Array) -> Factor:
    return cholesky(rows.gram, damping)


_jitted_inverse = jax.jit(_inverse)


@functools.partial(jax.jit, static_argnums=0)
def _turned_over(averaging: float, kept: Examples, fresh: Sample, key: Array) -> Sample:
    """A random share `averaging` of the old examples, the rest fresh ones."""
    n = len(fresh.indices)
    mixed = jax.random.permutation(key, n)
    old = jnp.arange(n, dtype=np.int32) < jnp.where(kept.rows.samples > 0, np.int32(averaging * n), 0)

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(old, a[mixed], b[mixed])

    before = kept.sample
    return Sample(pick(before.indices, fresh.indices), pick(before.weights, fresh.weights), fresh.count)


# --- conjugate gradients -------------------------------------------------------------------------------------------


class _Iterate(NamedTuple):
    x: Array
    r: Array
    p: Array
    rz: Array
    best: Array
    best_rr: Array
    products: Array


def conjugate_gradient(
    while_loop: Callable,
    product: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    b: Array,
    x: Array,
    tolerance: float,
    max_steps: int,
) -> tuple[Array, Array]:
    """A x = b by preconditioned conjugate gradients (Nocedal and Wright, Algorithm 5.3); x and the number of products.

    Ends at |b - A x| <= tolerance |b|, or after max_steps with the iterate of smallest residual. b is normalised
    first: no constant in here knows a scale. x: where to begin, unless that is worse than zero. Each residual is
    orthogonalised against all before it (Golub and Van Loan, Matrix Computations (2013), section 10.3): fewer products
    in float32, and rounding grows much less from step to step; keeps 2 max_steps P numbers.
    """
    length = norm(b)
    scale = jnp.where(length > 0, length, 1)
    b, x = b / scale, x / scale
    begin, basis = _begin(max_steps, b, x, product(x))

    def on(carry: tuple[_Iterate, Array]) -> Array:
        it, _ = carry
        unsolved = it.best_rr > jnp.asarray(tolerance, b.dtype) ** 2
        return unsolved & (it.products <= max_steps) & jnp.isfinite(it.rz) & (it.rz > 0)

    def step(carry: tuple[_Iterate, Array]) -> tuple[_Iterate, Array]:
        it, basis = carry
        it = _descended(it, basis, product(it.p))
        return _turned(basis, it, precondition(it.r))

    it, _ = while_loop(on, step, _turned(basis, begin, precondition(begin.r)))
    return it.best * scale, it.products


@functools.partial(jax.jit, static_argnums=0)
def _begin(max_steps: int, b: Array, x: Array, ax: Array) -> tuple[_Iterate, Array]:
    """An iterate without a direction yet, and room for the residuals to come."""
    r = b - ax
    better = jnp.vdot(r, r) < jnp.vdot(b, b)
    x, r = jnp.where(better, x, 0), jnp.where(better, r, b)
    rr = jnp.vdot(r, r)
    begin = _Iterate(x, r, jnp.zeros_like(r), rr, x, rr, jnp.ones((), np.int32))
    return begin, jnp.zeros((2, max_steps, len(b)), b.dtype)


@jax.jit
def _descended(it: _Iterate, basis: Array, ap: Array) -> _Iterate:
    alpha = it.rz / jnp.vdot(it.p, ap)
    x, r = it.x + alpha * it.p, it.r - alpha * ap
    r = r - (basis[1] @ r) @ basis[0]
    rr = jnp.vdot(r, r)
    better = rr < it.best_rr
    best, best_rr = jnp.where(better, x, it.best), jnp.where(better, rr, it.best_rr)
    return it._replace(x=x, r=r, best=best, best_rr=best_rr, products=it.products + 1)


@functools.partial(jax.jit, donate_argnums=0)
def _turned(basis: Array, it: _Iterate, z: Array) -> tuple[_Iterate, Array]:
    """The next direction; r and z enter the basis, over the root of r.z (the last ones, of no more use, do not fit)."""
    rz = jnp.vdot(it.r, z)
    pair = jnp.stack([it.r, z]) / jnp.sqrt(jnp.where(rz > 0, rz, 1))
    basis = basis.at[:, it.products - 1].set(pair, mode="drop")
    return it._replace(p=z + rz / it.rz * it.p, rz=rz), basis


# --- the cost model ------------------------------------------------------------------------------------------------


def form_flops(problem: Problem, recipe: Recipe, dampings: int) -> dict[str, float]:
    """Cost of one step's curvature and solves in each form that fits in memory, in operations of large matrix products.

    With g those of one gradient, n rows of a sample, W samples averaged over, D dampings, c CG steps, r rows of the
    preconditioner, symmetric products and factors counted by half:

        dense   h n g + n P^2 + (2 + D) P^3 / 9
        sample  h n g + (2 W - 1) n^2 P + D ((W n)^3 / 3 + 50 z W n P)
        cg      h r g + r^2 P + D c (5/3 m g a n / M + 4 r P + e)

    Heuristics: CG needs half of the steps it may. The other forms average over steps for nothing, CG would need
    a = 1 / (1 - averaging) times the examples to know as much. The model's own operations run at a fifth to a twentieth
    of the rate of large matrix products, and products are paid for twice, in seconds and as gradients: m = 15. A row
    costs 2.4 gradients (small convolutions on CPUs): h = 36. Calling a product costs as much as e = 5e8 operations of a
    matrix product, one or two milliseconds. A damping that has no factorisation of its own costs a third of one. Rows
    are read z = 12 times for each damping, once where they are the subset's own, at 50 operations a number. The sample
    form is none to choose where averaging is asked for and one sample has more than P / 2 rows.
    """
    g, p = gradient_flops(problem), problem.parameters
    n = recipe.most_rows(problem)
    rows, steps, r = window(problem, recipe) * n, recipe.cg_max_steps / 2, _preconditioner(problem)
    seen = n / problem.outputs / (1.0 if recipe.rows is None else 1 - recipe.averaging)
    products = dampings * steps * (PRODUCT * _MODEL_RATE * g * seen + 4 * r * p + _CALL)
    flops = {"cg": _ROW_RATE * r * g + r**2 * p + products}
    if p <= MATRIX_LIMIT:
        flops["dense"] = _ROW_RATE * n * g + n * p**2 + (2 + dampings) * p**3 / 9
    averages = recipe.rows is None or recipe.averaging == 0 or rows > n
    if averages and rows < p and rows * p <= MATRIX_LIMIT**2:
        reading = _READING * (1 if _has_own_rows(problem, recipe) else 12)
        solving = dampings * (rows**3 / 3 + reading * rows * p)
        flops["sample"] = _ROW_RATE * n * g + (2 * rows - n) * n * p + solving
    return flops


def form_of(problem: Problem, recipe: Recipe, linear_solve: str, dampings: int) -> Form:
    """The form of that name, or the cheapest one by the cost model."""
    if linear_solve == "auto":
        flops = form_flops(problem, recipe, dampings)
        linear_solve = min(flops, key=flops.__getitem__)
    if linear_solve == "dense":
        return Dense(recipe)
    if linear_solve == "cg":
        return MatrixFree(recipe, _preconditioner(problem))
    return SampleSpace(recipe, window(problem, recipe), _has_own_rows(problem, recipe))


def _has_own_rows(problem: Problem, recipe: Recipe) -> bool:
    """Whether the gradient is a combination of the sample's rows."""
    return recipe.rows is None and problem.objective.loss.residual is not None


def window(problem: Problem, recipe: Recipe) -> int:
    """Samples that SampleSpace averages over: no more than have P rows together."""
    if recipe.rows is None or recipe.averaging == 0:
        return 1
    return max(1, min(_WINDOW, problem.parameters // recipe.most_rows(problem)))


def _preconditioner(problem: Problem) -> int:
    return max(1, min(_PRECONDITIONER_ROWS, problem.parameters // 4))
