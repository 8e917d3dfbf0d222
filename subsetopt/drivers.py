"""Two drivers, one source: loops over blocks and steps, from Python or inside one compiled program.

A solver and a problem say `driver.reduce`, `driver.cond`, `driver.select`, `driver.while_loop`; the driver decides who
runs them.

Host: jitted blocks driven from Python, fetched from NumPy or a memmap one after the other, a block ahead. For CPUs,
where XLA has fast convolutions only outside of loops, and for data larger than the device.
Compiled: `lax` loops inside one program over data on the device, many steps a dispatch. For GPUs and TPUs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from subsetopt.devices import Devices, Kernel
from subsetopt.pages import Pages, gathered, trim

_MANY = 1 << 18  # examples of which a number each fills a megabyte
_AHEAD = 2  # blocks sent and not yet done: one that computes, one that waits; memory stays that of few blocks


class Sample(NamedTuple):
    """Weighted examples: sum_i weights_i q_i estimates the subset's mean of q.

    indices, weights: (n,), of which the first `count` stand, the rest being there for a constant shape. Indices None:
    the data at hand are these examples, and one block.
    """

    indices: Any
    weights: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class Host:
    """Blocks from Python."""

    devices: Devices
    name: ClassVar[str] = "host"

    def cond(self, predicate: Any, true: Callable, false: Callable, *operands: Any) -> Any:
        """lax.cond; only one branch is touched."""
        return (true if bool(predicate) else false)(*operands)

    def select(self, predicate: Any, true: Any, false: Any) -> Any:
        """One of two trees."""
        return true if bool(predicate) else false

    def while_loop(self, cond: Callable, body: Callable, carry: Any) -> Any:
        """lax.while_loop."""
        while bool(cond(carry)):
            carry = body(carry)
        return carry

    def reduce(
        self, kernel: Kernel, static: Any, sums: Any, shared: Any, data: Any, sample: Sample, extra: Any, size: int
    ):
        """`sums` plus the sums over the sample, and per-example values (n, ...), zero beyond its count.

        extra: arrays of n rows that go with the sample. size: examples a block, over all devices.
        """
        sample, extra = jax.tree.map(np.asarray, (sample, extra))
        devices, part = self.devices, size // self.devices.count
        width = part * len(devices.local)
        sums, shared = devices.start(sums), devices.share(shared)
        each, waiting, pages = None, [], Pages(*data)
        for start in range(0, int(sample.count), size):
            start += part * devices.first
            block = _block(data, sample, extra, start, width)
            sums, values, done = devices.run(kernel, static, sums, shared, block)
            waiting.append((start, values, done))
            # Those that only add to a sum, as rows do to a matrix, compute for long and fill far more than their data.
            if len(waiting) > (_AHEAD if jax.tree.leaves(values) else 1):
                each = self._keep(each, sample, *waiting.pop(0))
            pages.read(*block)
        for made in waiting:
            each = self._keep(each, sample, *made)
        pages.release()
        return devices.finish(sums, each)

    def over_all(self, program: Callable, *arguments: Any) -> Any:
        """A program on numbers of all examples at once, whose memory does not stay."""
        made = jax.block_until_ready(program(*arguments))
        if max(np.size(a) for a in arguments) >= _MANY:
            trim()
        return made

    def total(self, weights: Any, new: Any, old: Any = None) -> Any:
        """The sum of weights (new - old) over examples, (n,) each; in float64, by pieces."""
        weights, new, piece = np.asarray(weights), np.asarray(new), 1 << 16
        total = 0.0
        for part in (slice(start, start + piece) for start in range(0, len(new), piece)):
            values = new[part].astype(np.float64) - (0 if old is None else np.asarray(old[part]))
            total += values @ weights[part].astype(np.float64)
        return new.dtype.type(total)

    def _keep(self, each: Any, sample: Sample, start: int, values: Any, done: Array) -> Any:
        """Write a block's per-example values to their place in `each`, made by the first one; waits for the block."""
        done.block_until_ready()  # not every kernel has values: nothing else keeps XLA from taking in 32 blocks
        values = jax.tree.map(lambda v: self.devices.rows(np.asarray(v)), values)
        if each is None:
            each = jax.tree.map(lambda v: np.zeros((len(sample.indices), *v.shape[1:]), v.dtype), values)
        for whole, part in zip(jax.tree.leaves(each), jax.tree.leaves(values), strict=True):
            room = whole[start : min(start + len(part), int(sample.count))]
            room[:] = part[: len(room)]
        return each


def _block(data: Any, sample: Sample, extra: Any, start: int, width: int) -> tuple[Any, ...]:
    """Rows start to start + width; past the last one copies of it with weight zero."""
    places = np.arange(start, start + width)
    inside = places < sample.count
    places = np.minimum(places, sample.count - 1)
    indices = sample.indices[places]
    weights = np.where(inside, sample.weights[places], 0).astype(sample.weights.dtype)
    neighbours = np.all(np.diff(indices) == 1)
    rows = (np.asarray(a[indices[0] : indices[-1] + 1]) if neighbours else gathered(a, indices) for a in data)
    return (*rows, weights, *(a[places] for a in extra))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Everything in one program, the data on every device."""

    devices: Devices
    name: ClassVar[str] = "compiled"

    def cond(self, predicate: Any, true: Callable, false: Callable, *operands: Any) -> Any:
        """lax.cond; every predicate is the same on all devices, for it comes from reduced values."""
        return lax.cond(predicate, true, false, *operands)

    def select(self, predicate: Any, true: Any, false: Any) -> Any:
        """Element by element, where both trees are there anyway: a GPU waits for the predicate of a cond."""
        return jax.tree.map(functools.partial(jnp.where, predicate), true, false)

    def while_loop(self, cond: Callable, body: Callable, carry: Any) -> Any:
        """lax.while_loop."""
        return lax.while_loop(cond, body, carry)

    def reduce(
        self, kernel: Kernel, static: Any, sums: Any, shared: Any, data: Any, sample: Sample, extra: Any, size: int
    ):
        """As Host.reduce: a loop over blocks on each device, then one all-reduce for sums and values together.

        Where one block is all there can be, there is no loop: on a GPU each turn waits for its condition.
        """
        n = len(sample.weights)
        part, rank = size // self.devices.count, self.devices.rank()
        capacity = -(-n // size) * size

        def block(number: Any) -> tuple[Array, Any]:
            start = number * size + rank * part
            places = start + jnp.arange(part, dtype=np.int32)
            inside = places < sample.count
            places = jnp.minimum(places, sample.count - 1)
            rows = data if sample.indices is None else [a[sample.indices[places]] for a in data]
            weights = jnp.where(inside, sample.weights[places], 0)
            return start, (inside, (*rows, weights, *(a[places] for a in extra)))

        def add(number: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            sums, each = carry
            start, (inside, arrays) = block(number)
            sums, values = kernel(static, sums, shared, arrays)
            return sums, jax.tree.map(functools.partial(_put, start, inside), each, values)

        _, shapes = jax.eval_shape(lambda: kernel(static, sums, shared, block(np.int32(0))[1][1]))
        each = jax.tree.map(lambda v: jnp.zeros((capacity, *v.shape[1:]), v.dtype), shapes)
        mine = jax.tree.map(lambda a: jnp.where(rank == 0, a, 0), sums)
        blocks = (sample.count + size - 1) // size
        sums, each = add(np.int32(0), (mine, each)) if capacity == size else lax.fori_loop(0, blocks, add, (mine, each))
        sums, each = self.devices.total((sums, each))
        return sums, jax.tree.map(lambda e: e[:n], each)

    def over_all(self, program: Callable, *arguments: Any) -> Any:
        """The program."""
        return program(*arguments)

    def total(self, weights: Any, new: Any, old: Any = None) -> Array:
        """As Host.total, in two rounds: rounding grows with the square root of n, not with n."""
        values = weights * (new if old is None else new - old)
        return jnp.sum(jnp.sum(jnp.pad(values, (0, -values.size % 512)).reshape(-1, 512), axis=1))


def _put(start: Array, inside: Array, each: Array, values: Array) -> Array:
    keep = inside.reshape(-1, *[1] * (values.ndim - 1))
    return lax.dynamic_update_slice_in_dim(each, jnp.where(keep, values, 0), start, 0)
