"""The parts of a chunk against their floors, drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".pdf", ".svg")


def draw(figures: dict[str, Any], path: Path) -> None:
    """Bars of measured milliseconds and of floors, one pair for each part, written to `path`."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = figures["parts"]
    places = range(len(rows))
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar([place - 0.2 for place in places], [row["ms"] for row in rows], 0.4, label="measured")
    floors = [
        (place + 0.2, row["floor_ms"]) for place, row in zip(places, rows, strict=True) if row["floor_ms"]
    ]
    axes.bar([place for place, _ in floors], [ms for _, ms in floors], 0.4, label="floor")
    for place, row in zip(places, rows, strict=True):
        if row["share_of_floor"] is not None:
            axes.annotate(f"{row['share_of_floor']:.0%}", (place - 0.2, row["ms"]), ha="center", va="bottom")
    axes.set_xticks(list(places), [row["part"] for row in rows])
    axes.set_xlabel("part of a chunk (percent: floor over measured)")
    axes.set_ylabel("milliseconds in one chunk")
    axes.set_title(
        f"{figures['model']} at {figures['width']} x {figures['height']}, {figures['dtype']}, on "
        f"{figures['device']}\ncommit {figures['versions']['commit']}"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def check_plot(path: Path) -> None:
    """Raises RuntimeError where matplotlib is missing, ValueError for a file that cannot be drawn to."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no directory; make it, or write the plot elsewhere")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot is {path}; end it in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib, which is not installed; pip install matplotlib")
