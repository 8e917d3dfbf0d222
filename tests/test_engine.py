"""The engine room: drivers, programs, memory-mapped data, precision."""

import functools
import itertools
import json
import platform
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problems

from subsetopt import LBFGS, GaussNewton, Growth, drivers, fit_subset, pages, problem
from subsetopt.curvature import PRECISIONS
from subsetopt.devices import Devices, cost_analysis
from subsetopt.problem import Problem, counted, make_problem, placed
from subsetopt.solve import _steps as solver_steps
from subsetopt.solve import _typed as typed
from subsetopt.timing import compiled_programs

EXAMPLES = {example.name: example for example in problems(np.float32)}
MLP = EXAMPLES["MLP"]
WHOLE = {"growth": Growth(start=1e9), "until": "converged", "warmup_epochs": 0, "progress": False}


def fit(solver: Any, data: Any = None, **options: Any) -> Any:
    options = WHOLE | {"l2": MLP.l2} | options
    return fit_subset(MLP.apply, (MLP.x, MLP.y) if data is None else data, MLP.params, solver=solver, **options)


PROGRAM = """if True:
    import json
    import jax, numpy as np
    from test_engine import MLP
    from subsetopt.devices import _loop_program
    from subsetopt.problem import make_problem, placed

    def text(function, block_size):
        data = np.tile(MLP.x, (9, 1)), np.tile(MLP.y, 9)  # more than one block of rows
        host, w = make_problem(MLP.apply, data, MLP.params, loss=MLP.loss, block_size=block_size)
        problem = placed(host, "compiled")
        devices = problem.driver.devices
        arrays = devices.replicate((problem, w))
        return _loop_program(function, devices, 2).lower((), np.arange(4), *arrays).compile().as_text()

    def evaluate(static, problem, w):
        return problem.evaluate(w, uncertain=True)

    def gram(static, problem, w):
        return problem.gram(w, problem.whole(), None)

    for program in (text(evaluate, 8), text(gram, 8), text(evaluate, 10_000)):
        main = program[program.index("ENTRY"):]
        print(json.dumps([program.count(" all-reduce("), main.count(" all-reduce("), program.count(" while(")]))
"""


def test_one_all_reduce_an_evaluation_and_none_a_block(run_python: Any, request: pytest.FixtureRequest):
    as_users_have_it = "--xla_cpu_use_fusion_emitters=true"
    lines = run_python("-c", PROGRAM, devices=4, cwd=request.path.parent, flags=as_users_have_it).splitlines()
    *by_blocks, at_once = map(json.loads, lines)
    for everywhere, outside_of_loops, loops in by_blocks:
        assert (everywhere, outside_of_loops) == (1, 1)
        assert loops >= 1  # over blocks
    assert at_once == [1, 1, 0]  # where all examples are one block


ACCELERATOR = """if True:
    import json
    from jax import lax
    lax.platform_dependent = lambda *operands, default, **others: default(*operands)
    from test_engine import FORMS, fit
    print(json.dumps([fit(solver, driver="compiled", max_steps=6).history["loss"] for solver in FORMS]))
"""
FORMS = [GaussNewton(linear_solve=form, curvature_ratio=1, tolerance=0) for form in ("dense", "sample")]


def test_what_accelerators_run_instead_gives_the_same(run_python: Any, request: pytest.FixtureRequest):
    """Here on a CPU, for which XLA compiles it as well."""
    theirs = json.loads(run_python("-c", ACCELERATOR, cwd=request.path.parent))
    ours = [fit(solver, driver="compiled", max_steps=6).history["loss"] for solver in FORMS]
    assert theirs != ours
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)


@pytest.mark.parametrize("solver", [LBFGS(), *FORMS, GaussNewton(curvature_precision="bfloat16")], ids=repr)
def test_accelerators_have_every_operation_of_a_solve(solver: Any):
    cnn = EXAMPLES["CNN"]
    problem, w = make_problem(cnn.apply, (cnn.x, cnn.y), cnn.params, loss=cnn.loss)
    problem = placed(problem, "compiled")
    steps = jax.jit(functools.partial(solver_steps, solver))
    traced = steps.trace(problem, typed(solver.init(problem, w)), np.int32(3), np.float32(0))
    assert "while" in traced.lower(lowering_platforms=("cuda", "tpu")).as_text()


ELSEWHERE = """if True:
    import jax
    from test_engine import GaussNewton, LBFGS, MLP, WHOLE, fit_subset
    first, second = jax.devices()
    params = jax.device_put(MLP.params, first)
    for solver in (LBFGS(), GaussNewton()):
        for driver in ("host", "compiled"):
            options = WHOLE | {"solver": solver, "driver": driver, "devices": [second], "max_steps": 2}
            result = fit_subset(MLP.apply, (MLP.x, MLP.y), params, **options)
            assert all(a.devices() == {second} for a in jax.tree.leaves(result.params)), driver
    print("there")
"""


def test_fit_is_on_the_device_asked_for_wherever_the_parameters_are(run_python: Any, request: pytest.FixtureRequest):
    assert run_python("-c", ELSEWHERE, devices=2, cwd=request.path.parent).strip() == "there"


class Accelerator:
    """A device with a gigabyte, or one that does not tell."""

    platform = "gpu"

    def __init__(self, tells: bool):
        self.tells = tells

    def memory_stats(self) -> dict[str, int] | None:
        return {"bytes_limit": 1 << 30} if self.tells else None


def test_a_block_takes_a_part_of_an_accelerators_memory_and_data_half_of_it():
    (first, second), secret = (Accelerator(True), Accelerator(True)), Accelerator(False)
    devices, untold = Devices((first, second), (first, second)), Devices((secret,), (secret,))
    assert devices.default_block(True, lambda: 1 << 20) == 2 * 256
    assert devices.default_block(True, lambda: 1 << 40) == 2  # never less than an example a device
    assert devices.hold(1 << 29)
    assert not devices.hold((1 << 29) + 1)
    assert untold.default_block(True, lambda: 1 << 20) == 8 * 256


def test_costs_are_counted_beyond_32_bits():
    many = np.int32(50_000)
    assert counted(many, 50_000) == counted(jnp.asarray(many), 50_000) == 2.5e9
    assert jax.jit(counted)(many, many) == np.float32(2.5e9)


def test_operations_are_counted_by_the_cpu_or_not_at_all(monkeypatch: pytest.MonkeyPatch):
    def none(backend: str) -> None:
        raise RuntimeError(f"Unknown backend: {backend}")

    assert cost_analysis(jnp.dot, MLP.x, MLP.x.T)["flops"] == pytest.approx(2 * len(MLP.x) ** 2 * MLP.x.shape[1])
    monkeypatch.setattr("jax.local_devices", none)
    with pytest.raises(ValueError, match="JAX_PLATFORMS"):
        cost_analysis(jnp.dot, MLP.x, MLP.x.T)


@pytest.mark.parametrize("solver", [GaussNewton(linear_solve="dense"), LBFGS()], ids=repr)
def test_growing_subsets_never_recompile_the_compiled_driver(solver: Any):
    def grown(growth: Growth) -> Any:
        return fit(solver, growth=growth, until=1, max_steps=8, driver="compiled")

    grown(Growth(0.5, 2))
    before = compiled_programs()
    assert len(grown(Growth(0.3, 1.5)).stages) > 4
    assert compiled_programs() == before


def test_compiled_driver_takes_many_steps_a_program():
    programs = []
    options = {"max_steps": 25, "driver": "compiled"}
    result = fit(LBFGS(tolerance=0), callback=lambda progress: programs.append(progress.step), **options)
    assert result.driver == "compiled"
    assert programs == [10, 20, 25]
    assert result.history["step"] == list(range(1, 26))
    for rising in ("seconds", "sample_grads"):
        assert np.all(np.diff(result.history[rising], prepend=0) > 0)
    early = fit(LBFGS(tolerance=0), target_loss=result.history["loss"][13], **options)
    assert early.status.name == "TARGET_REACHED"
    assert early.history["loss"] == result.history["loss"][:14]


def test_examples_of_a_subset_are_picked_once_and_those_of_the_whole_set_stay_where_they_are():
    def problem_of(block_size: int) -> tuple[Problem, Any]:
        host, w = make_problem(MLP.apply, (MLP.x, MLP.y), MLP.params, loss=MLP.loss, block_size=block_size)
        return placed(host, "compiled"), w

    def picked(problem: Problem, w: Any) -> int:
        lowered = jax.jit(three_evaluations).lower(problem, w).as_text()
        shape = "x".join(map(str, (problem.block_size, *MLP.x.shape[1:])))
        return len(re.findall(rf"stablehlo\.gather.*-> tensor<{shape}xf32>", lowered))

    def three_evaluations(problem: Problem, w: Any) -> Any:
        return [problem.evaluate(factor * w) for factor in (1, 2, 3)]

    problem, w = problem_of(len(MLP.x))
    subset = problem.on(np.arange(7, 60))
    assert problem.fetch().fetched[0] is problem.x
    np.testing.assert_array_equal(subset.fetch().fetched[0][:53], MLP.x[7:60])
    assert picked(problem.fetch(), w) == picked(subset.fetch(), w) == 0
    assert picked(problem_of(len(MLP.x) // 2)[0].fetch(), w) == 3  # no block holds them
    assert subset.fetch().on(np.arange(5)).fetched is None


@pytest.mark.parametrize("solver", [GaussNewton(), LBFGS()], ids=repr)
def test_memory_mapped_data_are_like_any_other(tmp_path: Path, solver: Any):
    np.save(tmp_path / "x.npy", MLP.x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    growth = Growth(0.5, 2, nested=isinstance(solver, LBFGS))
    options = {"growth": growth, "until": 3, "max_steps": 6, "block_size": 16}
    plain, streamed = fit(solver, driver="host", **options), fit(solver, (mapped, MLP.y), **options)
    np.testing.assert_array_equal(streamed.history["loss"], plain.history["loss"])
    assert streamed.driver == "host"


def misaligned(values: np.ndarray) -> np.ndarray:
    """A copy that begins 4 bytes past where JAX could read it in place."""
    memory = np.empty(values.nbytes + 68, np.uint8)
    start = -memory.ctypes.data % 64 + 4
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def test_small_data_are_held_where_jax_reads_them_and_large_ones_not_twice(monkeypatch: pytest.MonkeyPatch):
    def held(x: np.ndarray) -> np.ndarray:
        return make_problem(MLP.apply, (x, MLP.y), MLP.params, loss=MLP.loss)[0].x

    x = misaligned(MLP.x)
    small = held(x)
    assert small.ctypes.data % 64 == 0
    np.testing.assert_array_equal(small, MLP.x)
    assert held(small) is small
    monkeypatch.setattr(problem, "_SMALL", 0)
    assert held(x) is x


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, bool, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 5), (7, 0)])
def test_gathered_rows_are_those_of_an_index(dtype: Any, shape: tuple[int, ...]):
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    indices = np.array([6, 0, 0, 3])
    for whole in (values, np.asfortranarray(values), values[::-1]):
        rows = pages.gathered(whole, indices)
        assert rows.dtype == whole.dtype
        assert rows.size == 0 or rows.ctypes.data % 64 == 0
        np.testing.assert_array_equal(rows, whole[indices])
        np.testing.assert_array_equal(pages.aligned(whole), whole)


TRIM = """if True:
    import resource
    from pathlib import Path
    from subsetopt import pages

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    arrays = [bytearray(10_000) for _ in range(10_000)]  # 100 MB
    full, last = resident(), arrays.pop()
    arrays.clear()
    freed = resident()  # glibc gives back what lies above the last array alone
    pages.trim()
    print(full, freed, resident(), len(last))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_freed_memory_goes_back(run_python: Any):
    full, freed, trimmed, _ = map(int, run_python("-c", TRIM).split())
    assert full - freed < 10e6
    assert full - trimmed > 90e6


def test_memory_of_a_draw_goes_back_where_examples_are_many(monkeypatch: pytest.MonkeyPatch):
    trims = []
    monkeypatch.setattr(drivers, "trim", lambda: trims.append(1))
    options = {"growth": Growth(8, 2), "until": 2, "max_steps": 2, "block_size": 16}
    few, none = fit(GaussNewton(), **options), len(trims)
    monkeypatch.setattr(drivers, "_MANY", len(MLP.x))
    many = fit(GaussNewton(), **options)
    np.testing.assert_array_equal(many.history["loss"], few.history["loss"])
    assert none == 0 < len(trims)


@pytest.mark.parametrize(
    ("solver", "copies", "driver"), [(LBFGS(), 1, "compiled"), (LBFGS(), 20_000, "host"), (GaussNewton(), 1, "host")]
)
def test_driver_of_a_cpu_is_compiled_where_calls_would_be_most_of_a_step(solver: Any, copies: int, driver: str):
    x, y = (np.tile(a, (copies, *[1] * (a.ndim - 1))) for a in (MLP.x, MLP.y))
    assert (x.nbytes + y.nbytes > 1 << 26) == (copies > 1)
    problem, _ = make_problem(MLP.apply, (x, y), MLP.params, loss=MLP.loss)
    assert placed(problem, "auto", solver.check_every).driver.name == driver
    if copies == 1:  # a fit of 1.3 million examples would take a minute
        assert fit(solver, (x, y), max_steps=1).driver == driver


@pytest.mark.parametrize("kernel", ["gram", "product", "evaluate"])
def test_host_driver_is_few_blocks_ahead_of_the_device(kernel: str, monkeypatch: pytest.MonkeyPatch):
    """Whatever a block gives back: else more and more data would wait on the device."""
    x = np.ones((40 * 64, 256), np.float32)
    model = lambda w, x: jnp.tanh(x @ w.reshape(256, 2))  # noqa: E731
    problem, w = make_problem(model, (x, x[:, :2]), np.zeros(512, np.float32), loss="squared_error", block_size=64)
    begun, unfinished, run = [], [], Devices.run

    def watched(*arguments: Any) -> Any:
        unfinished.append(sum(not done.is_ready() for done in begun))
        made = run(*arguments)
        begun.append(made[-1])
        return made

    monkeypatch.setattr(Devices, "run", watched)
    sample = problem.whole()
    if kernel == "gram":
        problem.gram(w, sample, np.ones((len(x), 2), np.float32), least=64)
    elif kernel == "product":
        problem.product(w, w, sample)
    else:
        problem.evaluate(w)
    assert len(begun) > 20
    assert max(unfinished) <= 2


def test_driver_of_a_cpu_is_host_where_the_network_convolves():
    cnn = EXAMPLES["CNN"]
    options = WHOLE | {"solver": LBFGS(), "max_steps": 1}
    assert fit_subset(cnn.apply, (cnn.x, cnn.y), cnn.params, **options).driver == "host"


@pytest.mark.parametrize(("linear_solve", "rounding"), [("dense", 1e-6), ("sample", 5e-6), ("cg", 1e-4)])
def test_blocks_change_float32_losses_by_rounding_only(linear_solve: str, rounding: float):
    """After twenty steps; conjugate gradients whose residuals are not kept orthogonal are off by 3e-3."""
    solver = GaussNewton(linear_solve=linear_solve, tolerance=0)
    losses = [fit(solver, max_steps=20, block_size=size).loss for size in (7, 16, 64)]
    np.testing.assert_allclose(losses, losses[0], rtol=rounding)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_of_the_curvature_serves(precision: str):
    result = fit(GaussNewton(curvature_precision=precision), driver="host", max_steps=3)
    assert result.precision["curvature"] == precision
    assert result.history["loss"][-1] < result.history["loss"][0]


@pytest.mark.parametrize("linear_solve", ["dense", "sample", "cg"])
def test_curvature_may_be_coarse_and_the_result_says_so(linear_solve: str):
    solver = GaussNewton(linear_solve=linear_solve, curvature_precision="bfloat16")
    result = fit(solver, max_steps=5)
    assert result.precision == {"dtype": "float32", "matmul": "highest", "curvature": "bfloat16"}
    assert result.loss < 0.5


# 2^-50: at 2^-60 the matrix of a fit that has all but ended adds up numbers below 1e-38, which some CPUs take for zero.
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-50])
@pytest.mark.parametrize(
    "solver",
    [LBFGS(), GaussNewton(curvature_ratio=None, damping=0, momenta=(0.0,), length_factor=1.0)],
    ids=["LBFGS", "undamped at first, so that steps are rejected"],
)
def test_tiny_losses_take_the_same_steps_in_float32(solver: Any, scale: float):
    def losses(scale: float) -> np.ndarray:
        def scaled(outputs: Any, y: Any) -> Any:
            return scale * jnp.sum((outputs - jnp.eye(4, dtype=outputs.dtype)[y]) ** 2, axis=1)

        options = {"loss": scaled, "solver": solver, "max_steps": 60} | WHOLE
        return np.array(fit_subset(MLP.apply, (MLP.x, MLP.y), MLP.params, **options).history["loss"]) / scale

    # Not 1, which XLA leaves out of the program; on some CPUs the rest is rounded in another order then.
    small, ours = losses(scale), losses(2.0**-10)
    rejected = sum(a == b for a, b in itertools.pairwise(ours))
    assert isinstance(solver, LBFGS) or rejected > 2
    np.testing.assert_array_equal(small, ours)


@pytest.mark.parametrize("driver", ["host", "compiled"])
def test_a_momentum_of_zero_among_others_changes_nothing_of_the_classical_method(driver: str):
    """Where steps are rejected, too: momentum is added to the picked step there, and none is no more."""

    def history(*momenta: float) -> list[float]:
        solver = GaussNewton(curvature_ratio=None, damping=0, momenta=momenta)
        return fit(solver, driver=driver, max_steps=30).history["loss"]

    losses = history(0.3, 0.6)
    assert losses == history(0.0, 0.6, 0.3)
    assert losses != history(0.0)
    assert any(a == b for a, b in itertools.pairwise(losses))
