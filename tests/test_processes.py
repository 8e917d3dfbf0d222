"""Two processes with two CPU devices each, over gloo: they get what one device gets, and none waits for a dead one."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent

SOLVE = """if True:
    import json, sys
    import jax
    jax.config.update("jax_enable_x64", True)
    if sys.argv[1:]:
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=20)
    from test_oracles import LBFGS, MLP, GaussNewton, Growth, fit

    def loss(solver, driver):
        return fit(MLP, solver, 20, growth=Growth(1, 2), driver=driver, block_size=32).loss

    form = GaussNewton(linear_solve="dense")
    print(json.dumps([loss(solver, driver) for solver in (LBFGS(), form) for driver in ("host", "compiled")]))
"""

DIE = """if True:
    import os, sys
    import jax
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=20)
    from test_oracles import LBFGS, MLP, fit

    def die(progress):
        if progress.step >= 5 and sys.argv[2] == "1":
            os._exit(0)

    try:
        fit(MLP, LBFGS(), 1000, l2=0.0, callback=die, driver=sys.argv[3])
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(3)  # jax itself would wait for the dead one until its heartbeat is missed
"""


STOP = """if True:
    import json, sys
    import jax
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=20)
    from test_oracles import LBFGS, MLP, fit
    from subsetopt import finetune

    own = int(sys.argv[2])
    stop = lambda progress: own == 1 and progress.step >= 3
    result = fit(MLP, LBFGS(), 20, callback=stop, driver="host", checkpoint=f"{sys.argv[3]}/all")
    options = {"batch_size": 64, "callback": stop, "progress": False, "checkpoint": f"{sys.argv[3]}/tuned"}
    tuned = finetune(MLP.apply, (MLP.x, MLP.y), result.params, epochs=3, **options)
    try:  # one has a run to go on with, the other has none
        fit(MLP, LBFGS(), 20, driver="host", checkpoint=f"{sys.argv[3]}/{['all', 'none'][own]}")
        found = "no error"
    except ValueError as error:
        found = str(error)
    told = [(run.status.name, run.n_steps, run.loss) for run in (result, tuned)]
    print(json.dumps([*told, found]))
"""


TOGETHER = """if True:
    import json, os, signal, sys
    import jax
    jax.config.update("jax_enable_x64", True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    own = int(sys.argv[2])
    jax.distributed.initialize(sys.argv[1], 2, own, heartbeat_timeout_seconds=20)
    from test_oracles import LBFGS, MLP, GaussNewton, Growth, fit

    seen = []
    log = seen.append if own == 0 else None  # as who wants one line a step does
    told = [fit(MLP, LBFGS(), 3, driver="host", callback=log).n_steps, len(seen) if own == 0 else 3]

    def press(progress):
        if own == 1 and progress.step == 3:
            signal.raise_signal(signal.SIGINT)

    def interrupt(progress):
        if own == 1 and progress.step == 3:
            raise KeyboardInterrupt

    form = GaussNewton(linear_solve="dense")
    runs = (LBFGS(), Growth(1, 2), press), (form, Growth(1, 2, nested=False), press), (LBFGS(), Growth(1, 2), interrupt)
    for solver, growth, callback in runs:
        stopped = fit(MLP, solver, 6, driver="host", growth=growth, until=2, callback=callback)
        told += [stopped.status.name, stopped.n_steps, stopped.loss]

    def message(**options):
        try:
            fit(MLP, LBFGS(), 2, driver="host", **options)
        except (ValueError, KeyError, RuntimeError) as error:
            return str(error)

    told += [message(seed=own)[:22], message(devices=jax.devices())[:39]]
    folder = f"{sys.argv[3]}/{own}"
    alone = fit(MLP, LBFGS(), 2, driver="host", devices=jax.local_devices(), checkpoint=folder)
    told += [alone.n_steps, len(os.listdir(folder))]

    def fail(progress):
        if own == 1:
            raise KeyError("mine")

    print(json.dumps([*told, message(callback=fail)]))
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def finished(process: subprocess.Popen, timeout: float = 400) -> str:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, out + err
    return out.splitlines()[-1]


def test_two_processes_get_the_result_of_one_device():
    where = address()
    both = [start(SOLVE, where, str(number)) for number in range(2)]
    first, second = (json.loads(finished(process)) for process in both)
    alone = json.loads(finished(start(SOLVE.replace("driver=driver", "driver=driver, devices=jax.devices()[:1]"))))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, alone, rtol=1e-9)


def test_two_processes_stop_together_and_go_on_together(tmp_path: Path):
    where = address()
    both = [start(STOP, where, str(number), str(tmp_path)) for number in range(2)]
    first, second = (json.loads(finished(process)) for process in both)
    assert first == second
    assert [run[:2] for run in first[:2]] == [["STOPPED", 3], ["STOPPED", 3]]
    assert "checkpoint must hold the same run for every process, found steps [3, 0]" in first[2]


def test_none_of_two_processes_waits_for_one_that_was_told_something_else(tmp_path: Path):
    where = address()
    both = [start(TOGETHER, where, str(number), str(tmp_path)) for number in range(2)]
    (*first, lost), (*second, failed) = (json.loads(finished(process, 200)) for process in both)
    assert first == second
    assert first[:4] == [3, 3, "STOPPED", 3]
    assert first[5:7] == ["STOPPED", 3]
    assert first[8:10] == ["STOPPED", 3]
    assert first[11:] == ["data must be the same,", "devices must be devices of this process", 2, 1]
    assert "Process 0 lost another process of this fit" in lost
    assert "mine" in failed


@pytest.mark.parametrize("driver", ["host", "compiled"])
def test_a_process_that_dies_makes_the_other_fail_with_a_clear_error(driver: str):
    where = address()
    survivor, victim = (start(DIE, where, str(number), driver) for number in range(2))
    victim.communicate(timeout=100)
    died = time.monotonic()
    out, err = survivor.communicate(timeout=60)
    assert time.monotonic() - died < 60
    assert survivor.returncode == 3, out + err
    assert "Process 0 lost another process of this fit" in out
