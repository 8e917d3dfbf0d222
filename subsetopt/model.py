"""One pure function outputs(w, x) of a flat vector w, whatever the user's model is.

A linen module, an nnx module or a plain `apply(params, x)` becomes a `Model`: hashable, so it is a static argument of
compiled code, and a dict of `constants` (frozen parameters, nnx state): arrays, so they are not compiled in.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from subsetopt import checks

Params = Any
Constants = dict[str, Any]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Linen:
    """Equal modules give equal adapters: a second fit of the same module recompiles nothing."""

    module: Any

    def __call__(self, params: Params, state: Any, x: Array) -> Array:
        return self.module.apply({"params": params}, x)

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, _Linen) and bool(self.module == other.module)
        except (ValueError, TypeError):  # modules with arrays in them, which do not compare
            return False

    def __hash__(self) -> int:
        try:
            return hash(self.module)
        except TypeError:  # a module with a list in it, as nn.Sequential: still found again by being equal
            return hash(type(self.module))


@dataclasses.dataclass(frozen=True)
class _Nnx:
    graphdef: Any

    def __call__(self, params: Params, state: Any, x: Array) -> Array:
        nnx = sys.modules["flax.nnx"]
        own = jax.tree.map(lambda a: a, state)  # variables of this trace: a call may write to them, which is dropped
        return nnx.merge(self.graphdef, params, own)(x)


@dataclasses.dataclass(frozen=True)
class _Function:
    apply: Callable[[Params, Array], Array]

    def __call__(self, params: Params, state: Any, x: Array) -> Array:
        return self.apply(params, x)


@dataclasses.dataclass(frozen=True)
class Model:
    """The static part of a model: how a flat vector becomes parameters and parameters become outputs.

    shapes: of all parameter arrays. trained: of those that w holds, one after the other; (n,) where it holds n entries
    of an array.
    """

    apply: Callable[[Params, Any, Array], Array]
    structure: Any
    shapes: tuple[Shape, ...]
    trained: tuple[Shape, ...]

    def unflatten(self, w: Array, constants: Constants) -> Params:
        """The parameter tree of the trainable entries w (P,) and the frozen rest."""
        if "index" in constants:
            w = constants["full"].at[constants["index"]].set(w)
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        pieces = jnp.split(w, ends[:-1])
        leaves = [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def outputs(self, w: Array, constants: Constants, x: Array) -> Array:
        """Model outputs (n, ...) of examples x (n, ...)."""
        return self.apply(self.unflatten(w, constants), constants["state"], x)


def prepare(model: Any, params: Params | None, x: Any, seed: int, trainable: Any) -> tuple[Model, Array, Constants]:
    """The static model, its trainable entries w (P,), and the constants they are completed with.

    model: flax.linen.Module, flax.nnx.Module, or apply(params, x). params None: linen init from `seed`; an nnx
    module brings its own. trainable: None, or bools or boolean arrays shaped like params.
    """
    apply, params, state = _adapt(model, params, x, seed)
    leaves, structure = jax.tree.flatten(params)
    dtype = checks.parameter_dtype(leaves)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    full = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    shapes = tuple(leaf.shape for leaf in leaves)
    constants: Constants = {"state": state}
    if trainable is None:
        return Model(apply, structure, shapes, shapes), full, constants
    masks = jax.tree.leaves(mask_tree(params, trainable))
    index = np.flatnonzero(np.concatenate([mask.reshape(-1) for mask in masks]))
    constants |= {"full": full, "index": jnp.asarray(index)}
    static = Model(apply, structure, shapes, tuple(map(_trained, masks)))
    return static, full[constants["index"]].astype(dtype), constants


def _trained(mask: np.ndarray) -> Shape:
    return mask.shape if mask.all() else (int(mask.sum()),)


def mask_tree(params: Params, trainable: Any) -> Params:
    """`trainable` as boolean arrays in the exact shapes of params."""
    checks.mask(params, trainable)
    return jax.tree.map(lambda p, m: np.broadcast_to(np.asarray(m), np.shape(p)), params, trainable)


def _adapt(model: Any, params: Params | None, x: Any, seed: int) -> tuple[Callable, Params, Any]:
    # A flax module can only come from a flax that is imported already: no import of ours for users without one.
    linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
    if linen is not None and isinstance(model, linen.Module):
        return _Linen(model), _linen_params(model, params, x, seed), None
    if nnx is not None and isinstance(model, nnx.Module):
        twin = nnx.clone(model)
        twin.eval()  # dropout off, statistics frozen: the loss must be deterministic
        graphdef, own, state = nnx.split(twin, nnx.Param, ...)
        checks.hashable(
            "model", graphdef, "keep in its attributes what is neither array nor module as tuples, not as dicts"
        )
        if params is None:
            return _Nnx(graphdef), own, state
        checks.same_tree(params, own, "nnx.state(model, nnx.Param)")
        return _Nnx(graphdef), params, state
    checks.plain_function(model, params)
    return _Function(model), params, None


# Of the module, not its method: equal modules compile once. LLVM takes ten times as long to optimise random draws that
# are made once.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1})
def _init(linen: _Linen, key: Array, x: Array) -> Params:
    return linen.module.init(key, x)


def _linen_params(module: Any, params: Params | None, x: Any, seed: int) -> Params:
    first, key = jnp.asarray(x[:1]), jax.random.key(seed)
    expected = checks.shapes(module.init, key, first)
    checks.only_params(expected)
    if params is None:
        return _init(_Linen(module), key, first)["params"]
    checks.same_tree(params, expected["params"], "module.init(key, x)['params']")
    return params
