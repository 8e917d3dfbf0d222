"""Training loss and test accuracy of every method of `cost_to_loss` over its cost, one figure for each problem."""

from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import style

COSTS = {"sample_grads": "gradients (sample_grads)", "flops": "floating-point operations", "seconds": "seconds"}
RESULTS = {"full_loss": "training loss", "test_accuracy": "test accuracy"}
# A first-order method is a point for each budget, for which it was tuned; the others are a line a seed.
BUDGETS = {"adam": ("Adam, tuned", style.BLACK, "o"), "sgd": ("SGD with momentum, tuned", style.GREY, "s")}
RUNS = {
    "gauss_newton": ("Gauss-Newton", style.BLUE, ""),
    "gauss_newton_finetune": ("Gauss-Newton on part, then Adam", style.SKY, "x"),
    "lbfgs": ("L-BFGS", style.GREEN, ""),
    "paper": ("the paper's recipe", style.ORANGE, "^"),
}


def figure(record: dict) -> Figure:
    """A row for the loss and one for the accuracy, a column a cost."""
    drawn = Figure(figsize=(style.TWO_COLUMNS, 4.6))
    panels = drawn.subplots(len(RESULTS), len(COSTS), sharex="col", sharey="row")
    for row, (result, name) in zip(panels, RESULTS.items(), strict=True):
        for axes, cost in zip(row, COSTS, strict=True):
            draw_runs(axes, record["curves"], cost, result)
            draw_budgets(axes, record["final"]["targets"], cost, result)
        row[0].set_ylabel(name)
    panels[0][0].set_yscale("log")
    style.label_ticks(panels[0][0].yaxis)
    for axes, name in zip(panels[-1], COSTS.values(), strict=True):
        axes.set(xscale="log", xlabel=name)
    drawn.suptitle(f"{record['name']}: what a training loss costs, and the test accuracy that comes with it")
    lines, names = panels[0][0].get_legend_handles_labels()
    drawn.legend(lines, names, loc="outside lower center", ncols=3)
    return drawn


def draw_runs(axes: Axes, curves: dict, cost: str, result: str) -> None:
    """A line a seed; of fine-tuning, which has a run for each rate and budget, points alone."""
    for method, (name, color, marker) in RUNS.items():
        if method not in curves:
            continue
        curve = curves[method]
        rows = sorted(zip(curve["seed"], curve[cost], curve[result], strict=True), key=lambda row: row[:2])
        looks = {"color": color, "marker": marker, "alpha": 0.8, "linewidth": 0 if "rate" in curve else 1}
        for number, (_, run) in enumerate(groupby(rows, key=lambda row: row[0])):
            _, spent, reached = zip(*run, strict=True)
            axes.plot(spent, reached, label=None if number else name, **looks)


def draw_budgets(axes: Axes, targets: dict, cost: str, result: str) -> None:
    """The medians of the tuned runs of each budget."""
    for method, (name, color, marker) in BUDGETS.items():
        found = [targets[epochs][method] for epochs in sorted(targets, key=int)]
        reached = [run["loss" if result == "full_loss" else result] for run in found]
        axes.plot([run[cost] for run in found], reached, color=color, marker=marker, linestyle=":", label=name)
