"""finetune as a user meets it: optimizers, early stopping, masks, resuming."""

import sys
from typing import Any

import jax
import numpy as np
import optax
import pytest

from subsetopt import Status, finetune
from subsetopt.timing import compiled_programs
from tests.test_fit import Net, assert_same_params, data, leaves  # noqa: F401

QUIET: dict[str, Any] = {"progress": False}
DRIVERS = ["host", "compiled"]


def network(params: Any, x: jax.Array) -> Any:
    return Net().apply({"params": params}, x)


@pytest.fixture
def params(data):  # noqa: F811
    return Net().init(jax.random.key(0), data[0][:1])["params"]


def test_result_reports_the_full_training_loss_and_every_gradient(data, params):  # noqa: F811
    result = finetune(Net(), data, params, epochs=3, batch_size=64, **QUIET)
    logits: Any = Net().apply({"params": result.params}, data[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data[1])
    assert result.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert result.sample_grads == 3 * 300
    assert result.n_steps == 3 * 5
    assert (result.status, result.epochs) == (Status.MAX_STEPS, 3)
    assert {len(column) for column in result.history.values()} == {3}
    assert result.message in str(result)


def test_one_epoch_of_full_batches_is_plain_gradient_descent(data, params):  # noqa: F811
    def mean_loss(p):
        logits: Any = Net().apply({"params": p}, data[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()

    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(mean_loss)(params))
    result = finetune(Net(), data, params, optimizer=optax.sgd(0.5), epochs=1, batch_size=300, **QUIET)
    assert_same_params(result.params, expected, rtol=1e-4, atol=1e-6)


def test_callback_has_a_tree_of_its_own(data, params):  # noqa: F811
    whole = finetune(Net(), data, params, epochs=2, **QUIET)
    emptied = finetune(Net(), data, params, epochs=2, callback=lambda p: p.params.clear(), **QUIET)
    assert_same_params(emptied.params, whole.params)


def test_validation_loss_that_is_not_finite_keeps_what_was_trained(data, params):  # noqa: F811
    def apply(p, x):
        return jax.numpy.where(x[:, :1] > 50, jax.numpy.nan, network(p, x))

    x, y = data
    validation = np.full_like(x[:20], 100), y[:20]
    plain = finetune(apply, data, params, epochs=2, **QUIET)
    result = finetune(apply, data, params, epochs=2, validation=validation, **QUIET)
    assert_same_params(result.params, plain.params)
    assert str(result.validation_loss) == "nan"


def test_equal_calls_without_an_optimizer_compile_nothing_twice(data, params):  # noqa: F811
    finetune(Net(), data, params, epochs=1, **QUIET)
    before = compiled_programs()
    finetune(Net(), data, params, epochs=1, **QUIET)
    assert compiled_programs() == before


def test_optimizer_may_have_numbers_of_another_precision(data, params):  # noqa: F811
    with jax.enable_x64(True):
        optimizer = optax.adamw(np.float64(1e-2))
        result = finetune(Net(), data, params, optimizer=optimizer, epochs=1, **QUIET)
    assert {leaf.dtype for leaf in leaves(result.params)} == {np.dtype(np.float32)}


def test_last_smaller_batch_counts_as_a_mean_over_its_own_examples(data, params):  # noqa: F811
    small = (data[0][:3], data[1][:3])
    a = finetune(Net(), small, params, optimizer=optax.sgd(0.1), epochs=1, batch_size=3, **QUIET)
    b = finetune(Net(), small, params, optimizer=optax.sgd(0.1), epochs=1, batch_size=8, **QUIET)
    assert_same_params(a.params, b.params, rtol=1e-5, atol=1e-7)


def test_best_parameters_on_validation_data_are_kept_and_patience_ends(data, params):  # noqa: F811
    x, y = data
    held_out = (x[200:], y[200:])
    seen = []
    result = finetune(
        Net(), (x[:40], y[:40]), params, optimizer=optax.adam(0.1), epochs=200, batch_size=40, validation=held_out,
        patience=5, callback=seen.append, **QUIET,
    )  # fmt: skip
    curve = result.history["validation_loss"]
    best = int(np.argmin(curve))
    assert result.status == Status.CONVERGED
    assert result.validation_loss == curve[best] == min(curve)
    assert len(curve) == best + 1 + 5
    assert_same_params(result.params, seen[best].params, rtol=0)
    assert result.sample_grads == pytest.approx(len(curve) * (40 + 100 / 3))


def test_frozen_parameters_do_not_move(data, params):  # noqa: F811
    trainable = {"Dense_0": {"kernel": False, "bias": False}, "Dense_1": {"kernel": True, "bias": True}}
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    result = finetune(Net(), data, params, optimizer=optimizer, epochs=2, trainable=trainable, **QUIET)
    assert_same_params(result.params["Dense_0"], params["Dense_0"], rtol=0)
    assert all((a != b).any() for a, b in zip(leaves(result.params["Dense_1"]), leaves(params["Dense_1"]), strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_drivers_take_the_same_steps(data, params, dtype):  # noqa: F811
    """With a mask, a last batch that is smaller, and validation data."""
    with jax.enable_x64(dtype == np.float64):
        x, start = data[0].astype(dtype), jax.tree.map(lambda p: np.asarray(p, dtype), params)
        kept = np.random.default_rng(0).random((5, 6)) < 0.7
        trainable = {"Dense_0": {"kernel": kept, "bias": False}, "Dense_1": {"kernel": True, "bias": True}}
        options: dict[str, Any] = {"epochs": 3, "batch_size": 64, "trainable": trainable, **QUIET}
        options |= {"optimizer": optax.adamw(1e-2), "validation": (x[:50], data[1][:50])}
        host, compiled = (finetune(network, (x, data[1]), start, driver=driver, **options) for driver in DRIVERS)
    tolerance = 100 * float(np.finfo(dtype).eps)
    assert_same_params(host.params, compiled.params, rtol=tolerance, atol=tolerance)
    assert_same_params(compiled.params["Dense_0"]["bias"], params["Dense_0"]["bias"], rtol=0)
    assert (host.status, host.n_steps, host.sample_grads) == (compiled.status, compiled.n_steps, compiled.sample_grads)
    for column in host.history.keys() - {"seconds"}:
        assert host.history[column] == pytest.approx(compiled.history[column], rel=tolerance)


def test_equal_compiled_runs_compile_once(data, params):  # noqa: F811
    optimizer = optax.adam(1e-2)

    def run(seed: int) -> None:
        finetune(Net(), data, params, optimizer=optimizer, epochs=2, seed=seed, driver="compiled", **QUIET)

    run(0)
    before = compiled_programs()
    run(1)
    assert compiled_programs() == before


@pytest.mark.parametrize("wanted", [optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9), optax.adafactor(1e-2)])
def test_compiled_epochs_carry_any_state_of_an_optimizer(data, params, wanted):  # noqa: F811
    options: dict[str, Any] = {"optimizer": optax.MultiSteps(wanted, 2), "epochs": 2, **QUIET}
    host, compiled = (finetune(Net(), data, params, driver=driver, **options) for driver in DRIVERS)
    assert_same_params(host.params, compiled.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [DRIVERS, DRIVERS[::-1]])
def test_run_of_one_driver_is_resumed_by_the_other(tmp_path, data, params, first, second):  # noqa: F811
    options: dict[str, Any] = {"optimizer": optax.adam(1e-2), "epochs": 4, **QUIET}
    whole = finetune(Net(), data, params, **options)
    finetune(Net(), data, params, driver=first, checkpoint=tmp_path, callback=lambda p: p.step == 6, **options)
    resumed = finetune(Net(), data, params, driver=second, checkpoint=tmp_path, **options)
    assert (resumed.epochs, resumed.n_steps, resumed.sample_grads) == (4, 12, whole.sample_grads)
    assert resumed.history["loss"] == pytest.approx(whole.history["loss"], rel=1e-5)
    assert_same_params(whole.params, resumed.params, rtol=1e-4, atol=1e-5)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, data, params):  # noqa: F811
    options = {"optimizer": optax.adam(1e-2), "epochs": 6, "validation": data, **QUIET}
    whole = finetune(Net(), data, params, **options)
    first = finetune(Net(), data, params, checkpoint=tmp_path, callback=lambda p: p.step == 6, **options)
    assert (first.status, first.epochs) == (Status.STOPPED, 2)
    resumed = finetune(Net(), data, params, checkpoint=tmp_path, **options)
    assert_same_params(whole.params, resumed.params, rtol=0)
    assert whole.history["loss"] == resumed.history["loss"]
    assert resumed.sample_grads == whole.sample_grads


@pytest.mark.parametrize("driver", DRIVERS)
def test_keyboard_interrupt_keeps_the_finished_epochs(data, params, driver):  # noqa: F811
    def interrupt(progress):
        if progress.step >= 6:
            raise KeyboardInterrupt

    result = finetune(Net(), data, params, epochs=9, callback=interrupt, driver=driver, **QUIET)
    assert (result.status, result.epochs) == (Status.STOPPED, 2)


def test_ctrl_c_while_the_last_loss_is_measured_loses_that_alone(data, params, monkeypatch):  # noqa: F811
    module, whole = sys.modules["subsetopt.finetune"], finetune(Net(), data, params, epochs=2, **QUIET)

    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_mean_loss", pressed)
    result = finetune(Net(), data, params, epochs=2, **QUIET)
    assert (result.status, result.epochs) == (Status.STOPPED, 2)
    assert np.isnan(result.loss)
    assert_same_params(whole.params, result.params, rtol=0)
    # Before a first epoch was validated, nothing is known of it.
    first = finetune(Net(), data, params, epochs=2, validation=data, **QUIET)
    assert (first.status, first.epochs, first.validation_loss) == (Status.STOPPED, 0, None)


@pytest.mark.parametrize("driver", DRIVERS)
def test_diverging_run_keeps_the_last_finite_parameters(data, params, driver):  # noqa: F811
    result = finetune(Net(), data, params, optimizer=optax.sgd(3e38), epochs=5, driver=driver, **QUIET)
    assert result.status == Status.NONFINITE
    assert all(np.isfinite(leaf).all() for leaf in leaves(result.params))


def test_run_ended_by_patience_is_read_back_and_goes_on_with_more(tmp_path, data, params):  # noqa: F811
    options: dict[str, Any] = {"optimizer": optax.sgd(3.0), "epochs": 40, "batch_size": 16, "validation": data, **QUIET}
    whole = finetune(Net(), data, params, patience=6, **options)
    first, second = (finetune(Net(), data, params, patience=2, checkpoint=tmp_path, **options) for _ in range(2))
    assert first.status == second.status == Status.CONVERGED
    assert first.epochs == second.epochs < whole.epochs
    resumed = finetune(Net(), data, params, patience=6, checkpoint=tmp_path, **options)
    assert resumed.history["loss"] == whole.history["loss"]
    assert_same_params(whole.params, resumed.params, rtol=0)


def test_run_with_more_epochs_goes_on(tmp_path, data, params):  # noqa: F811
    options: dict[str, Any] = {"optimizer": optax.adam(1e-2), **QUIET}
    whole = finetune(Net(), data, params, epochs=5, **options)
    for epochs in (2, 5):
        resumed = finetune(Net(), data, params, epochs=epochs, checkpoint=tmp_path, **options)
    assert resumed.history["loss"] == whole.history["loss"]
    assert_same_params(whole.params, resumed.params, rtol=0)


def test_diverged_run_is_read_back_as_it_is(tmp_path, data, params):  # noqa: F811
    options: dict[str, Any] = {"optimizer": optax.sgd(3e38), "epochs": 5, "checkpoint": tmp_path, **QUIET}
    first, second = (finetune(Net(), data, params, **options) for _ in range(2))
    assert first.status == second.status == Status.NONFINITE
    assert (first.epochs, first.sample_grads) == (second.epochs, second.sample_grads)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": optax.sgd(1e-2)}, "lengths of the first updates"),
        ({"optimizer": optax.adam(1e-3)}, "lengths of the first updates"),
        ({"optimizer": optax.adam(1e-2, b1=0.5)}, "lengths of the first updates"),
        ({"optimizer": optax.adam(1e-2, eps=1e-4)}, "lengths of the first updates"),
        ({"optimizer": optax.adamw(1e-2)}, "lengths of the first updates"),
        ({"optimizer": optax.chain(optax.adam(1e-2), optax.trace(0.0))}, "arrays"),
        ({"validation": True}, "validation"),
        ({"batch_size": 32}, "batch_size = 32, found 128"),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, data, params, change, said):  # noqa: F811
    def run(validation=False, **changes):
        options: dict[str, Any] = {"optimizer": optax.adam(1e-2), "epochs": 2, "checkpoint": tmp_path, **QUIET}
        finetune(Net(), data, params, validation=data if validation else None, **options | changes)

    run()
    with pytest.raises(ValueError, match=f"checkpoint must hold .*{said}"):
        run(**change)
