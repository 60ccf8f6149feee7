"""How far a video has moved away from its first chunk: light, colour, sharpness, and the latents behind it.

A prompt switch is a drift too as far as these see; they compare looks, not intentions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.evaluation.frame_signals import frame_signals
from rfengine.evaluation.video_frames import (
    DEFAULT_GRID,
    ChunkGrid,
    FrameSource,
    Measured,
    NotMeasurableError,
    as_frames,
)

_LAST_PART = 4  # a quarter of the chunks is the end of the video
_LEAST_VARIANCE = 1e-6


def measure_drift(frames: FrameSource, grid: ChunkGrid = DEFAULT_GRID) -> Measured:
    """The drift of frames uint8 [T, H, W, 3]: between every chunk and the first one (curves, by the frame a
    chunk starts at, the first being 0), and how large it is over the last quarter (values).

    exposure, contrast: signed, of the range 0 to 1. colour: distance of the means and deviations of both
    chroma axes. sharpness: signed, in octaves. clipped: signed, a share of the values. Raises
    NotMeasurableError for a video without a second chunk.
    """
    video = as_frames(frames)
    chunks = grid.slices(video.count)
    if len(chunks) < 2:
        raise NotMeasurableError(
            f"{video.count} frames are no two chunks; drift needs {grid.first_frames + grid.frames}"
        )
    signals = frame_signals(video)

    def against_first(signal: Tensor) -> Tensor:
        means = torch.stack([signal[chunk].mean(0) for chunk in chunks])
        return means - means[0]

    drifts = {
        "exposure_drift": against_first(signals.luma),
        "contrast_drift": against_first(signals.contrast),
        "colour_drift": against_first(signals.colour).norm(dim=-1),
        "sharpness_drift": against_first(signals.sharpness),
        "clipped_drift": against_first(signals.clipped),
    }
    last, starts = max(1, len(chunks) // _LAST_PART), [chunk.start for chunk in chunks]
    return Measured(
        {name: abs(float(drift[-last:].mean())) for name, drift in drifts.items()},
        {name: tuple(zip(starts, drift.tolist(), strict=True)) for name, drift in drifts.items()},
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
