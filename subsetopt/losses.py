"""Per-example losses and the square root of their output Hessian.

Symbols: f (n, M) outputs, y targets, l (n,) losses, H_i (M, M) the Hessian of l_i in f_i, B_i a root: B_i B_i' = H_i.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """A per-example loss with the pieces that Gauss-Newton needs; hashable, so that equal losses never recompile.

    values: (f, y) -> (n,) losses.
    root: (f, y, u) -> (n, M) products B_i u_i.
    hessian: (f, y, v) -> (n, M) products H_i v_i.
    uncertainty: (f, y) -> (n,) s_i = sqrt(trace H_i), how much example i can still say about the curvature.
    residual: (f, y) -> (n, M) c_i with B_i c_i = dl_i/df_i; None where the loss gives no such c.
    """

    values: Callable[[Array, Array], Array]
    root: Callable[[Array, Array, Array], Array]
    hessian: Callable[[Array, Array, Array], Array]
    uncertainty: Callable[[Array, Array], Array]
    residual: Callable[[Array, Array], Array] | None = None

    def slope(self, f: Array, y: Array) -> Array:
        """(n,) |dl_i/df_i|, how much example i can still say about the gradient."""
        slopes = jax.grad(lambda f: jnp.sum(self.values(f, y)))(f)
        return jnp.linalg.norm(_flat(slopes), axis=-1)


def _softmax_values(f: Array, y: Array) -> Array:
    if y.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(f, y)
    return optax.softmax_cross_entropy(f, y)


def _softmax_root(f: Array, y: Array, u: Array) -> Array:
    """B u with B = diag(sqrt p) - p sqrt(p)': then B B' = diag p - p p' exactly."""
    p = jax.nn.softmax(f)
    r = jnp.sqrt(p)
    return r * u - p * jnp.sum(r * u, axis=-1, keepdims=True)


def _softmax_hessian(f: Array, y: Array, v: Array) -> Array:
    p = jax.nn.softmax(f)
    return p * (v - jnp.sum(p * v, axis=-1, keepdims=True))


def _softmax_uncertainty(f: Array, y: Array) -> Array:
    """sqrt(1 - sum p^2), as sqrt(sum p (1 - p)): no cancellation where the model is sure."""
    p = jax.nn.softmax(f)
    return jnp.sqrt(jnp.sum(p * (1 - p), axis=-1))


def _softmax_residual(f: Array, y: Array) -> Array:
    """(p - y) / sqrt p; sqrt p of a class that the model rules out is kept at 1e-13."""
    # Not in the labels' own dtype: eight bits would count classes from 256 on as 0, 1, ...
    target = jax.nn.one_hot(y.astype(np.int32), f.shape[-1], dtype=f.dtype) if y.ndim == 1 else y
    half = jnp.maximum(jax.nn.log_softmax(f) / 2, -30)
    return jnp.exp(half) - target * jnp.exp(-half)


def _flat(f: Array) -> Array:
    return f.reshape(f.shape[0], -1)


def _squared_values(f: Array, y: Array) -> Array:
    return jnp.sum(optax.l2_loss(_flat(f), y.reshape(f.shape[0], -1)), axis=-1)


def _squared_uncertainty(f: Array, y: Array) -> Array:
    flat = _flat(f)
    return jnp.full(flat.shape[:1], flat.shape[1] ** 0.5, f.dtype)


def _hessians(values: Callable[[Array, Array], Array], f: Array, y: Array) -> Array:
    """(n, M, M) output Hessians of any loss, zero where there is none: such an example says nothing of curvature."""

    def one(f_i: Array, y_i: Array) -> Array:
        def of_flat(g: Array) -> Array:
            return values(g.reshape(f_i.shape)[None], y_i[None])[0]

        return jax.hessian(of_flat)(f_i.reshape(-1))

    hessians = jax.vmap(one)(f, y)
    return jnp.where(jnp.isfinite(hessians).all(axis=(1, 2), keepdims=True), hessians, 0)


def _roots(hessians: Array) -> Array:
    """Their symmetric roots, negative eigenvalues counting as zero: unique, unlike any other root."""
    eigenvalues, vectors = jnp.linalg.eigh(hessians)
    scaled = vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0))[:, None]
    return scaled @ vectors.mT


@functools.lru_cache(maxsize=128)  # the same function gives the same Loss, whose compiled code is found again
def _custom(values: Callable[[Array, Array], Array]) -> Loss:
    def root(f: Array, y: Array, u: Array) -> Array:
        return jnp.einsum("nij,nj->ni", _roots(_hessians(values, f, y)), _flat(u)).reshape(f.shape)

    def hessian(f: Array, y: Array, v: Array) -> Array:
        b = _roots(_hessians(values, f, y))
        return jnp.einsum("nij,njk,nk->ni", b, b, _flat(v)).reshape(f.shape)

    def uncertainty(f: Array, y: Array) -> Array:
        trace = jnp.trace(_hessians(values, f, y), axis1=1, axis2=2)
        return jnp.sqrt(jnp.maximum(trace, 0))

    return Loss(values, root, hessian, uncertainty)


LOSSES = {
    "softmax_cross_entropy": Loss(
        _softmax_values, _softmax_root, _softmax_hessian, _softmax_uncertainty, _softmax_residual
    ),
    "squared_error": Loss(
        _squared_values,
        lambda f, y, u: u,
        lambda f, y, v: v,
        _squared_uncertainty,
        lambda f, y: _flat(f) - y.reshape(f.shape[0], -1),
    ),
}


def resolve(loss: str | Callable[[Array, Array], Array]) -> Loss:
    """The named loss, or the one built from any convex per-example function (outputs, y) -> (n,).

    "softmax_cross_entropy": y integer labels (n,) or probabilities (n, M).
    "squared_error": 1/2 sum_m (f_m - y_m)^2.
    """
    if isinstance(loss, str):
        return LOSSES[loss]
    return _custom(loss)
