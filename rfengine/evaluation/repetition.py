"""Loops: late windows of a video that are earlier windows over again.

A moving scene may come back to where it was, but then it passes at its own pace: the nearest earlier window
may be half a frame's motion away. A loop is nearer than that. The unit of every distance is therefore how far
a window is from itself one frame later; a still window is no repetition, since nothing left it. A world that
is itself exactly periodic (a shape that wraps around a border in whole frames) does repeat, and counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.evaluation.video_frames import (
    FrameSource,
    Measured,
    NotMeasurableError,
    as_frames,
    layout_features,
    spread,
)

_LEAST_WINDOWS = 4
_MOST_WINDOWS = 64
_MOTION = 0.5  # of a frame's motion: a match nearer than this is not explained by passing the same place
_FLOOR = 0.02  # distance of features, standard deviations of a picture: coding noise


def measure_repetition(frames: FrameSource, window_frames: int = 12) -> Measured:
    """Repetition in frames uint8 [T, H, W, 3]: windows of the second half against those two windows earlier.

    repetition: mean over late windows of 1 - (best match / half a frame's motion), from 0 to 1. repeated: the
    share of late windows above 0.5. repetition_lag: the median of the frames back to their match, where there
    are any. Raises NotMeasurableError for a video of less than four windows.
    """
    video = as_frames(frames)
    count = video.count
    if count < _LEAST_WINDOWS * window_frames + 1:
        raise NotMeasurableError(
            f"{count} frames are too few; repetition needs {_LEAST_WINDOWS * window_frames + 1}"
        )
    features = layout_features(video)
    windows = count - window_frames - count // 2
    scores, lags = [], []
    for late in spread(0, windows - 1, min(windows, _MOST_WINDOWS)):
        start = count // 2 + late
        window = features[start : start + window_frames]
        step = _distance(window, features[start + 1 : start + 1 + window_frames])
        best, place = _best_match(window, features[: start - window_frames])
        scores.append(max(0.0, 1 - best / (_MOTION * step)))
        lags.append(start - place)
    score = torch.tensor(scores, dtype=torch.float32, device="cpu")
    found = torch.tensor(lags, dtype=torch.int64, device="cpu")[score > 0.5]
    values = {"repetition": float(score.mean()), "repeated": float((score > 0.5).float().mean())}
    if len(found):
        values["repetition_lag"] = float(found.median())
    return Measured(values, {})


def _distance(first: Tensor, second: Tensor) -> float:
    return float(((first - second).square().mean() + _FLOOR**2).sqrt())


def _best_match(window: Tensor, earlier: Tensor) -> tuple[float, int]:
    """The least distance of a window [N, D] to N frames in a row of `earlier` [T, D], and where they are."""
    squares = torch.cdist(window, earlier).square() / window.shape[1]
    places = squares.shape[1] - len(window) + 1
    rows = torch.stack([squares[row, row : row + places] for row in range(len(window))]).mean(0)
    place = int(rows.argmin())
    return float((rows[place] + _FLOOR**2).sqrt()), place
