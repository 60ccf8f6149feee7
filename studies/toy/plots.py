"""The plots of the toy study as PNG files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfengine.evaluation.plots import new_figure
from studies.toy.record import Record
from studies.toy.setting import WITH_EVICTION, WITHOUT_EVICTION, split_model
from studies.toy.tables import (
    TRUE_MODEL,
    TRUE_SINK,
    Samples,
    clip_samples,
    measure,
    model_place,
    own_sinks,
    stream_samples,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

# the palette of Okabe and Ito without its yellow, which is lost on white
_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _RED, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"
_GREY = "#777777"
_MODEL_COLOURS = {
    "start": _GREY,
    "teacher": _BLACK,
    "dmd": _ORANGE,
    WITH_EVICTION: _GREEN,
    WITHOUT_EVICTION: _RED,
}
_SINK_COLOURS = {TRUE_SINK: _BLACK, "none": _RED, "frozen": _ORANGE}
_OTHER_COLOURS = (_SKY, _BLUE, _GREEN, _PURPLE)
_MARKERS = "osD^vPX*"
_SHARES_RIGHT = ("colour", "shape", "direction", "speed", "all")
_REWARD, _TIME = "reward, world's top speed = 1", "time, s"
_CURVES = {
    "reward": (_TIME, _REWARD),
    "right": (_TIME, "all right, of 1"),
    "consistency": ("time between frames, s", "consistency, likeness"),
    "sharpness_drift": (_TIME, "sharpness drift, octaves"),
    "colour_drift": (_TIME, "colour drift, of 1"),
    "after_switch": ("time after a switch, s", "attributes right, of 1"),
    "old_scene": ("time after a switch, s", "old scene seen, of 1"),
}
_STUDENT_VALUES = {
    "right": "all right, % of windows",
    "reward": _REWARD,
    "sharpness_drift": "sharpness drift, octaves",
    "old_scene": "old scene seen, % of windows",
}
_LOGGED = {
    "reward": "reward while training, world's top speed = 1",
    "toy.agreement": "what the caption says and is seen, %",
    "distance": "distribution matching distance",
    "critic_loss": "loss of the critic",
}
# shares, which are drawn in per cent
_PERCENT = (*_SHARES_RIGHT, "fast", "right", "old_scene", "toy.agreement")
_SMOOTHED = 20  # a point is the mean of one in so many of a log's lines, at least one
_MOST_POINTS = 60  # of a line, else a PNG of several trainings becomes large
_DPI, _COLOURS = 90, 128


def draw(records: Sequence[Record], logs: Mapping[str, Path], folder: Path) -> list[Path]:
    """Draw what there is and return the files: models.png, trainings.png, students.png and, for every
    scenario of the streams of WITH_EVICTION, sinks_<scenario>.png.

    logs: JSON lines of the training of each model. Raises RuntimeError when matplotlib is missing.
    """
    streams = stream_samples(records)
    figures = {"models": _models(records), "trainings": _trainings(logs)}
    for model, scenario in streams:
        if model == WITH_EVICTION:
            figures[f"sinks_{scenario}"] = _sinks(records, scenario, streams[model, scenario])
    figures["students"] = _students(streams)
    files = {folder / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for path, figure in files.items():
        _save(figure, path)
    return list(files)


def _save(figure: Figure, path: Path) -> None:
    """A PNG of a palette, which is about a third of the size of one in full colour."""
    from PIL import Image  # which matplotlib brings

    figure.set_dpi(_DPI)
    figure.canvas.draw()
    size, pixels = figure.canvas.get_width_height(), figure.canvas.buffer_rgba()
    image = Image.frombuffer("RGBA", size, pixels, "raw", "RGBA", 0, 1).convert("RGB")
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def _share_legend(figure: Figure, grid: Sequence[Axes], place: str) -> None:
    """One legend of what the panels show, each label once."""
    labelled = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid]
    handles = {label: handle for pairs in labelled for handle, label in pairs}
    figure.legend(handles=list(handles.values()), loc=place, ncols=4)


def _models(records: Sequence[Record]) -> Figure | None:
    clips = {kind: clip_samples(records, kind) for kind in ("full", "open")}
    models = sorted({*clips["full"], *clips["open"]}, key=model_place)
    if not models:
        return None
    figure, (reward, fast, right, fidelity) = new_figure(11, 8, 2, 2)
    for place, model in enumerate(models):
        style = {"color": _model_colour(model, models), "marker": _MARKERS[place % len(_MARKERS)]}
        for axes, name in ((reward, "reward"), (fast, "fast")):
            _points(axes, [(place, clips["open"].get(model))], name, **style)
        shift = 0.7 * ((place + 0.5) / len(models) - 0.5)
        for index, name in enumerate(_SHARES_RIGHT):
            _points(right, [(index + shift, clips["full"].get(model))], name, **style, label=model)
    for kind, shift, colour, marker in (("full", -0.12, _BLUE, "o"), ("open", 0.12, _ORANGE, "s")):
        found = [(place + shift, clips[kind].get(model)) for place, model in enumerate(models)]
        _points(fidelity, found, "fidelity", color=colour, marker=marker, label=f"{kind} captions")
    reward.set(title="open captions", ylabel=_REWARD)
    fast.set(title="open captions", ylabel="moving scenes that move fast, %")
    right.set(title="full captions", ylabel="right, %")
    right.set_xticks(range(len(_SHARES_RIGHT)), _SHARES_RIGHT)
    _share_legend(figure, [right], "outside lower center")
    fidelity.set_ylabel("energy distance to the teacher's latents\n(lower is nearer; bars: range)")
    if fidelity.containers:
        fidelity.legend(fontsize="small")
    for axes in (reward, fast, fidelity):
        axes.set_xticks(range(len(models)), models, rotation=20)
        axes.set_xlim(-0.5, len(models) - 0.5)
    return figure


def _trainings(logs: Mapping[str, Path]) -> Figure | None:
    seeds: dict[str, list[list[dict[str, float]]]] = {}
    for name, path in sorted(logs.items(), key=lambda log: (model_place(split_model(log[0])[0]), log)):
        seeds.setdefault(split_model(name)[0], []).append(_read_log(path))
    curves = {
        (name, model): _mean_points([[(e["step"], e[name]) for e in log if name in e] for log in found])
        for name in _LOGGED
        for model, found in seeds.items()
    }
    if not any(curves.values()):
        return None
    figure, grid = new_figure(11, 8, 2, 2)
    for axes, (name, label) in zip(grid, _LOGGED.items(), strict=True):
        for model, found in seeds.items():
            if curves[name, model]:
                points = [(step, _scale(name) * value) for step, value in _smooth(curves[name, model])]
                title = f"{model}, mean of {len(found)} trainings" if len(found) > 1 else model
                colour = _model_colour(model, list(seeds))
                axes.plot(*zip(*points, strict=True), color=colour, label=title, linewidth=1.2)
        axes.set(xlabel="step", ylabel=label)
    _share_legend(figure, grid, "outside lower center")
    return figure


def _read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log, with "reward" among them where it is logged: toy.motion, or else the score."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    for line in lines:
        if "toy.motion" in line or "score" in line:
            line["reward"] = line.get("toy.motion", line.get("score"))
    return lines


def _smooth(points: Points) -> Points:
    """The running mean at places spread evenly, each at the middle of what it is taken over."""
    width = max(1, len(points) // _SMOOTHED)
    last = len(points) - width
    count = min(_MOST_POINTS, last + 1)
    firsts = [round(place * last / max(1, count - 1)) for place in range(count)]
    parts = [points[first : first + width] for first in firsts]
    return [(sum(x for x, _ in part) / width, sum(y for _, y in part) / width) for part in parts]


def _sinks(records: Sequence[Record], scenario: str, samples: Mapping[str, Samples]) -> Figure:
    curves = {
        name: {sink: points for sink in samples if (points := _mean_curve(records, sink, scenario, name))}
        for name in _CURVES
    }
    curves = {name: found for name, found in curves.items() if found}  # no switch, no curve of it
    rows = math.isqrt(len(curves) + 2)
    columns = math.ceil((len(curves) + 2) / rows)
    figure, panels = new_figure(4.3 * columns, 3.4 * rows, rows, columns)
    copying, legend, lines = panels[len(curves)], panels[-1], {}
    for axes, (name, found) in zip(panels, curves.items(), strict=False):
        for sink, points in found.items():
            style = "--" if sink.endswith("_bf16") else "-"  # in the colour of the split precision
            colour = _sink_colour(sink, samples)
            (line,) = axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.5)
            lines.setdefault(sink, line)
        axes.set(xlabel=_CURVES[name][0], ylabel=_CURVES[name][1])
        if name == "consistency":
            axes.set_xscale("log", base=2)
    for place, sink in enumerate(samples):
        found = measure(samples[sink], "copying_excess")
        if found:
            hatch = "//" if sink.endswith("_bf16") else None
            copying.bar(place, found.mean, color=_sink_colour(sink, samples), alpha=0.6, hatch=hatch)
            _points(copying, [(place, samples[sink])], "copying_excess", color=_BLACK, marker="none")
    copying.axhline(0, color=_GREY, linewidth=0.8)
    copying.set_xticks(range(len(samples)), samples, rotation=60)
    copying.set_ylabel("copying excess, likeness")
    for axes in panels[len(curves) + 1 :]:
        axes.set_axis_off()
    shown = [sink for sink in samples if sink in lines]
    if shown:
        title = f"{WITH_EVICTION}, a scene that {scenario}: sink"
        legend.legend([lines[sink] for sink in shown], shown, loc="center", title=title)
    return figure


def _mean_curve(records: Sequence[Record], sink: str, scenario: str, name: str) -> Points:
    """The mean over all videos of a curve, at the places that all of them have."""
    owner = TRUE_MODEL if sink == TRUE_SINK else WITH_EVICTION
    return _mean_points(
        [
            video["curves"][name]
            for record in records
            if record["kind"] == "streams" and split_model(record["model"])[0] == owner
            if (record["sink"], record["scenario"]) == (sink, scenario)
            for video in record["videos"]
            if name in video["curves"]
        ]
    )


def _mean_points(curves: Sequence[Points]) -> Points:
    """The mean of curves at the places that all of them have."""
    values = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*map(set, values))) if values else []
    return [(place, sum(curve[place] for curve in values) / len(values)) for place in shared]


def _students(streams: Mapping[tuple[str, str], Mapping[str, Samples]]) -> Figure | None:
    """Every student under the sink that it was trained with, in each scenario."""
    scenarios = sorted({scenario for _, scenario in streams})
    found = {scenario: own_sinks(streams, scenario) for scenario in scenarios}
    models = sorted({model for rows in found.values() for model in rows}, key=model_place)
    if len(models) < 2:
        return None
    figure, grid = new_figure(14, 4, 1, len(_STUDENT_VALUES))
    for axes, (name, label) in zip(grid, _STUDENT_VALUES.items(), strict=True):
        for index, scenario in enumerate(scenarios):
            shift = 0.5 * ((index + 0.5) / len(scenarios) - 0.5)
            entries = [(place + shift, found[scenario].get(model)) for place, model in enumerate(models)]
            style = {"color": _OTHER_COLOURS[index % len(_OTHER_COLOURS)], "marker": _MARKERS[index]}
            _points(axes, entries, name, **style, label=f"a scene that {scenario}")
        axes.set_xticks(range(len(models)), models, rotation=60)
        axes.set_ylabel(label)
    _share_legend(figure, grid, "outside upper center")
    return figure


def _points(axes: Axes, entries: Iterable[tuple[float, Samples | None]], name: str, **style: Any) -> None:
    """Means with their intervals at their places, for the samples that have the value."""
    measured = [(place, measure(samples, name)) for place, samples in entries if samples]
    found = [(place, interval) for place, interval in measured if interval]
    if found:
        scale = _scale(name)
        means = [scale * one.mean for _, one in found]
        below = [0.0 if one.low is None else max(0.0, scale * (one.mean - one.low)) for _, one in found]
        above = [0.0 if one.high is None else max(0.0, scale * (one.high - one.mean)) for _, one in found]
        xs = [place for place, _ in found]
        axes.errorbar(xs, means, [below, above], linestyle="none", capsize=3, markersize=6, **style)


def _scale(name: str) -> int:
    return 100 if name in _PERCENT else 1


def _model_colour(model: str, models: Iterable[str]) -> str:
    others = [name for name in models if name not in _MODEL_COLOURS]
    return _MODEL_COLOURS.get(model) or _OTHER_COLOURS[others.index(model) % len(_OTHER_COLOURS)]


def _sink_colour(sink: str, sinks: Iterable[str]) -> str:
    """A sink in bf16 has the colour of the same sink in split precision."""
    name = sink.removesuffix("_bf16")
    others = list(dict.fromkeys(one.removesuffix("_bf16") for one in sinks))
    others = [one for one in others if one not in _SINK_COLOURS]
    return _SINK_COLOURS.get(name) or _OTHER_COLOURS[others.index(name) % len(_OTHER_COLOURS)]
