"""Frames for a file or an encoder: decoded pixels, clamped to [-1, 1], to RGB bytes.

    byte = round((x + 1) * 127.5)

pixels [3, T, H, W], packed uint8 [T, H, W, 3]. Single float32 operations in the order of the reference, ties
to even: its result bit for bit. Bound: memory, for a pixel in 16 bits 6 bytes read and 3 written.
"""

# T frames, H rows, W columns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 bytes packed by each of 128 threads; unmeasured on a GPU
BLOCK = 2048


@triton.jit
def _load_clamped(at, mask):
    return tl.minimum(tl.maximum(tl.load(at, mask=mask, other=0.0).to(tl.float32), -1.0), 1.0)


@triton.jit
def round_to_byte(x):
    """Ties to even: from 2^23 on float32 has no fractions, so adding it rounds. 0 <= x <= 255."""
    return ((x + 8388608.0) - 8388608.0).to(tl.uint8)


@triton.jit
def _frame_pack_kernel(pixels, packed, channel_stride, frame_stride, frame_pixels, BLOCK: tl.constexpr):
    """One block of a frame's bytes, in the order they are written."""
    frame = tl.program_id(1).to(tl.int64)
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = byte < 3 * frame_pixels.to(tl.int64)
    x = _load_clamped(pixels + frame * frame_stride + (byte % 3) * channel_stride + byte // 3, mask)
    tl.store(packed + frame * 3 * frame_pixels + byte, round_to_byte((x + 1.0) * 127.5), mask=mask)


def check_pixels(pixels: Tensor) -> None:
    """ValueError unless pixels are [3, T, H, W] with contiguous frames; the kernels step along them."""
    if pixels.ndim != 4 or pixels.shape[0] != 3 or pixels.stride()[2:] != (pixels.shape[3], 1):
        raise ValueError(
            f"pixels are {tuple(pixels.shape)} with strides {pixels.stride()}; give [3, T, H, W] whose rows "
            "of a frame lie one below the other"
        )


@torch.library.custom_op("rfengine::frame_pack", mutates_args=())
def frame_pack(pixels: Tensor) -> Tensor:
    """Decoded pixels [3, T, H, W] in [-1, 1], clamped, to RGB24: uint8 [T, H, W, 3].

    The rows of a frame must lie one below the other (ValueError); channel and frame strides are free.
    """
    check_pixels(pixels)
    _, frames, height, width = pixels.shape
    packed = torch.empty((frames, height, width, 3), dtype=torch.uint8, device=pixels.device)
    grid = (triton.cdiv(3 * height * width, BLOCK), frames)
    _frame_pack_kernel[grid](
        pixels, packed, *pixels.stride()[:2], height * width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
    )
    return packed


@frame_pack.register_fake
def _(pixels: Tensor) -> Tensor:
    _, frames, height, width = pixels.shape
    return pixels.new_empty((frames, height, width, 3), dtype=torch.uint8)
