"""What it costs to reach what Adam and SGD end with: who has the loss first, and from which budget on Adam has not.

A row is a point of a run: its method's name aside, `seed`, the three costs so far, `full_loss` and what was tested;
of first-order training also `budget_epochs`, `rate` and `batch_size`.
"""

import math
from collections.abc import Sequence
from typing import Any

from experiments.runs import median

COSTS = ("sample_grads", "flops", "seconds")
TESTS = ("test_loss", "test_accuracy")
WORST = dict.fromkeys((*COSTS, "test_loss"), math.inf) | {"test_accuracy": -math.inf}
Row = dict[str, Any]


def lowest(rows: Sequence[Row]) -> Row:
    """The run that ended with the lowest loss; one that diverged has none."""
    return min(rows, key=lambda row: math.inf if row["full_loss"] is None else row["full_loss"])


def of_budget(rows: Sequence[Row], epochs: int) -> list[Row]:
    return [row for row in rows if row["budget_epochs"] == epochs]


def summary(rows: dict[str, list[Row]], budgets: Sequence[int], rivals: Sequence[str]) -> dict[str, Any]:
    """For each budget: what Adam and SGD reached, and what that cost the rivals; then where they cost less than Adam.

    rows: of each method, with its three costs, `seed`, `full_loss` and what was tested.
    """
    targets: dict[str, Any] = {}
    for epochs in budgets:
        mine, sgd = (tuned(rows[name], epochs) for name in ("adam", "sgd"))
        if mine["loss"] is not None:  # else it diverged: no target
            targets[str(epochs)] = {"adam": mine, "sgd": sgd | against(rows, rivals, sgd)} | against(rows, rivals, mine)
    return {"targets": targets, "break_even": {name: break_evens(targets, name) for name in rivals}}


def against(rows: dict[str, list[Row]], rivals: Sequence[str], winner: Row) -> dict[str, Row]:
    """What a winner's loss cost its rivals, each by name; nothing where it diverged."""
    return {} if winner["loss"] is None else {name: race(rows[name], winner) for name in rivals}


def tuned(rows: Sequence[Row], epochs: int) -> Row:
    """The winner of a budget on the first seed, over all seeds: losses, accuracy and cost."""
    rows = of_budget(rows, epochs)
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    choice = {key: lowest(first)[key] for key in ("rate", "batch_size")}
    runs = [row for row in rows if all(row[key] == value for key, value in choice.items())]
    losses = [row["full_loss"] for row in runs]
    tests = {key: median([row[key] for row in runs], WORST[key]) for key in TESTS}
    cost = {key: runs[0][key] for key in COSTS}
    return {"budget_epochs": epochs, "loss": median(losses), "losses": losses} | choice | tests | cost


def race(rows: Sequence[Row], winner: Row) -> Row:
    """When a method first has a winner's loss, by seed: costs, and the winner's costs over them."""
    found = [cheapest([row for row in rows if row["seed"] == seed], winner["loss"]) for seed in seeds_of(rows)]
    result: Row = {}
    for key in (*COSTS, *TESTS):
        values = [None if point is None else point[key] for point in found]
        result[key] = {"by_seed": values, "median": median(values, WORST[key])}
    for key in COSTS:
        costs = [*result[key]["by_seed"], result[key]["median"]]
        *ratios, middle = [None if cost is None else winner[key] / cost for cost in costs]
        result[f"{key}_ratio"] = {"by_seed": ratios, "median": middle}
    return result


def seeds_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def cheapest(rows: Sequence[Row], target: float) -> Row | None:
    """Where a seed first has the loss; each fine-tuning is a run of its own, the other rows are one run's snapshots."""
    runs = [[row] for row in rows] if "budget_epochs" in rows[0] else [rows]
    found = [point for run in runs if (point := reached(run, target)) is not None]
    return min(found, key=lambda point: point["sample_grads"], default=None)


def reached(run: Sequence[Row], target: float) -> Row | None:
    """The first snapshot of a run that has the loss: the step it needs is paid for as a whole."""
    keys = (*COSTS, *TESTS)
    found = (row for row in run if row["full_loss"] is not None and row["full_loss"] <= target)
    return next(({key: row[key] for key in keys} for row in found), None)


def break_evens(targets: dict[str, Any], method: str) -> dict[str, float | None]:
    """For each cost, the budget from which the method costs no more than Adam."""
    found = {}
    for key in COSTS:
        ratios = {int(epochs): target[method][f"{key}_ratio"]["median"] for epochs, target in targets.items()}
        found[key] = break_even(ratios)
    return found


def break_even(ratios: dict[int, float | None]) -> float | None:
    """The smallest budget from which the ratio stays at 1 or above, interpolated in logarithms; None: there is none."""
    budgets = sorted(ratios)
    behind = [i for i, budget in enumerate(budgets) if (ratios[budget] or 0) < 1]
    if not behind:
        return budgets[0] if budgets else None
    if behind[-1] == len(budgets) - 1:
        return None
    low, high = budgets[behind[-1] : behind[-1] + 2]
    below, above = ratios[low], ratios[high]
    if not below or not above:  # the loss of the smaller budget is never reached
        return high
    share = -math.log(below) / math.log(above / below)
    return low * (high / low) ** share
