"""The curves of a report as PNG files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rfengine.evaluation.video_report import VideoReport
from rfengine.files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DRIFT = {
    "exposure_drift": "brightness",
    "contrast_drift": "contrast",
    "colour_drift": "colour",
    "sharpness_drift": "sharpness, octaves",
}


def missing_plots() -> str | None:
    """Why nothing can be drawn, in one sentence; None where it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plots were drawn: matplotlib is not installed; pip install matplotlib"
    return None


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its panels, row by row.

    Raises RuntimeError with the sentence of `missing_plots` when matplotlib is missing.
    """
    missing = missing_plots()
    if missing:
        raise RuntimeError(missing)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_plots(videos: Sequence[VideoReport], directory: Path) -> list[Path]:
    """Draw what the videos have curves for and return the files: motion_and_drift.png and consistency.png.

    Raises RuntimeError with the sentence of `missing_plots` when matplotlib is missing.
    """
    files = []
    if any("speed" in video.curves for video in videos):
        figure, grid = new_figure(10, 9, 3, 2)
        _draw(grid[0], videos, "speed", "frame", "speed, % of the side a frame", marks=True)
        for place, (name, label) in zip(grid[1:5], _DRIFT.items(), strict=True):
            _draw(place, videos, name, "frame", f"{label}, change")
        if any("latent_drift" in video.curves for video in videos):
            _draw(grid[5], videos, "latent_drift", "chunk", "latents, divergence in nats")
        else:
            grid[5].set_axis_off()
        files.append(directory / "motion_and_drift.png")
        _save(figure, files[-1])
    if any("consistency" in video.curves for video in videos):
        figure, (axes,) = new_figure(7, 5, 1, 1)
        _draw(axes, videos, "consistency", "frames between", "likeness")
        axes.set_xscale("log", base=2)
        files.append(directory / "consistency.png")
        _save(figure, files[-1])
    return files


def _save(figure: Figure, file: Path) -> None:
    with replaced(file) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _draw(axes: Axes, videos: Sequence[VideoReport], name: str, x: str, y: str, marks: bool = False) -> None:
    """A thin line for every video, or marks where its points have gaps, and a thick line for the mean over
    the places that all of them have."""
    values: dict[float, list[float]] = {}
    shown = [video for video in videos if name in video.curves]
    style = {"marker": ".", "linestyle": "none"} if marks else {}
    for video in shown:
        points = video.curves[name]
        axes.plot(*zip(*points, strict=True), color="tab:blue", alpha=0.3, linewidth=1, **style)
        for place, value in points:
            values.setdefault(place, []).append(value)
    shared = sorted(place for place, found in values.items() if len(found) == len(shown))
    if len(shown) > 1 and shared:
        means = [sum(values[place]) / len(shown) for place in shared]
        style = style or {"linewidth": 2}
        axes.plot(shared, means, color="black", label=f"mean of {len(shown)} videos", **style)
        axes.legend()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
