"""Save and resume: a tree of arrays and a JSON record, written by orbax so that a crash leaves the last good one."""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subsetopt import checks

_SAVING = 20  # a save for so many times its duration
_WAY_OUT = "pass an empty folder, or the arguments of the first call"


class Checkpoint:
    """A folder that holds the latest state of one run; None as path: nothing is saved.

    run: JSON-ready description of the run. Resuming with another one is refused: the result would be neither's.
    process: of several, the first one saves; all of them load, so the folder has to be one that all can read.
    """

    def __init__(self, path: str | Path | None, run: dict[str, Any], process: int = 0):
        self._process, self.run = process, run
        self._saved, self._took = time.perf_counter(), 0.0  # when, and how long it took
        self._manager: Any = None
        if path is not None:
            import orbax.checkpoint as ocp  # imported here: it takes seconds and few runs need it

            self._ocp = ocp
            # Each process by itself: their clocks differ, so one would wait where the other has nothing to save.
            alone = ocp.options.MultiprocessingOptions(
                primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
            )
            options = ocp.CheckpointManagerOptions(
                max_to_keep=1, enable_async_checkpointing=False, multiprocessing_options=alone, create=False
            )
            Path(path).absolute().mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(Path(path).absolute(), options=options)

    def load(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The saved tree, in the structure of `like`, and its record; None where nothing is saved."""
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return None
        args = self._ocp.args.Composite(tree=self._ocp.args.StandardRestore(), record=self._ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=args)
        self._check_same_run(saved["record"]["run"])
        leaves, structure = jax.tree.flatten(like)
        _check_same_arrays(saved["tree"], _named(leaves))
        found = [_unpacked(saved["tree"].get(name, leaf), leaf) for name, leaf in zip(_names(), leaves, strict=False)]
        return jax.tree.unflatten(structure, found), saved["record"]["content"]

    def save(self, tree: Any, content: dict[str, Any], now: bool = False) -> None:
        """Keep this state, if `now` or if the last save is so long ago that all take a twentieth of the time."""
        due = now or time.perf_counter() - self._saved > _SAVING * self._took
        if self._manager is not None and self._process == 0 and due:
            with _ctrl_c_later():
                self._save(tree, content)

    def _save(self, tree: Any, content: dict[str, Any]) -> None:
        begin = time.perf_counter()
        arrays, args = _named(jax.tree.leaves(tree)), self._ocp.args
        record = {"run": self.run, "content": content}
        step = (self._manager.latest_step() or 0) + 1
        self._manager.save(step, args=args.Composite(tree=args.StandardSave(arrays), record=args.JsonSave(record)))
        self._saved = time.perf_counter()
        self._took = self._saved - begin

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        for key in self.run | saved:
            before, now = saved.get(key), self.run.get(key)
            must = f"hold a run with {key} = {now!r}"
            checks.require(_agree(before, now), "checkpoint", must, repr(before), _WAY_OUT)


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C waits for the end: half a checkpoint, which orbax's threads go on writing, is in the next one's way."""
    handler, pressed = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):  # nothing comes up in here
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(signal.SIGINT, None)


def _agree(before: Any, now: Any) -> bool:
    """Equal, or equal but for the rounding of another device: lists of floats were computed."""
    lists = [value for value in (before, now) if isinstance(value, list)]
    floats = all(isinstance(number, float) for values in lists for number in values)
    if len(lists) == 2 and floats and len(before) == len(now):
        return np.allclose(before, now, rtol=1e-3, equal_nan=True)
    return before == now


def _check_same_arrays(saved: dict[str, Any], own: dict[str, np.ndarray]) -> None:
    """What no description tells: the state of another optimizer."""
    before, now = ({name: np.shape(a) for name, a in arrays.items()} for arrays in (saved, own))
    different = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    for name in different[:1]:
        must = f"hold {len(now)} arrays like those of this run, number {int(name)} of shape {now.get(name)}"
        checks.require(False, "checkpoint", must, f"{len(before)}, shape {before.get(name)}", _WAY_OUT)


def _names() -> Iterator[str]:
    return (f"{i:04}" for i in itertools.count())


def _named(leaves: list[Any]) -> dict[str, np.ndarray]:
    """As arrays, by number; orbax keeps no empty ones."""
    return {name: a for name, a in zip(_names(), map(_packed, leaves), strict=False) if a.size}


def _packed(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _unpacked(found: Any, like: Any) -> Any:
    if isinstance(like, bool | int | float):
        return type(like)(np.asarray(found).item())  # enums of Python 3.12 take no arrays
    if isinstance(like, jax.Array) and jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(found)
    return jnp.asarray(found) if isinstance(like, jax.Array) else np.asarray(found)
