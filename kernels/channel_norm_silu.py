"""Between two convolutions of the VAE: add bias and residual, normalise over channels, SiLU, in one pass.

    total = x + bias + residual                    rounded once, written over x; x itself without both
    y     = total / max(||total||_2, 1e-12) * sqrt(C) * gamma
    out   = y / (1 + exp(-y)) / out_scale          rounded once; at most 448 where out is e4m3

x, residual, out [T, H, W, C] with free strides but the last, so that out can be the frames of the next
convolution's halo from the third on; bias, gamma [C] stay in cache. A program holds some rows of C in
registers, so many that every thread has four 16-byte loads of each tensor under way.

Bound: memory, 8 bytes an element of x in bf16 with a residual, 6 with a bias alone, 4 without (one less in
e4m3).
"""

# T frames, H rows, W columns of pixels, C channels.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import rows_per_program
from rfengine.kernels.e4m3 import LARGEST


@triton.jit
def _channel_norm_silu_kernel(
    x, bias, residual, gamma, out,
    x_stride_t, x_stride_h, x_stride_w, residual_stride_t, residual_stride_h, residual_stride_w,
    out_stride_t, out_stride_h, out_stride_w,
    height, width, root, out_scale,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, w = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    known = channel < CHANNELS
    inside = (h < height)[:, None] & known[None, :]

    at = x + (frame * x_stride_t + h * x_stride_h + w * x_stride_w)[:, None] + channel[None, :]
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        rows = frame * residual_stride_t + h * residual_stride_h + w * residual_stride_w
        total += tl.load(residual + rows[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None or residual is not None:
        rounded = total.to(x.dtype.element_ty)
        # this program alone reads and writes these rows
        tl.store(at, rounded, mask=inside)
        total = rounded.to(tl.float32)

    norm = tl.maximum(tl.sqrt(tl.sum(total * total, 1)), 1e-12)
    y = total * (root / norm)[:, None]
    y *= tl.load(gamma + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    y = y / (1.0 + tl.exp(-y)) / out_scale
    if out.dtype.element_ty == tl.float8e4nv:
        y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    to = out + (frame * out_stride_t + h * out_stride_h + w * out_stride_w)[:, None] + channel[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("rfengine::channel_norm_silu", mutates_args=["x", "out"])
def _channel_norm_silu(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor, out: Tensor, out_scale: float
) -> None:
    frames, height, width, channels = x.shape
    block = triton.next_power_of_2(channels)
    rows = rows_per_program(block)
    residual_strides = (0, 0, 0) if residual is None else residual.stride()[:3]
    _channel_norm_silu_kernel[(triton.cdiv(height * width, rows), frames)](
        x, bias, residual, gamma, out, *x.stride()[:3], *residual_strides, *out.stride()[:3],
        height, width, channels**0.5, out_scale,
        CHANNELS=channels, BLOCK_C=block, ROWS=rows, num_warps=4,
    )  # fmt: skip


def channel_norm_silu(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor, out: Tensor,
    out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """silu(total / max(L2 norm over C, 1e-12) * sqrt(C) * gamma) / out_scale into `out`; returns total.

    total = x + bias + residual, written over x and rounded to its dtype before the norm reads it; x itself
    without both. x, residual, out: [T, H, W, C], contiguous channels (ValueError), other strides free; bias,
    gamma: [C]. out may be float8_e4m3fn, and then out_scale is the size of its unit.
    """
    served = (torch.bfloat16, torch.float16, torch.float32)
    if x.dtype not in served or out.dtype not in (*served, torch.float8_e4m3fn):
        raise ValueError(
            f"x is {x.dtype} and out {out.dtype}; x must be bfloat16, float16 or float32, and out one of "
            "these or float8_e4m3fn"
        )
    for name, rows in (("x", x), ("residual", residual), ("out", out)):
        if rows is not None and (rows.shape != x.shape or rows.stride(3) != 1):
            raise ValueError(
                f"{name} is {tuple(rows.shape)} with strides {rows.stride()}; it must be [T, H, W, C] as x, "
                f"{tuple(x.shape)}, with contiguous channels"
            )
    bias = None if bias is None else bias.contiguous()
    _channel_norm_silu(x, bias, residual, gamma.contiguous(), out, out_scale)
    return x
