"""Problem: what a solver may ask about a subset's loss, evaluated block by block.

    L(w) = 1/K sum_i l(f(w, x_i), y_i) + l2/2 |w|^2        i in the subset, K examples

Costs in `sample_grads`: see the constants below. Memory is that of one block, whatever K.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from subsetopt import checks
from subsetopt.devices import Devices, Kernel, choose, cost_analysis
from subsetopt.drivers import Compiled, Host, Sample
from subsetopt.linalg import add_gram, norm
from subsetopt.losses import LOSSES, Loss, resolve
from subsetopt.model import Constants, Model, Params, Shape, prepare
from subsetopt.pages import aligned, pieces

# Price of one example in sample_grads.
GRADIENT, LOSS, PRODUCT, ROW = 1.0, 1 / 3, 5 / 3, 1.0

_ROW_BLOCK, _ROW_BLOCK_NUMBERS = 2048, 1 << 25  # most rows in a block of them, and numbers: 128 MB in float32
_SMALL = 1 << 26  # bytes of data that a CPU may hold twice
_ANALYSED = 128  # examples in a block whose cost is analysed
_TWICE = 32  # examples, at most, on which the model is looked at before the start
_SHOWN = 1000, 8  # examples by whose data, and by whose losses, a problem is known again
_PIECE, _PIECE_NUMBERS = 64, 1 << 20  # least rows in a piece, for each is compiled; numbers that a CPU's cache holds


@dataclasses.dataclass(frozen=True)
class Objective:
    """The static part of a problem; equal objectives share compiled code."""

    model: Model
    loss: Loss


class Evaluation(NamedTuple):
    """Loss and gradient of the subset at w, with the per-example values that come for free.

    value (): L(w). grad (P,): its gradient. norm (): |grad|. losses, uncertainty, slope (N,): of each example, in the
    subset's order, zero beyond it; the last two are None where they were not asked for.
    """

    value: Any
    grad: Any
    norm: Any
    losses: Any
    uncertainty: Any
    slope: Any


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
    known = (objective.loss.uncertainty(outputs, y), objective.loss.slope(outputs, y)) if uncertain else (None, None)
    return grad + g, (losses, *known)


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


def _rows(objective: Objective, shared: Any, block: Any) -> Array:
    """(B, P): the rows sqrt(weight_i) u_i' B_i' J_i, one an example."""
    w, constants = shared

    def row(x: Array, y: Array, weight: Array, u: Array) -> Array:
        outputs, pull = jax.vjp(lambda w: objective.model.outputs(w, constants, x[None]), w)
        units = u.astype(outputs.dtype).reshape(outputs.shape)
        return pull(objective.loss.root(outputs, y[None], units) * jnp.sqrt(weight))[0]

    def by_pieces(*block: Array) -> Array:
        """Not in a loop, in which XLA's convolutions are slow on CPUs; pieces in the cache are a quarter faster."""
        size = max(_PIECE_NUMBERS // len(w), _PIECE)
        pieces = ([a[start : start + size] for a in block] for start in range(0, len(block[0]), size))
        return jnp.concatenate([jax.vmap(row)(*piece) for piece in pieces])

    return lax.platform_dependent(*block, cpu=by_pieces, default=jax.vmap(row))


def _all_rows(objective: Objective, shared: Any, block: Any) -> Array:
    """(B, M, P): all rows sqrt(weight_i) B_i' J_i of each example."""
    w, constants = shared
    x, y, weights = block

    def rows(x: Array, y: Array, weight: Array) -> Array:
        outputs, pull = jax.vjp(lambda w: objective.model.outputs(w, constants, x[None]), w)
        units = jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape) * jnp.sqrt(weight)
        return jax.vmap(lambda unit: pull(objective.loss.root(outputs, y[None], unit))[0])(units)

    return jax.vmap(rows)(x, y, weights)


def _gram_block(objective: Objective, gram: Array, shared: Any, block: Any) -> tuple[Array, Any]:
    """Adds R'R to the lower triangle of gram, R one row an example."""
    return add_gram(gram, _rows(objective, shared, block)), None


def _whole_gram_block(objective: Objective, gram: Array, shared: Any, block: Any) -> tuple[Array, Any]:
    """Adds R'R to the lower triangle of gram, R all rows."""
    rows = _all_rows(objective, shared, block)
    return add_gram(gram, rows.reshape(-1, rows.shape[-1])), None


def _rows_block(objective: Objective, nothing: Any, shared: Any, block: Any) -> tuple[Any, Array]:
    return nothing, _rows(objective, shared, block)


def _whole_rows_block(objective: Objective, nothing: Any, shared: Any, block: Any) -> tuple[Any, Any]:
    """All rows R_i, and c_i (B, M) with which the gradient is sum_i R_i' c_i: the loss's residual, weighted alike."""
    w, constants = shared
    x, y, weights = block
    rows = _all_rows(objective, shared, block)
    if objective.loss.residual is None:
        return nothing, (rows, None)
    c = objective.loss.residual(objective.model.outputs(w, constants, x), y)
    return nothing, (rows, c.reshape(len(weights), -1) * jnp.sqrt(weights)[:, None])


# --- what is left when the sums are done ---------------------------------------------------------------------------


@jax.jit
def _rows_of(x: Array, y: Array, indices: Array) -> tuple[Array, Array]:
    return x[indices], y[indices]


@jax.jit
def _penalised(value: Array, grad: Array, w: Array, l2: Array) -> tuple[Array, Array, Array]:
    """Value, gradient and its norm, l2 included."""
    grad = grad + l2 * w
    return value + l2 / 2 * jnp.vdot(w, w), grad, norm(grad)


@jax.jit
def _plus_penalty(difference: Array, w: Array, w0: Array, l2: Array) -> Array:
    return difference + l2 / 2 * jnp.vdot(w - w0, w + w0)


@partial(jax.jit, static_argnums=0)
def _draw(most: int, n: Array, key: Array, score: Array, weights: Array, count: Array) -> tuple[Array, Array]:
    """Positions (most,) with q_i = 0.1 w_i / sum w + 0.9 w_i s_i / sum w s, and weights w_i / (n q_i).

    Only the first n stand, the others have weight zero. Each example comes floor(n q_i) times, and once more for the
    rest by sequential Poisson sampling (Ohlsson, J. Official Statistics 14, 1998): ranked by a random number over the
    rest. What an example's number decides is that example alone, so rounding in the scores (other blocks, other
    devices) changes hardly any draw.
    """
    inside = jnp.arange(len(score), dtype=count.dtype) < count
    weights = jnp.where(inside, weights, 0)
    share = weights / jnp.sum(weights)
    s = weights * score
    total = jnp.sum(s)
    s = jnp.where(total > 0, s / jnp.where(total > 0, total, 1), share)
    q = 0.1 * share + 0.9 * s
    expected = n.astype(q.dtype) * q
    sure = jnp.floor(expected)
    rest = expected - sure
    number = jax.random.uniform(key, q.shape, q.dtype)
    rank = jnp.where(rest > 0, number / jnp.where(rest > 0, rest, 1), jnp.inf)
    _, first = lax.top_k(-rank, min(most, len(q)))
    times = sure.astype(count.dtype)
    once_more = jnp.arange(len(first), dtype=count.dtype) < n - jnp.sum(times, dtype=count.dtype)
    times = times.at[first].add(once_more.astype(count.dtype))
    positions = jnp.repeat(jnp.arange(len(q), dtype=count.dtype), times, total_repeat_length=most)
    stands = jnp.arange(most, dtype=n.dtype) < n
    return positions, jnp.where(stands, (weights / jnp.where(expected > 0, expected, 1))[positions], 0)


# --- the problem ---------------------------------------------------------------------------------------------------

_STATIC = ("objective", "driver", "block_size", "parameters", "outputs", "dtype", "fresh")
_ARRAYS = ("constants", "x", "y", "subset", "weights", "count", "seed", "l2", "fetched")


@partial(jax.tree_util.register_dataclass, meta_fields=_STATIC, data_fields=_ARRAYS)
@dataclasses.dataclass(frozen=True)
class Problem:
    """The loss of one subset, for the driver to evaluate; a pytree, so that a whole solve can be one program.

    x, y: all N examples: NumPy or a memmap for the host driver, arrays on the devices for the compiled one.
    subset: (N,) indices, of which the first `count` are in use: a growing subset changes no shape, nothing recompiles.
    weights: (N,), 1 / count, or unequal where the examples of the subset were drawn with unequal probabilities.
    fresh: the next step gets another subset, so nothing evaluated on this one is worth keeping.
    fetched: x and y of the subset, where they are at hand.
    """

    objective: Objective
    driver: Any
    block_size: int
    parameters: int
    outputs: int
    dtype: np.dtype
    constants: Constants
    x: Any
    y: Any
    subset: Any
    weights: Any
    count: Any
    seed: Any = 0
    l2: Any = 0.0
    fresh: bool = False
    fetched: Any = None

    @property
    def examples(self) -> int:
        """N, the number of examples there are."""
        return len(self.x)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the parameter arrays of which w is made, one after the other."""
        return tuple(shape for shape in self.objective.model.trained if np.prod(shape) > 0)

    @property
    def ratio(self) -> float:
        """Q = K M / P."""
        return float(self.count) * self.outputs / self.parameters

    def on(self, subset: np.ndarray, weights: np.ndarray | None = None) -> "Problem":
        """The same loss on another subset (K,), equally weighted; with weights (K,), on one that is drawn anew."""
        # Sorted: blocks of neighbours are read in one piece, and the whole set needs no copy at all.
        sort = np.argsort(subset)
        sample = subset_of(self._padded(subset[sort], np.int32), self.dtype, len(subset))
        if weights is None:
            return self.using(sample)
        return self.using(sample._replace(weights=self._padded(weights[sort], self.dtype)), fresh=True)

    def _padded(self, values: np.ndarray, dtype: Any) -> np.ndarray:
        """Filled up with zeros to N numbers."""
        padded = np.zeros(self.examples, dtype)
        padded[: len(values)] = values
        return padded

    def using(self, whole: Sample, fresh: bool = False) -> "Problem":
        """The same loss on the subset of another problem, its `whole()`."""
        indices, weights, count = whole
        return dataclasses.replace(self, subset=indices, weights=weights, count=count, fresh=fresh, fetched=None)

    def fetch(self) -> "Problem":
        """For many evaluations: with what all of them look at, where one block on one device holds it."""
        if isinstance(self.driver, Host) or self.driver.devices.count > 1 or self.block_size < self.examples:
            return self
        in_place = np.array_equal(self.subset, np.arange(self.examples))  # all there are: no copy
        fetched = (self.x, self.y) if in_place else _rows_of(self.x, self.y, self.subset)
        return dataclasses.replace(self, fetched=fetched)

    def whole(self) -> Sample:
        """Every example of the subset, with its weight."""
        return Sample(self.subset, self.weights, self.count)

    def evaluate(self, w: Array, uncertain: bool = False) -> Evaluation:
        """Loss, gradient and per-example losses of the subset at w (P,); costs GRADIENT * K.

        uncertain: give the examples' uncertainty and slope as well, for drawing samples.
        """
        sample, static = self.whole(), (self.objective, uncertain)
        if self.fetched is not None:
            sample = sample._replace(indices=None)
        grad, each = self._reduce(_gradient_block, static, _zeros(w), (w, self.constants), sample)
        losses, uncertainty, slope = each
        value = self.driver.total(sample.weights, losses)
        value, grad, length = _penalised(value, grad, w, self.real(self.l2))
        return Evaluation(value, grad, length, losses, uncertainty, slope)

    def losses(self, w: Array, sample: Sample) -> Any:
        """Per-example losses (n,) of a sample at w, without l2; costs LOSS * n."""
        return self._reduce(_loss_block, self.objective, (), (w, self.constants), sample)[1]

    def mean_loss(self, w: Array, sample: Sample) -> float:
        """Mean of `losses` over a sample of which all stand, summed up in float64; from Python only."""
        return float(np.mean(self.losses(w, sample), dtype=np.float64))

    def difference(self, w: Array, w0: Array, losses: Any, losses0: Any, weights: Any) -> Array:
        """L(w) - L(w0) from per-example losses: summing differences keeps what a difference of sums rounds away."""
        return _plus_penalty(self.driver.total(weights, losses, losses0), w, w0, self.real(self.l2))

    def product(self, w: Array, v: Array, sample: Sample) -> Array:
        """Gauss-Newton product (sum_i weight_i J_i'H_iJ_i + l2 I) v, (P,); costs PRODUCT * n."""
        shared = (w, v, self.constants)
        return self._reduce(_product_block, self.objective, _zeros(w), shared, sample)[0] + self.real(self.l2) * v

    def gram(self, w: Array, sample: Sample, u: Any, onto: Array | None = None, least: int | None = None) -> Array:
        """Lower triangle of `onto` + sum_i weight_i r_i r_i' with rows r_i = J_i'B_i u_i, (P, P); costs ROW * n.

        u: (n, M), of any dtype; random signs make the sum an unbiased estimate of J'HJ. None: all M rows of each
        example, which make it exact and cost ROW * M * n. least: a number of examples for which no block is partly
        empty.
        """
        onto = jnp.zeros((self.parameters, self.parameters), w.dtype) if onto is None else onto
        kernel, extra = (_whole_gram_block, ()) if u is None else (_gram_block, (u,))
        size = self._row_block(u, least)
        return self._reduce(kernel, self.objective, onto, (w, self.constants), sample, extra, size)[0]

    def rows(self, w: Array, sample: Sample, u: Any) -> Any:
        """The rows sqrt(weight_i) r_i of `gram` themselves, (n, P).

        u None: all rows (n, M, P), and c (n, M) with which the gradient without l2 is sum_i rows_i' c_i, or None.
        """
        kernel, extra = (_whole_rows_block, ()) if u is None else (_rows_block, (u,))
        return self._reduce(kernel, self.objective, (), (w, self.constants), sample, extra, self._row_block(u))[1]

    def draw(self, key: Array, score: Any, most: int, n: Any) -> tuple[Any, Sample]:
        """Draw n of at most so many examples of the subset by their score (N,): positions in it, and the sample."""
        positions, weights = self.driver.over_all(partial(_draw, most), n, key, score, self.weights, self.count)
        return positions, Sample(self.subset[positions], weights, n)

    def _reduce(self, kernel: Kernel, static: Any, sums: Any, shared: Any, sample: Sample, extra: Any = (), size=0):
        """Blocks no larger than the sample: on an accelerator one may hold all examples there are."""
        data = (self.x, self.y) if sample.indices is not None else self.fetched
        size = min(size or self.block_size, self.driver.devices.even(len(sample.weights)))
        return self.driver.reduce(kernel, static, sums, shared, data, sample, extra, size)

    def _row_block(self, u: Any, least: int | None = None) -> int:
        """Examples a block of rows: as many rows as large products like, fewer where they are long."""
        size = min(max(_ROW_BLOCK_NUMBERS // self.parameters, 64), _ROW_BLOCK)
        size = size if u is not None else -(-size // self.outputs)
        return self.driver.devices.even(size if least is None else _full(least, size))

    def real(self, value: Any) -> Any:
        """A number of Python in the dtype of the problem."""
        return self.dtype.type(value) if isinstance(value, float) else value


def counted(*counts: Any) -> Any:
    """Their product: Python's float where it can be, for that is exact, else float32: as int32 it may overflow."""
    return math.prod(count.astype(np.float32) if isinstance(count, Tracer) else float(count) for count in counts)


def _full(n: int, size: int) -> int:
    """The largest block, of at most that size, of which n examples fill every one (but for rounding)."""
    blocks = -(-n // size)
    return -(-n // blocks)


def _zeros(w: Array) -> Array:
    return jnp.zeros(w.shape, w.dtype)


def gradient_flops(problem: Problem) -> float:
    """Floating-point operations of the loss and gradient of one example, by the compiler's estimate."""
    w = jax.ShapeDtypeStruct((problem.parameters,), problem.dtype)
    constants = jax.tree.map(_shape, problem.constants)
    return _gradient_cost(problem.objective, w, constants, _example(problem.x), _example(problem.y))["flops"]


def _gradient_cost(objective: Objective, *arrays: Any) -> dict[str, float]:
    """What the compiler's analysis says of the gradient, an example; arrays: w, constants, x and y of one."""
    leaves, structure = jax.tree.flatten(arrays)
    return _analysed(objective, structure, tuple(leaves))


@lru_cache(maxsize=64)
def _analysed(objective: Objective, structure: Any, leaves: tuple[Any, ...]) -> dict[str, float]:
    w, constants, *example = jax.tree.unflatten(structure, leaves)
    x, y = (jax.ShapeDtypeStruct((_ANALYSED, *a.shape), a.dtype) for a in example)
    weights = jax.ShapeDtypeStruct((_ANALYSED,), w.dtype)
    block = partial(_gradient_block, (objective, False))
    analysis = cost_analysis(block, w, (w, constants), (x, y, weights))
    return {key: float(analysis[key]) / _ANALYSED for key in ("flops", "bytes accessed")}


def _shape(a: Any) -> Any:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _example(a: Any) -> Any:
    """Of one of them."""
    return jax.ShapeDtypeStruct(a.shape[1:], a.dtype)


def subset_of(indices: np.ndarray, dtype: np.dtype, count: int | None = None) -> Sample:
    """The first `count` of some examples (None: all of them), equally weighted."""
    count = len(indices) if count is None else count
    return Sample(indices, np.full(len(indices), 1 / max(count, 1), dtype), np.int32(count))


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
    own = choose(devices)
    with own.context():
        own_model, w, constants = prepare(model, params, x, seed, trainable)
        checks.x_dtype(x, w.dtype)
        w, constants = own.adopt((w, constants))  # params may be committed to another one
        objective = Objective(own_model, resolve(loss))
        outputs = _checked_outputs(objective, loss, w, constants, x, y)
        size = own.even(min(block_size or _default_block(own, objective, w, constants, x, y), len(x)))
        x, y = (_in_place(np.asarray(a) if isinstance(a, jax.Array) else a) for a in (x, y))
        subset, weights, count = subset_of(np.arange(len(x), dtype=np.int32), np.dtype(w.dtype))
        static = (objective, Host(own), size, w.size, outputs, np.dtype(w.dtype))
        problem = Problem(*static, constants, x, y, subset, weights, count, seed=np.uint32(seed), l2=float(l2))
        if own.of_several_processes:
            checks.same_everywhere(own.of_each_process(_shown(problem, w)))
        _check_deterministic(problem, w)
    return problem, w


def identity(problem: Problem, w: Array) -> dict[str, Any]:
    """What a checkpoint knows a problem by, beside its sizes: checksums, and some losses near the start w (P,)."""
    some = _some(problem)
    noise = np.random.default_rng(0).normal(size=problem.parameters).astype(problem.dtype)
    shown = subset_of(some[:: -(-len(some) // _SHOWN[1])], problem.dtype)
    losses = problem.losses(w + 0.1 * noise, shown)  # at the start itself all models of one loss may be alike: at zero
    return {
        "examples": problem.examples,
        "parameters": problem.parameters,
        "dtype": str(problem.dtype),
        "data": [checksum(problem.x[some]), checksum(problem.y[some])],
        "trainable": checksum(problem.constants.get("index", np.empty(0))),
        "losses near the start": [float(f"{loss:.4g}") for loss in losses],
    }


def _some(problem: Problem) -> np.ndarray:
    """Examples from all over the data."""
    return np.unique(np.linspace(0, problem.examples - 1, _SHOWN[0]).astype(np.int32))


def _shown(problem: Problem, w: Array) -> int:
    """A checksum, 31 bits, of what all processes have to have in common: some of the data, the start, and the seed."""
    some, numbers = _some(problem), np.array([problem.examples, problem.seed], np.int64)
    arrays = problem.x[some], problem.y[some], np.asarray(w), numbers
    return zlib.crc32("".join(map(checksum, arrays)).encode()) >> 1


def checksum(values: Any) -> str:
    """CRC-32 of an array's bytes, in the dtype that JAX computes with."""
    dtype, crc = jax.dtypes.canonicalize_dtype(values.dtype), 0
    for _, piece in pieces(values):
        crc = zlib.crc32(piece.astype(dtype).tobytes(), crc)
    return f"{crc:08x}"


def _in_place(values: np.ndarray) -> np.ndarray:
    """Where JAX reads it without a copy for each evaluation, if it is small."""
    return aligned(values) if values.nbytes <= _SMALL and not isinstance(values, np.memmap) else values


def _default_block(own: Devices, objective: Objective, w: Array, constants: Constants, x: Any, y: Any) -> int:
    arrays = _shape(w), jax.tree.map(_shape, constants), _example(x), _example(y)
    convolves = _convolves(objective, w, constants, x)
    size = own.default_block(convolves, lambda: _gradient_cost(objective, *arrays)["bytes accessed"])
    return _full(len(x), size)


def _convolves(objective: Objective, w: Any, constants: Constants, x: Any) -> bool:
    return "conv_general_dilated" in str(jax.make_jaxpr(objective.model.outputs)(w, constants, x[:1]))


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
    return dataclasses.replace(problem, x=np.asarray(x), y=np.asarray(y)).on(np.arange(len(x)))


def placed(problem: Problem, driver: str, steps: int = 1) -> Problem:
    """The problem for "host" or "compiled".

    "auto": compiled on an accelerator that holds the data. On a CPU where a program takes many steps, which saves
    Python's calls, the data are small, for they are copied, and nothing convolves, for XLA's convolutions are far
    slower inside a compiled loop there.
    """
    checks.choice("driver", driver, ("auto", "host", "compiled"))
    devices, arrays = problem.driver.devices, (problem.x, problem.y)
    mapped, size = any(isinstance(a, np.memmap) for a in arrays), sum(a.nbytes for a in arrays)
    suits = not mapped and devices.hold(size) and (not devices.on_cpu or (steps > 1 and _quick_in_loops(problem, size)))
    if driver == "host" or (driver == "auto" and not suits):
        return problem
    x, y, constants = devices.replicate((np.asarray(problem.x), np.asarray(problem.y), problem.constants))
    return dataclasses.replace(problem, driver=Compiled(devices), x=x, y=y, constants=constants)


def _quick_in_loops(problem: Problem, size: int) -> bool:
    w = jax.ShapeDtypeStruct((problem.parameters,), problem.dtype)
    return size <= _SMALL and not _convolves(problem.objective, w, problem.constants, problem.x)


def _check_deterministic(problem: Problem, w: Array) -> None:
    """Evaluate a few examples twice, the second time in other company (as curvlinops checks its data); not charged."""
    indices = np.arange(min(problem.examples, problem.block_size, _TWICE))
    half = indices[: -(-len(indices) // 2)]
    first = problem.losses(w, subset_of(indices, problem.dtype))
    backwards = problem.losses(w, subset_of(indices[::-1], problem.dtype))
    checks.deterministic(first, backwards[::-1])
    checks.deterministic(first[: len(half)], problem.losses(w, subset_of(half, problem.dtype)))
