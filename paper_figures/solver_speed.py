"""Loss over seconds: our solvers and the peers', from one start, compilation apart.

Reads records of the experiment `solver_speed`; one figure for each problem.
"""

from pathlib import Path

from matplotlib.figure import Figure

from paper_figures import style

# Solver: name and line; ours lie on top.
LINES = {
    "torch": ("torch", {"color": style.PURPLE}),
    "scipy": ("scipy", {"color": style.GREEN}),
    "optax": ("optax", {"color": style.VERMILION}),
    "jaxopt": ("jaxopt", {"color": style.ORANGE}),
    "jaxopt_run": ("jaxopt, its own loop", {"color": style.ORANGE, "linestyle": "--"}),
    "optimistix": ("optimistix", {"color": style.GREY}),
    "levenberg_marquardt": ("optimistix, Levenberg-Marquardt", {"color": style.GREY, "linestyle": "--"}),
    "gauss_newton": ("subsetopt, Gauss-Newton", {"color": style.BLUE, "linestyle": "--", "linewidth": 1.6}),
    "compiled": ("subsetopt, compiled", {"color": style.BLUE, "linestyle": ":", "linewidth": 2.2}),
    "subsetopt": ("subsetopt", {"color": style.BLUE, "linewidth": 2.2}),
}
PEERS = LINES.keys() - {"subsetopt", "compiled", "gauss_newton"}
LOSSES = {"softmax_cross_entropy": "cross-entropy (nats)", "squared_error": "half the squared error"}


def draw(records: list[dict], out: Path) -> list[Path]:
    """One figure for each record, as PDF and PNG; the files written."""
    return style.save_all(((f"solver_speed-{record['name']}", figure, record) for record in records), out)


def figure(record: dict) -> Figure:
    drawn = Figure(figsize=(style.TWO_COLUMNS, 3.4))
    axes = drawn.subplots()
    final = record["final"]
    for name, (label, line) in LINES.items():
        if name in record["curves"]:
            curve = record["curves"][name]
            axes.plot(curve["seconds"], curve["loss"], label=f"{label}: {price(final[name])}", **line)
            axes.plot(curve["seconds"][-1], curve["loss"][-1], "o", color=line["color"])
    loss = LOSSES[record["config"]["loss"]]
    axes.set(xscale="log", yscale="log", xlabel="time without compiling (seconds)", ylabel=f"{loss} with penalty")
    for axis in (axes.xaxis, axes.yaxis):
        style.label_ticks(axis)
    axes.set_title(message(record), loc="left", fontweight="bold", pad=10)
    drawn.legend(loc="outside right center", title=setting(record), alignment="left", reverse=True)
    return drawn


def price(run: dict) -> str:
    """Evaluations of an L-BFGS step, which is what line searches differ in."""
    return f"{run['evaluations_per_step']:.2f}"


def message(record: dict) -> str:
    """What the figure shows, in the record's own numbers: the peer that is hardest to beat decides."""
    races = {name: record["final"][name]["speedup"] for name in record["curves"] if name in PEERS}
    missed = [LINES[name][0] for name, ratio in races.items() if ratio is None]
    ours = LINES[record["final"]["fastest"]][0]
    if missed:
        return f"{ours}: L-BFGS stays above the last loss of {', '.join(missed)}"
    closest = min(races, key=lambda name: races[name])
    name, ratio = LINES[closest][0], races[closest]
    if ratio < 1:
        return f"{ours}: L-BFGS takes {1 / ratio:.2g} times as long as {name} to its last loss"
    return f"{ours}: L-BFGS has {name}'s last loss {ratio:.2g} times sooner, the others' sooner still"


def setting(record: dict) -> str:
    """Data, model and what stands behind the names."""
    config = record["config"]
    size = f"{config['examples']:,} examples of {config['data']},\n{config['parameters']:,} parameters, float32"
    return f"{size}\n\nsolver: evaluations a step\n(our L-BFGS takes twice as many steps)"
