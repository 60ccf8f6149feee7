"""How alike the frames of a video are, against the time between them.

The feature of a frame are histograms over the picture and over its four quarters: of brightness, of chroma
(both axes together), and of gradients (direction and strength together, at two scales). Two frames are as
alike as their histograms overlap (Bhattacharyya), from 0 to 1: what moves stays alike, what changes its look
does not. A still video is the most consistent of all, so read this beside the dynamics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rfengine.evaluation.frame_signals import luma_and_chroma
from rfengine.evaluation.optical_flow import gradient
from rfengine.evaluation.video_frames import (
    FrameSource,
    Measured,
    NotMeasurableError,
    as_frames,
    gathered,
    picture_batches,
)

_SIDE = 64  # pixels of the shorter side at which the features are taken
_ROWS_AT_ONCE = 4096  # of the features, whose products are held
_BINS = 8
_DIRECTIONS = 8
_STRENGTHS = 4
_STRONGEST = 0.25  # brightness a pixel: an edge at least as steep as this falls into the last bin


def measure_consistency(frames: FrameSource, chunk_frames: int = 12) -> Measured:
    """How alike frames uint8 [T, H, W, 3] are: at one chunk (near), at half the video (far), and as a curve
    over lags that double, each with the mean likeness of all frames that far apart.

    Raises NotMeasurableError for a video shorter than two chunks.
    """
    video = as_frames(frames)
    if video.count < 2 * chunk_frames:
        raise NotMeasurableError(f"{video.count} frames are too few; consistency needs {2 * chunk_frames}")
    features = look_features(video)
    half = video.count // 2
    lags = {2**power for power in range(half.bit_length())} | {chunk_frames, half}
    likeness = {lag: _likeness(features, lag) for lag in sorted(lags)}
    values = {"consistency_near": likeness[chunk_frames], "consistency_far": likeness[half]}
    return Measured(values, {"consistency": tuple(likeness.items())})


def look_features(frames: FrameSource) -> Tensor:
    """Features [T, D] of length 1, whose products are the likeness of frames uint8 [T, H, W, 3]."""
    video = as_frames(frames)
    return gathered(map(_picture_features, picture_batches(video, _SIDE)), video.count)


def _likeness(features: Tensor, lag: int) -> float:
    """The mean over all frames [T, D] that are `lag` apart, a part of them at a time."""
    pairs = zip(features[lag:].split(_ROWS_AT_ONCE), features[:-lag].split(_ROWS_AT_ONCE), strict=True)
    return float(torch.cat([(late * early).sum(-1) for late, early in pairs]).mean())


def _picture_features(pictures: Tensor) -> Tensor:
    luma, chroma = luma_and_chroma(pictures)
    light = _soft_bins(luma, _BINS)
    fine = 0.5 + 0.5 * chroma.sign() * (2 * chroma.abs()).sqrt()  # narrower bins near grey
    blue, red = (_soft_bins(fine[:, axis], _BINS) for axis in (0, 1))
    smaller = functional.avg_pool2d(luma[:, None], 2, ceil_mode=True)[:, 0]
    histograms = [
        _histograms(light, torch.ones_like(light[..., :1])),
        _histograms(blue, red),
        _histograms(*_gradient_bins(luma)),
        _histograms(*_gradient_bins(smaller)),
    ]
    weights = [1.0, 2.0, 0.5, 0.5]  # light, colour, edges of both scales
    rows = [math.sqrt(weight) * row for weight, row in zip(weights, histograms, strict=True)]
    return functional.normalize(torch.cat(rows, dim=1), dim=1)


def _soft_bins(values: Tensor, count: int) -> Tensor:
    """Shares [..., count] of each value from 0 to 1 in the two bins nearest to it."""
    places = torch.arange(count, dtype=torch.int64, device=values.device)
    return (1 - (values.clamp(0, 1)[..., None] * (count - 1) - places).abs()).clamp(min=0)


def _gradient_bins(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Direction and strength bins [B, H, W, bins] of the gradient; opposite directions are one."""
    x, y = (axis[:, 0] for axis in gradient(luma[:, None]))
    strength = _soft_bins(torch.sqrt((x.square() + y.square()) / _STRONGEST**2), _STRENGTHS)
    turn = (torch.atan2(y, x) / math.pi) % 1.0
    direction = _soft_bins(turn, _DIRECTIONS + 1)
    wrapped = direction[..., :_DIRECTIONS].clone()
    wrapped[..., 0] += direction[..., _DIRECTIONS]
    # without strength there is no direction: flat pixels share all of them
    flat = strength[..., :1]
    return wrapped * (1 - flat) + flat / _DIRECTIONS, strength


def _histograms(first: Tensor, second: Tensor) -> Tensor:
    """Roots of the joint histograms of bins [B, H, W, i] and [B, H, W, j], over whole and quarters."""
    height, width = first.shape[1:3]
    middle_y, middle_x = max(1, height // 2), max(1, width // 2)
    regions = [(slice(None), slice(None))]
    regions += [
        (rows, columns)
        for rows in (slice(None, middle_y), slice(middle_y, None))
        for columns in (slice(None, middle_x), slice(middle_x, None))
    ]
    parts = []
    for (rows, columns), weight in zip(regions, [0.5] + [0.125] * 4, strict=True):
        left, right = first[:, rows, columns].flatten(1, 2), second[:, rows, columns].flatten(1, 2)
        counts = (left.transpose(1, 2) @ right).flatten(1)
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1e-9)
        parts.append((weight * shares).sqrt())
    return torch.cat(parts, dim=1)
