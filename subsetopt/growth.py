"""Overdetermination ratios and subset sizes; one stratified permutation of the training set."""

import dataclasses
import heapq
import math
from collections.abc import Iterator

import numpy as np

from subsetopt import checks


def overdetermination_ratio(examples: int, outputs: int, parameters: int) -> float:
    """Q = K M / P: constraints (K examples times M outputs) per trainable parameter.

    Above one the training data determine the parameters; arXiv 2410.16523 asks that Q "sufficiently exceed" one
    before a subset's loss minimum stands for that of the whole set.
    """
    for name, value in (("examples", examples), ("outputs", outputs), ("parameters", parameters)):
        checks.whole_number(name, value, 1)
    return examples * outputs / parameters


@dataclasses.dataclass(frozen=True)
class Growth:
    """How the subset grows: ratios Q = start, start * factor, start * factor^2, ... and then the whole set.

    start: ratio of the first subset.
    factor: what the ratio is multiplied by from stage to stage, above 1.
    stop: ratio of the last subset; None: on to the whole training set. `Growth(q, stop=q)` is one subset.
    nested: True: each subset is a prefix of one permutation, a deterministic objective. False: every step draws a
        fresh subset of its stage's size (Gauss-Newton only; seeded, so just as repeatable).
    importance: share of a fresh subset that is drawn in proportion to the examples' last known slopes |dl/df|, the
        rest uniformly, for slopes grow old; weights keep its loss all but unbiased. Below 1; 0: all uniformly.
    """

    start: float = 4.0
    factor: float = 1.25
    stop: float | None = None
    nested: bool = True
    importance: float = 0.8

    def __post_init__(self):
        checks.flag("Growth.nested", self.nested)
        checks.positive("Growth.start", self.start)
        checks.real_number("Growth.factor", self.factor)
        way_out = "for one subset use Growth(start=q, stop=q)"
        checks.require(self.factor > 1, "Growth.factor", "be above 1", repr(self.factor), way_out)
        if self.stop is not None:
            checks.real_number("Growth.stop", self.stop)
            must = f"be at least start={self.start!r}"
            checks.require(self.stop >= self.start, "Growth.stop", must, repr(self.stop), "None grows to the whole set")
        checks.real_number("Growth.importance", self.importance, 0, 1)
        checks.with_plain_numbers(self)

    def sizes(self, examples: int, parameters: int, outputs: int, probe: int = 0) -> list[int]:
        """Subset sizes K = ceil(Q P / M), stage by stage.

        Subsets leave `probe` examples out, except the last one of `stop=None`, which is the whole set.
        """

        def size(ratio: float) -> int:
            # 1e-9: a ratio that is a whole number of examples up to rounding stays that number.
            return max(1, math.ceil(min(ratio * parameters / outputs, examples) - 1e-9))

        last = examples if self.stop is None or size(self.stop) >= examples else min(size(self.stop), examples - probe)
        sizes, ratio = [], self.start
        while size(ratio) < min(last, examples - probe + 1):
            sizes.append(size(ratio))
            # Not one by one where many of them have the same size.
            larger, growth = math.log((sizes[-1] + 1) * outputs / parameters), math.log(self.factor)
            turns = math.floor((larger - math.log(ratio)) / growth)
            ratio = math.exp(math.log(ratio) + turns * growth) if turns > 1 else ratio * self.factor
        return sorted({*sizes, last})


def draw_fresh(
    slopes: np.ndarray, size: int, importance: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A fresh subset: `size` different positions, and weights that make its sums all but unbiased means of the n.

    slopes: (n,) last known |dl_i/df_i|, NaN where there is none: those count as the mean. Sampling by slopes:
    Katharopoulos and Fleuret, Not all samples are created equal (2018), there by this very bound of the gradient's
    norm; sequential Poisson sampling: Ohlsson, J. Official Statistics 14 (1998).
    """
    known = np.isfinite(slopes)
    mean = slopes[known].mean() if known.any() else 1.0
    slopes = np.where(known, slopes, mean).astype(np.float64)
    total, n = slopes.sum(), len(slopes)
    share = slopes / total if total > 0 else np.full(n, 1 / n)
    inclusion = _inclusion(importance * share + (1 - importance) / n, size)
    # Who is sure to come is ranked first.
    rank = np.where(inclusion < 1, rng.random(n) / inclusion, 0)
    chosen = np.argpartition(rank, size - 1)[:size]
    return chosen, 1 / (n * inclusion[chosen])


def _inclusion(shares: np.ndarray, size: int) -> np.ndarray:
    """Probabilities in proportion to the shares, none above one, with the sum `size`."""
    inclusion = np.ones(len(shares))
    rest = np.arange(len(shares))
    while size < len(shares):
        scaled = (size - len(shares) + len(rest)) * shares[rest] / shares[rest].sum()
        if scaled.max() <= 1:
            inclusion[rest] = scaled
            break
        rest = rest[scaled < 1]
    return inclusion


def draw_order(y: np.ndarray, seed: int, stratified: bool = True) -> np.ndarray:
    """A permutation of the training set of which every prefix is a subset to train on; (N,) indices.

    y: (N,) integer labels or any targets with N rows. With integer labels and `stratified`, every prefix holds the
    classes in the proportions of the whole set, to within one example a class; other targets are only shuffled.
    """
    y = np.asarray(y)
    fits = y.ndim > 0 and y.size > 0
    checks.require(fits, "y", "hold a target an example", f"shape {y.shape}", "pass the training targets")
    checks.whole_number("seed", seed, 0)
    shuffled = np.random.default_rng(seed).permutation(len(y))
    if not stratified or y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        return shuffled
    _, of, counts = np.unique(y[shuffled], return_inverse=True, return_counts=True)
    members = np.split(shuffled[np.argsort(of, kind="stable")], np.cumsum(counts)[:-1])
    taken, order = np.zeros(len(counts), int), np.empty_like(shuffled)
    for place, label in enumerate(_fair_sequence(counts)):
        order[place] = members[label][taken[label]]
        taken[label] += 1
    return order


def _fair_sequence(counts: np.ndarray) -> Iterator[int]:
    """Classes in an order of which every prefix has each class's share to within less than one.

    Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980): of the classes that may have the next
    place without getting ahead of their share, the one that has to have a place soonest.
    """
    share, slack = (counts / counts.sum()).tolist(), 1 - 1 / (2 * max(len(counts), 2) - 2)

    def next_window(label: int, taken: int) -> tuple[float, float, int, int]:
        """From which place on a class may have its next one, by which it has to, and how many it then has."""
        return (taken + 1 - slack - 1e-12) / share[label], (taken + slack) / share[label], label, taken + 1

    early, eligible = [next_window(label, 0) for label in range(len(counts))], []
    heapq.heapify(early)
    for place in range(1, counts.sum() + 1):
        while early and early[0][0] <= place:
            heapq.heappush(eligible, heapq.heappop(early)[1:])
        _, label, taken = heapq.heappop(eligible)
        if taken < counts[label]:
            heapq.heappush(early, next_window(label, taken))
        yield label
