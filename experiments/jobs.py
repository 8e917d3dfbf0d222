"""An experiment's command: parts that are measured one by one and kept, and the records that they make together.

A job is one record. What is interrupted goes on with its first unfinished part, and with the first unfinished run
within it.
"""

import abc
import contextlib
import dataclasses
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments import records


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment's command takes."""

    out: Path = Path("out")
    """Folder of figures and finished parts."""
    results: Path = Path("out/results")
    """Folder of records; experiments/results holds the committed ones."""
    only: str | None = None
    """Run a part: key=NAME, or several with commas between them; a wrong one is told what there is."""
    list: bool = False
    """Say which parts have a result, and run nothing."""
    again: bool = False
    """Run anew what has a result already; what was interrupted goes on without it."""
    smoke: bool = False
    """A few examples and steps, to see that it runs."""


def chosen(only: str | None, names: Mapping[str, Collection[str]]) -> dict[str, str]:
    """What `--only key=NAME[,key=NAME]` picks; exits, saying what there is, for any other key or name."""
    items = [item.partition("=") for item in only.split(",")] if only is not None else []
    picked = {key: name for key, _, name in items}
    if len(picked) < len(items) or any(name not in names.get(key, ()) for key, name in picked.items()):
        several = ", or several with commas" if len(names) > 1 else ""
        known = "; ".join(f"{key} one of {', '.join(values)}" for key, values in names.items())
        sys.exit(f"--only must be {' or '.join(f'{key}=NAME' for key in names)}{several}; {known}. Found {only!r}.")
    return picked


class Job(abc.ABC):
    """One record and its parts.

    experiment: whose. labels: what its records and their parts are called in the command and in `--list`.
    """

    experiment: ClassVar[str]
    labels: ClassVar[tuple[str, str]]

    def __init__(self, name: str, parts: Sequence[str], arguments: Options, seed: int = 0):
        """Seeds beside the first one have records of their own."""
        self.arguments, self.parts = arguments, parts
        self.name = records.named(name + (f"-seed{seed}" if seed else ""), arguments.smoke)
        self.folder = arguments.out / "parts" / self.name

    @abc.abstractmethod
    def measure(self, part: str) -> Any:
        """The result of a part, as JSON can hold it."""

    @abc.abstractmethod
    def config(self) -> Mapping:
        """What the results depend on, in full; what was kept under another one is refused."""

    @abc.abstractmethod
    def contents(self, parts: dict[str, Any]) -> tuple[Mapping, Mapping]:
        """The record's curves and final, from the results of all parts."""

    @property
    def record_path(self) -> Path:
        """Where the record is, or will be."""
        return self.arguments.results / self.experiment / f"{self.name}.json"

    def path(self, part: str) -> Path:
        """Where a finished part is kept."""
        return self.folder / f"{part}.json"

    def _runs(self, part: str) -> list[Path]:
        """The runs of a part that are kept each."""
        return sorted((self.folder / part).glob("*.json"))

    def _files(self, part: str) -> list[Path]:
        """All that is kept of a part."""
        path = self.path(part)
        return [*([path] if path.exists() else []), *self._runs(part)]

    def done(self, part: str) -> bool:
        """Whether a part needs no run."""
        return self.record_path.exists() or self.path(part).exists()

    def complete(self) -> bool:
        """Whether nothing is left to run."""
        return all(map(self.done, self.parts))

    def show(self) -> None:
        """Print the state of every part."""
        for part in self.parts:
            runs = len(self._runs(part))
            kept = f", {runs} runs kept" if runs else ""
            state = "done" if self.done(part) else "to do"
            print(f"{self.labels[0]}={self.name} {self.labels[1]}={part}: {state}{kept}")

    def forget(self, parts: Collection[str]) -> None:
        """Remove the record, and what these parts have kept; exits where the record could not be made again."""
        lost = [part for part in self.parts if part not in parts and not self.path(part).exists()]
        if lost and self.record_path.exists():
            sys.exit(
                f"--again of {', '.join(parts)} alone would lose the record {self.record_path}, for in {self.folder} "
                f"nothing is kept of {', '.join(lost)}. Run all of {self.name} again, or name another --results."
            )
        self.record_path.unlink(missing_ok=True)
        for part in parts:
            self.path(part).unlink(missing_ok=True)
            shutil.rmtree(self.folder / part, ignore_errors=True)

    def check(self, anew: Collection[str]) -> None:
        """Exits where what a record is still to be made of, but for parts to run anew, has another configuration."""
        made = self.record_path.exists() and not anew
        parts = [] if made else [part for part in self.parts if part not in anew]
        files = [path for part in parts for path in self._files(part)]
        config = self.config() if files else {}
        for path in files:
            changed = records.changed(path, config)
            if changed:
                sys.exit(
                    f"{path} was kept with another {', '.join(changed)}, and one record is of one configuration. "
                    f"Run all of {self.name} anew by --again, or name another --out."
                )

    def run(self, part: str) -> None:
        """Run one part, unless it is done."""
        if self.done(part):
            print(f"{self.name}, {part}: has a result already (--again runs it anew)")
            return
        self._keep(self.path(part), part, self.measure, part)

    def kept(self, part: str, run: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """What one run of a part gave, now or when it was run."""
        path = self.folder / part / f"{run}.json"
        if not path.exists():
            self._keep(path, f"{part}, {run}", measure, *arguments)
        return records.kept(path)

    def _keep(self, path: Path, what: str, measure: Callable[..., Any], *arguments: Any) -> None:
        print(f"{self.name}: {what}", flush=True)
        with interrupts():
            result = measure(*arguments)
        records.keep(result, path, self.config())

    def record(self) -> dict[str, Any]:
        """The record, put together from its parts the first time."""
        if not self.record_path.exists():
            parts = {part: records.kept(self.path(part)) for part in self.parts}
            made_of = [path for part in self.parts for path in self._files(part)]
            record = records.new(self.experiment, self.name, self.config(), *self.contents(parts), made_of)
            records.write(record, self.arguments.results)
        print(f"record: {self.record_path}")
        return records.read(self.record_path)


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Ctrl-C ends what is measured, too: a fit takes it for the wish to end early, and gives a result."""
    handler: Any = signal.getsignal(signal.SIGINT)
    pressed: list[bool] = []

    def note(*arguments: Any) -> None:
        pressed.append(True)
        handler(*arguments)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def run(jobs: Iterable[Job], arguments: Options, part: str | None) -> Iterator[dict[str, Any]]:
    """Run what has no result yet, one part of each job or all; the records that are complete then."""
    records.environment()  # reads the commit now: when a record is made there may be another one
    for job in jobs:
        if arguments.list:
            job.show()
            continue
        parts = [name for name in job.parts if part in (None, name)]
        anew = parts if arguments.again else []
        job.check(anew)
        if anew:
            job.forget(anew)
        for name in parts:
            job.run(name)
        if job.complete():
            yield job.record()
