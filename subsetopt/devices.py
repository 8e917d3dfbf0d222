"""Blocks over devices: the only file that knows devices exist.

A kernel is a pure function (static, sums, shared, block) -> (sums, each): it adds a block's contribution to `sums` and
returns per-example values `each` (B, ...). On several devices every device keeps sums of its own over its part of
each block; they are added once, by one `psum`, when the last block is done.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subsetopt import checks

Kernel = Callable[[Any, Any, Any, Any], tuple[Any, Any]]

AXIS = "data"


@functools.lru_cache(maxsize=256)
def _compiled(kernel: Kernel, devices: tuple[Any, ...]) -> Callable:
    if len(devices) == 1:
        return jax.jit(kernel, static_argnums=0, donate_argnums=1)
    return jax.pmap(
        kernel, AXIS, in_axes=(None, 0, None, 0), static_broadcasted_argnums=0, donate_argnums=1, devices=devices
    )


@functools.lru_cache(maxsize=64)
def _psum(devices: tuple[Any, ...]) -> Callable:
    return jax.pmap(lambda sums: jax.lax.psum(sums, AXIS), AXIS, in_axes=0, out_axes=None, devices=devices)


class Devices:
    """The devices of one fit. One device: plain jit. Several: pmap, each block split evenly over them."""

    def __init__(self, devices: Sequence[Any] | None = None):
        checks.devices(devices, jax.Device)
        self.devices: tuple[Any, ...] = tuple(jax.local_devices() if devices is None else devices)

    def block_size(self, wanted: int | None) -> int:
        """A block size that splits evenly; the default is what the backend's kernels like (measured, not tuned)."""
        size = wanted or (128 if self.devices[0].platform == "cpu" else 2048) * len(self.devices)
        return -(-size // len(self.devices)) * len(self.devices)

    def start(self, sums: Any) -> Any:
        """Zeros to add to, one set a device."""
        if len(self.devices) == 1:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
        return jax.tree.map(lambda s: jnp.zeros((len(self.devices), *s.shape), s.dtype), sums)

    def run(self, kernel: Kernel, static: Any, sums: Any, shared: Any, block: Any) -> tuple[Any, Any]:
        """One block, arrays with B rows each; B is a multiple of the number of devices."""
        count = len(self.devices)
        if count > 1:
            block = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), block)
        else:
            block = jax.device_put(block, self.devices[0])  # what is committed decides where the kernel runs
        return _compiled(kernel, self.devices)(static, sums, shared, block)

    def finish(self, sums: Any, each: list[Any], length: int) -> tuple[Any, Any]:
        """The sums over all devices, and the per-example values of all blocks as arrays of `length` rows."""
        if len(self.devices) > 1 and jax.tree.leaves(sums):
            sums = _psum(self.devices)(sums)
        lead = 1 if len(self.devices) == 1 else 2
        gathered = jax.tree.map(
            lambda *parts: np.concatenate([np.asarray(p).reshape(-1, *p.shape[lead:]) for p in parts])[:length], *each
        )
        return sums, gathered
