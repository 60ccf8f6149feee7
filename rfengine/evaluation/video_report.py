"""All metrics of one video: its numbers, its curves, and for every metric that is absent the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rfengine.evaluation.consistency import measure_consistency
from rfengine.evaluation.copying import SinkTrace, measure_copying, trace_sink
from rfengine.evaluation.drift import latent_drift
from rfengine.evaluation.dynamics import measure_dynamics
from rfengine.evaluation.flicker import measure_flicker
from rfengine.evaluation.prompt_switch import Captions, measure_switches
from rfengine.evaluation.repetition import measure_repetition
from rfengine.evaluation.toy_accuracy import check_world_size, toy_accuracy, toy_window_score
from rfengine.evaluation.video_frames import (
    DEFAULT_GRID,
    ChunkGrid,
    Curve,
    Frames,
    FrameSource,
    Measured,
    NotMeasurableError,
    as_frames,
)


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


def measure_video(
    name: str,
    frames: FrameSource,
    grid: ChunkGrid = DEFAULT_GRID,
    flow_pairs: int = 96,
    *,
    captions: Captions = (),
    latents: Tensor | None = None,
) -> tuple[VideoReport, SinkTrace | None]:
    """Everything that one video alone says, and the trace by which `with_copying` compares it with others.

    frames: in memory uint8 [T, H, W, 3]; grid: where the chunks lie; flow_pairs: pairs of frames whose flow
    is measured, at most; captions: of the toy world; latents: [C, F, h, w]. A metric that the video does not
    allow is absent, with the reason; captions that are none of the toy world are a ValueError.
    """
    video = as_frames(frames)
    groups: dict[str, Callable[[], Measured]] = {
        "dynamics and drift": lambda: measure_dynamics(video, grid, flow_pairs),
        "consistency": lambda: measure_consistency(video, grid.frames),
        "flicker": lambda: measure_flicker(video, grid.frames),
        "repetition": lambda: measure_repetition(video, grid.frames),
    }
    if latents is not None:
        groups["latent drift"] = lambda: _latents(latents)
    if len(captions) == 1:
        groups["toy world"] = lambda: _toy(video, captions[0][1])
    elif captions:
        groups["prompt switch"] = lambda: _switches(video, captions, grid.frames)
    values: dict[str, float] = {}
    curves: dict[str, Curve] = {}
    absent: dict[str, str] = {}
    trace = None
    for group, measure in groups.items():
        try:
            measured = measure()
        except NotMeasurableError as error:
            absent[group] = str(error)
        else:
            values |= measured.values
            curves |= measured.curves
    try:
        trace = trace_sink(video, grid)
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
        if trace is not None:
            others = [place for place, other in enumerate(traces) if place != index and other is not None]
            alike = [place for place in others if reports[place].captions == report.captions]
            chosen = [other for place in alike or others if (other := traces[place]) is not None]
            try:
                values = report.values | measure_copying(trace, baselines or chosen)
                report = replace(report, values=values)
            except NotMeasurableError as error:
                report = replace(report, absent=report.absent | {"copying": str(error)})
        completed.append(report)
    return completed


def _latents(latents: Tensor) -> Measured:
    curve = latent_drift(latents).tolist()
    last = curve[-max(1, len(curve) // 4) :]
    return Measured({"latent_drift": sum(last) / len(last)}, {"latent_drift": tuple(enumerate(curve))})


def _toy(video: Frames, caption: str) -> Measured:
    return Measured({f"toy_{name}": value for name, value in toy_accuracy(video, caption).items()}, {})


def _switches(video: Frames, captions: Captions, window_frames: int) -> Measured:
    check_world_size(video)
    return measure_switches(video, captions, toy_window_score, window_frames)
