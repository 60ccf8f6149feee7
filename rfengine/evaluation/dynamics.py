"""How much moves in a video. A change of light or colour is no motion; a result always holds the drift."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from rfengine.evaluation.drift import measure_drift
from rfengine.evaluation.optical_flow import (
    WORKING_SIDE,
    OpticalFlow,
    moving_speed,
    pairs_at_once,
    picture_flow,
)
from rfengine.evaluation.video_frames import (
    DEFAULT_GRID,
    ChunkGrid,
    Frames,
    FrameSource,
    Measured,
    NotMeasurableError,
    as_frames,
    chosen_frames,
    gathered,
    picture_batches,
    spread,
    windows,
)

_RUN_PAIRS = 8  # neighbouring pairs of frames measured together
_FREEZE_SIDE = 64  # pixels: noise of the coding is gone at this size, motion is not
_FREEZE_CHANGE = 2 / 255  # 99% of the pixels of a frozen frame change by less


def measure_dynamics(frames: FrameSource, grid: ChunkGrid = DEFAULT_GRID, most_pairs: int = 96) -> Measured:
    """Motion of frames uint8 [T, H, W, 3], with the drift without which it says nothing: a drifting picture
    seems to move.

    speed: how fast what moves is (the fastest 5% of the picture), mean_flow: the mean over the whole picture,
    both in per cent of the shorter side a frame. freeze_fraction: the share of frames that repeat the one
    before, light and colour aside. The curve of the speed is that of the pairs measured.

    most_pairs: pairs of neighbouring frames whose flow is measured; of a longer video they are taken in runs
    of eight, spread evenly. The flow evens out light and colour around every pixel, so that neither exposure
    nor colour that changes moves anything; noise hides motion, and the drift of sharpness shows it.
    Raises NotMeasurableError for a video without a second chunk, whose drift is unknown.
    """
    video = as_frames(frames)
    if most_pairs < 1:
        raise ValueError(f"most_pairs is {most_pairs}; measure at least one pair of frames")
    drift = measure_drift(video, grid)
    percent = 100 / min(video.height, video.width)
    speeds, means = [], []
    runs = _runs(video.count - 1, most_pairs)
    for flow in _run_flows(video, runs):
        speeds.append(moving_speed(flow) * percent)
        lengths = torch.where(flow.mask, flow.vectors.norm(dim=-1), 0.0)
        means.append(lengths.flatten(1).mean(1) * percent)
    speed = torch.cat(speeds)
    values = {
        "speed": float(speed.mean()),
        "mean_flow": float(torch.cat(means).mean()),
        "freeze_fraction": freeze_fraction(video),
    }
    pairs = [place for start, end in runs for place in range(start, end)]
    curve = tuple(zip(pairs, speed.tolist(), strict=True))
    return Measured(values | drift.values, {"speed": curve} | drift.curves)


def freeze_fraction(frames: FrameSource) -> float:
    """The share of pairs of neighbouring frames that show the same once light and colour are matched.

    Frames uint8 [T, H, W, 3]. Each channel of a frame is given the mean and the deviation that it had in the
    frame before. Raises NotMeasurableError for a single frame.
    """
    video = as_frames(frames)
    if video.count < 2:
        raise NotMeasurableError("1 frame is no pair of frames; freezing needs two")
    changes = gathered(_changes(picture_batches(video, _FREEZE_SIDE)), video.count - 1)
    return float((changes < _FREEZE_CHANGE).float().mean())


def _changes(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    last = None
    for pictures in batches:
        joined = pictures if last is None else torch.cat((last, pictures))
        yield _matched_change(joined)
        last = pictures[-1:].clone()


def _matched_change(pictures: Tensor) -> Tensor:
    """What 99% of the pixels of each picture [T, 3, h, w] have changed by at most since the one before:
    [T - 1]."""
    values = pictures.flatten(2)
    mean, deviation = values.mean(-1, keepdim=True), values.std(-1, keepdim=True, correction=0)
    gain = (deviation[:-1] + 1e-3) / (deviation[1:] + 1e-3)
    matched = (values[1:] - mean[1:]) * gain + mean[:-1]
    change = (matched - values[:-1]).abs().amax(1).sort(dim=-1).values
    return change[:, min(change.shape[1] - 1, round(0.99 * change.shape[1]))]


def _run_flows(video: Frames, runs: list[tuple[int, int]]) -> Iterator[OpticalFlow]:
    """The flow of all pairs of the runs, in parts that memory holds; the video is gone through once."""
    places = sorted({place for start, end in runs for place in range(start, end + 1)})
    rows = {place: row for row, place in enumerate(places)}
    pictures = picture_batches(chosen_frames(video, places), WORKING_SIDE)
    first = next(pictures)
    at_once = pairs_at_once(*first.shape[-2:])
    parts = [
        (rows[place], rows[min(place + at_once, end)] + 1)
        for start, end in runs
        for place in range(start, end, at_once)
    ]
    for part in windows(chain([first], pictures), parts):
        yield picture_flow(part, video.height, video.width)


def _runs(pairs: int, most: int) -> list[tuple[int, int]]:
    """Runs (first pair, one past the last) of at most `most` pairs in all, spread over `pairs`."""
    if pairs <= most:
        return [(0, pairs)]
    length = min(_RUN_PAIRS, most)
    return [(start, start + length) for start in spread(0, pairs - length, most // length)]
