"""A given clip as the beginning of a stream: the pixels of it that fill whole chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rfengine.grid import LatentGrid
from rfengine.video import pixels_from_frames

if TYPE_CHECKING:
    from numpy import ndarray


def clip_pixels(frames: ndarray, grid: LatentGrid, chunk_frames: int) -> Tensor:
    """The pixels [1, 3, T, H, W] of a clip, uint8 [T, H, W, 3], that are used: whole chunks of its end.

    Raises ValueError for a clip of another size than the grid's, and for one without a whole chunk.
    """
    pixels = pixels_from_frames(frames)
    size = (grid.height, grid.width)
    if tuple(pixels.shape[-2:]) != size:
        raise ValueError(
            f"the clip is {tuple(pixels.shape[-2:])} pixels and the stream is {size}; resize the clip"
        )
    shortest = grid.pixel_frames(chunk_frames)
    if pixels.shape[2] < shortest:
        raise ValueError(
            f"the clip has {pixels.shape[2]} frames; at least {shortest} are needed, one whole chunk"
        )
    complete = (pixels.shape[2] - 1) // grid.temporal_stride + 1
    latent_frames = complete // chunk_frames * chunk_frames
    return pixels[:, :, -grid.pixel_frames(latent_frames) :]
