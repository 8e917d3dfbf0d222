import copy
import json
import math
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import records

Patch = pytest.MonkeyPatch
CURVES = {
    "gauss_newton": {
        "sample_grads": [1797.0, 3594.0],
        "flops": [1e9, 2e9],
        "seconds": [0.5, 1.25],
        "loss": [0.1 + 0.2, 1e-300],
        "probe_loss": [0.5, None],
    }
}


@pytest.fixture
def record() -> dict:
    config = {"dataset": "digits", "rates": (1e-3, 3e-3), "nested": True}
    return records.new("demo", "digits", config, copy.deepcopy(CURVES), {"loss": 0.25})


def test_what_is_written_is_read_back_exactly(record: dict, tmp_path: Path):
    path = records.write(record, tmp_path)
    assert path == tmp_path / "demo" / "digits.json"
    assert records.read(path) == record | {"config": record["config"] | {"rates": [1e-3, 3e-3]}}


def test_record_exists_once_it_is_written(record: dict, tmp_path: Path):
    assert not records.exists("demo", "digits", tmp_path)
    records.write(record, tmp_path)
    assert records.exists("demo", "digits", tmp_path)


def test_arrays_become_plain_numbers(record: dict, tmp_path: Path):
    record["final"] = {"loss": np.float32(0.5), "steps": np.int64(3), "best": jnp.arange(2.0)}
    path = records.write(record, tmp_path)
    assert records.read(path)["final"] == {"loss": 0.5, "steps": 3, "best": [0.0, 1.0]}


def test_each_list_stands_on_one_line(record: dict, tmp_path: Path):
    lines = records.write(record, tmp_path).read_text().splitlines()
    assert '      "seconds": [0.5, 1.25],' in lines


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), jnp.array([-jnp.inf])])
def test_nan_and_infinity_are_refused_and_located(record: dict, tmp_path: Path, value: object):
    record["curves"]["gauss_newton"]["loss"][1] = value
    with pytest.raises(ValueError, match=r"record\.curves\.gauss_newton\.loss\[1\]"):
        records.write(record, tmp_path)


@pytest.mark.parametrize("value", ["/home/someone/data", object(), {1, 2}, Path("results")])
def test_paths_of_this_machine_and_objects_are_refused(record: dict, tmp_path: Path, value: object):
    record["config"]["data"] = value
    with pytest.raises(ValueError, match=r"record\.config\.data"):
        records.write(record, tmp_path)


def test_lists_of_unequal_length_are_refused(record: dict, tmp_path: Path):
    record["curves"]["gauss_newton"]["loss"].append(0.1)
    with pytest.raises(ValueError, match="'loss': 3"):
        records.write(record, tmp_path)


@pytest.mark.parametrize("column", ["sample_grads", "flops", "seconds"])
def test_curve_without_one_of_the_three_costs_is_refused(record: dict, tmp_path: Path, column: str):
    del record["curves"]["gauss_newton"][column]
    with pytest.raises(ValueError, match="'gauss_newton' needs equally long"):
        records.write(record, tmp_path)


def test_curve_over_no_cost_needs_no_cost_columns(record: dict, tmp_path: Path):
    record["curves"] = {"theory": {"ratio": [1.0, 2.0], "gap": [1.0, 0.5]}}
    assert records.write(record, tmp_path).exists()


@pytest.mark.parametrize("name", ["../digits", "", "a b", ".hidden"])
def test_unreadable_file_names_are_refused(record: dict, tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="file name"):
        records.write(record | {"name": name}, tmp_path)


def test_refused_record_leaves_the_old_one_and_nothing_else(record: dict, tmp_path: Path):
    path = records.write(record, tmp_path)
    with pytest.raises(ValueError, match="NaN"):
        records.write(record | {"final": {"loss": math.nan}}, tmp_path)
    assert records.read(path)["final"] == {"loss": 0.25}
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_writing_keeps_the_old_record(record: dict, tmp_path: Path, monkeypatch: Patch):
    path = records.write(record, tmp_path)

    def interrupt(_: int):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        records.write(record | {"final": {"loss": 0.125}}, tmp_path)
    assert records.read(path)["final"] == {"loss": 0.25}
    assert list(path.parent.glob("*.json")) == [path]


def test_record_of_another_schema_is_not_read(tmp_path: Path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match=r"old\.json has schema 0"):
        records.read(path)


def test_environment_tells_versions_and_device_but_no_machine(record: dict):
    found = record["environment"]
    assert found["jax"] == version("jax")
    assert found["device"] == jax.devices()[0].device_kind
    assert found["precision"] in {"float32", "float64"}
    keys = "git_commit git_dirty python jax jaxlib flax numpy device devices cores precision"
    assert list(found) == keys.split()


def test_record_has_the_environments_of_its_parts(monkeypatch: Patch, tmp_path: Path):
    monkeypatch.setattr(records, "environment", lambda: {"git_commit": "a", "cores": 2})
    early = records.keep([1.0], tmp_path / "early.json", {})
    monkeypatch.setattr(records, "environment", lambda: {"git_commit": "b", "cores": 2})
    late = records.keep([2.0], tmp_path / "late.json", {})
    assert records.kept(early) == [1.0]
    assert records.new("demo", "digits", {}, {}, {}, [early])["environment"] == {"git_commit": "a", "cores": 2}
    both = records.new("demo", "digits", {}, {}, {}, [early, late, early])
    assert both["environment"] == {"git_commit": ["a", "b"], "cores": 2}


def test_part_tells_what_has_changed_but_not_what_came_in_between(tmp_path: Path):
    before = {"seeds": (0, 1), "studies": {"a": "1", "b": "2"}}
    path = records.keep([1.0], tmp_path / "part.json", before)
    assert records.changed(path, before) == []
    assert records.changed(path, before | {"studies": {"a": "1", "c": "3"}}) == []
    assert records.changed(path, {"seeds": (0,), "studies": {"a": "9"}, "new": 1}) == ["seeds", "studies", "new"]


@pytest.mark.parametrize("content", [[1.0], {"loss": 1.0}])
def test_part_kept_in_another_form_is_refused(content: object, tmp_path: Path):
    path = tmp_path / "part.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"part\.json was kept by another version of this code: give --again"):
        records.kept(path)


def test_missing_git_leaves_the_commit_open(monkeypatch: Patch):
    def missing(*_: object, **__: object):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "check_output", missing)
    found = records.environment.__wrapped__()
    assert (found["git_commit"], found["git_dirty"]) == (None, None)


def test_new_results_alone_do_not_make_the_code_dirty(tmp_path: Path, monkeypatch: Patch):
    package = tmp_path / "experiments"
    (package / "results").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.setattr(records, "RESULTS", package / "results")
    (package / "results" / "a.json").touch()
    assert records.environment.__wrapped__()["git_dirty"] is False
    (package / "new.py").touch()
    assert records.environment.__wrapped__()["git_dirty"] is True


def test_flops_of_a_matrix_product_are_two_per_multiplication():
    a, b = jnp.ones((20, 30)), jnp.ones((30, 40))
    assert records.flops(jnp.dot, a, b) == pytest.approx(2 * 20 * 30 * 40, rel=0.01)
    assert records.flops(jax.jit(jnp.dot), a, b) == records.flops(jnp.dot, a, b)
