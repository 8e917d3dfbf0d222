"""Who has a loss first, in made-up runs."""

from typing import Any

import pytest

from experiments import races
from experiments.races import Row


def run(loss: float | None, **choice: Any) -> Row:
    return {"full_loss": loss, "test_loss": loss, "test_accuracy": 0.5} | choice


def snapshots(*losses: float | None, seed: int = 0) -> list[Row]:
    """Each costs as much as the one before it and once more."""
    costs = [dict.fromkeys(races.COSTS, 100.0 * (i + 1)) for i in range(len(losses))]
    return [{"seed": seed} | run(loss) | cost for loss, cost in zip(losses, costs, strict=True)]


@pytest.mark.parametrize(
    ("target", "cost"), [(0.1, 200), (1.0, 100), (2.0, 100), (0.1**0.5, 200), (0.01, 300), (0.001, None)]
)
def test_step_that_has_the_loss_is_paid_for_as_a_whole(target: float, cost: float | None):
    point = races.reached(snapshots(1.0, 0.1, 0.01), target)
    assert (point and point["seconds"]) == cost


def test_loss_that_rises_again_counts_where_it_was_first_reached():
    point = races.reached(snapshots(1.0, 0.1, 0.5, 0.05), 0.2)
    assert point is not None
    assert point["flops"] == 200


def test_fine_tunings_are_runs_of_their_own():
    """The one that has the loss counts, with nothing between the two."""
    rows = [row | {"budget_epochs": epochs} for row, epochs in zip(snapshots(1.0, 0.1), (3, 10), strict=True)]
    point = races.cheapest(rows, 0.5)
    assert point is not None
    assert point["sample_grads"] == 200


def test_seed_that_never_has_the_loss_counts_as_the_dearest():
    rows = snapshots(0.1) + snapshots(1.0, 0.1, seed=1) + snapshots(1.0, seed=2)
    adam = {"loss": 0.1} | dict.fromkeys(races.COSTS, 400.0)
    race = races.race(rows, adam)
    assert race["seconds"] == {"by_seed": [100, 200, None], "median": 200}
    assert race["seconds_ratio"] == {"by_seed": [4, 2, None], "median": 2}
    assert races.race(rows, adam | {"loss": 0.01})["flops_ratio"]["median"] is None


def test_seed_that_never_has_the_loss_counts_as_the_least_accurate():
    rows = [row | {"test_accuracy": 0.8 + row["seed"] / 10} for row in snapshots(0.1) + snapshots(0.1, seed=1)]
    race = races.race([*rows, *snapshots(1.0, seed=2)], {"loss": 0.1} | dict.fromkeys(races.COSTS, 400.0))
    assert race["test_accuracy"] == {"by_seed": [0.8, 0.9, None], "median": 0.8}


@pytest.mark.parametrize(
    ("ratios", "budget"),
    [
        ({3: 0.5, 10: 0.25, 40: 4.0, 100: 5.0}, 20),
        ({3: 2.0, 10: 0.5, 30: 2.0}, pytest.approx(300**0.5)),
        ({3: 1.0, 10: 2.0}, 3),
        ({3: 2.0, 10: 0.9}, None),
        ({3: 2.0, 10: None}, None),
        ({3: None, 10: 2.0}, 10),
        ({}, None),
    ],
)
def test_break_even_is_where_the_ratio_stays_above_one(ratios: dict[int, float | None], budget: Any):
    found = races.break_even(ratios)
    assert found == (pytest.approx(budget) if isinstance(budget, int) else budget)


def test_target_is_the_median_of_the_winner():
    """The winner on the first seed, whatever the other rates would have given on the others."""
    cost = dict.fromkeys(races.COSTS, 1.0)
    choices = {0.1: (0.3, 0.5, 0.4), 0.2: (0.35,)}
    rows = [
        run(loss, rate=rate, batch_size=128, seed=seed, budget_epochs=3) | cost
        for rate, losses in choices.items()
        for seed, loss in enumerate(losses)
    ]
    target = races.tuned(rows, 3)
    assert (target["loss"], target["losses"], target["rate"]) == (0.4, [0.3, 0.5, 0.4], 0.1)


def test_rivals_run_against_adam_and_against_sgd():
    """SGD that diverged is no target; Adam's targets stand without it."""

    def trained(loss: float | None, epochs: int) -> Row:
        cost = dict.fromkeys(races.COSTS, 400.0)
        return run(loss, rate=0.1, batch_size=128, seed=0, budget_epochs=epochs) | cost

    rows = {
        "adam": [trained(0.1, 3), trained(0.1, 10)],
        "sgd": [trained(0.01, 3), trained(None, 10)],
        "ours": snapshots(1.0, 0.1, 0.01, 0.001),
    }
    short, long = races.summary(rows, (3, 10), ["ours"])["targets"].values()
    assert short["ours"]["seconds_ratio"]["median"] == long["ours"]["seconds_ratio"]["median"] == pytest.approx(2)
    assert short["sgd"]["ours"]["seconds_ratio"]["median"] == pytest.approx(4 / 3)
    assert "ours" not in long["sgd"]
