"""Where blocks are computed: the only file that knows devices and processes exist.

On one device everything is a plain jit. On several it is one pmap over all devices of all processes, along one axis:
each device keeps sums of its own over its part of every block, and they are added once, by one `psum`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from subsetopt import checks

# (static, sums, shared, block) -> (sums, each): adds a block's contribution to `sums`, gives values `each` (B, ...)
Kernel = Callable[[Any, Any, Any, Any], tuple[Any, Any]]

AXIS = "data"
_LOST = (
    "Process {} lost another process of this fit: it died, failed, or made another call. All of them have to be "
    "started again, with the same arguments; with checkpoint=FOLDER they go on where they were."
)
_DATA_SHARE, _BLOCK_SHARE = 0.5, 0.25  # of a device's memory that data and one block may fill; the rest is the solver's
_UNTOLD_MEMORY = 1 << 33


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of one fit; equal ones share compiled code.

    all: of every process, in the same order everywhere. local: those of this process, `first` the place of the first
    of them in `all`.
    """

    all: tuple[Any, ...]
    local: tuple[Any, ...]

    @property
    def count(self) -> int:
        """Devices of all processes together."""
        return len(self.all)

    @property
    def first(self) -> int:
        """Place of this process's first device."""
        return self.all.index(self.local[0])

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        return self.all[0].platform == "cpu"

    def even(self, size: int) -> int:
        """The next block size that splits evenly over the devices."""
        return -(-size // self.count) * self.count

    def default_block(self, convolves: bool, example_bytes: Callable[[], float]) -> int:
        """A block size that the backend's kernels like: small ones where a CPU convolves, on accelerators large ones.

        example_bytes: what an example moves through memory in an evaluation, which is more than it fills.
        """
        if self.on_cpu:
            return (128 if convolves else 2048) * self.count
        return max(int(_BLOCK_SHARE * self._memory / example_bytes()), 1) * self.count

    def hold(self, size: int) -> bool:
        """Whether every device has room for so many bytes of data beside the solver's own."""
        return self.on_cpu or size <= _DATA_SHARE * self._memory

    @property
    def _memory(self) -> int:
        """Bytes of a device, for which some backends have no answer."""
        stats = self.local[0].memory_stats()
        return stats["bytes_limit"] if stats else _UNTOLD_MEMORY

    @property
    def process(self) -> int:
        """Number of this process; the first one, 0, does what must be done once."""
        return self.local[0].process_index

    @property
    def of_several_processes(self) -> bool:
        """Whether other processes take part."""
        return len(self.local) < self.count

    def none_lost(self, one_is: bool) -> None:
        """RuntimeError where another process has failed."""
        if one_is:
            raise RuntimeError(_LOST.format(self.process))

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Everything else is computed on the first of this process's devices; failed collectives explain themselves."""
        with jax.default_device(self.local[0]):
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                if not self.of_several_processes:
                    raise
                raise RuntimeError(_LOST.format(self.process)) from error

    def adopt(self, tree: Any) -> Any:
        """The tree on the first device of this process, wherever it was, for all that follows in `context`.

        What several devices give is committed to the first one, what one device alone gives to none: all begins as it
        will be, for where some arrays of a program are committed and others are not JAX compiles it once more.
        """
        if self.count > 1:
            return jax.device_put(tree, self.local[0])
        return jax.tree.map(_uncommitted, tree)

    def replicate(self, tree: Any) -> Any:
        """The tree on every device of every process, each of which holds the same values; what is there stays."""
        if self.count == 1:
            return jax.device_put(tree)
        everywhere = NamedSharding(Mesh(np.array(self.all), (AXIS,)), PartitionSpec())
        if not self.of_several_processes:
            return jax.device_put(tree, everywhere)
        return jax.tree.map(functools.partial(_from_every_process, everywhere), tree)

    def here(self, tree: Any) -> Any:
        """What is replicated, as arrays of this process's first device; nothing is copied."""
        if self.count == 1:
            return tree
        return jax.tree.map(lambda a: a.addressable_data(0) if isinstance(a, Array) else a, tree)

    def of_each_process(self, number: int) -> list[int]:
        """What each process has for this number; all of them have to ask."""
        if not self.of_several_processes:
            return [number]
        return multihost_utils.process_allgather(np.int32(number)).tolist()

    # --- the host driver: one block a call -------------------------------------------------------------------------

    def start(self, sums: Any) -> Any:
        """`sums` to add to, which are given away: the first device begins with them, the others with zeros."""
        if self.count == 1:
            return sums

        def spread(a: Array) -> Array:
            zeros = jnp.zeros((len(self.local), *a.shape), a.dtype)
            return self._local(zeros.at[0].set(a) if self.first == 0 else zeros, AXIS)

        return jax.tree.map(spread, sums)

    def share(self, tree: Any) -> Any:
        """What every block needs, on this process's devices."""
        return tree if self.count == 1 else self._local(tree)

    def _local(self, tree: Any, *axes: str) -> Any:
        """Split along the first dimension where an axis is given, else all of it on each device."""
        return jax.device_put(tree, NamedSharding(Mesh(np.array(self.local), (AXIS,)), PartitionSpec(*axes)))

    def run(self, kernel: Kernel, static: Any, sums: Any, shared: Any, block: Any) -> tuple[Any, Any, Array]:
        """This process's part of one block: arrays whose rows are split evenly over the local devices.

        The sums, the values, and a number that is there when they are: the sums are given away to the next block.
        """
        if self.count > 1:
            block = jax.tree.map(lambda a: a.reshape(len(self.local), -1, *a.shape[1:]), block)
        return _block_program(kernel, self)(static, sums, shared, block)

    def rows(self, values: Any) -> Any:
        """Per-example values that `run` gave, in the order of the rows it was given."""
        return values if self.count == 1 else jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), values)

    def finish(self, sums: Any, each: Any) -> tuple[Any, Any]:
        """The sums over all devices, and per-example values, of which other processes have other rows, complete."""
        if self.count == 1:
            return sums, each
        if not self.of_several_processes:
            return (self.here(_total_program(self)(sums)) if jax.tree.leaves(sums) else sums), each
        # Rows of other processes are zero here, and the other way round: adding completes them.
        padded = jax.tree.map(lambda a: np.stack([a, *[np.zeros_like(a)] * (len(self.local) - 1)]), each)
        sums, each = self.here(_total_program(self)((sums, padded)))
        return sums, jax.tree.map(np.asarray, each)

    # --- the compiled driver: a whole loop a call ------------------------------------------------------------------

    def compiled(self, function: Callable) -> Callable:
        """function(static, *trees) as one program over all devices; trees and results are replicated."""
        if self.count == 1:
            return _single_program(function)
        ranks = np.arange(len(self.local))  # pmap wants something to map over
        return lambda static, *trees: _loop_program(function, self, len(trees))(static, ranks, *trees)

    def rank(self) -> Any:
        """The place of the device that runs; inside `compiled` only."""
        return 0 if self.count == 1 else lax.axis_index(AXIS)

    def total(self, tree: Any) -> Any:
        """The sum over all devices, one all-reduce for the whole tree; inside `compiled` only."""
        return tree if self.count == 1 else lax.psum(tree, AXIS)


def choose(devices: Sequence[Any] | None) -> Devices:
    """The given devices of this process, or all there are, those of other processes included."""
    checks.devices(devices, jax.Device, jax.process_index())
    if devices is not None:
        return Devices(tuple(devices), tuple(devices))
    # One process after the other, each with its own together, which is not the order of a TPU pod's numbers.
    in_order = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Devices(tuple(in_order), tuple(d for d in in_order if d.process_index == jax.process_index()))


def cost_analysis(function: Callable, *arguments: Any) -> dict[str, float]:
    """What XLA counts in a program, of which arguments need shapes and dtypes only.

    By its CPU client, whatever the devices: of the others most do not count before compiling, and after it a GPU's
    convolutions are calls of unknown content.
    """
    try:
        (cpu, *_) = jax.local_devices(backend="cpu")
    except RuntimeError as error:
        raise ValueError(
            "JAX_PLATFORMS leaves out the CPU, where operations are counted; add it, as in JAX_PLATFORMS=cuda,cpu."
        ) from error
    with jax.default_device(cpu):
        analysis: Any = jax.jit(function).lower(*arguments).cost_analysis()
    return analysis


def _from_every_process(sharding: NamedSharding, a: Any) -> Array:
    if isinstance(a, Array) and a.sharding == sharding:
        return a
    return _with_values(a, lambda values: jax.make_array_from_callback(values.shape, sharding, values.__getitem__))


def _uncommitted(a: Any) -> Any:
    return _with_values(a, jnp.asarray) if isinstance(a, Array) and a.committed else a


def _with_values(a: Any, place: Callable[[np.ndarray], Array]) -> Array:
    """The array that `place` makes of its values; random keys have some, too."""
    is_key = isinstance(a, Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    placed = place(np.asarray(jax.random.key_data(a) if is_key else a))
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(a)) if is_key else placed


@functools.lru_cache(maxsize=256)
def _block_program(kernel: Kernel, devices: Devices) -> Callable:
    def program(static: Any, sums: Any, shared: Any, block: Any) -> tuple[Any, Any, Array]:
        sums, values = kernel(static, sums, shared, block)
        return sums, values, jax.tree.leaves((sums, values))[0].ravel()[:1]

    if devices.count == 1:
        return jax.jit(program, static_argnums=0, donate_argnums=1)
    # Each process works on its own: what they computed is added by `finish` alone.
    axes = (None, 0, None, 0)
    return jax.pmap(program, AXIS, in_axes=axes, static_broadcasted_argnums=0, donate_argnums=1, devices=devices.local)


@functools.lru_cache(maxsize=64)
def _total_program(devices: Devices) -> Callable:
    return jax.pmap(lambda tree: lax.psum(tree, AXIS), AXIS, in_axes=0, out_axes=None, devices=devices.all)


@functools.lru_cache(maxsize=64)
def _single_program(function: Callable) -> Callable:
    return jax.jit(function, static_argnums=0)


@functools.lru_cache(maxsize=64)
def _loop_program(function: Callable, devices: Devices, trees: int) -> Callable:
    def replica(static: Any, rank: Array, *trees: Any) -> Any:
        return function(static, *trees)

    axes = (None, 0, *[None] * trees)
    return jax.pmap(replica, AXIS, in_axes=axes, out_axes=None, static_broadcasted_argnums=0, devices=devices.all)
