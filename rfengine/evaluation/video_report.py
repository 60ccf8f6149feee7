"""All metrics of one video: its numbers, its curves, and for every metric that is absent the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from torch import Tensor

from rfengine.evaluation.consistency import measure_consistency
from rfengine.evaluation.copying import SinkTrace, measure_copying, trace_sink
from rfengine.evaluation.drift import latent_drift
from rfengine.evaluation.dynamics import measure_dynamics
from rfengine.evaluation.flicker import measure_flicker
from rfengine.evaluation.prompt_switch import Switch, measure_switch_delays
from rfengine.evaluation.repetition import measure_repetition
from rfengine.evaluation.toy_accuracy import check_world_size, toy_accuracy, toy_window_score
from rfengine.evaluation.video_frames import ChunkGrid, Frames, NotMeasurableError, as_frames
from rfengine.limits import Range, check_fields

if TYPE_CHECKING:
    from numpy import ndarray

Curve = tuple[tuple[float, float], ...]
Captions = Sequence[tuple[int, str]]
"""The captions of a video: (the frame each begins at, its text), the first at 0."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """chunks: where they lie. flow_pairs: pairs of frames of each video whose flow is measured, at most."""

    chunks: ChunkGrid = ChunkGrid()
    flow_pairs: Annotated[int, Range(1, 100_000)] = 96

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class VideoReport:
    """captions: the texts it was made from, as far as known. values: metric -> number. curves: name ->
    points. absent: group of metrics -> why it is missing."""

    name: str
    frames: int
    height: int
    width: int
    captions: tuple[str, ...]
    values: dict[str, float]
    curves: dict[str, Curve]
    absent: dict[str, str]


Measured = tuple[dict[str, float], dict[str, Curve]]


def measure_video(
    name: str,
    frames: Tensor | ndarray | Frames,
    options: MeasureOptions | None = None,
    *,
    captions: Captions = (),
    latents: Tensor | None = None,
) -> tuple[VideoReport, SinkTrace | None]:
    """Everything that one video alone says, and the trace by which `with_copying` compares it with others.

    frames: in memory uint8 [T, H, W, 3]; captions: of the toy world; latents: [C, F, h, w]. A metric that the
    video does not allow is absent, with the reason; captions that are none of the toy world are a ValueError.
    """
    video, options = as_frames(frames), options or MeasureOptions()
    period = options.chunks.frames
    groups: dict[str, Callable[[], Measured]] = {
        "dynamics and drift": lambda: _dynamics_and_drift(video, options),
        "consistency": lambda: _consistency(video, period),
        "flicker": lambda: _flicker(video, period),
        "repetition": lambda: _repetition(video, period),
    }
    if latents is not None:
        groups["latent drift"] = lambda: _latents(latents)
    if len(captions) == 1:
        groups["toy world"] = lambda: (_toy(video, captions[0][1]), {})
    elif captions:
        groups["prompt switch"] = lambda: _switches(video, captions, period)
    values: dict[str, float] = {}
    curves: dict[str, Curve] = {}
    absent: dict[str, str] = {}
    for group, measure in groups.items():
        try:
            numbers, lines = measure()
        except NotMeasurableError as error:
            absent[group] = str(error)
        else:
            values |= numbers
            curves |= lines
    trace = None
    try:
        trace = trace_sink(video, options.chunks)
    except NotMeasurableError as error:
        absent["copying"] = str(error)
    texts = tuple(text for _, text in captions)
    return VideoReport(name, video.count, video.height, video.width, texts, values, curves, absent), trace


def with_copying(
    reports: Sequence[VideoReport],
    traces: Sequence[SinkTrace | None],
    baselines: Sequence[SinkTrace] = (),
) -> list[VideoReport]:
    """The reports with the copying of the first frames added.

    Each video is measured against `baselines`; without any, against the other videos of the same captions, or
    against all the others where no other has them.
    """
    completed = []
    for index, (report, trace) in enumerate(zip(reports, traces, strict=True)):
        if trace is None:
            completed.append(report)
            continue
        others = [place for place, other in enumerate(traces) if place != index and other is not None]
        alike = [place for place in others if reports[place].captions == report.captions]
        chosen = [other for place in alike or others if (other := traces[place]) is not None]
        try:
            copying = measure_copying(trace, baselines or chosen)
        except NotMeasurableError as error:
            completed.append(replace(report, absent=report.absent | {"copying": str(error)}))
            continue
        values = {
            "copying_likeness": copying.likeness,
            "copying_baseline": copying.baseline,
            "copying_excess": copying.excess,
        }
        completed.append(replace(report, values=report.values | values))
    return completed


def _dynamics_and_drift(video: Frames, options: MeasureOptions) -> Measured:
    dynamics = measure_dynamics(video, options.chunks, options.flow_pairs)
    drift = dynamics.drift
    values = {
        "speed": dynamics.speed,
        "mean_flow": dynamics.mean_flow,
        "freeze_fraction": dynamics.freeze_fraction,
    }
    curves = {"speed": tuple(zip(dynamics.pair_frames.tolist(), dynamics.pair_speeds.tolist(), strict=True))}
    starts = [chunk.start for chunk in options.chunks.slices(video.count)]
    for name in ("exposure", "contrast", "colour", "sharpness", "clipped"):
        values[f"{name}_drift"] = getattr(drift, name)
        curves[f"{name}_drift"] = tuple(zip(starts, getattr(drift, f"{name}_curve").tolist(), strict=True))
    return values, curves


def _consistency(video: Frames, period: int) -> Measured:
    consistency = measure_consistency(video, period)
    values = {"consistency_near": consistency.near, "consistency_far": consistency.far}
    return values, {"consistency": consistency.curve}


def _flicker(video: Frames, period: int) -> Measured:
    flicker = measure_flicker(video, period)
    values = {
        "brightness_flicker": flicker.brightness,
        "colour_flicker": flicker.colour,
        "sharpness_flicker": flicker.sharpness,
        "flicker_ratio": flicker.brightness_ratio,
    }
    return values, {}


def _repetition(video: Frames, period: int) -> Measured:
    repetition = measure_repetition(video, period)
    values = {"repetition": repetition.score, "repeated": repetition.repeated}
    if repetition.lag is not None:
        values["repetition_lag"] = float(repetition.lag)
    return values, {}


def _latents(latents: Tensor) -> Measured:
    curve = latent_drift(latents).tolist()
    last = curve[-max(1, len(curve) // 4) :]
    return {"latent_drift": sum(last) / len(last)}, {"latent_drift": tuple(enumerate(curve))}


def _toy(video: Frames, caption: str) -> dict[str, float]:
    return {f"toy_{name}": value for name, value in toy_accuracy(video, caption).items()}


def _switches(video: Frames, captions: Captions, period: int) -> Measured:
    """Delays of all switches, each judged up to the next; one that is never done counts as all its part."""
    check_world_size(video)
    ends = [start for start, _ in captions[2:]] + [video.count]
    switches = [
        Switch(start, end, old, new)
        for (_, old), (start, new), end in zip(captions, captions[1:], ends, strict=False)
    ]
    delays = measure_switch_delays(video, switches, toy_window_score, period)
    points = [point for delay in delays for point in delay.margins]
    lengths = [
        switch.end - switch.frame if delay.frames is None else delay.frames
        for switch, delay in zip(switches, delays, strict=True)
    ]
    failed = sum(delay.frames is None for delay in delays)
    values = {"switch_delay": sum(lengths) / len(lengths), "switch_failures": failed / len(delays)}
    return values, {"switch_margin": tuple(points)}
