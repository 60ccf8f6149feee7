"""The last convolution of the VAE and the packing of its pixels to RGB bytes, in one kernel.

    rgb[t, h, w, n] = bias[n] + sum of W[n, c, i, j, k] * x[t + i, h + j - 1, w + k - 1, c] over i, j, k, c
    bytes: as frame_pack.py makes them of the float32 rgb, which is never stored

x [T + 2, H, W, C] normed and activated, weight [3, C, 3, 3, 3], bytes [T, H, W, 3]. The product is that of
convolution_tile.py with three of its rows in use.

Bound: memory, 2 C bytes read and 3 written a pixel, 1.1 GB for 96 channels of 12 frames at 832 x 480,
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
from rfengine.kernels.frame_pack import round_to_byte


@triton.jit
def _conv_frame_pack_kernel(
    x, weight, tail_weight,
    x_stride_t, x_stride_h, x_stride_w,
    weight_stride_a, weight_stride_b, weight_stride_n, weight_stride_k,
    weight_stride_t, weight_stride_h, weight_stride_w,
    bias, packed, frames, height, width, CHANNELS: tl.constexpr,
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
    to = packed + ((frame.to(tl.int64) * height + h) * width + w) * 3
    bytes_of = round_to_byte((rgb + 1.0) * 127.5).T
    tl.store(to[:, None] + n[None, :], bytes_of, mask=inside[:, None] & (n < 3)[None, :])


def _check(x: Tensor, weight: Tensor) -> None:
    check_layout(x, weight)
    if weight.ndim != 5 or weight.shape[:2] != (3, x.shape[3]) or x.shape[0] < weight.shape[2]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; give x [T + kt - 1, H, W, C] and a "
            "weight [3, C, kt, kh, kw]"
        )


def _allocate(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0] - weight.shape[2] + 1, *x.shape[1:3], 3), dtype=torch.uint8)


@torch.library.custom_op("rfengine::conv_frame_pack", mutates_args=())
def _conv_frame_pack(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None) -> Tensor:
    packed, kernel = _allocate(x, weight), tuple(weight.shape[2:])
    frames, height, width, _ = packed.shape
    tile, programs = plan(x, weight, frames, form)
    _conv_frame_pack_kernel[(programs,)](
        *operands(x, weight, tile), bias, packed, frames, height, width,
        CHANNELS=x.shape[3], KERNEL_T=kernel[0], KERNEL_H=kernel[1], KERNEL_W=kernel[2],
        **tile.parameters, enable_fp_fusion=False,
    )  # fmt: skip
    return packed


@_conv_frame_pack.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None) -> Tensor:
    return _allocate(x, weight)


def conv_frame_pack(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None = None) -> Tensor:
    """frame_pack of causal_conv3d, whose float32 sum is not rounded in between: uint8 [T, H, W, 3].

    x: [T + kt - 1, H, W, C], contiguous channels (ValueError), normed and activated; weight: [3, C, kt, kh,
    kw]; bias: [3]. form: "descriptor" or "pointer", chosen when None.
    """
    _check(x, weight)
    return _conv_frame_pack(x, weight, bias, form)
