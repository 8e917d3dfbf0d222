"""Problem: what a solver may ask about a subset's loss, evaluated block by block.

    L(w) = 1/K sum_i l(f(w, x_i), y_i) + l2/2 |w|^2        i in the subset, K examples

Costs in `sample_grads`: see the constants below. Memory is that of one block, whatever K.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from subsetopt import checks
from subsetopt.devices import Devices, Kernel
from subsetopt.losses import LOSSES, Loss, resolve
from subsetopt.model import Constants, Model, Params, prepare

# Price of one example in sample_grads.
GRADIENT, LOSS, PRODUCT, ROW = 1.0, 1 / 3, 5 / 3, 1.0

_PANELS = 8  # column panels of the Gram update: (8 + 1) / 16 of the full product's work


@dataclasses.dataclass(frozen=True)
class Objective:
    """The static part of a problem; equal objectives share compiled code."""

    model: Model
    loss: Loss


class Sample(NamedTuple):
    """Weighted examples: sum_i weights_i q_i estimates the subset's mean of q. indices, weights: (n,)."""

    indices: np.ndarray
    weights: np.ndarray


class Evaluation(NamedTuple):
    """Loss and gradient of the subset at w, with the per-example values that come for free.

    value (): L(w). grad (P,): its gradient. losses, uncertainty (K,): of each example, in the subset's order;
    uncertainty is empty where it was not asked for.
    """

    value: Any
    grad: Array
    losses: np.ndarray
    uncertainty: np.ndarray


# --- kernels: one block --------------------------------------------------------------------------------------------


def _gradient_block(static: tuple[Objective, bool], grad: Array, shared: Any, block: Any) -> tuple[Array, Any]:
    objective, uncertain = static
    w, constants = shared
    x, y, weights = block

    def weighted(w: Array) -> tuple[Array, Any]:
        outputs = objective.model.outputs(w, constants, x)
        losses = objective.loss.values(outputs, y)
        return jnp.sum(weights * losses), (losses, outputs)

    g, (losses, outputs) = jax.grad(weighted, has_aux=True)(w)
    return grad + g, (losses, objective.loss.uncertainty(outputs, y) if uncertain else losses[:0])


def _loss_block(objective: Objective, nothing: Any, shared: Any, block: Any) -> tuple[Any, Array]:
    w, constants = shared
    x, y, _ = block
    return nothing, objective.loss.values(objective.model.outputs(w, constants, x), y)


def _product_block(objective: Objective, product: Array, shared: Any, block: Any) -> tuple[Array, Any]:
    """Adds J' H J v, weighted and summed over the block: v → J v → H J v → J' H J v."""
    w, v, constants = shared
    x, y, weights = block
    outputs, jv = jax.jvp(lambda w: objective.model.outputs(w, constants, x), (w,), (v,))
    hjv = objective.loss.hessian(outputs, y, jv) * weights.reshape(-1, *[1] * (jv.ndim - 1))
    _, pull = jax.vjp(lambda w: objective.model.outputs(w, constants, x), w)
    return product + pull(hjv)[0], None


def _row_block(objective: Objective, gram: Array, shared: Any, block: Any) -> tuple[Array, Any]:
    """Adds R'R to the lower triangle of gram, R the rows sqrt(weight_i) u_i' B_i' J_i."""
    w, constants = shared
    x, y, weights, u = block

    def row(x: Array, y: Array, weight: Array, u: Array) -> Array:
        outputs, pull = jax.vjp(lambda w: objective.model.outputs(w, constants, x[None]), w)
        return pull(objective.loss.root(outputs, y[None], u.reshape(outputs.shape)) * jnp.sqrt(weight))[0]

    return _add_gram(gram, jax.vmap(row)(x, y, weights, u)), None


def _add_gram(gram: Array, rows: Array) -> Array:
    """Adds R'R to gram in panels of columns, below and on the diagonal blocks only: little over half the work."""
    p = gram.shape[0]
    width = -(-p // _PANELS)
    for start in range(0, p, width):
        stop = min(start + width, p)
        panel = lax.slice(gram, (start, start), (p, stop)) + rows[:, start:].T @ rows[:, start:stop]
        gram = lax.dynamic_update_slice(gram, panel, (start, start))
    return gram


# --- drawing -------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="n")
def _draw(key: Array, uncertainty: Array, count: Array, n: int) -> tuple[Array, Array]:
    """Draw n positions with q_i = 0.1 / K + 0.9 s_i / sum s, and weights 1 / (n K q_i).

    Systematic: one random offset, equal steps through the cumulated q. Unbiased like independent draws, with less
    variance, and no example comes oftener than ceil(n q_i).
    """
    inside = jnp.arange(len(uncertainty), dtype=count.dtype) < count
    share = 1 / count.astype(uncertainty.dtype)
    s = jnp.where(inside, uncertainty, 0)
    total = jnp.sum(s)
    s = jnp.where(total > 0, s / jnp.where(total > 0, total, 1), share)
    q = jnp.where(inside, 0.1 * share + 0.9 * s, 0)
    cumulated = jnp.cumsum(q)
    steps = (jnp.arange(n, dtype=q.dtype) + jax.random.uniform(key, dtype=q.dtype)) / n
    positions = jnp.searchsorted(cumulated, steps * cumulated[-1], side="right").astype(count.dtype)
    positions = jnp.minimum(positions, count - 1)
    return positions, share / (n * q[positions])


# --- the problem ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """The loss of one subset. `x`, `y` hold all N examples (NumPy or a memmap); `subset` the K indices in use.

    fresh: the next step gets another subset, so nothing evaluated on this one is worth keeping.
    """

    objective: Objective
    constants: Constants
    x: np.ndarray
    y: np.ndarray
    subset: np.ndarray
    devices: Devices
    block_size: int
    parameters: int
    outputs: int
    dtype: np.dtype
    seed: int = 0
    l2: float = 0.0
    fresh: bool = False

    @property
    def count(self) -> int:
        """K, the number of examples in the subset."""
        return len(self.subset)

    @property
    def ratio(self) -> float:
        """Q = K M / P."""
        return self.count * self.outputs / self.parameters

    def on(self, subset: np.ndarray, fresh: bool = False) -> "Problem":
        """The same loss on another subset."""
        return dataclasses.replace(self, subset=subset, fresh=fresh)

    def whole(self) -> Sample:
        """Every example of the subset, equally weighted."""
        return Sample(self.subset, np.full(self.count, 1 / self.count))

    def evaluate(self, w: Array, uncertain: bool = False) -> Evaluation:
        """Loss, gradient and per-example losses of the subset at w (P,); costs GRADIENT * K.

        uncertain: give the examples' uncertainty as well, for `draw`.
        """
        sample = self.whole()
        static = (self.objective, uncertain)
        grad, (losses, uncertainty) = self._reduce(_gradient_block, static, w, (w, self.constants), sample)
        value = self._scalar(sample.weights @ losses.astype(np.float64) + self.l2 / 2 * float(jnp.vdot(w, w)))
        return Evaluation(value, grad + self.l2 * w, losses, uncertainty)

    def losses(self, w: Array, sample: Sample) -> np.ndarray:
        """Per-example losses (n,) of a sample at w, without l2; costs LOSS * n."""
        return self._reduce(_loss_block, self.objective, (), (w, self.constants), sample)[1]

    def difference(self, w: Array, w0: Array, losses: np.ndarray, losses0: np.ndarray, weights: np.ndarray) -> Any:
        """L(w) - L(w0) from per-example losses: summing differences keeps what a difference of sums rounds away."""
        penalty = self.l2 / 2 * float(jnp.vdot(w - w0, w + w0))
        return self._scalar(weights @ (losses.astype(np.float64) - losses0) + penalty)

    def product(self, w: Array, v: Array, sample: Sample) -> Array:
        """Gauss-Newton product (sum_i weight_i J_i'H_iJ_i + l2 I) v, (P,); costs PRODUCT * n."""
        return self._reduce(_product_block, self.objective, w, (w, v, self.constants), sample)[0] + self.l2 * v

    def gram(self, w: Array, sample: Sample, u: np.ndarray) -> Array:
        """Lower triangle of sum_i weight_i r_i r_i' with rows r_i = J_i'B_i u_i, (P, P); costs ROW * n.

        u: (n, M). Random signs make the sum an unbiased estimate of J'HJ; each example repeated with the M unit
        vectors makes it exact.
        """
        shape = jax.ShapeDtypeStruct((self.parameters, self.parameters), w.dtype)
        return self._reduce(
            _row_block, self.objective, shape, (w, self.constants), sample, u, size=4 * self.block_size
        )[0]

    def draw(self, key: Array, uncertainty: np.ndarray, n: int) -> tuple[np.ndarray, Sample]:
        """Draw n examples of the subset by uncertainty: their positions in the subset, and the sample."""
        # Padded to N examples: a growing subset changes no shape and recompiles nothing.
        padded = np.zeros(len(self.x), self.dtype)
        padded[: self.count] = uncertainty
        positions, weights = (np.asarray(a) for a in _draw(key, padded, np.int32(self.count), n))
        return positions, Sample(self.subset[positions], weights)

    def _reduce(
        self, kernel: Kernel, static: Any, zeros: Any, shared: Any, sample: Sample, *extra: np.ndarray, size: int = 0
    ):
        size, n = size or self.block_size, len(sample.indices)
        sums, each = self.devices.start(zeros), []
        for start in range(0, n, size):
            block = self._block(sample, extra, start, size)
            sums, values = self.devices.run(kernel, static, sums, shared, block)
            each.append(values)
        return self.devices.finish(sums, each, n)

    def _block(self, sample: Sample, extra: tuple[np.ndarray, ...], start: int, size: int) -> tuple[Any, ...]:
        """Rows start to start + size; the last block is filled up with copies of weight zero."""
        rows = np.arange(start, start + size)
        inside = rows < len(sample.indices)
        rows = np.where(inside, rows, start)
        indices = sample.indices[rows]
        weights = np.where(inside, sample.weights[rows], 0).astype(self.dtype)
        return (self.x[indices], self.y[indices], weights, *(a[rows] for a in extra))

    def _scalar(self, value: Any) -> Any:
        return self.dtype.type(value)


def make_problem(
    model: Any,
    data: Any,
    params: Params | None,
    *,
    loss: str | Callable[[Array, Array], Array],
    trainable: Any = None,
    seed: int = 0,
    l2: float = 0.0,
    block_size: int | None = None,
    devices: Any = None,
) -> tuple[Problem, Array]:
    """The checked problem on all examples of `data`, and its starting point w (P,). Every misuse ends here."""
    x, y = checks.pair("data", data)
    checks.examples(x, y)
    checks.loss_argument(loss, tuple(LOSSES))
    checks.real_number("l2", l2, 0)
    if block_size is not None:
        checks.whole_number("block_size", block_size, 1)
    static, w, constants = prepare(model, params, x, seed, trainable)
    checks.x_dtype(x, w.dtype)
    own = Devices(devices)
    objective = Objective(static, resolve(loss))
    outputs = _checked_outputs(objective, loss, w, constants, x, y)
    size = own.block_size(block_size)
    x, y = (np.asarray(a) if isinstance(a, jax.Array) else a for a in (x, y))
    problem = Problem(
        objective, constants, x, y, np.arange(len(x)), own, size, w.size, outputs, np.dtype(w.dtype), seed, float(l2)
    )
    _check_deterministic(problem, w)
    return problem, w


def _checked_outputs(objective: Objective, loss: Any, w: Array, constants: Constants, x: Any, y: Any) -> int:
    """M, from abstract evaluation: nothing is computed."""
    n = min(len(x), 2)
    out = checks.shapes(objective.model.outputs, w, constants, x[:n])
    checks.outputs(out, n, w.dtype)
    checks.targets(loss, y, out)
    checks.per_example(jax.eval_shape(objective.loss.values, out, y[:n]), n, w.dtype)
    return int(np.prod(out.shape[1:]))


def held_out(problem: Problem, data: Any, loss: Any, w: Array) -> Problem:
    """The same loss on checked validation data."""
    x, y = checks.pair("validation", data)
    checks.examples(x, y, "validation ")
    checks.like_training_data(problem.x, problem.y, x, y)
    out = checks.shapes(problem.objective.model.outputs, w, problem.constants, x[:1])
    checks.targets(loss, y, out, "validation y")
    return dataclasses.replace(problem, x=np.asarray(x), y=np.asarray(y), subset=np.arange(len(x)))


def _check_deterministic(problem: Problem, w: Array) -> None:
    """Evaluate some examples twice, the second time in other company (as curvlinops checks its data)."""
    indices = np.arange(min(problem.count, problem.block_size))
    sample = Sample(indices, np.full(len(indices), 1 / len(indices)))
    backwards = Sample(indices[::-1], sample.weights)
    half = Sample(indices[: -(-len(indices) // 2)], sample.weights[: -(-len(indices) // 2)])
    first = problem.losses(w, sample)
    checks.deterministic(first, problem.losses(w, backwards)[::-1])
    checks.deterministic(first[: len(half.indices)], problem.losses(w, half))
