"""Frames for a file or an encoder: decoded pixels, clamped to [-1, 1], to RGB24 or to NV12 bytes.

    RGB24   byte = round((x + 1) * 127.5)
    NV12    L = 0.2126 r + 0.7152 g + 0.0722 b, and m the mean over a block of 2 x 2 pixels
            Y = round(109.5 L + 125.5);  Cb = round(112 / 1.8556 (m_b - L_m) + 128), Cr with 1.5748 and m_r

pixels [3, T, H, W], packed uint8 [T, H, W, 3] or [T, H * 3 / 2, W]. Single float32 operations in the order
of the reference, ties to even: its result bit for bit. Bound: memory, for a pixel in 16-bit 6 bytes read and
3 or 1.5 written.
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
def luma_of(red, green, blue):
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@triton.jit
def _frame_pack_kernel(pixels, packed, channel_stride, frame_stride, frame_pixels, BLOCK: tl.constexpr):
    """One block of a frame's bytes, in the order they are written."""
    frame = tl.program_id(1).to(tl.int64)
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = byte < 3 * frame_pixels.to(tl.int64)
    x = _load_clamped(pixels + frame * frame_stride + (byte % 3) * channel_stride + byte // 3, mask)
    tl.store(packed + frame * 3 * frame_pixels + byte, round_to_byte((x + 1.0) * 127.5), mask=mask)


@triton.jit
def _frame_pack_nv12_kernel(
    pixels, packed, channel_stride, frame_stride, height, width, BLUE, RED, BLOCK: tl.constexpr
):
    """BLOCK columns of two rows of a frame, with the chroma row that they share."""
    frame, pair = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    top = pixels + frame * frame_stride + 2 * pair * width + column
    bottom = top + width
    red_top, red_bottom = _load_clamped(top, mask), _load_clamped(bottom, mask)
    green_top = _load_clamped(top + channel_stride, mask)
    green_bottom = _load_clamped(bottom + channel_stride, mask)
    blue_top = _load_clamped(top + 2 * channel_stride, mask)
    blue_bottom = _load_clamped(bottom + 2 * channel_stride, mask)

    frame_start = packed + frame * (height // 2 * 3) * width
    luma = frame_start + 2 * pair * width + column
    tl.store(luma, round_to_byte(luma_of(red_top, green_top, blue_top) * 109.5 + 125.5), mask=mask)
    luma_bottom = luma_of(red_bottom, green_bottom, blue_bottom)
    tl.store(luma + width, round_to_byte(luma_bottom * 109.5 + 125.5), mask=mask)

    red_mean = _mean(red_top, red_bottom, BLOCK)
    blue_mean = _mean(blue_top, blue_bottom, BLOCK)
    mean_luma = luma_of(red_mean, _mean(green_top, green_bottom, BLOCK), blue_mean)
    blueness = round_to_byte((blue_mean - mean_luma) * BLUE + 128.0)
    redness = round_to_byte((red_mean - mean_luma) * RED + 128.0)
    chroma = tl.reshape(tl.join(blueness, redness), (BLOCK,))
    tl.store(frame_start + (height + pair) * width + column, chroma, mask=mask)


@triton.jit
def _mean(top, bottom, BLOCK: tl.constexpr):
    """The means [BLOCK / 2] over 2 x 2 pixels of two rows: along each row first, then of both."""
    top_left, top_right = tl.split(tl.reshape(top, (BLOCK // 2, 2)))
    bottom_left, bottom_right = tl.split(tl.reshape(bottom, (BLOCK // 2, 2)))
    return ((top_left + top_right) + (bottom_left + bottom_right)) * 0.25


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


@torch.library.custom_op("rfengine::frame_pack_nv12", mutates_args=())
def frame_pack_nv12(pixels: Tensor) -> Tensor:
    """Decoded pixels [3, T, H, W] in [-1, 1], clamped, to NV12 (BT.709, limited): uint8 [T, H * 3 / 2, W].

    Strides as for frame_pack. ValueError for an odd height or width.
    """
    check_pixels(pixels)
    _, frames, height, width = pixels.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames are {height} x {width}; NV12 needs even sides: crop or pad them")
    packed = torch.empty((frames, height * 3 // 2, width), dtype=torch.uint8, device=pixels.device)
    # the columns of two rows, 8 for each of 128 threads: six 16-byte loads under way in 16-bit; unmeasured
    block = min(1024, triton.next_power_of_2(width))
    grid = (triton.cdiv(width, block), height // 2, frames)
    _frame_pack_nv12_kernel[grid](
        pixels, packed, *pixels.stride()[:2], height, width, 112 / 1.8556, 112 / 1.5748,
        BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return packed


@frame_pack_nv12.register_fake
def _(pixels: Tensor) -> Tensor:
    _, frames, height, width = pixels.shape
    return pixels.new_empty((frames, height * 3 // 2, width), dtype=torch.uint8)
