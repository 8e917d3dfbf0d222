"""finetune as a user meets it: optimizers, early stopping, masks, resuming."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from subsetopt import Status, finetune
from tests.test_fit import Net, assert_same_params, data, leaves  # noqa: F401

QUIET: dict[str, Any] = {"progress": False}


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


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, data, params):  # noqa: F811
    options = {"optimizer": optax.adam(1e-2), "epochs": 6, "validation": data, **QUIET}
    whole = finetune(Net(), data, params, **options)
    first = finetune(Net(), data, params, checkpoint=tmp_path, callback=lambda p: p.step == 6, **options)
    assert (first.status, first.epochs) == (Status.STOPPED, 2)
    resumed = finetune(Net(), data, params, checkpoint=tmp_path, **options)
    assert_same_params(whole.params, resumed.params, rtol=0)
    assert whole.history["loss"] == resumed.history["loss"]
    assert resumed.sample_grads == whole.sample_grads


def test_keyboard_interrupt_keeps_the_finished_epochs(data, params):  # noqa: F811
    def interrupt(progress):
        if progress.step >= 6:
            raise KeyboardInterrupt

    result = finetune(Net(), data, params, epochs=9, callback=interrupt, **QUIET)
    assert (result.status, result.epochs) == (Status.STOPPED, 2)


def test_diverging_run_keeps_the_last_finite_parameters(data, params):  # noqa: F811
    result = finetune(Net(), data, params, optimizer=optax.sgd(3e38), epochs=5, **QUIET)
    assert result.status == Status.NONFINITE
    assert all(np.isfinite(leaf).all() for leaf in leaves(result.params))
