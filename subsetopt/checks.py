"""Every ValueError of the package: each names the argument, what was found, and the way out."""

import dataclasses
import math
import numbers
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subsetopt.pages import pieces


def require(condition: Any, name: str, must: str, found: Any, way_out: str) -> None:
    """Raise ValueError("<name> must <must>, found <found>; <way out>.") unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must {must}, found {found}; {way_out}.")


def _describe(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of length {len(value)}"
    return repr(value)


# --- numbers, words, functions -------------------------------------------------------------------------------------


def whole_number(name: str, value: Any, least: int) -> None:
    """An integer of at least `least`."""
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
    require(fits, name, f"be a whole number of at least {least}", repr(value), f"pass for example {name}={least}")


def real_number(name: str, value: Any, least: float = -math.inf, below: float = math.inf) -> None:
    """A finite number in [least, below)."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(_float(value))
    bounds = f" of at least {least:g}" if least > -math.inf else ""
    bounds += f" and below {below:g}" if below < math.inf else ""
    fits = number and least <= float(value) < below
    require(fits, name, f"be a finite number{bounds}", repr(value), f"pass for example {name}={max(least, 0):g}")


def _float(value: Any) -> float:
    """Infinite where Python's integer or fraction is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def with_plain_numbers(settings: Any) -> None:
    """NumPy's numbers and fractions in a dataclass become Python's: alike to JAX, and in print."""
    for field in dataclasses.fields(settings):
        object.__setattr__(settings, field.name, _plain(getattr(settings, field.name)))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, bool | str) or value is None:
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def seed(value: Any) -> None:
    """A whole number that both random generators take."""
    whole_number("seed", value, 0)
    require(value < 2**32, "seed", "be below 2**32", repr(value), "pass for example seed=0")


def folder(name: str, value: Any) -> None:
    """A path, or None."""
    fits = value is None or (isinstance(value, str | os.PathLike) and not os.path.isfile(value))
    require(fits, name, "be the path of a folder, or None", repr(value), f"pass for example {name}='folder'")


def same_everywhere(shown: list[int]) -> None:
    """All processes have shown the same."""
    must, found = "be the same, as params and seed, in every process", f"checksums {shown}"
    way_out = "give each the whole of the data, or devices=jax.local_devices() to fit alone"
    require(len(set(shown)) == 1, "data", must, found, way_out)


def same_step(steps: list[int]) -> None:
    """All processes go on from the same step."""
    must, way_out = "hold the same run for every process", "pass a folder that all of them see"
    require(len(set(steps)) == 1, "checkpoint", must, f"steps {steps}", way_out)


def positive(name: str, value: Any) -> None:
    """A finite number above zero."""
    real_number(name, value, 0)
    require(value > 0, name, "be above 0", repr(value), f"pass for example {name}=1")


def tuple_of(check: Any, name: str, values: Any, *bounds: float) -> None:
    """A non-empty tuple whose entries all pass `check(name, entry, *bounds)`."""
    fits = isinstance(values, tuple) and len(values) > 0
    require(fits, name, "be a non-empty tuple of numbers", repr(values), f"pass for example {name}=(0.5,)")
    for value in values:
        check(name, value, *bounds)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of a few words."""
    fits = isinstance(value, str) and value in allowed
    require(fits, name, f"be one of {', '.join(map(repr, allowed))}", repr(value), "pick one of them")


def flag(name: str, value: Any) -> None:
    """True or False."""
    require(isinstance(value, bool), name, "be True or False", repr(value), f"pass for example {name}=True")


def hashable(name: str, value: Any, way_out: str) -> None:
    """What compiled code is found again by."""
    try:
        hash(value)
    except TypeError:
        require(False, name, "be hashable, for its compiled code is found by its hash", _describe(value), way_out)


def function(name: str, value: Any) -> None:
    """A function, or None."""
    fits = value is None or callable(value)
    require(fits, name, "be a function of one Progress, or None", _describe(value), f"pass {name}=lambda progress: ...")


def solver(value: Any, protocol: type) -> None:
    """An instance with init and step."""
    fits = isinstance(value, protocol) and not isinstance(value, type)
    require(fits, "solver", "be a Solver instance", repr(value), "pass GaussNewton() or LBFGS()")


def growth(value: Any, kind: type, fresh_subsets: bool) -> Any:
    """A Growth that the solver can follow."""
    require(isinstance(value, kind), "growth", "be a Growth", repr(value), "pass for example Growth(start=4)")
    way_out = "pass nested=True, or a solver that takes fresh subsets such as GaussNewton()"
    require(value.nested or fresh_subsets, "growth", "be nested for a line search", "nested=False", way_out)
    return value


def until(value: Any) -> Any:
    """A stage end."""
    if isinstance(value, str):
        choice("until", value, ("representative", "converged"))
    else:
        whole_number("until", value, 1)
    return value if isinstance(value, str) else int(value)


def until_ends(value: Any, probe: int) -> None:
    """A stage end that comes on fresh subsets, too, with a probe of so many examples."""
    ends = isinstance(value, int) or (value == "representative" and probe > 0)
    must = "be a number of steps" + (", or 'representative'" if probe else "") + " where every step has a fresh subset"
    way_out = "pass until=1, or growth=Growth(nested=True)"
    require(ends, "until", must, f"{value!r}, which is never met there", way_out)


def optimizer(value: Any, params: Any) -> None:
    """An optax gradient transformation that is content with gradients and params."""
    fits = hasattr(value, "init") and hasattr(value, "update")
    way_out = "pass for example optax.adam(1e-3)"
    require(fits, "optimizer", "be an optax.GradientTransformation", _describe(value), way_out)
    hashable("optimizer", value, "make it an optax.GradientTransformation(init, update)")
    try:
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = jax.eval_shape(lambda p: value.update(p, value.init(p), p), params)
    except (TypeError, AttributeError) as error:  # line searches want the loss as well, lookahead two sets of params
        must = "update by gradients and parameters alone"
        raise ValueError(f"optimizer must {must}, found one with {str(error)!r}; {way_out}.") from error
    same_shapes("optimizer", "give updates of the shapes of params", updates, params, way_out)


def devices(values: Any, known: type, process: int) -> None:
    """A non-empty sequence of different devices of this process, or None."""
    if values is None:
        return
    fits = isinstance(values, list | tuple) and len(values) > 0 and all(isinstance(d, known) for d in values)
    way_out = "pass jax.local_devices() or a part of it, or None for all"
    require(fits, "devices", "be a non-empty list of JAX devices", repr(values), way_out)
    require(len(set(values)) == len(values), "devices", "be different devices", repr(values), "name each once")
    own = all(device.process_index == process for device in values)
    require(own, "devices", f"be devices of this process, number {process}", repr(values), way_out)


# --- data ----------------------------------------------------------------------------------------------------------


def pair(name: str, data: Any) -> tuple[Any, Any]:
    """The two members of (x, y) as arrays."""
    fits = isinstance(data, tuple | list) and len(data) == 2
    require(fits, name, "be a pair (x, y)", _describe(data), "pass for example (images, labels)")
    where = "" if name == "data" else f"{name} "
    return _array(f"{where}x", data[0]), _array(f"{where}y", data[1])


def _array(name: str, value: Any) -> Any:
    must = "be an array of real numbers with one row an example"
    require(value is not None, name, must, "None", "pass an array")
    sparse = hasattr(value, "toarray")
    require(not sparse, name, must, f"a sparse matrix of shape {getattr(value, 'shape', '')}", "pass its toarray()")
    require(not np.ma.isMaskedArray(value), name, must, "a masked array", "pass its filled() or compressed()")
    if not isinstance(value, jax.Array) and type(value) not in (np.ndarray, np.memmap):
        value = _by_numpy(name, must, value)
    require(value.dtype.isnative, name, must, f"the byte order of {value.dtype!r}", "cast it with astype")
    real = value.dtype == bool or any(jnp.issubdtype(value.dtype, kind) for kind in (np.integer, np.floating))
    first = value.reshape(-1)[:1].tolist() if value.dtype == object else []
    text = np.issubdtype(value.dtype, np.str_) or (bool(first) and isinstance(first[0], str))
    way_out = (
        "encode it, labels for example with np.unique(y, return_inverse=True)[1]" if text else "cast it with astype"
    )
    ragged = value.ndim == 0 or (value.dtype == object and not text)
    way_out = "stack the examples with np.stack" if ragged else way_out
    require(value.ndim > 0 and real, name, must, _describe(value), way_out)
    return value


def _by_numpy(name: str, must: str, value: Any) -> np.ndarray:
    """What else NumPy understands, in memory: lists, data frames, tensors of PyTorch on a CPU."""
    way_out = "pass it as a NumPy array" if hasattr(value, "shape") else "stack the examples with np.stack"
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # their own words, as on ragged lists, name no argument
        require(False, name, must, _describe(value), way_out)
        raise


def _fits_jax(name: str, values: Any) -> None:
    """Integers that JAX would otherwise cut to 32 bits in silence."""
    kept = jax.dtypes.canonicalize_dtype(values.dtype)
    if not np.issubdtype(values.dtype, np.integer) or kept == values.dtype or values.size == 0:
        return
    bounds = np.iinfo(kept)
    must = f"hold integers from {bounds.min} to {bounds.max} unless x64 is on"
    way_out = "rescale or cast it, or call jax.config.update('jax_enable_x64', True) first"
    for _, piece in pieces(values):
        low, high = int(piece.min()), int(piece.max())
        require(bounds.min <= low and high <= bounds.max, name, must, f"{low} to {high}", way_out)


def examples(x: Any, y: Any, where: str = "") -> None:
    """As many inputs as targets, at least one, all finite."""
    lengths = f"lengths {len(x)} and {len(y)}"
    require(len(x) == len(y), f"{where}x and y", "have the same length", lengths, "drop or add examples in one of them")
    require(
        len(x) > 0,
        f"{where}x",
        "hold at least one example",
        f"shape {tuple(x.shape)}",
        "pass the training examples" if not where else "pass the held-out examples, or None",
    )
    for name, values in (("x", x), ("y", y)):
        finite(where + name, values)
        _fits_jax(where + name, values)


def like_training_data(x: Any, y: Any, x_held_out: Any, y_held_out: Any) -> None:
    """Validation data of the training data's shapes and dtypes."""
    for name, a, b in (("x", x, x_held_out), ("y", y, y_held_out)):
        must = f"have shape (n, {', '.join(map(str, a.shape[1:]))}) and dtype {a.dtype} like the training data"
        fits = a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
        require(fits, f"validation {name}", must, _describe(b), "prepare both alike")


def patience(value: Any, validation: Any) -> None:
    """A number of epochs, and something to watch during them."""
    if value is None:
        return
    whole_number("patience", value, 1)
    found = f"patience={value} without validation data"
    require(validation is not None, "patience", "come with validation data", found, "pass validation=(x, y)")


def finite(name: str, values: Any) -> None:
    """No NaN and no infinity; looked at in pieces, so that a memory-mapped file stays on disk."""
    if not jnp.issubdtype(values.dtype, np.inexact):
        return
    for start, piece in pieces(values):
        good = np.isfinite(piece.reshape(len(piece), -1)).all(axis=1)
        if not good.all():
            row = start + int(np.flatnonzero(~good)[0])
            require(False, name, "be finite", f"NaN or infinity in row {row}", "remove or impute such examples")


def x_dtype(x: Any, dtype: Any) -> None:
    """Floating inputs have the dtype of the parameters: JAX would otherwise convert one of them silently."""
    fits = not jnp.issubdtype(x.dtype, np.floating) or x.dtype == dtype
    way_out = f"pass x.astype('{dtype}')"
    if x.dtype == np.float64:
        way_out += ", or float64 params with jax.config.update('jax_enable_x64', True)"
    require(fits, "x", f"have the dtype of params, {dtype}", x.dtype, way_out)


def targets(loss: Any, y: Any, outputs: Any, name: str = "y") -> None:
    """Targets that fit the outputs of a named loss."""
    if loss == "softmax_cross_entropy":
        fits = len(outputs.shape) == 2
        way_out = "reshape the model's outputs or pass a loss function"
        require(fits, "model", f"return outputs (n, classes) for loss={loss!r}", outputs.shape, way_out)
        (_labels if y.ndim == 1 else _probabilities)(name, y, outputs.shape[1], outputs.dtype)
    elif loss == "squared_error":
        shape = tuple(outputs.shape[1:])
        flat = y.ndim < 3 or len(shape) < 2  # rows of as many numbers; of the same shape but for axes of length one
        alike = [n for n in y.shape[1:] if n > 1] == [n for n in shape if n > 1]
        fits = math.prod(y.shape[1:]) == math.prod(shape) and (flat or alike)
        must = f"have one value for each of the model's outputs {shape}"
        require(fits, name, must, f"shape {tuple(y.shape)}", "reshape or transpose y or the outputs")
        _same_dtype(name, y, outputs.dtype)
    elif jnp.issubdtype(y.dtype, np.floating):
        _same_dtype(name, y, outputs.dtype)


def _labels(name: str, y: Any, classes: int, dtype: Any) -> None:
    integers = np.issubdtype(y.dtype, np.integer)
    require(integers, name, "hold integer labels for cross-entropy", y.dtype, "pass y.astype('int32')")
    low, high = int(np.min(y)), int(np.max(y))
    must = f"hold labels from 0 to {classes - 1}, one for each of the model's {classes} outputs"
    way_out = f"renumber the labels or give the model {max(high + 1, classes)} outputs"
    require(low >= 0 and high < classes, name, must, f"{low} to {high}", way_out)


def _probabilities(name: str, y: Any, classes: int, dtype: Any) -> None:
    fits = y.ndim == 2 and y.shape[1] == classes
    must = f"have shape (n,) of labels or (n, {classes}) of probabilities"
    require(fits, name, must, f"shape {tuple(y.shape)}", f"match the model's {classes} outputs")
    _same_dtype(name, y, dtype)
    total = np.asarray(y).sum(axis=1)
    fits = np.allclose(total, 1, atol=1e-3) and np.min(y) >= 0
    found = f"sums from {total.min():.4g} to {total.max():.4g}, least entry {np.min(y):.4g}"
    require(fits, name, "hold rows of probabilities that sum to 1", found, "normalise the rows")


def _same_dtype(name: str, value: Any, dtype: Any) -> None:
    require(
        value.dtype == dtype,
        name,
        f"have the dtype of the outputs, {dtype}",
        value.dtype,
        f"pass {name}.astype('{dtype}')",
    )


# --- model and parameters ------------------------------------------------------------------------------------------


def plain_function(model: Any, params: Any) -> None:
    """A function model brings its own parameters."""
    name = getattr(model, "__name__", repr(model))
    require(not isinstance(model, type), "model", "be an instance", f"the class {name}", f"write {name}(...)")
    way_out = "pass one of those"
    require(callable(model), "model", "be a flax module or a function apply(params, x)", _describe(model), way_out)
    hashable("model", model, "pass a function, such as lambda params, x: model(params, x)")
    way_out = "pass the parameters; only linen modules are initialised from a seed"
    require(params is not None, "params", "be given with model=apply(params, x)", "None", way_out)


def shapes(function: Any, *arguments: Any) -> Any:
    """What a model's function returns, in the abstract; it may need no random numbers beside its parameters'."""
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        # By name: flax is the user's import, not ours.
        if type(error).__name__ != "InvalidRngError":
            raise
        way_out = "switch dropout off, for example with deterministic=True"
        message = str(error).split("(http")[0].strip()
        raise ValueError(
            f"model must need no rng beside that of its params, found a wanted rng, {message!r}; {way_out}."
        ) from error


def only_params(variables: Any) -> None:
    """Parameters, and no batch statistics or other state: the loss must be a pure function of the parameters."""
    others = sorted(set(variables) - {"params"})
    way_out = "pass apply(params, x) that closes over them, with frozen statistics"
    require(not others, "model", "have no variable collections beside 'params'", others, way_out)
    way_out = "pass a module with at least one layer"
    require("params" in variables, "model", "have trainable parameters", "none", way_out)


def same_tree(params: Any, expected: Any, where: str) -> None:
    """The tree of arrays that the module itself would make."""
    same_shapes("params", "have the module's own structure", params, expected, f"pass {where}")


def same_shapes(name: str, must: str, tree: Any, expected: Any, way_out: str) -> None:
    """Arrays of the expected tree's names and shapes."""
    want, have = _shapes(expected), _shapes(tree)
    different = sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key))
    if different:
        key = different[0]
        must = f"{must}, {key}: {want.get(key, 'nothing')}"
        require(False, name, must, f"{key}: {have.get(key, 'nothing')}", way_out)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def parameter_dtype(leaves: list[Any]) -> np.dtype:
    """The one floating dtype of all parameters, which are finite."""
    require(leaves, "params", "hold at least one array", "an empty tree", "pass the model's parameters")
    found = sorted({str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype) for leaf in leaves})
    cast = "cast them with jax.tree.map(lambda p: np.asarray(p, 'float32'), params)"
    require(len(found) == 1, "params", "have one dtype", " and ".join(found), cast)
    require(found[0] in ("float32", "float64"), "params", "be float32 or float64", found[0], cast)
    x64 = jax.config.read("jax_enable_x64")
    way_out = cast + ", or call jax.config.update('jax_enable_x64', True) first"
    require(found[0] == "float32" or x64, "params", "be float32 unless x64 is on", found[0], way_out)
    all_finite = all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
    require(all_finite, "params", "be finite", "NaN or infinity", "start from other parameters")
    return np.dtype(found[0])


def mask(params: Any, trainable: Any) -> None:
    """Bools or boolean arrays in the structure of params, with something left to train."""
    want, have = jax.tree.structure(params), jax.tree.structure(trainable)
    way_out = "build it with jax.tree.map(lambda p: True, params) and change entries"
    require(want == have, "trainable", f"have the structure of params, {want}", have, way_out)
    anything = False
    for (path, leaf), m in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(trainable), strict=True):
        name, m = f"trainable{jax.tree_util.keystr(path)}", np.asarray(m)
        require(m.dtype == bool, name, "be a bool or a boolean array", m.dtype, "pass True, False or an array of them")
        fits = m.shape in ((), np.shape(leaf))
        require(fits, name, f"have the shape {np.shape(leaf)} of its parameter", m.shape, "use np.broadcast_to")
        anything |= bool(m.any()) and np.size(leaf) > 0
    require(anything, "trainable", "leave at least one parameter to train", "all False", "set an entry to True")


# --- outputs and loss ----------------------------------------------------------------------------------------------


def loss_argument(loss: Any, known: tuple[str, ...]) -> None:
    """A known name or a function."""
    fits = loss in known if isinstance(loss, str) else callable(loss)
    must = f"be one of {', '.join(map(repr, known))} or a function (outputs, y) -> (n,)"
    require(fits, "loss", must, repr(loss), "pass one of those")
    hashable("loss", loss, "pass a function, or make it a dataclass with frozen=True")


def outputs(out: Any, n: int, dtype: Any) -> None:
    """One floating array with a row an example."""
    is_array = isinstance(out, jax.ShapeDtypeStruct)
    require(is_array, "model", "return one array of outputs", type(out).__name__, "return the logits only")
    fits = len(out.shape) > 1 and out.shape[0] == n and 0 not in out.shape
    must = f"return outputs of shape ({n}, M) for {n} examples"
    require(fits, "model", must, f"shape {out.shape}", "keep the leading axis, and at least one more")
    must = f"compute in the dtype of params, {dtype}"
    require(out.dtype == dtype, "model", must, f"outputs of {out.dtype}", "set the module's dtype, or cast")


def per_example(losses: Any, n: int, dtype: Any) -> None:
    """One loss an example, in the dtype of the parameters."""
    shape = getattr(losses, "shape", type(losses).__name__)
    way_out = "return the per-example losses, not their mean or sum"
    require(shape == (n,), "loss", f"return one value an example, shape ({n},)", f"shape {shape}", way_out)
    require(losses.dtype == dtype, "loss", f"return {dtype} like the parameters", losses.dtype, "cast inside the loss")


def deterministic(first: np.ndarray, second: np.ndarray) -> None:
    """The losses of the same examples, evaluated twice in different company, agree."""
    way_out = "scale the inputs, or start from smaller params"
    finite = np.isfinite(first).all() and np.isfinite(second).all()
    require(finite, "loss", "be finite at the starting params", "NaN or infinity", way_out)
    scale = float(np.abs(first).max() + np.abs(second).max())
    difference = float(np.abs(first - second).max())
    fits = difference <= 1e3 * float(np.finfo(first.dtype).eps) * scale
    way_out = "switch dropout off, freeze batch statistics, and in a loss of your own broadcast no example to another"
    must = "be the same when evaluated twice, in different company"
    require(fits, "loss", must, f"a difference of {difference:.3g}", way_out)
