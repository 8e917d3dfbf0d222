"""Loss over cost: subset training, then fine-tuning, beside Adam tuned for each budget.

Reads records of the experiment `demo`. Costs are cumulative from the first evaluation on, those of
fine-tuning too; a loss is null where it was not measured.
"""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from paper_figures import style

METHODS = {"gauss_newton": "Gauss-Newton", "lbfgs": "L-BFGS"}
LOSSES = {  # column: label and line; the last one lies on top
    "subset_loss": ("current subset", {"color": style.SKY, "linewidth": 1.0}),
    "probe_loss": ("probe, outside the subset", {"color": style.ORANGE, "linewidth": 1.2}),
    "full_loss": ("whole training set", {"color": style.BLUE, "linewidth": 1.8}),
}
FINE_TUNING = {"color": style.PURPLE, "linewidth": 1.8, "label": "whole set, fine-tuning"}
ADAM = {"color": style.BLACK, "linewidth": 0.8, "marker": "o", "linestyle": "--"}
NOTE = {"color": style.GREY, "fontsize": "small"}
LABEL_GAP = 0.12  # least distance of two subset sizes, as a share of the axis

Points = list[tuple[float, float]]


def draw(records: list[dict], out: Path) -> list[Path]:
    """One figure for each record, as PDF and PNG; the files written."""
    return style.save_all(((f"demo-{record['name']}", figure, record) for record in records), out)


def figure(record: dict) -> Figure:
    drawn = Figure(figsize=(style.TWO_COLUMNS, 3.6))
    panels = drawn.subplots(1, 2, sharex=True, sharey=True)
    curves = record["curves"]
    for axes, (method, name) in zip(panels, METHODS.items(), strict=True):
        draw_method(axes, curves, method)
        draw_adam(axes, curves, method)
        axes.set_title(name, loc="left", fontweight="bold", pad=14)
        axes.set_title("top: examples in the subset", loc="right", pad=14, **NOTE)
        axes.set(xscale="log", yscale="log", xlabel="cost (epochs of gradient evaluations)")
    for axes, method in zip(panels, METHODS, strict=True):  # now that the limits are known
        mark_stages(axes, curves[method])
        mark_zero(axes, curves[method])
        for axis in (axes.xaxis, axes.yaxis):
            style.label_ticks(axis)
    panels[0].set_ylabel("cross-entropy loss (nats)")
    drawn.suptitle(message(curves))
    lines = panels[0].get_legend_handles_labels()[0]
    drawn.legend(handles=lines, loc="outside lower center", ncols=3, title=setting(record))
    return drawn


def draw_method(axes: Axes, curves: dict, method: str) -> None:
    for column, (label, line) in LOSSES.items():
        axes.plot(*columns(points(curves[method], column)), label=label, **line)
    joint = [] if zero_at(curves[method]) else points(curves[method], "full_loss")[-1:]
    tuned = joint + points(curves[f"{method}_finetune"], "full_loss")
    axes.plot(*columns(tuned), **FINE_TUNING)


def draw_adam(axes: Axes, curves: dict, method: str) -> None:
    """Adam's loss for each budget, and where the method first has the best of them."""
    adam = best_per_budget(curves)
    axes.plot(*columns(adam), label="whole set, Adam tuned per budget", **ADAM)
    target = min(loss for _, loss in adam)
    axes.axhline(target, color=style.GREY, linewidth=0.6, linestyle=":", zorder=0)
    found = first_at(curves, method, target)
    if found is None:
        return
    axes.plot(*found, "D", color=style.VERMILION, markersize=5, zorder=5)
    place = {"xytext": (-5, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(f"{short(found[0])} epochs", found, color=style.VERMILION, **place)


def zero_at(curve: dict) -> float | None:
    """The cost at which every example's loss is zero first, in the floating-point numbers of the fit."""
    return next((cost for cost, loss in zip(curve["epochs"], curve["full_loss"], strict=True) if loss == 0), None)


def mark_zero(axes: Axes, curve: dict) -> None:
    """A loss of zero has no place on a logarithmic axis: an arrow down, below which it lies."""
    cost = zero_at(curve)
    if cost is None:
        return
    axes.plot(cost, 0.03, "v", color=style.BLUE, markersize=5, transform=axes.get_xaxis_transform(), zorder=5)
    place = {"xytext": (5, -1), "textcoords": "offset points", "ha": "left", "va": "center"}
    text = f"0 from {short(cost)} epochs on"
    axes.annotate(text, (cost, 0.03), xycoords=axes.get_xaxis_transform(), color=style.BLUE, **place)


def mark_stages(axes: Axes, curve: dict) -> None:
    """A tick above where each subset size begins; its size and a line where there is room."""
    stage = curve["stage"]
    starts = [i for i in range(len(stage)) if i == 0 or stage[i] != stage[i - 1]]
    left, right = axes.get_xlim()
    costs = [max(curve["epochs"][max(i - 1, 0)], left) for i in starts]
    shown = spread([math.log(cost / left) / math.log(right / left) for cost in costs], LABEL_GAP)
    for i in shown:
        axes.axvline(costs[i], color=style.LIGHT, linewidth=0.6, zorder=-1)
    top = axes.secondary_xaxis("top")
    top.set_xscale("log")
    top.xaxis.set_major_locator(FixedLocator([costs[i] for i in shown]))
    top.set_xticklabels([f"{curve['examples'][starts[i]]:,}" for i in shown])
    top.xaxis.set_minor_locator(FixedLocator(costs))
    top.xaxis.set_minor_formatter(NullFormatter())
    top.tick_params(which="both", direction="in", color=style.GREY, labelcolor=style.GREY, pad=1)
    top.tick_params(which="both", labelsize="small")
    top.spines["top"].set_visible(False)


def spread(places: list[float], gap: float) -> list[int]:
    """Indices of places at least a gap apart: the last one, then from the first on what fits."""
    shown = []
    for i, place in enumerate(places[:-1]):
        free = not shown or place - places[shown[-1]] >= gap
        if free and places[-1] - place >= gap:
            shown.append(i)
    return [*shown, len(places) - 1]


def points(curve: dict, column: str) -> Points:
    """Cost and loss where the loss was measured and can stand on logarithmic axes."""
    pairs = zip(curve["epochs"], curve[column], strict=True)
    return [(cost, loss) for cost, loss in pairs if loss and cost > 0]


def columns(pairs: Points) -> tuple[list[float], list[float]]:
    return [cost for cost, _ in pairs], [loss for _, loss in pairs]


def best_per_budget(curves: dict) -> Points:
    """Adam's lowest final loss for each budget: each had its rate tuned."""
    runs = zip(curves["adam"]["budget_epochs"], curves["adam"]["full_loss"], strict=True)
    runs = [(budget, loss) for budget, loss in runs if loss is not None]
    return sorted(dict(sorted(runs, key=lambda run: -run[1])).items())  # the lowest one comes last


def first_at(curves: dict, method: str, target: float) -> tuple[float, float] | None:
    """Cost and loss where the loss on the whole set was first measured not to exceed the target."""
    path = points(curves[method], "full_loss") + points(curves[f"{method}_finetune"], "full_loss")
    return next((point for point in path if point[1] <= target), None)


def message(curves: dict) -> str:
    """What the figure shows, in the record's own numbers."""
    budget, target = min(best_per_budget(curves), key=lambda point: point[1])
    adam = f"Adam's {budget:g}-epoch loss ({target:.3g})"
    found = {name: first_at(curves, method, target) for method, name in METHODS.items()}
    reached = [(name, short(point[0])) for name, point in found.items() if point]
    missed = [name for name, point in found.items() if not point]
    if not reached:
        return f"{' and '.join(missed)} stay above {adam}"
    (first, cost), *others = reached
    rest = [f", {name} in {other}" for name, other in others]
    rest += [f"; {name} stays above" for name in missed]
    return f"{first} reaches {adam} in {cost} epochs{''.join(rest)}"


def short(cost: float) -> str:
    return f"{cost:.1f}" if cost < 10 else f"{cost:,.0f}"


def setting(record: dict) -> str:
    """Data, model, and test accuracies: what the reader must know to judge the curves."""
    config, final = record["config"], record["final"]
    names = METHODS | {"adam": "Adam"}
    accuracies = {name: 100 * final[key]["test_accuracy"] for key, name in names.items()}
    ends = ", ".join(f"{name} {percent:.1f} %" for name, percent in accuracies.items())
    size = f"{config['examples']:,} training examples, {config['parameters']:,} parameters"
    return f"{config['dataset']}: {size}. Final test accuracy: {ends}"
