"""What experiments share: measuring a model, pricing a run, and the Adam baseline that a claim is held against."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.records import flops
from subsetopt import FinetuneResult, FitResult, GaussNewton, Growth, finetune, fit_subset

Arrays = tuple[np.ndarray, np.ndarray]
CLASSES = 10  # of every data set here
WHOLE = Growth(start=1e9)  # a first ratio that no set reaches: one stage, the whole set
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sgd": functools.partial(optax.sgd, momentum=0.9),
}


def fit_whole(model: Any, data: Any, solver: Any, params: Any = None, **options: Any) -> FitResult:
    """A fit of the whole set in one stage, from the start and to the end."""
    options = {"growth": WHOLE, "until": "converged", "warmup_epochs": 0, "progress": False} | options
    return fit_subset(model, data, params, solver=solver, **options)


@functools.partial(jax.jit, static_argnums=0)
def _block_sums(model: nn.Module, params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits: Any = model.apply({"params": params}, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.sum(losses), jnp.sum(jnp.argmax(logits, axis=-1) == y)


def loss_and_accuracy(model: nn.Module, params: Any, data: Arrays, block: int = 500) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers; never part of a run's cost."""
    x, y = data
    sums = [_block_sums(model, params, x[i : i + block], y[i : i + block]) for i in range(0, len(x), block)]
    loss, right = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
    return float(loss / len(x)), float(right / len(x))


@functools.cache
def gradient_flops(model: nn.Module, shape: tuple[int, ...], block: int = 128) -> float:
    """Floating-point operations of the loss and gradient of one example, from the compiled program."""
    x, y = np.zeros((block, *shape), np.float32), np.zeros(block, np.int32)
    params = model.init(jax.random.key(0), x[:1])["params"]

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, x)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    return flops(jax.value_and_grad(loss), params, x, y) / block


def linear_algebra_flops(solver: Any, parameters: int, examples: Sequence[int]) -> np.ndarray:
    """Operations up to each step, on so many examples, beside the model's own: curvature matrices, factorisations.

    By halves, for both are symmetric. The compiler's cost analysis does not see into them: they are counted by hand. Of
    the dense form, which "auto" takes in every run of the defaults.
    """
    if not isinstance(solver, GaussNewton):
        return np.zeros(len(examples))
    rows = np.multiply(examples, CLASSES)
    if solver.curvature_ratio is not None:
        rows = np.maximum(solver.curvature_ratio * parameters, np.multiply(examples, solver.curvature_share))
    # One factorisation, and solves with it: one for its own damping, twelve for each of the others. One product with A
    # to average gradients.
    products = 1 + 12 * (len(solver.damping_factors) - 1) + (solver.gradient_averaging > 0)
    solving = parameters**3 / 3 + 2 * products * parameters**2
    return np.cumsum(rows * parameters**2 + solving)


def finite(value: float) -> float | None:
    """None for what a record cannot hold."""
    return value if math.isfinite(value) else None


def median(values: Sequence[float | None], missing: float = math.inf) -> float | None:
    """A missing value, never reached or diverged, counts as the worst there is."""
    return finite(statistics.median(missing if value is None else value for value in values))


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True)
class Price:
    """What a run on N examples costs in each of the three columns."""

    examples: int
    flops_per_grad: float

    def of(self, sample_grads: float, seconds: float, extra_flops: float = 0.0) -> dict[str, float]:
        """Epochs (sample_grads / N), floating-point operations, seconds without compiling."""
        total = sample_grads * self.flops_per_grad + extra_flops
        return {"epochs": sample_grads / self.examples, "flops": total, "seconds": seconds}


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list]:
    """Equal-long lists from rows with the same keys."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def tuned_adam(
    model: nn.Module,
    train: Arrays,
    test: Arrays,
    budgets: dict[int, tuple[float, ...]],
    price: Price,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, list]:
    """Adam at several budgets (epochs), each with a cosine decay to zero of its own, at each of its rates.

    One row a run; the best run of a budget is what the method is compared with.
    """
    rows = []
    for epochs, rates in budgets.items():
        for rate in rates:
            result = adam(model, train, None, rate, epochs, seed)
            loss, accuracy = loss_and_accuracy(model, result.params, test)
            cost = price.of(result.sample_grads, result.seconds)
            row = {"budget_epochs": epochs, "rate": rate, "full_loss": result.loss, "test_loss": loss}
            rows.append(row | {"test_accuracy": accuracy, "flops": cost["flops"], "seconds": cost["seconds"]})
            say(f"Adam, {epochs} epochs at {rate:g}: loss {result.loss:.4g}, test accuracy {accuracy:.4f}")
    return columns(rows)


def adam(
    model: nn.Module, train: Arrays, params: Any, rate: float, epochs: int, seed: int, **options: Any
) -> FinetuneResult:
    """Adam on mini-batches of 128, cosine decay from `rate` to zero over all steps."""
    return first_order(model, train, params, "adam", rate, epochs, seed, **options)


def first_order(
    model: nn.Module,
    train: Arrays,
    params: Any,
    optimizer: str,
    rate: float,
    epochs: int,
    seed: int,
    batch_size: int = 128,
    **options: Any,
) -> FinetuneResult:
    """An optimizer, by its name, on mini-batches; cosine decay from `rate` to zero over all steps."""
    transformation = _optimizer(optimizer, rate, epochs * -(-len(train[0]) // batch_size))
    options = {"optimizer": transformation, "epochs": epochs, "batch_size": batch_size, "seed": seed} | options
    return finetune(model, train, params, progress=False, **options)


@functools.lru_cache(maxsize=64)  # the same optimizer object, so that the same run compiles its step once
def _optimizer(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    return OPTIMIZERS[name](optax.cosine_decay_schedule(rate, steps))


def fit_curve(model: nn.Module, fit: FitResult, snapshots: dict[int, Any], train: Arrays, price: Price, solver: Any):
    """The history of a fit with its three costs, and the loss of the whole training set at the snapshots (by step)."""
    rows, extra = [], linear_algebra_flops(solver, count(fit.params), fit.history["examples"])
    for i, step in enumerate(fit.history["step"]):
        cost = price.of(fit.history["sample_grads"][i], fit.history["seconds"][i], float(extra[i]))
        full = loss_and_accuracy(model, snapshots[step], train)[0] if step in snapshots else None
        names = {"examples": "examples", "ratio": "ratio", "stage": "stage", "subset_loss": "loss"}
        row = {name: fit.history[key][i] for name, key in names.items()}
        rows.append(cost | row | {"probe_loss": fit.history["probe_loss"][i], "full_loss": full})
    return columns(rows)
