"""FrameChunk: what one call of a stream returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True, slots=True)
class ChunkTimings:
    """Milliseconds of one chunk.

    denoise_ms: the host in the chunk's denoising; CUDA runs behind it. decode_ms: the decoding where it ran;
    without overlap it includes the wait for the denoising. call_ms: the whole call that returned the chunk;
    with overlap this is what a chunk costs the caller, and part of the other two is in the call before it.
    """

    denoise_ms: float
    decode_ms: float
    call_ms: float


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Frames of one chunk: uint8 [T, H, W, 3], RGB; index counts the chunks of the stream from 0."""

    frames: ndarray
    index: int
    timings: ChunkTimings
