"""Wolfe line search that survives float32, as a pure state machine: it never evaluates anything itself.

Nocedal and Wright, Numerical Optimization (2006), section 3.5 (cubic steps, (3.59)); approximate Wolfe conditions of
Hager and Zhang, SIAM J. Optim. 16 (2005), section 3. Notation: phi(t) = L(w + t d) - L(w), slope(t) = phi'(t).
Differs from both in: phi is a summed difference of per-example losses, accurate to far below the rounding of L; the
allowance of the approximate conditions is scaled by the dtype; at most `max_trials` trials, the best point kept.
"""

from typing import NamedTuple

import numpy as np

DECREASE, CURVATURE = 1e-4, 0.9  # Nocedal and Wright's constants for quasi-Newton directions


class Point(NamedTuple):
    """One trial: step length, phi and slope there."""

    t: float
    phi: float
    slope: float


class Search(NamedTuple):
    """low: longest step known to be short of the minimum. high: shortest step known to be beyond it, or None."""

    low: Point
    high: Point | None
    slope0: float
    allowance: float


def begin(slope0: float, value: float, dtype: np.dtype) -> Search:
    """A search along a descent direction of slope `slope0` < 0, from loss `value`."""
    # About 80 eps in float32: below this an increase of L cannot be told from rounding (heuristic, measured).
    relative = 1e-5 if dtype == np.float32 else 1e-12
    return Search(Point(0.0, 0.0, slope0), None, slope0, relative * abs(value))


def accepts(search: Search, point: Point) -> bool:
    """The strong Wolfe conditions, or the approximate ones near the limit of precision."""
    if not (np.isfinite(point.phi) and np.isfinite(point.slope)):
        return False
    flat = point.slope >= CURVATURE * search.slope0
    wolfe = point.phi <= DECREASE * point.t * search.slope0 and abs(point.slope) <= -CURVATURE * search.slope0
    approximate = point.phi <= search.allowance and flat and point.slope <= (2 * DECREASE - 1) * search.slope0
    return bool(wolfe or approximate)


def narrow(search: Search, point: Point) -> Search:
    """The search after a trial that was not accepted."""
    beyond = not np.isfinite(point.phi) or not np.isfinite(point.slope) or point.slope >= 0
    if beyond or point.phi > max(search.allowance, DECREASE * point.t * search.slope0):
        return search._replace(high=point)
    return search._replace(low=point)


def propose(search: Search) -> float:
    """The next step length: cubic inside the bracket, cubic extrapolation or a stride of 4 where there is none yet."""
    low, high = search.low, search.high
    if high is None:
        return 4 * low.t
    width = high.t - low.t
    if not np.isfinite(high.phi):
        return low.t + 0.1 * width
    inside = _cubic_minimum(low, high)
    return float(np.clip(inside, low.t + 0.1 * width, high.t - 0.1 * width))


def _cubic_minimum(a: Point, b: Point) -> float:
    """Minimiser of the cubic through both values and slopes, (3.59); the middle where there is none."""
    d1 = a.slope + b.slope - 3 * (a.phi - b.phi) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if not np.isfinite(square) or square < 0:
        return (a.t + b.t) / 2
    d2 = np.sign(b.t - a.t) * np.sqrt(square)
    denominator = b.slope - a.slope + 2 * d2
    if denominator == 0:
        return (a.t + b.t) / 2
    return float(b.t - (b.t - a.t) * (b.slope + d2 - d1) / denominator)
