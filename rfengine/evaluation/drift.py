"""How far a video has moved away from its first chunk: light, colour, sharpness, and the latents behind it.

A prompt switch is a drift too as far as these see; they compare looks, not intentions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfengine.evaluation.frame_signals import frame_signals
from rfengine.evaluation.video_frames import ChunkGrid, Frames, NotMeasurableError, as_frames

if TYPE_CHECKING:
    from numpy import ndarray

_LAST_PART = 4  # a quarter of the chunks is the end of the video
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Drift:
    """Differences between every chunk and the first one, and how large they are over the last quarter.

    Curves have one value a chunk, the first being 0. exposure, contrast: signed, of the range 0 to 1. colour:
    distance of the means and deviations of both chroma axes. sharpness: signed, in octaves. clipped: signed,
    a share of the values.
    """

    exposure_curve: Tensor
    contrast_curve: Tensor
    colour_curve: Tensor
    sharpness_curve: Tensor
    clipped_curve: Tensor

    @property
    def exposure(self) -> float:
        return _at_end(self.exposure_curve)

    @property
    def contrast(self) -> float:
        return _at_end(self.contrast_curve)

    @property
    def colour(self) -> float:
        return _at_end(self.colour_curve)

    @property
    def sharpness(self) -> float:
        return _at_end(self.sharpness_curve)

    @property
    def clipped(self) -> float:
        return _at_end(self.clipped_curve)


def measure_drift(frames: Tensor | ndarray | Frames, grid: ChunkGrid | None = None) -> Drift:
    """The drift of frames uint8 [T, H, W, 3].

    Raises NotMeasurableError for a video without a second chunk.
    """
    video, grid = as_frames(frames), grid or ChunkGrid()
    chunks = grid.slices(video.count)
    if len(chunks) < 2:
        raise NotMeasurableError(
            f"{video.count} frames are no two chunks; drift needs {grid.first_frames + grid.frames}"
        )
    signals = frame_signals(video)

    def against_first(signal: Tensor) -> Tensor:
        means = torch.stack([signal[chunk].mean(0) for chunk in chunks])
        return means - means[0]

    return Drift(
        exposure_curve=against_first(signals.luma),
        contrast_curve=against_first(signals.contrast),
        colour_curve=against_first(signals.colour).norm(dim=-1),
        sharpness_curve=against_first(signals.sharpness),
        clipped_curve=against_first(signals.clipped),
    )


def latent_drift(latents: Tensor, chunk_frames: int = 3) -> Tensor:
    """How far the latents of every chunk are from those of the first: float32 [chunks], the first being 0.

    latents: [C, F, h, w]. The divergence KL(chunk || first) of Gaussians with the mean and variance of each
    channel, in nats, averaged over channels. Raises NotMeasurableError for less than two chunks.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; give [C, F, h, w]")
    count = latents.shape[1] // chunk_frames
    if count < 2:
        raise NotMeasurableError(
            f"{latents.shape[1]} latent frames are no two chunks; latent drift needs {2 * chunk_frames}"
        )
    parts = latents[:, : count * chunk_frames].float().unflatten(1, (count, chunk_frames)).flatten(2)
    mean, variance = parts.mean(-1), parts.var(-1, correction=0) + _LEAST_VARIANCE
    ratio = variance / variance[:, :1]
    distance = (mean - mean[:, :1]).square() / variance[:, :1]
    return (ratio - 1 - ratio.log() + distance).mean(0) / 2


def _at_end(curve: Tensor) -> float:
    return abs(float(curve[-max(1, len(curve) // _LAST_PART) :].mean()))
