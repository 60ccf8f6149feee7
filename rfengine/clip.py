"""A given clip, or one picture, as the beginning of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from rfengine.config import CacheConfig, EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.vae import WanVAE
from rfengine.video import pixels_from_frames

if TYPE_CHECKING:
    from numpy import ndarray


ClipMode = Literal["chunks", "frames", "clamped"]


def clip_latents(
    vae: WanVAE, frames: ndarray, grid: LatentGrid, cache: CacheConfig, mode: ClipMode
) -> Tensor:
    """Normalised latents [1, z, F, h, w] of clip_pixels, on the device and in the dtype of the encoder."""
    return vae.encode_in_groups(clip_pixels(frames, grid, cache, mode), cache.chunk_frames)


def clip_pixels(frames: ndarray, grid: LatentGrid, cache: CacheConfig, mode: ClipMode) -> Tensor:
    """The pixels [1, 3, T, H, W] of a clip, uint8 [T, H, W, 3], that are used: those of its end that fill
    whole chunks, or latents where `mode` takes single ones.

    Raises ValueError for a mode that is none, for a clip of another size than the grid's, and for one without
    a whole chunk.
    """
    if mode not in get_args(ClipMode):
        raise ValueError(f"mode is {mode!r}; use {', '.join(get_args(ClipMode))}")
    pixels = pixels_from_frames(frames)
    size = (grid.height, grid.width)
    if tuple(pixels.shape[-2:]) != size:
        raise ValueError(
            f"the clip is {tuple(pixels.shape[-2:])} pixels and the stream is {size}; resize the clip"
        )
    shortest = grid.pixel_frames(cache.first_chunk if mode == "chunks" else 1)
    if pixels.shape[2] < shortest:
        raise ValueError(
            f"the clip has {pixels.shape[2]} frames; at least {shortest} are needed, one whole chunk; mode "
            "'frames' or 'clamped' takes a shorter one"
        )
    latent_frames = (pixels.shape[2] - 1) // grid.temporal_stride + 1
    if mode == "chunks":
        latent_frames = sum(_whole_chunks(latent_frames, cache))
    return pixels[:, :, -grid.pixel_frames(latent_frames) :]


def split_clip(
    latents: Tensor, mode: ClipMode, config: EngineConfig
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The pieces of latents [1, C, F, h, w] that are prefilled, and what the first generated chunk begins
    with as it is.

    Raises ValueError for a mode that the model's schedule or decoder cannot begin with.
    """
    count, size = latents.shape[2], config.cache.chunk_frames
    if mode == "frames":
        if config.runtime.vae == "tensorrt" and size != 1:
            raise ValueError(
                f"the TensorRT decoder takes {size} latents at a time; use mode 'chunks' or 'clamped'"
            )
        return latents.split(1, dim=2), None
    chunks = _whole_chunks(count, config.cache)
    *pieces, rest = latents.split([*chunks, count - sum(chunks)], dim=2)
    if not rest.shape[2]:
        return tuple(pieces), None
    if config.schedule.rolling != "none":
        raise ValueError("a rolling schedule has no chunk of its own to clamp frames in; use mode 'frames'")
    return tuple(pieces), rest


def _whole_chunks(latent_frames: int, cache: CacheConfig) -> list[int]:
    """The lengths of the chunks that so many latents from the start of a video fill."""
    if latent_frames < cache.first_chunk:
        return []
    return [cache.first_chunk] + [cache.chunk_frames] * (
        (latent_frames - cache.first_chunk) // cache.chunk_frames
    )
