"""Seconds, with the compiler's share apart."""

import time

import jax

_compiling = {"seconds": 0.0, "programs": 0}


def _listen(event: str, duration_secs: float, **_: object) -> None:
    if event.startswith("/jax/core/compile/"):
        _compiling["seconds"] += duration_secs
        _compiling["programs"] += event.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(_listen)


class Stopwatch:
    """Seconds since its making (plus `before`, of an interrupted run), and those in which JAX traced and compiled."""

    def __init__(self, before: float = 0.0, compiled_before: float = 0.0):
        self._start, self._compiled = (time.perf_counter() - before, _compiling["seconds"] - compiled_before)

    @property
    def compile_seconds(self) -> float:
        """Seconds spent tracing and compiling."""
        return _compiling["seconds"] - self._compiled

    @property
    def seconds(self) -> float:
        """Seconds of everything else."""
        return time.perf_counter() - self._start - self.compile_seconds


def compiled_programs() -> int:
    """Programs that XLA has compiled in this process so far."""
    return _compiling["programs"]
