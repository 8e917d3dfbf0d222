"""Draw the figures from the committed results: `python -m paper_figures [<figure>] [--out DIR]`."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from paper_figures import ablations, cost_to_loss, demo, scaling, solver_speed

ROOT = Path(__file__).parents[1]
SCHEMA = 1  # of the records that these figures understand

# A figure has the name of the experiment whose records it draws.
FIGURES: dict[str, Callable[[list[dict], Path], list[Path]]] = {
    "ablations": ablations.draw,
    "cost_to_loss": cost_to_loss.draw,
    "demo": demo.draw,
    "scaling": scaling.draw,
    "solver_speed": solver_speed.draw,
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    missing = 0
    for name in [options.figure] if options.figure else FIGURES:
        records = read(options.results / name)
        if not records:
            where = os.path.relpath(options.results / name)
            print(f"{name}: no records in {where}; make them: python -m experiments.{name}")
            missing += 1
            continue
        for path in FIGURES[name](records, options.out):
            print(os.path.relpath(path))
    # Without a name, all there is is drawn; what was asked for by name must be there.
    return int(missing == len(FIGURES) or bool(options.figure and missing))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description=__doc__)
    parser.add_argument("figure", nargs="?", choices=sorted(FIGURES), help="one; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "paper_figures" / "out", metavar="DIR")
    results = ROOT / "experiments" / "results"
    parser.add_argument("--results", type=Path, default=results, metavar="DIR")
    return parser.parse_args(arguments)


def read(folder: Path) -> list[dict]:
    """The records of one experiment, in the order of their names."""
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {record['schema']}, this code draws {SCHEMA}.")
        records.append(record)
    return records


if __name__ == "__main__":
    sys.exit(main())
