"""Results of experiments as small JSON files, which are committed and which `paper_figures` draws.

A record is a dict: schema, experiment, name, config, environment, curves, final. `curves` are named
dicts of equally long lists; a cost is three of them: `sample_grads` or epochs, `flops`, `seconds`.
"""

import functools
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


def new(
    experiment: str, name: str, config: Mapping, curves: Mapping, final: Mapping, parts: Sequence[Path] = ()
) -> dict:
    """A record, of what was kept in these files, or of now."""
    found = _common([_kept(path)["environment"] for path in parts] or [environment()])
    contents = {"config": config, "environment": found, "curves": curves, "final": final}
    return {"schema": SCHEMA, "experiment": experiment, "name": name} | contents


def write(record: dict, results: Path = RESULTS) -> Path:
    """Write `<results>/<experiment>/<name>.json`, whole or not at all; ValueError: bad content."""
    record = _plain(record, "record")
    for name, curve in record["curves"].items():
        _check_curve(name, curve)
    path = _path(record["experiment"], record["name"], results)
    return _replace(path, _dumps(record))


def keep(result: Any, path: Path, config: Mapping) -> Path:
    """Write a finished part of a record, whole or not at all, for the run that goes on with the others."""
    return _replace(
        path, json.dumps({"environment": environment(), "config": _plain(config, "config"), "result": result})
    )


def kept(path: Path) -> Any:
    """The result of a finished part; ValueError: it was kept in another form."""
    return _kept(path)["result"]


def changed(path: Path, config: Mapping) -> list[str]:
    """What is not in this configuration as it was when a part was kept, by name."""
    before, now = _kept(path)["config"], _plain(config, "config")
    return [name for name in before | now if name not in before or name not in now or _other(before[name], now[name])]


def read(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {record['schema']}, this code reads {SCHEMA}.")
    return record


def exists(experiment: str, name: str, results: Path = RESULTS) -> bool:
    return _path(experiment, name, results).exists()


def named(name: str, smoke: bool) -> str:
    """What a record is called: those of accelerators lie beside those of CPUs, such as `mlp` and `mlp-gpu`."""
    platform = jax.default_backend()
    return name + ("" if platform == "cpu" else f"-{platform}") + ("-smoke" if smoke else "")


def flops(fn: Callable, *args: Any) -> float:
    """Floating-point operations of the compiled program: loop bodies counted once, LAPACK not."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # on a GPU, convolutions are calls of unknown content
        analysis: Any = jax.jit(fn).lower(*args).compile().cost_analysis()
    return float(analysis["flops"])


@functools.cache
def environment() -> dict[str, Any]:
    """What a result depends on besides its config. Call it first: the commit is read only once."""
    return {
        **_git(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "precision": "float64" if jax.config.read("jax_enable_x64") else "float32",
    }


def _common(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What they have in common; a list of all that there is where they differ, as after a commit between two parts."""
    found = {key: list(dict.fromkeys(each[key] for each in environments)) for key in environments[0]}
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def _kept(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.keys() != {"environment", "config", "result"}:
        raise ValueError(f"{path} was kept by another version of this code: give --again, or remove it.")
    return content


def _other(before: Any, now: Any) -> bool:
    """Whether they differ; of two groups what both have, for a study or a library may have come in between."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(_other(before[name], now[name]) for name in before.keys() & now.keys())
    return before != now


def _git() -> dict[str, Any]:
    """The commit, and whether the code differs from it; None for both outside a repository."""
    command = ["git", "status", "--porcelain=v2", "--branch", "--", ":/", ":!results"]
    try:
        text = subprocess.check_output(command, cwd=RESULTS.parent, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}
    commit, *lines = text.decode().splitlines()
    return {"git_commit": commit.split()[-1], "git_dirty": any(line[0] != "#" for line in lines)}


def _replace(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.stem}-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        print(text, file=file, flush=True)
        os.fsync(file.fileno())
    return temporary.replace(path)


def _path(experiment: str, name: str, results: Path) -> Path:
    if not all(re.fullmatch(r"\w[\w.,=+-]*", part) for part in (experiment, name)):
        raise ValueError(f"{experiment!r}, {name!r}: letters, digits and _.,=+- make a file name.")
    return results / experiment / f"{name}.json"


def _plain(value: Any, where: str) -> Any:
    """The same in Python's own types; ValueError, saying where, for what a record may not hold."""
    value = value.tolist() if hasattr(value, "tolist") else value  # of NumPy or JAX
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    fine = math.isfinite(value) if isinstance(value, float) else isinstance(value, str | int | None)
    if not fine or (isinstance(value, str) and Path(value).is_absolute()):
        raise ValueError(f"{where} is {value!r}: no NaN, infinity, object or path of this machine.")
    return value


def _check_curve(name: str, curve: dict[str, list]) -> None:
    lengths = {column: len(values) for column, values in curve.items()}
    examples = bool({"sample_grads", "epochs", "budget_epochs"} & curve.keys())
    costs = {examples, "flops" in curve, "seconds" in curve}
    if len(costs) > 1 or len(set(lengths.values())) > 1:
        raise ValueError(f"{name!r} needs equally long sample_grads, flops and seconds: {lengths}.")


def _dumps(value: Any, indent: str = "") -> str:
    """JSON with one line per list: a diff shows which curve changed, and a file stays readable."""
    items = value.items() if isinstance(value, dict) else ()
    rows = [f"{indent}  {json.dumps(key)}: {_dumps(item, indent + '  ')}" for key, item in items]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}" if rows else json.dumps(value)
