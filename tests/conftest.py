import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before jax starts: one CPU device. A test that wants several starts a process of its own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers share the cores: threads that wait for each other make small factorisations 100 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the time goes into compiling: without LLVM's optimisations a small fit takes two thirds of it, without the
# newer of XLA's two code generators two thirds again.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import hypothesis
import jax
import pytest
import tyro

ROOT = Path(__file__).parents[1]

# Silent broadcasting and silent promotion are how wrong numbers get through.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples in every run, and no deadline: the first one pays for compilation.
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("seeded")


@pytest.fixture
def smoke(tmp_path: Path) -> Callable[[Any], tuple[Callable[..., str], Path]]:
    """For an experiment: its command, on smoke parts in a folder of the test's, gives what it prints; and the folder.

    In this process, whose tests compile the same programs.
    """

    def of(experiment: Any) -> tuple[Callable[..., str], Path]:
        def command(*arguments: str) -> str:
            folders = ("--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"))
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                experiment.main(tyro.cli(experiment.Arguments, args=[*arguments, "--smoke", *folders]))
            return printed.getvalue()

        return command, tmp_path

    return of


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs Python anew, warnings being errors, with so many CPU devices; what it printed."""

    def run(*args: str | Path, devices: int = 1, cwd: Path = ROOT, timeout: float = 300, flags: str = "") -> str:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} {flags}"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
        command = [sys.executable, "-W", "error", *map(str, args)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
