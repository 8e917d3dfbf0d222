"""What experiments share: measuring a model, pricing a run, and the Adam baseline that a claim is held against."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.records import flops
from subsetopt import FinetuneResult, FitResult, GaussNewton, Growth, finetune, fit_subset

Arrays = tuple[np.ndarray, np.ndarray]
WHOLE = Growth(start=1e9)  # a first ratio that no set reaches: one stage, the whole set
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sgd": functools.partial(optax.sgd, momentum=0.9),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment's command takes, besides `out` and `only`."""

    results: Path = Path("out/results")
    """Folder of records; experiments/results holds the committed ones."""
    list: bool = False
    """Say which parts have a result, and run nothing."""
    again: bool = False
    """Run anew what has a result already."""
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


def linear_algebra_flops(solver: Any, parameters: int, examples: int, outputs: int = 10) -> float:
    """Operations of a step on so many examples beside the model's own: the curvature matrix and its factorisations.

    By halves, for both are symmetric. The compiler's cost analysis does not see into them: they are counted by hand.
    """
    if not isinstance(solver, GaussNewton):
        return 0.0
    rows = examples * outputs
    if solver.curvature_ratio is not None:
        rows = max(solver.curvature_ratio * parameters, solver.curvature_share * examples)
    return rows * parameters**2 + len(solver.damping_factors) / 3 * parameters**3


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
    rows, parameters, extra = [], count(fit.params), 0.0
    for i, step in enumerate(fit.history["step"]):
        extra += linear_algebra_flops(solver, parameters, fit.history["examples"][i])
        cost = price.of(fit.history["sample_grads"][i], fit.history["seconds"][i], extra)
        full = loss_and_accuracy(model, snapshots[step], train)[0] if step in snapshots else None
        names = {"examples": "examples", "ratio": "ratio", "stage": "stage", "subset_loss": "loss"}
        row = {name: fit.history[key][i] for name, key in names.items()}
        rows.append(cost | row | {"probe_loss": fit.history["probe_loss"][i], "full_loss": full})
    return columns(rows)
