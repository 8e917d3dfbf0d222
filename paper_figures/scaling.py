"""Memory and time over the number of examples, and a Gauss-Newton step's price over the number of parameters.

Reads records of the experiment `scaling`: `examples` and `parameters`, one figure each.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import style

SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lbfgs": ("L-BFGS", {"color": style.ORANGE, "marker": "o"}),
    "dense": ("Gauss-Newton", {"color": style.BLUE, "marker": "s"}),
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"color": style.BLUE, "marker": "s"}),
    "sample": ("sample space", {"color": style.GREEN, "marker": "o"}),
    "cg": ("conjugate gradients", {"color": style.VERMILION, "marker": "^"}),
}
PICKED: dict[str, Any] = {
    "marker": "o",
    "markersize": 9,
    "markerfacecolor": "none",
    "color": style.BLACK,
    "linestyle": "",
}


def draw(records: list[dict], out: Path) -> list[Path]:
    """One figure for each record that has one, as PDF and PNG; the files written."""
    parts = [(record["config"]["part"], record) for record in records]
    drawn = ((f"scaling-{record['name']}", FIGURES[part], record) for part, record in parts if part in FIGURES)
    return style.save_all(drawn, out)


# --- examples ------------------------------------------------------------------------------------------------------


def examples(record: dict) -> Figure:
    drawn = Figure(figsize=(style.TWO_COLUMNS, 2.7))
    memory, time = drawn.subplots(1, 2)
    for name, (label, line) in SOLVERS.items():
        curve = record["curves"][name]
        memory.plot(curve["examples"], [size / 1e6 for size in curve["peak_bytes"]], label=label, **line)
        time.plot(curve["examples"], curve["microseconds_per_example"], label=label, **line)
    curve = record["curves"]["lbfgs"]
    data = [size / 1e6 for size in curve["data_bytes"]]
    memory.plot(curve["examples"], data, color=style.GREY, linestyle="--", label="the data alone")
    memory.set_title(memory_message(record), loc="left")
    memory.set_ylabel("peak memory (megabytes)")
    time.set_title(time_message(record), loc="left")
    time.set(yscale="log", ylabel="microseconds an example and step")
    style.label_ticks(time.yaxis)
    for axes in (memory, time):
        axes.set(xscale="log", xlabel="examples")
        axes.legend()
    memory.set_ylim(bottom=0)
    return drawn


def memory_message(record: dict) -> str:
    """What the largest set takes more than the smallest, beside the data."""
    rest = [
        [(peak - data) / 1e6 for peak, data in zip(curve["peak_bytes"], curve["data_bytes"], strict=True)]
        for curve in (record["curves"][name] for name in SOLVERS)
    ]
    most = max(values[-1] - values[0] for values in rest)
    sizes = record["curves"]["lbfgs"]["examples"]
    return f"{sizes[-1] // sizes[0]:,} times the examples: their data and {most:.0f} MB"


def time_message(record: dict) -> str:
    curves = record["curves"]
    first, last = ([curves[name]["microseconds_per_example"][i] for name in SOLVERS] for i in (0, -1))
    rises = any(after > before for before, after in zip(first, last, strict=True))
    return f"An example of a larger set costs {'more' if rises else 'less'}"


# --- parameters ----------------------------------------------------------------------------------------------------


def parameters(record: dict) -> Figure:
    """A panel for each number of rows a parameter."""
    curves = record["curves"].values()
    ratios = sorted({ratio for curve in curves for ratio in curve["ratio"]}, reverse=True)
    drawn = Figure(figsize=(style.TWO_COLUMNS, 3.0))
    panels = drawn.subplots(1, len(ratios), sharex=True, sharey=True, squeeze=False)[0]
    for axes, ratio in zip(panels, ratios, strict=True):
        panel(axes, [curve for curve in curves if curve["ratio"][0] == ratio])
        axes.set_title(f"{ratio:g} rows a parameter", loc="left")
    style.label_ticks(panels[0].yaxis)
    panels[0].set_ylabel("a step and its gradients (seconds)")
    drawn.suptitle(picked_message(record))
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return drawn


def panel(axes: Axes, curves: list[dict]) -> None:
    picked: dict[int, float] = {}
    for curve in curves:
        label, line = FORMS[curve["form"][0]]
        # Models come in the order of their sizes.
        axes.plot(curve["parameters"], curve["price_per_step"], label=label, **line)
        rows = zip(curve["parameters"], curve["price_per_step"], curve["auto"], strict=True)
        picked |= {p: price for p, price, auto in rows if auto == curve["form"][0]}
    axes.plot(list(picked), list(picked.values()), label="picked by the cost model", **PICKED)
    axes.set(xscale="log", yscale="log", xlabel="parameters P")


def picked_message(record: dict) -> str:
    worst = max(bar["measured"] for bar in record["final"]["bars"])
    return f"The form that the cost model picks costs at most {worst:.2g} times as much as the cheapest one"


FIGURES = {"examples": examples, "parameters": parameters}
