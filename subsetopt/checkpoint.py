"""Save and resume: what a run of steps keeps, and the folder it is kept in, written by orbax.

A crash leaves the last good checkpoint.
"""

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from subsetopt import checks
from subsetopt.devices import Devices
from subsetopt.timing import Stopwatch

_SAVING = 20  # a save for so many times its duration
_FAILS = 2  # a process's vote, where others are 0 and 1: going on and stopping
_WAY_OUT = "pass an empty folder, or the arguments of the first call"


class Checkpoint:
    """A folder that holds the latest state of one run; None as path: nothing is saved.

    run: JSON-ready description of the run. Resuming with another one is refused: the result would be neither's.
    devices: of the run. Of its processes the first one saves; all of them load, so all have to see the folder.
    """

    def __init__(self, path: str | Path | None, run: dict[str, Any], devices: Devices):
        process, self._saves, self.run = devices.process, devices.first == 0, run
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
        try:
            saved = self._manager.restore(step, args=args)
            before, content = saved["record"]["run"], saved["record"]["content"]
        except Exception as error:  # orbax and its files have many
            must = "be a folder that a call like this one has saved to"
            checks.require(False, "checkpoint", must, f"in its {step} {type(error).__name__}: {error}", _WAY_OUT)
            raise
        self._check_same_run(before)
        leaves, structure = jax.tree.flatten(like)
        checks.same_shapes("checkpoint", "hold the arrays of this run", saved["tree"], _arrays(leaves), _WAY_OUT)
        found = [_unpacked(saved["tree"].get(name, leaf), leaf) for name, leaf in _numbered(leaves).items()]
        return jax.tree.unflatten(structure, found), content

    def save(self, tree: Any, content: dict[str, Any], now: bool = False) -> bool:
        """Keep this state, if `now` or if the last save is so long ago that all take a twentieth of the time."""
        due = now or time.perf_counter() - self._saved > _SAVING * self._took
        if self._manager is None or not self._saves or not due:
            return False
        with _signals_later():
            self._save(tree, content)
        return True

    def _save(self, tree: Any, content: dict[str, Any]) -> None:
        begin = time.perf_counter()
        arrays = {name: np.asarray(a) for name, a in _arrays(jax.tree.leaves(tree)).items()}
        args = self._ocp.args
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


class Resumable:
    """A run of steps that is interrupted between two of them only, and resumed from there.

    numbers, arrays: names of what a step changes beside `history`, whose lists get an entry a step: what JSON holds,
    and the rest. Values are replaced, never changed, for the last complete step keeps the old ones.
    """

    numbers: ClassVar[tuple[str, ...]]
    arrays: ClassVar[tuple[str, ...]]

    def __init__(self, columns: Iterable[str], devices: Devices):
        self.devices = devices
        self.history: dict[str, list] = {column: [] for column in columns}
        self.watch = Stopwatch()
        self.point: dict[str, Any] = {}  # the last complete step
        self._saved: dict[str, Any] = self.point
        self._pressed = False  # Ctrl-C, where it is a vote

    def resume(self, saver: Checkpoint) -> bool:
        """Whether there is something to go on from; then it stands there, and every process at the same step."""
        self._saver, saved = saver, saver.load(self.tree(vars(self)))
        if saved is not None:
            self._go_back_to(*saved)
        steps = len(next(iter(self.history.values())))
        checks.same_step(self.devices.of_each_process(steps))
        return saved is not None

    def _go_back_to(self, tree: Any, content: dict[str, Any]) -> None:
        self.watch = Stopwatch(content.pop("seconds"), content.pop("compile"))
        vars(self).update(content)
        self.restore(tree)
        self.point = self._saved = self._stands()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """For a run and its result: of several processes none leaves what the others wait in; Ctrl-C is a vote.

        A second Ctrl-C leaves them alone.
        """
        if not self.devices.of_several_processes:
            yield
            return
        with _signal(signal.SIGINT, self._vote_to_stop):
            yield

    def _vote_to_stop(self, handler: Callable[[int, Any], Any]) -> None:
        if self._pressed:
            handler(signal.SIGINT, None)
        self._pressed = True

    def stopped_by(self, callback: Any, progress: Any) -> bool:
        """Whether the callback or Ctrl-C wants to stop, here or in another process; all of them ask.

        A callback that raises does so once the others know: their next evaluation would wait for this process.
        """
        failure, stops = None, False
        try:
            stops = callback is not None and bool(callback(progress))
        except KeyboardInterrupt:
            if not self.devices.of_several_processes:
                raise
            stops = True
        except Exception as error:
            failure = error
        vote = _FAILS if failure is not None else int(stops or self._pressed)
        votes = self.devices.of_each_process(vote)
        if failure is not None:
            raise failure
        self.devices.none_lost(_FAILS in votes)
        return any(votes)

    def tree(self, values: dict[str, Any]) -> Any:
        """What is saved of the values of `arrays`."""
        return tuple(values[name] for name in self.arrays)

    def restore(self, tree: Any) -> None:
        """The other way round, once the numbers are there."""
        vars(self).update(zip(self.arrays, tree, strict=True))

    def complete(self) -> None:
        """A step is: an interrupt goes back to here."""
        self.point = self._stands()
        self._save()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """For the loop over steps: however it ends, the run stands at its last complete step, which is saved."""
        try:
            yield
        except BaseException:  # of the keyboard, of a callback, of a device
            vars(self).update(self.point)
            try:
                self._save(now=True)
            except KeyboardInterrupt:  # which waited until it was
                pass
            except Exception as error:
                warnings.warn(f"The last complete step is not saved: {error!r}", stacklevel=2)
            raise
        with contextlib.suppress(KeyboardInterrupt):
            self._save(now=True)

    def _stands(self) -> dict[str, Any]:
        history = {name: column.copy() for name, column in self.history.items()}
        return {name: getattr(self, name) for name in (*self.numbers, *self.arrays)} | {"history": history}

    def _save(self, now: bool = False) -> None:
        if self.point is self._saved:  # or there is none: a start that was interrupted begins again
            return
        content = {name: self.point[name] for name in (*self.numbers, "history")}
        content |= {"seconds": self.watch.seconds, "compile": self.watch.compile_seconds}
        if self._saver.save(self.tree(self.point), content, now):
            self._saved = self.point


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """What would raise in here waits for the end: half a checkpoint, which orbax goes on writing, is in the way."""
    came: list[signal.Signals] = []
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.enter_context(_signal(number, lambda _, number=number: came.append(number)))
        yield
    for number in came:
        signal.raise_signal(number)


@contextlib.contextmanager
def _signal(number: signal.Signals, then: Callable[[Any], Any]) -> Iterator[None]:
    """A signal that a handler of Python's would take calls `then` with that handler instead."""
    handler = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):  # nothing comes up in here
        yield
        return
    signal.signal(number, lambda *_: then(handler))
    try:
        yield
    finally:
        signal.signal(number, handler)


def _agree(before: Any, now: Any) -> bool:
    """Equal, or equal but for the rounding of another device: lists of floats were computed."""
    if _computed(before) and _computed(now) and len(before) == len(now):
        return np.allclose(before, now, rtol=1e-3, atol=0, equal_nan=True)
    return before == now


def _computed(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, float) for number in value)


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {f"{i:04}": leaf for i, leaf in enumerate(leaves)}


def _arrays(leaves: list[Any]) -> dict[str, Any]:
    """What of them is saved, where it is: orbax keeps no keys of random numbers as such, and no empty arrays."""
    arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in _numbered(leaves).items()}
    return {name: a for name, a in arrays.items() if np.size(a)}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _unpacked(found: Any, like: Any) -> Any:
    if isinstance(like, bool | int | float):
        return type(like)(np.asarray(found).item())  # enums of Python 3.12 take no arrays
    if _is_key(like):
        return jax.random.wrap_key_data(found)
    return jnp.asarray(found) if isinstance(like, jax.Array) else np.asarray(found)
