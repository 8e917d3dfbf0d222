"""The problems on which every solver and every kernel is tested: one list for all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.datasets import load_digits


class Example(NamedTuple):
    """A loss to minimise: what fit_subset takes. `convex`: whether its minimum is the only one."""

    name: str
    apply: Callable[[Any, Array], Array]
    params: Any
    x: np.ndarray
    y: np.ndarray
    loss: str | Callable[[Array, Array], Array]
    l2: float = 0.0
    convex: bool = True


def linear(params: Any, x: Array) -> Array:
    return x @ params["w"]


def affine(params: Any, x: Array) -> Array:
    return x @ params["w"] + params["b"][None]


def rosenbrock(params: Any, x: Array) -> Array:
    """Outputs 10 (b - a^2) and a, whose targets are 0 and 1."""
    a, b = params["a"], params["b"]
    return x * jnp.stack([10 * (b - a**2), a])[None]


def mlp(params: Any, x: Array) -> Array:
    return affine(params[1], jnp.tanh(affine(params[0], x)))


def cnn(params: Any, x: Array) -> Array:
    """One convolution, 3 x 3 with stride 2, and a dense layer, on images of 8 x 8 given as rows."""
    images = x.reshape(-1, 8, 8, 1)
    layout = ("NHWC", "HWIO", "NHWC")
    maps = jax.lax.conv_general_dilated(images, params[0]["w"], (2, 2), "VALID", dimension_numbers=layout)
    return affine(params[1], jnp.tanh(maps + params[0]["b"][None, None, None]).reshape(len(x), -1))


def pseudo_huber(outputs: Array, y: Array) -> Array:
    """sqrt(1 + |f - e_y|^2) - 1: strictly convex, with an output Hessian that is not diagonal."""
    residuals = outputs - jax.nn.one_hot(y, outputs.shape[1], dtype=outputs.dtype)
    return jnp.sqrt(1 + jnp.sum(residuals**2, axis=1)) - 1


def least_squares(condition: float, dtype: Any, n: int = 60, parameters: int = 12) -> Example:
    """A convex quadratic whose Hessian has this condition number and largest eigenvalue 1."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(n, parameters)))
    right, _ = np.linalg.qr(rng.normal(size=(parameters, parameters)))
    x = left * np.geomspace(1, condition**-0.5, parameters) @ right * n**0.5
    y = x @ rng.normal(size=(parameters, 1)) + 0.1 * rng.normal(size=(n, 1))
    params = {"w": np.zeros((parameters, 1), dtype)}
    name = f"quadratic of condition {condition:.0e}"
    return Example(name, linear, params, x.astype(dtype), y.astype(dtype), "squared_error")


def problems(dtype: Any) -> list[Example]:
    """All of them, in float32 or float64."""
    rng = np.random.default_rng(0)

    def layer(*shape: int) -> dict[str, np.ndarray]:
        w = rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5
        return {"w": w.astype(dtype), "b": np.zeros(shape[-1:], dtype)}

    x, y = load_digits(n_class=4, return_X_y=True)
    digits = (x[:150] / 16).astype(dtype), y[:150].astype(np.int32)
    valley = {"a": np.array(-1.2, dtype), "b": np.array(1, dtype)}
    ones, targets = np.ones((4, 1), dtype), np.tile(np.array([0, 1], dtype), (4, 1))
    cross_entropy = "softmax_cross_entropy"
    return [
        *(least_squares(condition, dtype) for condition in (1e2, 1e4, 1e6)),
        Example("Rosenbrock", rosenbrock, valley, ones, targets, "squared_error"),
        Example("logistic regression", affine, layer(64, 4), *digits, cross_entropy, 1e-3),
        Example("Huber regression", affine, layer(64, 4), *digits, pseudo_huber, 1e-3),
        Example("MLP", mlp, [layer(64, 4), layer(4, 4)], *digits, cross_entropy, 1e-3, convex=False),
        Example("CNN", cnn, [layer(3, 3, 1, 2), layer(18, 4)], *digits, cross_entropy, 3e-4, convex=False),
    ]
