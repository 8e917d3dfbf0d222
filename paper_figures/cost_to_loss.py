"""Cost of tuned Adam over the cost of Gauss-Newton to the same loss, for losses that take Adam ever longer.

Reads records of the experiment `cost_to_loss`; one figure for all problems, besides the `curves` of each. A loss is
named by the budget at whose end Adam, its rate and batch size tuned for that budget, has it: the losses themselves
differ from problem to problem.
"""

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import curves, style

METHOD = "gauss_newton"
COSTS = {"sample_grads": "gradient evaluations", "flops": "floating-point operations", "seconds": "seconds"}
LINES = {
    "digits": (style.BLACK, "o"),
    "mnist14": (style.SKY, "s"),
    "mnist28": (style.BLUE, "D"),
    "cifar16": (style.ORANGE, "^"),
    "cifar32-4k": (style.VERMILION, "v"),
    "cifar32": (style.PURPLE, "P"),
}
NOTE: dict[str, Any] = {"color": style.GREY, "fontsize": "small"}

Ratio = tuple[int, float, float, float]  # Adam's budget, then the ratio: median, least and largest over seeds


def draw(records: list[dict], out: Path) -> list[Path]:
    """All problems of a device in one figure, and the curves of each in its own, as PDF and PNG; the files written."""
    suffixes = {record["name"].removeprefix(problem(record)) for record in records}
    drawn = [(f"cost_to_loss{suffix}", partial(of_suffix, records, suffix), {}) for suffix in sorted(suffixes)]
    return style.save_all(
        drawn + [(f"cost_to_loss-{record['name']}", curves.figure, record) for record in records], out
    )


def of_suffix(records: list[dict], suffix: str, _: dict) -> Figure:
    """The suffix of records' names tells their device."""
    return figure([record for record in records if record["name"] == problem(record) + suffix])


def figure(records: list[dict]) -> Figure:
    """A panel for each cost."""
    drawn = Figure(figsize=(style.TWO_COLUMNS, 3.1))
    panels = drawn.subplots(1, len(COSTS), sharex=True, sharey=True)
    for axes, (cost, name) in zip(panels, COSTS.items(), strict=True):
        for record in in_order(records):
            draw_problem(axes, record, cost)
        axes.axhline(1, color=style.GREY, linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log")
        axes.set_title(name, loc="left")
    for axis in (panels[0].xaxis, panels[0].yaxis):
        style.label_ticks(axis)
    mark_break_even(panels[-1])
    panels[0].set_ylabel("cost ratio, Adam / Gauss-Newton")
    panels[1].set_xlabel("budget at whose end tuned Adam has the target loss (epochs)")
    drawn.suptitle(message(records))
    lines, names = panels[0].get_legend_handles_labels()
    drawn.legend(lines, names, loc="outside lower center", ncols=len(LINES))
    return drawn


def draw_problem(axes: Axes, record: dict, cost: str) -> None:
    """Median and range over seeds; a gap where the loss is not reached."""
    color, marker = LINES[problem(record)]
    budgets, middle, least, most = zip(*ratios(record, cost), strict=True)
    axes.fill_between(budgets, least, most, color=color, alpha=0.2, linewidth=0)
    axes.plot(budgets, middle, color=color, marker=marker, label=problem(record))


def mark_break_even(axes: Axes) -> None:
    """A name for the line at 1, beside the last panel, where no curve runs."""
    place: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "ha": "left", "va": "center"}
    text = "above: cheaper\nthan tuned Adam\nbreak-even\n\n"  # as many lines above the middle as below it
    axes.annotate(text, (1, 1), xycoords=("axes fraction", "data"), annotation_clip=False, **place, **NOTE)


def in_order(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda record: list(LINES).index(problem(record)))


def problem(record: dict) -> str:
    return record["config"]["problem"]


def ratios(record: dict, cost: str) -> list[Ratio]:
    """By budget; NaN, which is not drawn, where the median seed, or for the range any seed, never has the loss."""
    rows = []
    for epochs, target in record["final"]["targets"].items():
        race = target[METHOD][f"{cost}_ratio"]
        seeds = [number(ratio) for ratio in race["by_seed"]]
        whole = None not in race["by_seed"]
        limits = (min(seeds), max(seeds)) if whole else (float("nan"), float("nan"))
        rows.append((int(epochs), number(race["median"]), *limits))
    return sorted(rows)


def number(value: float | None) -> float:
    return float("nan") if value is None else value


def message(records: list[dict]) -> str:
    """From which budgets on Gauss-Newton takes fewer seconds."""
    found = [record["final"]["break_even"][METHOD]["seconds"] for record in records]
    cheaper = sorted(epochs for epochs in found if epochs is not None)
    if not cheaper:
        return "Tuned Adam takes fewer seconds at its longest budget, whatever the problem"
    first, last = (f"{epochs:.1f}" if epochs < 10 else f"{epochs:,.0f}" for epochs in (cheaper[0], cheaper[-1]))
    budgets = first if first == last else f"{first} to {last}"
    return f"Fewer seconds than Adam tuned for {budgets} epochs or more, on {len(cheaper)} of {len(found)} problems"
