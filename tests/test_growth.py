import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subsetopt import LBFGS, Growth, draw_order, fit_subset, overdetermination_ratio
from subsetopt.growth import draw_fresh

seeds = st.integers(0, 2**32)
labels = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(
    lambda counts: np.repeat(np.arange(len(counts)), counts)
)
growths = st.builds(Growth, start=st.floats(1e-2, 20), factor=st.floats(1.05, 8))
examples, parameters, outputs = st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 100)


@given(y=labels, seed=seeds, stratified=st.booleans())
def test_order_is_a_permutation_that_the_seed_decides(y: np.ndarray, seed: int, stratified: bool):
    order = draw_order(y, seed, stratified)
    assert sorted(order) == list(range(len(y)))
    np.testing.assert_array_equal(order, draw_order(y, seed, stratified))


@pytest.mark.parametrize("targets", [np.zeros(50, int), np.zeros(50), np.zeros((50, 3), int)])
def test_another_seed_gives_another_order(targets: np.ndarray):
    assert np.any(draw_order(targets, 0) != draw_order(targets, 1))


@given(y=labels, seed=seeds)
def test_every_prefix_holds_each_class_in_proportion_to_within_one_example(y: np.ndarray, seed: int):
    is_of_class = y[draw_order(y, seed)][:, None] == np.unique(y)
    share = np.arange(1, len(y) + 1)[:, None] * is_of_class.mean(axis=0)
    assert np.abs(np.cumsum(is_of_class, axis=0) - share).max() <= 1 + 1e-9


def test_order_within_a_class_is_random():
    y = np.repeat([0, 1], 100)
    order = draw_order(y, 0)
    members = order[y[order] == 0]
    assert np.abs(np.diff(members)).mean() > 20


def test_unstratified_order_takes_no_notice_of_the_labels():
    y = np.repeat(np.arange(10), 20)
    np.testing.assert_array_equal(draw_order(y, 0, stratified=False), draw_order(np.zeros((200, 1)), 0))


@pytest.mark.parametrize(
    ("growth", "arguments", "sizes"),
    [
        # K = ceil(Q P / M): arguments are N, P, M and the probe.
        (Growth(4, 2), (1000, 100, 10), [40, 80, 160, 320, 640, 1000]),
        (Growth(4, 2), (1000, 101, 10), [41, 81, 162, 324, 647, 1000]),
        (Growth(1, 1.1), (5, 10, 10), [1, 2, 3, 4, 5]),
        (Growth(0.1, 3), (100, 7, 100, 10), [1, 2, 6, 16, 46, 100]),
        (Growth(4, 2, stop=10), (1000, 100, 10), [40, 80, 100]),
        (Growth(4, 2, stop=4), (1000, 100, 10), [40]),
        (Growth(4, 2, stop=40), (400, 100, 10, 40), [40, 80, 160, 320, 400]),
        (Growth(4, 2, stop=39), (400, 100, 10, 40), [40, 80, 160, 320, 360]),
        (Growth(4, 2, stop=1e9), (400, 100, 10, 40), [40, 80, 160, 320, 400]),
        (Growth(40, 2), (400, 100, 10), [400]),
        (Growth(4.1, 2), (40, 100, 10), [40]),
        (Growth(3, stop=3), (1000, 7, 10, 100), [3]),
    ],
)
def test_sizes_are_ratios_times_parameters_over_outputs(growth: Growth, arguments: tuple[int, ...], sizes: list[int]):
    assert growth.sizes(*arguments) == sizes


@given(growth=growths, n=examples, p=parameters, m=outputs, share=st.floats(0, 0.5))
def test_sizes_rise_to_the_whole_set_and_leave_the_probe_out_until_then(
    growth: Growth, n: int, p: int, m: int, share: float
):
    probe = int(share * n)
    *smaller, last = growth.sizes(n, p, m, probe)
    assert last == n
    assert sorted({*smaller, last}) == [*smaller, last]
    assert all(1 <= size <= n - probe for size in smaller)


@given(growth=growths, n=examples, p=parameters, m=outputs)
def test_every_size_is_that_of_a_power_of_the_factor(growth: Growth, n: int, p: int, m: int):
    powers = math.ceil(math.log(n * m / p / growth.start + 1, growth.factor)) + 1
    ratios = [growth.start * growth.factor**k for k in range(max(powers, 1))]
    # Repeated products round otherwise than powers do: both neighbours of a whole number will do.
    allowed = {math.ceil(ratio * p / m + slack) for ratio in ratios for slack in (-1e-6, 1e-6)}
    assert set(growth.sizes(n, p, m)[:-1]) <= allowed | {1}


@given(n=examples, p=parameters, m=outputs, ratio=st.floats(1e-2, 1e3))
def test_growth_that_stops_where_it_starts_is_one_subset(n: int, p: int, m: int, ratio: float):
    probe = n // 10
    sizes = Growth(ratio, stop=ratio).sizes(n, p, m, probe)
    wanted = math.ceil(ratio * p / m - 1e-9)
    assert sizes == [n if wanted >= n else min(wanted, n - probe)]


@given(n=examples, p=parameters, m=outputs)
def test_ratio_of_the_whole_set_below_start_gives_one_stage(n: int, p: int, m: int):
    start = 1.001 * overdetermination_ratio(n, m, p)
    assert Growth(start).sizes(n, p, m, probe=n // 10) == [n]


def test_overdetermination_ratio_counts_constraints_per_parameter():
    assert overdetermination_ratio(50_000, 10, 9_410) == pytest.approx(53.135, abs=1e-3)
    assert overdetermination_ratio(1, 1, 2) == 0.5


def test_fit_follows_the_sizes_and_the_order():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    y = rng.integers(0, 3, 200)
    growth = Growth(4, 2)
    result = fit_subset(
        lambda params, x: x @ params,
        (x, y),
        np.zeros((4, 3), np.float32),
        solver=LBFGS(),
        growth=growth,
        until=1,
        warmup_epochs=0,
        max_steps=10,
        progress=False,
    )
    assert [row["examples"] for row in result.stages] == growth.sizes(200, 12, 3, probe=20)
    assert [row["ratio"] for row in result.stages] == [
        overdetermination_ratio(row["examples"], 3, 12) for row in result.stages
    ]
    np.testing.assert_array_equal(result.order, draw_order(y, seed=0))


@given(n=st.integers(1, 60), seed=seeds, data=st.data())
def test_a_fresh_subset_holds_no_example_twice(n: int, seed: int, data: st.DataObject):
    size = data.draw(st.integers(1, n))
    slopes = np.array(data.draw(st.lists(st.floats(0, 1e6) | st.just(math.nan), min_size=n, max_size=n)))
    chosen, weights = draw_fresh(slopes, size, 0.8, np.random.default_rng(seed))
    assert len(set(chosen)) == len(weights) == size
    assert chosen.max() < n
    assert np.all((weights > 0.99 / n) & np.isfinite(weights))


@pytest.mark.parametrize(
    ("slopes", "importance"), [(np.full(50, np.nan), 0.8), (np.arange(50.0), 0), (np.zeros(50), 0.8)]
)
def test_a_fresh_subset_is_drawn_uniformly_where_nothing_is_known_or_asked(slopes: np.ndarray, importance: float):
    draws = [draw_fresh(slopes, 10, importance, np.random.default_rng(seed)) for seed in range(2000)]
    assert all(np.allclose(weights, 1 / 10) for _, weights in draws)
    times = np.bincount(np.concatenate([chosen for chosen, _ in draws]), minlength=50)
    np.testing.assert_allclose(times / 2000, 10 / 50, atol=0.05)


def test_a_fresh_subset_gives_unbiased_means_with_less_noise_than_a_uniform_one():
    rng = np.random.default_rng(0)
    slopes = rng.lognormal(sigma=2, size=300)
    values = slopes * rng.normal(1, 0.2, 300)

    def means(importance: float) -> np.ndarray:
        draws = [draw_fresh(slopes, 40, importance, np.random.default_rng(seed)) for seed in range(3000)]
        return np.array([values[chosen] @ weights for chosen, weights in draws])

    important, uniform = means(0.8), means(0)
    assert important.mean() == pytest.approx(values.mean(), rel=0.01)
    assert important.std() < uniform.std() / 3


def test_an_example_that_outweighs_the_others_is_in_every_fresh_subset():
    slopes = np.r_[1e6, np.ones(99)]
    for seed in range(50):
        chosen, weights = draw_fresh(slopes, 10, 0.8, np.random.default_rng(seed))
        assert weights[list(chosen).index(0)] == pytest.approx(1 / 100)


@pytest.mark.parametrize("growth", [Growth(4, 1 + 1e-15), Growth(4, 1.0000001), Growth(5e-324, 1.1)])
def test_growth_that_is_slow_ends(growth: Growth):
    sizes = growth.sizes(2000, 500, 10)
    assert sizes == sorted({*sizes})
    assert (sizes[0], sizes[-1]) == (200 if growth.start == 4 else 1, 2000)
    assert growth.factor > 1.01 or max(np.diff(sizes)) == 1
