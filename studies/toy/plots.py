"""The plots of the toy study as PNG files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfengine.evaluation.plots import missing_plots
from studies.toy.record import Records, split_model
from studies.toy.tables import (
    TRUE_MODEL,
    TRUE_SINK,
    WITH_EVICTION,
    WITHOUT_EVICTION,
    Samples,
    clip_samples,
    measure,
    model_place,
    sink_place,
    stream_samples,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the palette of Okabe and Ito without its yellow, which is lost on white
_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _RED, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"
_GREY = "#777777"
_MODEL_COLOURS = {"start": _GREY, "teacher": _BLACK, "dmd": _ORANGE, WITHOUT_EVICTION: _RED}
_SINK_COLOURS = {TRUE_SINK: _BLACK, "none": _RED, "frozen": _ORANGE}
_OTHER_COLOURS = (_SKY, _BLUE, _GREEN, _PURPLE)
_MARKERS = "osD^vPX*"
_SHARES_RIGHT = ("colour", "shape", "direction", "speed", "all")
_EVICTION_VALUES = {
    "copying_excess": "copying excess, likeness",
    "sharpness_drift": "sharpness drift, octaves",
    "reward": "reward, world's top speed = 1",
    "shape": "shape right, %",
}
_LOGGED = {
    "reward": "reward while training, world's top speed = 1",
    "toy.agreement": "what the caption says and is seen, %",
    "distance": "distribution matching distance",
    "critic_loss": "loss of the critic",
}
_SMOOTHED = 20  # a point is the mean of one in so many of a log's lines, at least one
_MOST_POINTS = 60  # of a line, else a PNG of several trainings becomes large
_DPI, _COLOURS = 90, 64


def draw(records: Records, logs: Mapping[str, Path], folder: Path) -> list[Path]:
    """Draw what there is and return the files: models.png, trainings.png, eviction.png and, for every model
    and length of streams, sinks_<model>_<seconds>s.png.

    logs: JSON lines of the training of each model. Raises RuntimeError when matplotlib is missing.
    """
    missing = missing_plots()
    if missing:
        raise RuntimeError(missing)
    streams = stream_samples(records)
    figures = {"models": _models(records), "trainings": _trainings(logs)}
    for model, seconds in streams:
        figures[f"sinks_{model}_{seconds}s"] = _sinks(records, model, seconds, streams[model, seconds])
    figures["eviction"] = _eviction(streams)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            files.append(folder / f"{name}.png")
            _save(figure, files[-1])
    return files


def _save(figure: Figure, path: Path) -> None:
    """A PNG of a palette, which is about a third of the size of one in full colour."""
    from PIL import Image  # which matplotlib brings

    figure.set_dpi(_DPI)
    figure.canvas.draw()
    size, pixels = figure.canvas.get_width_height(), figure.canvas.buffer_rgba()
    image = Image.frombuffer("RGBA", size, pixels, "raw", "RGBA", 0, 1).convert("RGB")
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _share_legend(figure: Figure, grid: Sequence[Axes], place: str) -> None:
    """One legend of what the panels show, each label once."""
    labelled = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid]
    handles = {label: handle for pairs in labelled for handle, label in pairs}
    figure.legend(handles=list(handles.values()), loc=place, ncols=4)


def _models(records: Records) -> Figure | None:
    clips = {kind: clip_samples(records, kind) for kind in ("full", "open")}
    models = sorted({*clips["full"], *clips["open"]}, key=model_place)
    if not models:
        return None
    figure, (reward, fast, right, fidelity) = _figure(11, 8, 2, 2)
    places = range(len(models))
    for axes, name, scale in ((reward, "reward", 1), (fast, "fast", 100)):
        for place, model in zip(places, models, strict=True):
            _points(axes, [place], [clips["open"].get(model)], name, scale, _model_style(model, models))
        axes.set_title("open captions")
    reward.set_ylabel("reward, world's top speed = 1")
    fast.set_ylabel("moving scenes that move fast, %")
    for order, model in enumerate(models):
        shift = 0.7 * ((order + 0.5) / len(models) - 0.5)
        style = _model_style(model, models) | {"label": model}
        for place, name in enumerate(_SHARES_RIGHT):
            _points(right, [place + shift], [clips["full"].get(model)], name, 100, style)
    right.set_xticks(range(len(_SHARES_RIGHT)), _SHARES_RIGHT)
    right.set_ylabel("right, %")
    right.set_title("full captions")
    _share_legend(figure, [right], "outside lower center")
    for kind, shift, colour, marker in (("full", -0.12, _BLUE, "o"), ("open", 0.12, _ORANGE, "s")):
        found = [clips[kind].get(model) for model in models]
        style = {"color": colour, "marker": marker, "label": f"{kind} captions"}
        _points(fidelity, [place + shift for place in places], found, "fidelity", 1, style)
    fidelity.set_ylabel("energy distance to the teacher's latents\n(lower is nearer; bars: range)")
    if fidelity.containers:
        fidelity.legend(fontsize="small")
    for axes in (reward, fast, fidelity):
        axes.set_xticks(places, models, rotation=20)
        axes.set_xlim(-0.5, len(models) - 0.5)
    return figure


def _trainings(logs: Mapping[str, Path]) -> Figure | None:
    models = sorted({split_model(name)[0] for name in logs}, key=model_place)
    lines = {
        model: [_read_log(path) for name, path in sorted(logs.items()) if split_model(name)[0] == model]
        for model in models
    }
    curves = {
        (name, model): points
        for name in _LOGGED
        for model, seeds in lines.items()
        if (points := _mean_points([[(e["step"], e[name]) for e in seed if name in e] for seed in seeds]))
    }
    if not curves:
        return None
    figure, grid = _figure(11, 8, 2, 2)
    for axes, (name, label) in zip(grid, _LOGGED.items(), strict=True):
        for model, seeds in lines.items():
            if (name, model) in curves:
                scale = 100 if name == "toy.agreement" else 1
                points = [(step, scale * value) for step, value in _smooth(curves[name, model])]
                told = f"{model}, mean of {len(seeds)} trainings" if len(seeds) > 1 else model
                colour = _model_style(model, models)["color"]
                axes.plot(*zip(*points, strict=True), color=colour, label=told, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
    _share_legend(figure, grid, "outside lower center")
    return figure


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, with "reward" among them where it is logged: toy.motion, or else the score."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    for line in lines:
        if "toy.motion" in line or "score" in line:
            line["reward"] = line.get("toy.motion", line.get("score"))
    return lines


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean at places spread evenly, each at the middle of what it is taken over."""
    width = max(1, len(points) // _SMOOTHED)
    last = len(points) - width
    count = min(_MOST_POINTS, last + 1)
    firsts = [round(place * last / max(1, count - 1)) for place in range(count)]
    parts = [points[first : first + width] for first in firsts]
    return [(sum(x for x, _ in part) / width, sum(y for _, y in part) / width) for part in parts]


def _sinks(records: Records, model: str, seconds: int, samples: Mapping[str, Samples]) -> Figure:
    panels = {
        "reward": ("time, s", "reward, world's top speed = 1"),
        "consistency": ("time between frames, s", "consistency, likeness"),
        "sharpness_drift": ("time, s", "sharpness drift, octaves"),
        "colour_drift": ("time, s", "colour drift, of 1"),
    }
    figure, grid = _figure(13, 7.5, 2, 3)
    sinks = list(samples)
    for axes, (name, (x, y)) in zip(grid[:4], panels.items(), strict=True):
        for sink in sinks:
            owner = TRUE_MODEL if sink == TRUE_SINK else model
            points = _mean_curve(records, owner, sink, seconds, name)
            if points:
                style = _sink_style(sink, sinks)
                axes.plot(*zip(*points, strict=True), **style, label=sink, linewidth=1.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    grid[1].set_xscale("log", base=2)
    for place, sink in enumerate(sinks):
        found = measure(samples[sink], "copying_excess")
        if found:
            hatch = "//" if sink.endswith("_bf16") else None
            grid[4].bar(place, found.mean, color=_sink_style(sink, sinks)["color"], alpha=0.6, hatch=hatch)
            style = {"color": _BLACK, "marker": "none"}
            _points(grid[4], [place], [samples[sink]], "copying_excess", 1, style)
    grid[4].axhline(0, color=_GREY, linewidth=0.8)
    grid[4].set_xticks(range(len(sinks)), sinks, rotation=60)
    grid[4].set_ylabel("copying excess, likeness")
    grid[5].set_axis_off()
    lines = {line.get_label(): line for axes in grid[:4] for line in axes.lines}
    shown = [sink for sink in sinks if sink in lines]
    if shown:
        title = f"{model}, {seconds} s: sink"
        grid[5].legend([lines[sink] for sink in shown], shown, loc="center", title=title)
    return figure


def _mean_curve(
    records: Records, model: str, sink: str, seconds: int, name: str
) -> list[tuple[float, float]]:
    """The mean over all videos of a curve, at the places that all of them have."""
    curves = [
        video.curves[name]
        for streams in records.streams
        if (streams.model, streams.sink, streams.seconds) == (model, sink, seconds)
        for video in streams.videos
        if name in video.curves
    ]
    return _mean_points(curves)


def _mean_points(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of curves at the places that all of them have."""
    values = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*map(set, values))) if values else []
    return [(place, sum(curve[place] for curve in values) / len(values)) for place in shared]


def _eviction(streams: Mapping[tuple[str, int], Mapping[str, Samples]]) -> Figure | None:
    lengths = [
        seconds
        for model, seconds in streams
        if model == WITH_EVICTION and (WITHOUT_EVICTION, seconds) in streams
    ]
    if not lengths:
        return None
    figure, grid = _figure(14, 4 * len(lengths), len(lengths), len(_EVICTION_VALUES))
    panels = [(seconds, name) for seconds in lengths for name in _EVICTION_VALUES]
    for axes, (seconds, name) in zip(grid, panels, strict=True):
        both = [streams[model, seconds] for model in (WITH_EVICTION, WITHOUT_EVICTION)]
        sinks = sorted(({*both[0]} | {*both[1]}) - {TRUE_SINK}, key=sink_place)
        for samples, shift, colour, label in zip(
            both, (-0.12, 0.12), (_BLUE, _RED), ("with eviction", "without"), strict=True
        ):
            places = [place + shift for place in range(len(sinks))]
            style = {"color": colour, "marker": "o" if shift < 0 else "s", "label": f"trained {label}"}
            scale = 100 if name == "shape" else 1
            _points(axes, places, [samples.get(sink) for sink in sinks], name, scale, style)
        axes.set_xticks(range(len(sinks)), sinks, rotation=60)
        axes.set_xlabel(f"sink while streaming {seconds} s")
        axes.set_ylabel(_EVICTION_VALUES[name])
    _share_legend(figure, grid, "outside upper center")
    return figure


def _points(
    axes: Axes,
    places: Sequence[float],
    samples: Sequence[Samples | None],
    name: str,
    scale: float,
    style: Mapping[str, Any],
) -> None:
    """Means with their intervals, for the samples that have the value."""
    measured = [(place, measure(one, name)) for place, one in zip(places, samples, strict=True) if one]
    found = [(place, one) for place, one in measured if one]
    if found:
        means = [scale * one.mean for _, one in found]
        below = [0.0 if one.low is None else max(0.0, scale * (one.mean - one.low)) for _, one in found]
        above = [0.0 if one.high is None else max(0.0, scale * (one.high - one.mean)) for _, one in found]
        xs = [place for place, _ in found]
        axes.errorbar(xs, means, [below, above], linestyle="none", capsize=3, markersize=6, **style)


def _model_style(model: str, models: Sequence[str]) -> dict[str, Any]:
    others = [name for name in models if name not in _MODEL_COLOURS]
    marker = _MARKERS[models.index(model) % len(_MARKERS)]
    if model in _MODEL_COLOURS:
        return {"color": _MODEL_COLOURS[model], "marker": marker}
    return {"color": _OTHER_COLOURS[others.index(model) % len(_OTHER_COLOURS)], "marker": marker}


def _sink_style(sink: str, sinks: Sequence[str]) -> dict[str, Any]:
    """A sink in bf16 is a dashed line in the colour of the same sink in split precision."""
    line, name = ("--" if sink.endswith("_bf16") else "-"), sink.removesuffix("_bf16")
    if name in _SINK_COLOURS:
        return {"color": _SINK_COLOURS[name], "linestyle": line}
    others = list(dict.fromkeys(one.removesuffix("_bf16") for one in sinks))
    others = [one for one in others if one not in _SINK_COLOURS]
    return {"color": _OTHER_COLOURS[others.index(name) % len(_OTHER_COLOURS)], "linestyle": line}
