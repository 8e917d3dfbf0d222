"""What each part of the method is worth: the loss at equal cost with one part changed, over that with the defaults.

Reads records of the experiment `ablations`, one figure for each problem.
"""

from pathlib import Path

from matplotlib.figure import Figure

from paper_figures import style

LARGEST = 1000.0  # ratios beyond it are drawn at the edge, as triangles


def draw(records: list[dict], out: Path) -> list[Path]:
    """A figure for each problem, as PDF and PNG; the files written."""
    return style.save_all([(f"ablations-{record['name']}", figure, record) for record in records], out)


def figure(record: dict) -> Figure:
    """A line a variant, a dot a seed, a bar at their median."""
    default = record["final"]["defaults"]["defaults"]["median"][-1]
    lines = [
        (name, [None if losses[-1] is None else losses[-1] / default for losses in found["losses"]])
        for study in record["final"].values()
        for name, found in study.items()
    ]
    drawn = Figure(figsize=(style.TWO_COLUMNS, 0.6 + 0.17 * len(lines)))
    axes = drawn.subplots()
    for place, (_, ratios) in enumerate(lines):
        draw_variant(axes, place, ratios)
    axes.axvline(1, color=style.GREY, linewidth=0.8, zorder=0)
    furthest = max(LARGEST if ratio is None else ratio for _, ratios in lines for ratio in ratios)
    axes.set(xscale="log", xlim=(None, min(LARGEST, 1.1 * furthest)), ylim=(len(lines) - 0.4, -0.6))
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.tick_params(axis="y", length=0)
    style.label_ticks(axes.xaxis)
    epochs = record["config"]["epochs"][-1]
    axes.set_xlabel(f"training loss after {epochs} epochs of cost, over the median with the defaults")
    drawn.suptitle(f"{record['name']}: left of the line the loss is lower, right of it higher")
    return drawn


def draw_variant(axes, place: int, ratios: list[float | None]) -> None:
    """A loss that is not finite counts as beyond the edge."""
    values = sorted(LARGEST if ratio is None else ratio for ratio in ratios)
    inside = [value for value in values if value < LARGEST]
    if inside:  # a line without points would be laid out as if it were in the figure's corner
        axes.plot(inside, [place] * len(inside), "o", color=style.BLUE, alpha=0.6, markeredgewidth=0, clip_on=False)
    if len(inside) < len(values):
        axes.plot(LARGEST, place, ">", color=style.BLUE, clip_on=False)
    median = values[len(values) // 2]
    if median < LARGEST:
        axes.plot(median, place, "|", color=style.VERMILION, markersize=8, markeredgewidth=1.6)
