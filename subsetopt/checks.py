"""Every ValueError of the package: each names the argument, what was found, and the way out."""

import math
import numbers
from typing import Any

import jax
import numpy as np


def require(condition: Any, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


# --- numbers -------------------------------------------------------------------------------------------------------


def whole_number(name: str, value: Any, least: int) -> None:
    """An integer of at least `least`."""
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least
    require(fits, f"{name} must be a whole number of at least {least}, found {value!r}; pass for example {name}={least}.")


def real_number(name: str, value: Any, least: float = -math.inf, below: float = math.inf, hint: str = "") -> None:
    """A finite number in [least, below)."""
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    fits = fits and least <= float(value) < below
    bounds = f" of at least {least:g}" if least > -math.inf else ""
    bounds += f" and below {below:g}" if below < math.inf else ""
    require(fits, f"{name} must be a finite number{bounds}, found {value!r}; {hint or f'pass for example {name}={max(least, 0):g}'}.")


def positive(name: str, value: Any) -> None:
    """A finite number above zero."""
    real_number(name, value, 0)
    require(value > 0, f"{name} must be above 0, found {value!r}; pass a positive number.")


def real_tuple(name: str, values: Any, least: float = -math.inf, below: float = math.inf) -> None:
    """A non-empty tuple of finite numbers in [least, below)."""
    require(isinstance(values, tuple) and values, f"{name} must be a non-empty tuple, found {values!r}; pass for example (0.5,).")
    for value in values:
        real_number(name, value, least, below)


def positive_tuple(name: str, values: Any) -> None:
    """A non-empty tuple of finite numbers above zero."""
    real_tuple(name, values, 0)
    for value in values:
        positive(name, value)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of a few words."""
    require(value in allowed, f"{name} must be one of {', '.join(map(repr, allowed))}, found {value!r}; pick one of them.")


def function(name: str, value: Any) -> None:
    """A function, or None."""
    require(value is None or callable(value), f"{name} must be a function or None, found {_describe(value)}; pass a function of one Progress.")


def solver(value: Any, protocol: Any) -> Any:
    """An instance with init and step."""
    is_solver = isinstance(value, protocol) and not isinstance(value, type)
    require(is_solver, f"solver must be GaussNewton(), LBFGS() or another Solver, found {value!r}; pass an instance.")
    return value


def growth(value: Any, kind: type, fresh_subsets: bool) -> Any:
    """A Growth that the solver can follow."""
    require(isinstance(value, kind), f"growth must be a Growth, found {value!r}; pass for example Growth(start=4).")
    require(value.nested or fresh_subsets, "growth must have nested=True with this solver, found nested=False; a line search needs the same subset from step to step.")
    return value


def until(value: Any) -> Any:
    """A stage end."""
    if isinstance(value, str):
        choice("until", value, ("representative", "converged"))
    else:
        whole_number("until", value, 1)
    return value


def optimizer(value: Any) -> Any:
    """An optax gradient transformation, or None."""
    fits = value is None or (hasattr(value, "init") and hasattr(value, "update"))
    require(fits, f"optimizer must be an optax.GradientTransformation, found {_describe(value)}; pass for example optax.adam(1e-3).")
    return value


# --- data ----------------------------------------------------------------------------------------------------------


def pair(name: str, data: Any) -> tuple[Any, Any]:
    """The two members of (x, y)."""
    fits = isinstance(data, tuple | list) and len(data) == 2
    require(fits, f"{name} must be a pair (x, y), found {_describe(data)}; pass for example (images, labels).")
    x, y = (_array(member, part) for member, part in zip(data, ("x", "y"), strict=True))
    return x, y


def _array(value: Any, name: str) -> Any:
    if not hasattr(value, "shape"):
        value = np.asarray(value)
    bad = value.dtype == object or value.ndim == 0
    require(not bad, f"{name} must be an array with one row an example, found {_describe(value)}; stack the examples with np.stack.")
    return value


def examples(x: Any, y: Any) -> None:
    """As many inputs as targets, at least one, all finite."""
    require(len(x) == len(y), f"x and y must have the same length, found {len(x)} and {len(y)}; drop or add examples in one of them.")
    require(len(x) > 0, f"x must hold at least one example, found shape {tuple(x.shape)}; pass the training examples.")
    for name, values in (("x", x), ("y", y)):
        finite(name, values)


def validation(x: Any, y: Any, x_held_out: Any, y_held_out: Any) -> None:
    """Validation data of the training data's shapes and dtypes."""
    for name, a, b in (("validation x", x, x_held_out), ("validation y", y, y_held_out)):
        require(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype, f"{name} must look like the training data, found {b.shape[1:]} of {b.dtype}, expected {a.shape[1:]} of {a.dtype}; prepare both alike.")


def finite(name: str, values: Any) -> None:
    """No NaN and no infinity; looked at in pieces, so that a memory-mapped file stays on disk."""
    if not np.issubdtype(values.dtype, np.inexact):
        return
    for start in range(0, len(values), 4096):
        piece = np.asarray(values[start : start + 4096])
        if not np.isfinite(piece).all():
            row = start + int(np.flatnonzero(~np.isfinite(piece.reshape(len(piece), -1)).all(axis=1))[0])
            raise ValueError(f"{name} must be finite, found NaN or infinity in row {row}; remove or impute such examples.")


def x_dtype(x: Any, dtype: Any) -> None:
    """Floating inputs have the dtype of the parameters: JAX would otherwise convert one of them silently."""
    if np.issubdtype(x.dtype, np.floating):
        require(
            x.dtype == dtype,
            f"x must have the dtype of params, found x {x.dtype} and params {dtype}; pass x.astype('{dtype}')"
            + ("" if x.dtype == np.float32 else ", or float64 params with jax.config.update('jax_enable_x64', True)")
            + ".",
        )


def targets(loss: Any, y: Any, outputs: jax.ShapeDtypeStruct) -> None:
    """Targets that fit the outputs of a named loss."""
    shape, dtype = tuple(outputs.shape), outputs.dtype
    if loss == "softmax_cross_entropy":
        require(len(shape) == 2, f"loss='softmax_cross_entropy' needs outputs of shape (n, classes), found {shape}; reshape the model's outputs or pass a loss function.")
        (_labels if y.ndim == 1 else _probabilities)(y, shape[1], dtype)
    elif loss == "squared_error":
        size = int(np.prod(y.shape[1:]))
        require(size == int(np.prod(shape[1:])), f"y must have one value for each of the model's outputs {shape[1:]}, found {tuple(y.shape[1:])} an example; reshape y or the outputs.")
        require(y.dtype == dtype, f"y must have the dtype of the outputs, {dtype}, for loss='squared_error', found {y.dtype}; pass y.astype('{dtype}').")


def _labels(y: Any, classes: int, dtype: Any) -> None:
    require(np.issubdtype(y.dtype, np.integer), f"y must hold integer labels for loss='softmax_cross_entropy', found {y.dtype}; pass y.astype('int32').")
    low, high = int(np.min(y)), int(np.max(y))
    require(0 <= low and high < classes, f"y must hold labels from 0 to {classes - 1}, one for each of the model's {classes} outputs, found {low} to {high}; renumber the labels or give the model {high + 1} outputs.")


def _probabilities(y: Any, classes: int, dtype: Any) -> None:
    require(y.ndim == 2 and y.shape[1] == classes, f"y must have shape (n,) of labels or (n, {classes}) of probabilities, found {tuple(y.shape)}; match the model's {classes} outputs.")
    require(y.dtype == dtype, f"y must have the dtype of the outputs, {dtype}, found {y.dtype}; pass y.astype('{dtype}').")
    total = np.asarray(y).sum(axis=1)
    require(np.allclose(total, 1, atol=1e-3) and np.min(y) >= 0, f"y must hold rows of probabilities that sum to 1, found sums from {total.min():.4g} to {total.max():.4g}; normalise the rows.")


# --- model and parameters ------------------------------------------------------------------------------------------


def plain_function(model: Any, params: Any) -> None:
    """A function model brings its own parameters."""
    require(callable(model), f"model must be a flax module or a function apply(params, x), found {_describe(model)}; pass one of those.")
    require(not isinstance(model, type), f"model must be an instance, found the class {getattr(model, '__name__', model)!r}; write {getattr(model, '__name__', 'Model')}(...).")
    require(params is not None, "params must be given with model=apply(params, x), found None; only linen modules can be initialised from a seed.")


def only_params(variables: Any) -> None:
    """No batch statistics or other state: the loss must be a pure function of the parameters."""
    others = sorted(set(variables) - {"params"})
    require(not others, f"model must have no variable collections beside 'params', found {others}; pass apply(params, x) that closes over them, with frozen statistics.")
    require("params" in variables, "model must have trainable parameters, found none; pass a module with at least one layer.")


def linen_params(module: Any, params: Any, first: Any) -> None:
    """The tree that the module itself would make."""
    expected = jax.eval_shape(module.init, jax.random.key(0), first)
    only_params(expected)
    want, found = _shapes(expected["params"]), _shapes(params)
    if want != found:
        keys = sorted(key for key in want.keys() | found.keys() if want.get(key) != found.get(key))
        raise ValueError(f"params must be the module's 'params' collection, found {keys[0]}: {found.get(keys[0], 'missing')}, expected {want.get(keys[0], 'nothing there')}; pass module.init(key, x)['params'].")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def parameter_dtype(leaves: list[Any]) -> Any:
    """One floating dtype for all parameters, which are finite."""
    require(leaves, "params must hold at least one array, found an empty tree; pass the model's parameters.")
    dtypes = sorted({str(np.asarray(leaf).dtype) for leaf in leaves})
    require(len(dtypes) == 1, f"params must have one dtype, found {' and '.join(dtypes)}; cast them with jax.tree.map(lambda p: p.astype('float32'), params).")
    require(dtypes[0] in ("float32", "float64"), f"params must be float32 or float64, found {dtypes[0]}; cast them with jax.tree.map(lambda p: p.astype('float32'), params).")
    x64 = jax.config.read("jax_enable_x64")
    require(dtypes[0] == "float32" or x64, "params must be float32 unless x64 is on, found float64; cast them, or call jax.config.update('jax_enable_x64', True) first.")
    for leaf in leaves:
        require(np.isfinite(np.asarray(leaf)).all(), "params must be finite, found NaN or infinity; start from other parameters.")
    return np.dtype(dtypes[0])


def mask(params: Any, trainable: Any) -> None:
    """Bools or boolean arrays in the structure of params, with something left to train."""
    same = jax.tree.structure(params) == jax.tree.structure(trainable)
    require(same, f"trainable must have the structure of params, found {jax.tree.structure(trainable)}; build it with jax.tree.map(lambda p: True, params) and change entries.")
    anything = False
    for (path, leaf), m in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(trainable), strict=True):
        name = f"trainable{jax.tree_util.keystr(path)}"
        m = np.asarray(m)
        require(m.dtype == bool, f"{name} must be a bool or a boolean array, found {m.dtype}; pass True, False or an array of them.")
        require(m.shape in ((), np.shape(leaf)), f"{name} must have the shape {np.shape(leaf)} of its parameter, found {m.shape}; use np.broadcast_to.")
        anything |= bool(m.any()) and np.size(leaf) > 0
    require(anything, "trainable must leave at least one parameter to train, found all False; set an entry to True.")


# --- loss ----------------------------------------------------------------------------------------------------------


def loss_argument(loss: Any, known: tuple[str, ...]) -> None:
    """A known name or a function."""
    fits = loss in known if isinstance(loss, str) else callable(loss)
    require(fits, f"loss must be one of {', '.join(map(repr, known))} or a function (outputs, y) -> (n,), found {loss!r}; pass one of those.")


def per_example(losses: jax.ShapeDtypeStruct, n: int, dtype: Any) -> None:
    """One loss an example, in the dtype of the parameters."""
    require(losses.shape == (n,), f"loss must return one value an example, shape ({n},), found shape {losses.shape}; return the per-example losses, not their mean or sum.")
    require(losses.dtype == dtype, f"loss must return {dtype} like the parameters, found {losses.dtype}; cast inside the loss.")


def outputs(out: Any, n: int, dtype: Any) -> None:
    """One floating array with a row an example."""
    is_array = isinstance(out, jax.ShapeDtypeStruct)
    require(is_array, f"model must return one array of outputs, found {type(out).__name__}; return the logits only.")
    require(len(out.shape) >= 1 and out.shape[0] == n, f"model must return one row of outputs an example, found shape {out.shape} for {n} examples; keep the leading axis.")
    require(out.dtype == dtype, f"model must compute in the dtype of params, {dtype}, found outputs of {out.dtype}; set the module's dtype or cast.")


def deterministic(first: np.ndarray, second: np.ndarray) -> None:
    """The losses of the same examples, evaluated twice in different company, agree."""
    require(np.isfinite(first).all(), "loss must be finite at the starting params, found NaN or infinity; scale the inputs or start from smaller params.")
    scale = np.abs(first).max() + np.abs(second).max()
    tolerance = 1e3 * np.finfo(first.dtype).eps * max(float(scale), float(np.finfo(first.dtype).tiny))
    difference = float(np.abs(first - second).max())
    require(difference <= tolerance, f"loss must be the same when evaluated twice, found a difference of {difference:.3g}; switch dropout off and freeze batch statistics (no examples may influence one another).")


def _describe(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__
