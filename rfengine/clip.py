"""A given clip, or one picture, as the beginning of a stream."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from rfengine.config import CacheConfig, EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.vae import WanVAE
from rfengine.video import pixels_from_frames

if TYPE_CHECKING:
    from numpy import ndarray


ClipMode = Literal["chunks", "frames", "clamped"]


@dataclass(frozen=True, slots=True)
class ClipParts:
    """How a clip is taken, in latent frames, of its end where not all of them are.

    prefilled: those of each context pass, in order. clamped: those with which the first generated chunk
    begins as they are.
    """

    prefilled: tuple[int, ...]
    clamped: int = 0

    @property
    def latent_frames(self) -> int:
        return sum(self.prefilled) + self.clamped


def clip_parts(frames: int, mode: ClipMode, config: EngineConfig) -> ClipParts:
    """The parts of a clip of `frames` pixel frames.

    Raises ValueError for a mode that is none, for a clip that is too short for it, and for one that the
    model's schedule or decoder cannot begin with.
    """
    if mode not in get_args(ClipMode):
        raise ValueError(f"mode is {mode!r}; use {', '.join(get_args(ClipMode))}")
    grid, cache = LatentGrid.of(config), config.cache
    if not frames:
        raise ValueError("the clip has 0 frames; give at least one")
    count = (frames - 1) // grid.temporal_stride + 1
    if mode == "frames":
        if config.runtime.vae == "tensorrt" and cache.chunk_frames != 1:
            raise ValueError(
                f"the TensorRT decoder takes {cache.chunk_frames} latents at a time; use mode 'chunks' or "
                "'clamped'"
            )
        return ClipParts((1,) * count)
    chunks = _whole_chunks(count, cache)
    if mode == "chunks":
        if not chunks:
            raise ValueError(
                f"the clip has {frames} frames; at least {grid.pixel_frames(cache.first_chunk)} are needed, "
                "one whole chunk; mode 'frames' or 'clamped' takes a shorter one"
            )
        return ClipParts(chunks)
    rest = count - sum(chunks)
    if rest and config.schedule.rolling != "none":
        raise ValueError("a rolling schedule has no chunk of its own to clamp frames in; use mode 'frames'")
    return ClipParts(chunks, rest)


def clip_latents(vae: WanVAE, frames: ndarray, grid: LatentGrid, latent_frames: int, group: int) -> Tensor:
    """Normalised latents [1, z, F, h, w] of the last `latent_frames` of a clip, uint8 [T, H, W, 3], on the
    device and in the dtype of the encoder, which takes `group` of them at a time.

    Raises ValueError for a clip of another size than the grid's.
    """
    pixels = pixels_from_frames(frames)
    size = (grid.height, grid.width)
    if tuple(pixels.shape[-2:]) != size:
        raise ValueError(
            f"the clip is {tuple(pixels.shape[-2:])} pixels and the stream is {size}; resize the clip"
        )
    return vae.encode_in_groups(pixels[:, :, -grid.pixel_frames(latent_frames) :], group)


def clip_digest(frames: ndarray) -> str:
    """The shape of a clip and the sha256 of its bytes, in short, for ranks that need the same one."""
    size = " x ".join(map(str, frames.shape))
    return f"{size}, {hashlib.sha256(frames.tobytes()).hexdigest()[:16]}"


def _whole_chunks(latent_frames: int, cache: CacheConfig) -> tuple[int, ...]:
    """The lengths of the chunks that so many latents from the start of a video fill."""
    if latent_frames < cache.first_chunk:
        return ()
    later = (latent_frames - cache.first_chunk) // cache.chunk_frames
    return (cache.first_chunk, *(cache.chunk_frames,) * later)
