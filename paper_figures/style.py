"""How all figures look: widths of a paper's columns, one palette, one set of rcParams."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

ONE_COLUMN, TWO_COLUMNS = 3.35, 7.0  # inches

# Okabe and Ito: told apart whatever the reader's colour vision, and by lightness in grey print.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT = "#6E6E6E", "#E2E2E2"  # what stands behind the curves

RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5,
    "legend.frameon": False,
    "figure.titlesize": 9,
    "figure.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "savefig.dpi": 250,
    "pdf.fonttype": 42,  # text stays text
}


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write `<name>.pdf` and `<name>.png`, the same bytes for the same figure; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.pdf", out / f"{name}.png"]
    figure.savefig(paths[0], metadata={"CreationDate": None})
    figure.savefig(paths[1])
    return paths


def save_all(figures: Iterable[tuple[str, Callable[[dict], Figure], dict]], out: Path) -> list[Path]:
    """Draw and save figures, each given by its name, the function that draws it and its record; the files written."""
    with matplotlib.rc_context(RC):
        return [path for name, figure, record in figures for path in save(figure(record), out, name)]


def label_ticks(axis: Axis) -> None:
    """Plain numbers at as many ticks as fit: each decade, or some within it where there are few decades."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (
        (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.8 else (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    )
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
