"""What a user may get wrong: each mistake is a ValueError that says what, what was found, and the way out."""

import dataclasses
import fractions
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse

from subsetopt import (
    LBFGS,
    FinetuneResult,
    FitResult,
    GaussNewton,
    Growth,
    draw_order,
    finetune,
    fit_subset,
    overdetermination_ratio,
)

N, D, M = 20, 4, 3  # examples, inputs, outputs
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = RNG.integers(0, M, N)
W = 0.1 * RNG.normal(size=(D, M)).astype(np.float32)
ONE_HOT = np.eye(M, dtype=np.float32)[Y]


def apply(params: Any, x: jax.Array) -> jax.Array:
    return x @ params


def changed(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def must_not_be_called(_: Any) -> None:
    raise AssertionError("a step was taken")


ARGUMENTS: dict[str, Any] = {
    "model": apply,
    "data": (X, Y),
    "params": W,
    "callback": must_not_be_called,
    "progress": False,
}


def fit(warmup_epochs: Any = 0, **changes: Any) -> FitResult:
    return fit_subset(**ARGUMENTS | changes, warmup_epochs=warmup_epochs)


def tune(**changes: Any) -> FinetuneResult:
    return finetune(**ARGUMENTS | changes)


def across_examples(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return (outputs[:, :1] - y.astype(outputs.dtype)[None]).mean(axis=1)


SGD = optax.sgd(0.1)
MEANS = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.mean(axis=0), updates))


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def dropout(params: Any, x: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kept = jax.pure_callback(lambda: RNG.integers(0, 2, shape.shape).astype(x.dtype), shape)
    return (x * kept) @ params


def batch_normalized(params: Any, x: jax.Array) -> jax.Array:
    outputs = x @ params
    return outputs - outputs.mean(axis=0, keepdims=True)


class WithBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=True)(nn.Dense(M)(x))


class WithDropout(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(M)(nn.Dropout(0.5, deterministic=False)(x))


@dataclasses.dataclass
class Settings:
    """Equal ones are equal, so that it has no hash."""

    factor: float

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        return self.factor * (x @ params)


@dataclasses.dataclass
class Steepest:
    """No hash either."""

    rate: float

    def init(self, params: Any) -> None: ...

    def update(self, updates: Any, state: None, params: Any = None) -> tuple[Any, None]:
        return jax.tree.map(lambda g: -self.rate * g, updates), state


class Unreadable:
    """As a tensor on another device."""

    shape, dtype = (N, D), np.dtype("float32")

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("not on this device")


DENSE = nn.Dense(M)
DENSE_VARIABLES: Any = DENSE.init(jax.random.key(0), X[:1])
DENSE_PARAMS = DENSE_VARIABLES["params"]

# mistake: (arguments, the argument that the message names, the value in it, pattern of the way out)
Mistakes = dict[str, tuple[dict[str, Any], str, str, str]]

DATA: Mistakes = {
    "x without y": ({"data": X}, "data", "shape (20, 4)", "images, labels"),
    "x, y and weights": ({"data": (X, Y, Y)}, "data", "tuple of length 3", "images, labels"),
    "a dict of arrays": ({"data": {"x": X, "y": Y}}, "data", "dict", "images, labels"),
    "a loader of batches": ({"data": zip([X], [Y], strict=True)}, "data", "zip", "images, labels"),
    "no targets": ({"data": (X, None)}, "y", "None", "pass|stack"),
    "a number for x": ({"data": (1.0, Y)}, "x", "shape ()", "np.stack"),
    "ragged lists": ({"data": ([[1.0], [1.0, 2.0]], [0, 1])}, "x", "list", "np.stack"),
    "an array of objects": ({"data": (X.astype(object), Y)}, "x", "object", "np.stack"),
    "a sparse matrix": ({"data": (scipy.sparse.csr_array(X), Y)}, "x", "(20, 4)", "toarray"),
    "inputs as text": ({"data": (X.astype(str), Y)}, "x", "<U", "astype|encode"),
    "labels as objects": ({"data": (X, Y.astype(str).astype(object))}, "y", "object", "np.unique"),
    "labels as text": ({"data": (X, Y.astype(str))}, "y", "<U", "astype|encode|np.unique"),
    "complex inputs": ({"data": (X.astype(np.complex64), Y)}, "x", "complex64", "astype"),
    "a masked array": ({"data": (np.ma.masked_greater(X, 1), Y)}, "x", "masked", "filled"),
    "bytes of another order": ({"data": (X, Y.astype(">i4"))}, "y", ">i4", "astype"),
    "integers beyond 32 bits": ({"data": (changed(Y[:, None], 3, 2**40), Y)}, "x", str(2**40), "jax_enable_x64"),
    "counts beyond 32 bits": (
        {"data": (changed(Y[:, None].astype("uint64"), 3, 2**40), Y)},
        "x",
        str(2**40),
        "rescale",
    ),
    "what NumPy cannot read": ({"data": (Unreadable(), Y)}, "x", "(20, 4)", "NumPy array"),
    "fewer labels than inputs": ({"data": (X, Y[:-1])}, "x and y", "20 and 19", "drop or add"),
    "no examples": ({"data": (X[:0], Y[:0])}, "x", "(0, 4)", "pass the training examples"),
    "NaN in x": ({"data": (changed(X, 7, np.nan), Y)}, "x", "row 7", "remove or impute"),
    "infinity in x": ({"data": (changed(X, (3, 1), np.inf), Y)}, "x", "row 3", "remove or impute"),
    "NaN in y": (
        {"data": (X, changed(ONE_HOT, 5, np.nan)), "loss": "squared_error"},
        *("y", "row 5", "remove or impute"),
    ),
    "float64 inputs": ({"data": (X.astype(float), Y)}, "x", "float64", "float32"),
    "float16 inputs": ({"data": (X.astype("float16"), Y)}, "x", "float16", "float32"),
    "labels from 1": ({"data": (X, Y + 1)}, "y", "1 to 3", "renumber"),
    "a label of -1": ({"data": (X, changed(Y, 0, -1))}, "y", "-1 to 2", "renumber"),
    "labels as floats": ({"data": (X, Y.astype("float32"))}, "y", "float32", "int32"),
    "labels as bools": ({"data": (X, Y > 0)}, "y", "bool", "int32"),
    "labels in a column": ({"data": (X, Y[:, None])}, "y", "(20, 1)", "match the model's 3"),
    "one-hot rows of integers": ({"data": (X, ONE_HOT.astype(int))}, "y", "int", "float32"),
    "one-hot rows of float64": ({"data": (X, ONE_HOT.astype(float))}, "y", "float64", "float32"),
    "rows that do not sum to 1": ({"data": (X, 2 * ONE_HOT)}, "y", "2", "normalise"),
    "negative probabilities": ({"data": (X, changed(ONE_HOT, 0, [2, -1, 0]))}, *("y", "-1", "normalise")),
    "a class too many": ({"data": (X, np.eye(4, dtype="float32")[Y])}, *("y", "(20, 4)", "match the model's 3")),
    "regression targets of another width": (
        {"data": (X, ONE_HOT[:, :2]), "loss": "squared_error"},
        *("y", "(20, 2)", "reshape"),
    ),
    "regression targets of another dtype": (
        {"data": (X, ONE_HOT.astype(float)), "loss": "squared_error"},
        *("y", "float64", "float32"),
    ),
    "regression targets of other axes": (
        {"model": lambda p, x: jnp.stack([x @ p] * 2, axis=1), "data": (X, np.zeros((N, M, 2), "float32"))}
        | {"loss": "squared_error"},
        *("y", "(20, 3, 2)", "transpose"),
    ),
    "float64 targets of a function": (
        {"data": (X, ONE_HOT.astype(float)), "loss": lambda f, y: jnp.sum((f - y) ** 2, axis=1)},
        *("y", "float64", "float32"),
    ),
    "labels as regression targets": (
        {"data": (X, np.stack([Y] * M, axis=1)), "loss": "squared_error"},
        *("y", "int", "float32"),
    ),
}

MODEL: Mistakes = {
    "the class of a linen module": ({"model": nn.Dense}, "model", "Dense", r"Dense\(\.\.\.\)"),
    "the class of an nnx module": ({"model": nnx.Linear}, "model", "Linear", r"Linear\(\.\.\.\)"),
    "no model": ({"model": None}, "model", "None", "pass"),
    "a function without a hash": ({"model": Settings(2.0)}, "model", "Settings", "lambda params, x"),
    "a function without params": ({"params": None}, "params", "None", "pass the parameters"),
    "batch statistics": ({"model": WithBatchNorm(), "params": None}, "model", "batch_stats", "frozen"),
    "batch statistics with params": (
        {"model": WithBatchNorm(), "params": DENSE_PARAMS},
        *("model", "batch_stats", "frozen"),
    ),
    "dropout in a linen module": ({"model": WithDropout(), "params": None}, "model", "rng", "dropout"),
    "a module without parameters": ({"model": nn.Sequential([nn.relu]), "params": None}, *("model", "none", "layer")),
    "features as outputs": ({"model": lambda p, x: (x @ p, x)}, "model", "tuple", "logits only"),
    "a mean over the batch": ({"model": lambda p, x: (x @ p).mean(0)}, "model", "(3,)", "leading"),
    "one output without an axis": ({"model": lambda p, x: x @ p[:, 0]}, *("model", "(2,)", "axis")),
    "outputs in half precision": ({"model": lambda p, x: (x @ p).astype("bfloat16")}, *("model", "bfloat16", "cast")),
    "dropout": ({"model": dropout}, "loss", "difference", "dropout"),
    "statistics of the batch": ({"model": batch_normalized}, "loss", "difference", "freeze batch"),
    "NaN in params": ({"params": changed(W, (0, 0), np.nan)}, "params", "NaN", "start from other"),
    "infinity in params": ({"params": changed(W, 0, np.inf)}, "params", "infinity", "start from"),
    "params that overflow": ({"params": np.full_like(W, 1e38)}, "loss", "NaN", "smaller params"),
    "params in half precision": ({"params": W.astype("float16")}, "params", "float16", "float32"),
    "params in float64": ({"params": W.astype(float)}, "params", "float64", "jax_enable_x64"),
    "params of two dtypes": (
        {"model": nn.Dense(M), "params": DENSE_PARAMS | {"bias": np.zeros(M, "float16")}},
        *("params", "float16 and float32", "cast"),
    ),
    "params of integers": ({"params": np.ones((D, M), int)}, "params", "int64", "float32"),
    "empty params": ({"params": {}}, "params", "empty", "pass the model's"),
    "params as text": ({"params": "model.npz"}, "params", "<U9", "float32"),
    "all variables as params": ({"model": DENSE, "params": DENSE_VARIABLES}, *("params", "nothing", r"\['params'\]")),
    "params of another module": (
        {"model": nn.Dense(M + 1), "params": DENSE_PARAMS},
        *("params", "(3,)", r"\['params'\]"),
    ),
    "params of another nnx module": (
        {"model": nnx.Linear(D, M, rngs=nnx.Rngs(0)), "params": DENSE_PARAMS},
        *("params", "bias", "nnx.state"),
    ),
    "trainable of another structure": (
        {"trainable": {"w": True}},
        *("trainable", "PyTreeDef({'w': *})", "jax.tree.map"),
    ),
    "trainable of numbers": ({"trainable": np.ones(W.shape)}, "trainable", "float64", "True"),
    "trainable of another shape": ({"trainable": W[0] > 0}, "trainable", "(3,)", "broadcast"),
    "nothing trainable": ({"trainable": False}, "trainable", "all False", "to True"),
}

LOSS: Mistakes = {
    "unknown loss": ({"loss": "mse"}, "loss", "'mse'", "pass one"),
    "a loss without a hash": ({"loss": Settings(2.0)}, "loss", "Settings", "frozen=True"),
    "no loss": ({"loss": None}, "loss", "None", "pass one"),
    "a mean": ({"loss": lambda f, y: cross_entropy(f, y).mean()}, "loss", "()", "per-example"),
    "a sum": ({"loss": lambda f, y: cross_entropy(f, y).sum()}, "loss", "()", "per-example"),
    "a loss an output": ({"loss": lambda f, _: f**2}, "loss", "(2, 3)", "per-example"),
    "a column of losses": ({"loss": lambda f, y: cross_entropy(f, y)[:, None]}, "loss", "(2, 1)", "per-"),
    "losses and their mean": ({"loss": lambda f, _: (f[:, 0], f.mean())}, "loss", "tuple", "per-"),
    "losses of integers": ({"loss": lambda f, _: f.argmax(axis=1)}, "loss", "int32", "cast"),
    "losses of other examples": ({"loss": across_examples}, "loss", "diff", "broadcast"),
    "losses that are NaN": ({"loss": lambda f, _: jnp.sqrt(-1 - f[:, 0] ** 2)}, "loss", "NaN", "scale"),
}

SHARED: Mistakes = {
    "a seed below zero": ({"seed": -1}, "seed", "-1", "seed=0"),
    "a fractional seed": ({"seed": 1.5}, "seed", "1.5", "seed=0"),
    "a key as seed": ({"seed": jax.random.key(0)}, "seed", "key", "seed=0"),
    "a seed of 64 bits": ({"seed": 2**63}, "seed", str(2**63), "seed="),
    "text as callback": ({"callback": "print"}, "callback", "'print'", "lambda progress"),
    "an unknown driver": ({"driver": "gpu"}, "driver", "'gpu'", "pick one"),
    "a file as checkpoint": ({"checkpoint": __file__}, "checkpoint", "test_misuse.py", "folder"),
    "True as checkpoint": ({"checkpoint": True}, "checkpoint", "True", "folder"),
}

FIT: Mistakes = {
    "a solver's class": ({"solver": LBFGS}, "solver", "LBFGS", r"LBFGS\(\)"),
    "an optax solver": ({"solver": optax.lbfgs()}, "solver", "GradientTransformation", r"LBFGS\(\)"),
    "a solver's name": ({"solver": "lbfgs"}, "solver", "'lbfgs'", r"LBFGS\(\)"),
    "growth as a number": ({"growth": 4}, "growth", "4", "Growth"),
    "the class Growth": ({"growth": Growth}, "growth", "Growth", "Growth"),
    "fresh subsets for a line search": (
        {"growth": Growth(nested=False), "solver": LBFGS()},
        *("growth", "nested=False", "nested=True"),
    ),
    "unknown until": ({"until": "done"}, "until", "'done'", "pick one"),
    "until no steps": ({"until": 0}, "until", "0", "until=1"),
    "until half a step": ({"until": 0.5}, "until", "0.5", "until=1"),
    "until True": ({"until": True}, "until", "True", "until=1"),
    "no steps": ({"max_steps": 0}, "max_steps", "0", "max_steps=1"),
    "steps as a float": ({"max_steps": 1e3}, "max_steps", "1000.0", "max_steps=1"),
    "warm-up below zero": ({"warmup_epochs": -1}, "warmup_epochs", "-1", "warmup_epochs=0"),
    "endless warm-up": ({"warmup_epochs": np.inf}, "warmup_epochs", "inf", "warmup_epochs=0"),
    "l2 below zero": ({"l2": -1e-3}, "l2", "-0.001", "l2=0"),
    "l2 as text": ({"l2": "1e-3"}, "l2", "'1e-3'", "l2=0"),
    "l2 of None": ({"l2": None}, "l2", "None", "l2=0"),
    "convergence on fresh subsets": (
        {"until": "converged", "growth": Growth(1, nested=False)},
        *("until", "'converged'", "nested=True"),
    ),
    "a probe of none": (
        {"until": "representative", "data": (X[:9], Y[:9]), "growth": Growth(0.5, nested=False)},
        *("until", "'representative'", "until=1"),
    ),
    "target beyond every number": ({"target_loss": 10**400}, "target_loss", "1000", "pass"),
    "target that is NaN": ({"target_loss": np.nan}, "target_loss", "nan", "pass"),
    "blocks of nothing": ({"block_size": 0}, "block_size", "0", "block_size=1"),
    "half blocks": ({"block_size": 64.5}, "block_size", "64.5", "block_size=1"),
    "no devices": ({"devices": []}, "devices", "[]", "jax.local_devices"),
    "a number of devices": ({"devices": 2}, "devices", "2", "jax.local_devices"),
    "the name of a device": ({"devices": "cpu"}, "devices", "'cpu'", "jax.local_devices"),
    "devices by number": ({"devices": [0]}, "devices", "[0]", "jax.local_devices"),
    "a device twice": ({"devices": 2 * jax.devices()[:1]}, "devices", "CpuDevice", "once"),
}

TUNE: Mistakes = {
    "no epochs": ({"epochs": 0}, "epochs", "0", "epochs=1"),
    "epochs as a float": ({"epochs": 2.0}, "epochs", "2.0", "epochs=1"),
    "empty batches": ({"batch_size": 0}, "batch_size", "0", "batch_size=1"),
    "an optimizer's name": ({"optimizer": "adam"}, "optimizer", "'adam'", "optax.adam"),
    "an optimizer not called": ({"optimizer": optax.adam}, "optimizer", "function", "optax.adam"),
    "an optimizer that wants the loss": ({"optimizer": optax.lbfgs()}, "optimizer", "value_fn", "optax.adam"),
    "an optimizer without a hash": ({"optimizer": Steepest(1e-3)}, "optimizer", "Steepest", "init, update"),
    "an optimizer of two sets": ({"optimizer": optax.lookahead(SGD, 5, 0.5)}, "optimizer", "fast", "optax.adam"),
    "updates of another shape": ({"optimizer": MEANS}, "optimizer", "(3,)", "optax.adam"),
    "a rate": ({"optimizer": 1e-3}, "optimizer", "0.001", "optax.adam"),
    "patience without validation": ({"patience": 2}, "patience", "2", "validation="),
    "no patience": ({"patience": 0, "validation": (X, Y)}, "patience", "0", "patience=1"),
    "validation x alone": ({"validation": X}, "validation", "shape (20, 4)", "images, labels"),
    "validation of other width": ({"validation": (X[:, :2], Y)}, "validation", "(20, 2)", "alike"),
    "validation of other dtype": ({"validation": (X.astype(float), Y)}, *("validation", "float64", "alike")),
    "validation of other targets": ({"validation": (X, ONE_HOT)}, "validation", "(20, 3)", "alike"),
    "empty validation": ({"validation": (X[:0], Y[:0])}, "validation", "(0, 4)", "pass the"),
    "fewer validation labels": ({"validation": (X, Y[1:])}, "validation", "20 and 19", "drop or add"),
    "NaN in validation": ({"validation": (changed(X, 2, np.nan), Y)}, *("validation", "row 2", "remove or impute")),
    "validation labels from 1": ({"validation": (X, Y + 1)}, "validation", "1 to 3", "renumber"),
}

NOT_ZERO = r"(?!.*=0\b)\w"  # what may not be zero is no example of a way out

GROWTH: Mistakes = {
    "from nothing": ({"start": 0}, "Growth.start", "0", NOT_ZERO),
    "from below zero": ({"start": -1}, "Growth.start", "-1", NOT_ZERO),
    "from NaN": ({"start": np.nan}, "Growth.start", "nan", NOT_ZERO),
    "from text": ({"start": "4"}, "Growth.start", "'4'", NOT_ZERO),
    "that nests a little": ({"nested": "no"}, "Growth.nested", "'no'", "=True"),
    "that stays": ({"factor": 1}, "Growth.factor", "1", "stop=q"),
    "that shrinks": ({"factor": 0.5}, "Growth.factor", "0.5", "stop=q"),
    "by NaN": ({"factor": np.nan}, "Growth.factor", "nan", NOT_ZERO),
    "by infinity": ({"factor": np.inf}, "Growth.factor", "inf", NOT_ZERO),
    "by None": ({"factor": None}, "Growth.factor", "None", NOT_ZERO),
    "that ends before it starts": ({"start": 8, "stop": 4}, "Growth.stop", "4", "None"),
    "by importance alone": ({"importance": 1}, "Growth.importance", "1", "=0"),
    "up to NaN": ({"stop": np.nan}, "Growth.stop", "nan", NOT_ZERO),
}

QUASI_NEWTON: Mistakes = {
    "without memory": ({"memory": 0}, "LBFGS.memory", "0", "=1"),
    "with half a pair": ({"memory": 2.5}, "LBFGS.memory", "2.5", "=1"),
    "without trials": ({"max_trials": 0}, "LBFGS.max_trials", "0", "=1"),
    "that takes no pair": ({"pair_threshold": 1}, "LBFGS.pair_threshold", "1", "=0"),
    "to NaN": ({"tolerance": np.nan}, "LBFGS.tolerance", "nan", "=0"),
}

GAUSS_NEWTON: Mistakes = {
    "without curvature": ({"curvature_ratio": 0}, "GaussNewton.curvature_ratio", "0", NOT_ZERO),
    "with a negative share": ({"curvature_share": -0.1}, "GaussNewton.curvature_share", "-0.1", "=0"),
    "that only averages": ({"averaging": 1}, "GaussNewton.averaging", "1", "=0"),
    "that only averages gradients": ({"gradient_averaging": 1}, "GaussNewton.gradient_averaging", "1", "=0"),
    "damped below zero": ({"damping": -1}, "GaussNewton.damping", "-1", "=0"),
    "without factors": ({"damping_factors": ()}, "GaussNewton.damping_factors", "()", "0.5,"),
    "with a bare factor": ({"damping_factors": 0.5}, "GaussNewton.damping_factors", "0.5", "0.5,"),
    "with a factor of 0": ({"damping_factors": (0.5, 0)}, "GaussNewton.damping_factors", "0", NOT_ZERO),
    "with a momentum of 1": ({"momenta": (0.5, 1.0)}, "GaussNewton.momenta", "1.0", "0"),
    "that shortens": ({"length_factor": 0.5}, "GaussNewton.length_factor", "0.5", "=1"),
    "without trial examples": ({"trial_examples": 0}, "GaussNewton.trial_examples", "0", "=1"),
    "by LU": ({"linear_solve": "lu"}, "GaussNewton.linear_solve", "'lu'", "pick one"),
    "at a coarser precision": ({"curvature_precision": "fp8"}, "GaussNewton.curvature_precision", "'fp8'", "pick one"),
    "by exact CG": ({"cg_tolerance": 0}, "GaussNewton.cg_tolerance", "0", NOT_ZERO),
    "without CG steps": ({"cg_max_steps": 0}, "GaussNewton.cg_max_steps", "0", "=1"),
    "to twice the gradient": ({"tolerance": 2}, "GaussNewton.tolerance", "2", "=0"),
}

ORDER: Mistakes = {
    "of nothing": ({"y": np.empty(0), "seed": 0}, "y", "(0,)", "pass the training"),
    "of a number": ({"y": 3, "seed": 0}, "y", "()", "pass the training"),
    "by a seed below zero": ({"y": Y, "seed": -1}, "seed", "-1", "seed=0"),
}

RATIO: Mistakes = {
    "without examples": ({"examples": 0, "outputs": 1, "parameters": 1}, "examples", "0", "pass"),
    "without parameters": ({"examples": 1, "outputs": 1, "parameters": 0}, "parameters", "0", "pass"),
    "of NaN": ({"examples": 1, "outputs": np.nan, "parameters": 1}, "outputs", "nan", "pass"),
}


def calls(function: Callable[..., Any], *tables: Mistakes) -> list[Any]:
    return [
        pytest.param(functools.partial(function, **arguments), *said, id=f"{function.__name__} {mistake}")
        for table in tables
        for mistake, (arguments, *said) in table.items()
    ]


@pytest.mark.parametrize(
    ("call", "name", "found", "way_out"),
    [
        *calls(fit, DATA, MODEL, LOSS, SHARED, FIT),
        *calls(tune, DATA, MODEL, LOSS, SHARED, TUNE),
        *calls(Growth, GROWTH),
        *calls(LBFGS, QUASI_NEWTON),
        *calls(GaussNewton, GAUSS_NEWTON),
        *calls(draw_order, ORDER),
        *calls(overdetermination_ratio, RATIO),
    ],
)
def test_misuse_is_a_value_error_that_names_the_argument_the_value_and_the_way_out(
    call: Callable[[], Any], name: str, found: str, way_out: str
):
    with pytest.raises(ValueError, match=r"(?s)^.+, found .+; .+\.$") as caught:
        call()
    rule, rest = str(caught.value).split(", found ", 1)
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", rule)
    # A value may hold a semicolon itself: the way out follows one of them.
    cuts = [(rest[: at.start()], rest[at.end() :]) for at in re.finditer("; ", rest)]
    assert any(found in value and re.search(way_out, hint) for value, hint in cuts), rest


def test_whole_numbers_of_numpy_serve_as_python_ones(tmp_path: Path):
    arguments: dict[str, Any] = {"solver": LBFGS(), "growth": Growth(1, 2), "callback": None}
    python = fit(**arguments, until=1, max_steps=4)
    numpy = fit(
        **arguments,
        until=np.int64(1),
        max_steps=np.int64(4),
        seed=np.int64(0),
        warmup_epochs=np.float32(0),
        checkpoint=tmp_path,
    )
    assert numpy.history["loss"] == python.history["loss"]
    assert numpy.history["examples"] == python.history["examples"]


class Frame:
    """As a data frame or a tensor: rows by label, if at all, but NumPy can read it."""

    def __init__(self, values: np.ndarray):
        self._values, self.shape = values, values.shape

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self._values


@pytest.mark.parametrize("wrap", [Frame, np.ndarray.tolist, jnp.asarray, lambda a: a.view(np.matrix)])
def test_whatever_numpy_reads_serves_as_inputs(wrap: Callable[[np.ndarray], Any]):
    options: dict[str, Any] = {"callback": None, "max_steps": 3}
    x = X if wrap is not np.ndarray.tolist else X.astype(float)
    with jax.enable_x64(x.dtype == float):
        plain, wrapped = (fit(data=(a, Y), params=W.astype(x.dtype), **options) for a in (x, wrap(x)))
    assert wrapped.history["loss"] == plain.history["loss"]


def test_settings_of_numpy_and_fractions_are_python_s():
    def solvers(number: Callable[[float], Any]) -> tuple[GaussNewton, LBFGS, Growth]:
        gauss_newton = GaussNewton(damping=number(0.5), momenta=(number(0.25),), length_factor=number(1.5))
        return gauss_newton, LBFGS(tolerance=number(0.125)), Growth(number(2), number(1.5))

    assert repr(solvers(float)) == repr(solvers(np.float64)) == repr(solvers(fractions.Fraction))
    assert repr(LBFGS(memory=5)) == repr(LBFGS(memory=np.int64(5)))  # pyright: ignore[reportArgumentType]
    with jax.enable_x64(True):  # where a float64 would promote what it meets
        result = fit(solver=solvers(np.float64)[0], callback=None, max_steps=2, data=(X, Y.astype("int32")))
    assert result.params.dtype == np.float32


def test_a_ratio_beyond_every_number_is_the_whole_set():
    assert Growth(1e308).sizes(20, 1000, 1) == [20]
