"""Wolfe line search that survives float32, as a pure state machine: it never evaluates anything itself.

Nocedal and Wright, Numerical Optimization (2006), section 3.5 (cubic steps, (3.59)); approximate Wolfe conditions of
Hager and Zhang, SIAM J. Optim. 16 (2005), section 3. Notation: phi(t) = (L(w + t d) - L(w)) / |slope_0|, slope(t) =
phi'(t): both are divided by the slope at t = 0, so slope(0) = -1 and nothing in here knows the loss's scale.
Differs from both in: phi is a summed difference of per-example losses, accurate to far below the rounding of L; the
allowance of the approximate conditions is scaled by the dtype; few trials, the best point kept.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

DECREASE, CURVATURE = 1e-4, 0.9  # Nocedal and Wright's constants for quasi-Newton directions


class Point(NamedTuple):
    """One trial: step length, phi and slope there."""

    t: Array
    phi: Array
    slope: Array


class Search(NamedTuple):
    """low: longest step known to be short of the minimum. high: shortest one known to be beyond it; t infinite: none.

    allowance: an increase of phi that cannot be told from rounding.
    """

    low: Point
    high: Point
    allowance: Array


def begin(slope0: Array, value: Array) -> Search:
    """A search along a descent direction of slope `slope0` < 0, from loss `value`."""
    # About 80 eps in float32: below this an increase of L cannot be told from rounding (heuristic, measured).
    relative = 1e-5 if value.dtype == np.float32 else 1e-12
    zero = jnp.zeros_like(value)
    nowhere = Point(zero + jnp.inf, zero, zero)
    return Search(Point(zero, zero, zero - 1), nowhere, relative * jnp.abs(value) / jnp.abs(slope0))


def accepts(search: Search, point: Point) -> Array:
    """The strong Wolfe conditions, or the approximate ones near the limit of precision."""
    flat = point.slope >= -CURVATURE
    wolfe = (point.phi <= -DECREASE * point.t) & (jnp.abs(point.slope) <= CURVATURE)
    approximate = (point.phi <= search.allowance) & flat & (point.slope <= 1 - 2 * DECREASE)
    return _finite(point) & (wolfe | approximate)


def narrow(search: Search, point: Point) -> Search:
    """The search after a trial that was not accepted."""
    uphill = (point.slope >= 0) | (point.phi > jnp.maximum(search.allowance, -DECREASE * point.t))
    beyond = ~_finite(point) | uphill
    low = Point(*(jnp.where(beyond, a, b) for a, b in zip(search.low, point, strict=True)))
    high = Point(*(jnp.where(beyond, b, a) for a, b in zip(search.high, point, strict=True)))
    return search._replace(low=low, high=high)


def propose(search: Search) -> Array:
    """The next step length: cubic inside the bracket, near its low end where the loss is not finite beyond.

    A stride of 4 where there is no bracket yet.
    """
    low, high = search.low, search.high
    width = high.t - low.t
    # To a tenth at once, and to a hundredth where the slope beyond is so steep that no rounding can feign it.
    least = jnp.where(high.slope > 10, 0.01, 0.1).astype(width.dtype)
    inside = jnp.clip(_cubic_minimum(low, high), low.t + least * width, high.t - 0.1 * width)
    bracketed = jnp.where(_finite(high), inside, low.t + 0.1 * width)
    return jnp.where(jnp.isfinite(high.t), bracketed, 4 * low.t)


def _finite(point: Point) -> Array:
    return jnp.isfinite(point.phi) & jnp.isfinite(point.slope)


def _cubic_minimum(a: Point, b: Point) -> Array:
    """Minimiser of the cubic through both values and slopes, (3.59) for a.t < b.t; the middle where there is none."""
    d1 = a.slope + b.slope - 3 * (a.phi - b.phi) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    d2 = jnp.sqrt(jnp.maximum(square, 0))
    denominator = b.slope - a.slope + 2 * d2
    exists = jnp.isfinite(square) & (square >= 0) & (denominator != 0)
    cubic = b.t - (b.t - a.t) * (b.slope + d2 - d1) / jnp.where(exists, denominator, 1)
    return jnp.where(exists, cubic, (a.t + b.t) / 2)
