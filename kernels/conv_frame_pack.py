"""The last convolution of the VAE and the packing of its pixels in one kernel, to RGB24 or NV12.

    rgb[t, h, w, n] = bias[n] + sum of W[n, c, i, j, k] * x[t + i, h + j - 1, w + k - 1, c] over i, j, k, c
    bytes: as frame_pack.py makes them of the float32 rgb, which is never stored

x [T + 2, H, W, C] normed and activated, weight [3, C, 3, 3, 3], bytes [T, H, W, 3] or [T, H * 3 / 2, W]. The
product is that of convolution_tile.py with three of its rows in use. The chroma of NV12 is the mean of 2 x 2
pixels, which lie in one block because blocks have even sides.

Bound: memory, 2 C bytes read and 3 or 1.5 written a pixel, 1.1 GB for 96 channels of 12 frames at 832 x 480,
0.33 ms at 3.35 TB/s; 27 readings of it come from L2 (24.8 GB, about 4.5 ms at 5.5 TB/s: computed,
unmeasured), which a tile that keeps the frames of one block in flight could divide by 2.6.
"""

# T frames, H rows, W columns of pixels, C channels.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.causal_conv3d import check_layout
from rfengine.kernels.convolution_tile import (
    accumulate,
    finish,
    operands,
    place_of_program,
    plan,
)
from rfengine.kernels.frame_pack import luma_of, round_to_byte


@triton.jit
def _conv_frame_pack_kernel(
    x, weight, tail_weight,
    x_stride_t, x_stride_h, x_stride_w,
    weight_stride_a, weight_stride_b, weight_stride_n, weight_stride_k,
    weight_stride_t, weight_stride_h, weight_stride_w,
    bias, packed, frames, height, width, BLUE, RED,
    NV12: tl.constexpr, CHANNELS: tl.constexpr,
    KERNEL_T: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DESCRIBED: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, frame, top, left = place_of_program(1, frames, width, BLOCK_H, BLOCK_W)
    sums, _ = accumulate(
        x, weight, tail_weight, frame, top - KERNEL_H // 2, left - KERNEL_W // 2, 0, 0,
        height, width, 3, x_stride_t, x_stride_h, x_stride_w,
        weight_stride_a, weight_stride_b, weight_stride_n, weight_stride_k,
        weight_stride_t, weight_stride_h, weight_stride_w,
        DESCRIBED, CHANNELS, KERNEL_T, KERNEL_H, KERNEL_W, ROWS, TAIL, BLOCK_H, BLOCK_W, BLOCK_K,
    )  # fmt: skip
    n = tl.arange(0, ROWS)
    rgb = tl.minimum(tl.maximum(finish(sums, n, 3, None, bias), -1.0), 1.0)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h, w = top + pixel // BLOCK_W, left + pixel % BLOCK_W
    inside = (h < height) & (w < width)
    if NV12:
        red, green, blue = _channel(rgb, n, 0), _channel(rgb, n, 1), _channel(rgb, n, 2)
        start = packed + frame.to(tl.int64) * (height // 2 * 3) * width
        tl.store(start + h * width + w, round_to_byte(luma_of(red, green, blue) * 109.5 + 125.5), mask=inside)
        red, blue = _block_mean(red, BLOCK_H, BLOCK_W), _block_mean(blue, BLOCK_H, BLOCK_W)
        luma = luma_of(red, _block_mean(green, BLOCK_H, BLOCK_W), blue)
        pair = top // 2 + tl.arange(0, BLOCK_H // 2)
        column = left + tl.arange(0, BLOCK_W)
        chroma = tl.join(
            round_to_byte((blue - luma) * BLUE + 128.0), round_to_byte((red - luma) * RED + 128.0)
        )
        to = start + (height + pair)[:, None] * width + column[None, :]
        inside = (2 * pair < height)[:, None] & (column < width)[None, :]
        tl.store(to, tl.reshape(chroma, (BLOCK_H // 2, BLOCK_W)), mask=inside)
    else:
        to = packed + ((frame.to(tl.int64) * height + h) * width + w) * 3
        bytes_of = round_to_byte((rgb + 1.0) * 127.5).T
        tl.store(to[:, None] + n[None, :], bytes_of, mask=inside[:, None] & (n < 3)[None, :])


@triton.jit
def _channel(rgb, n, channel: tl.constexpr):
    """One row of the product [ROWS, pixels]; the others add zeros."""
    return tl.sum(tl.where((n == channel)[:, None], rgb, 0.0), 0)


@triton.jit
def _block_mean(values, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """The means [BLOCK_H / 2, BLOCK_W / 2] over 2 x 2 pixels: along each row first, then of both."""
    left, right = tl.split(tl.reshape(values, (BLOCK_H // 2, 2, BLOCK_W // 2, 2)))
    top, bottom = tl.split(tl.permute(left + right, (0, 2, 1)))
    return (top + bottom) * 0.25


def _pack(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, nv12: bool, form: str | None
) -> Tensor:
    kernel = tuple(weight.shape[2:])
    frames, height, width = x.shape[0] - kernel[0] + 1, x.shape[1], x.shape[2]
    tile, programs = plan(x, weight, frames, form)
    _conv_frame_pack_kernel[(programs,)](
        *operands(x, weight, tile), bias, packed, frames, height, width, 112 / 1.8556, 112 / 1.5748,
        NV12=nv12, CHANNELS=x.shape[3], KERNEL_T=kernel[0], KERNEL_H=kernel[1], KERNEL_W=kernel[2],
        **tile.parameters, enable_fp_fusion=False,
    )  # fmt: skip
    return packed


def _check(x: Tensor, weight: Tensor) -> None:
    check_layout(x, weight)
    if weight.ndim != 5 or weight.shape[:2] != (3, x.shape[3]) or x.shape[0] < weight.shape[2]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; give x [T + kt - 1, H, W, C] and a "
            "weight [3, C, kt, kh, kw]"
        )


def _allocate(x: Tensor, weight: Tensor, nv12: bool) -> Tensor:
    frames, (height, width) = x.shape[0] - weight.shape[2] + 1, x.shape[1:3]
    shape = (frames, height * 3 // 2, width) if nv12 else (frames, height, width, 3)
    return x.new_empty(shape, dtype=torch.uint8)


@torch.library.custom_op("rfengine::conv_frame_pack", mutates_args=())
def _conv_frame_pack(x: Tensor, weight: Tensor, bias: Tensor | None, nv12: bool, form: str | None) -> Tensor:
    return _pack(x, weight, bias, _allocate(x, weight, nv12), nv12, form)


@_conv_frame_pack.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, nv12: bool, form: str | None) -> Tensor:
    return _allocate(x, weight, nv12)


def conv_frame_pack(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None = None) -> Tensor:
    """frame_pack of causal_conv3d, whose float32 sum is not rounded in between: uint8 [T, H, W, 3].

    x: [T + kt - 1, H, W, C], contiguous channels (ValueError), normed and activated; weight: [3, C, kt, kh,
    kw]; bias: [3]. form: "descriptor" or "pointer", chosen when None.
    """
    _check(x, weight)
    return _conv_frame_pack(x, weight, bias, False, form)


def conv_frame_pack_nv12(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None = None) -> Tensor:
    """frame_pack_nv12 of causal_conv3d: uint8 [T, H * 3 / 2, W]. ValueError for an odd height or width."""
    _check(x, weight)
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f"frames are {x.shape[1]} x {x.shape[2]}; NV12 needs even sides: crop or pad them")
    return _conv_frame_pack(x, weight, bias, True, form)
