"""Causal convolution of channels-last frames: 3x3x3, 1x3x3, 3x1x1 or 1x1x1, as a matrix product of 4-D tiles.

    out[t, h, w, n] = bias[n] + sum of W[n, c, i, j, k] * x[t + i, h + j - 1, w + k - 1, c] over i, j, k, c

x [T + kt - 1, H, W, Cin] has the frames before the chunk in front, so time needs no padding; height and width
are padded with zeros that are never stored. out [T, H, W, Cout] may have any strides but the last, such as
every other frame of a longer tensor. float32 sums, rounded once. The e4m3 form multiplies 8-bit values and
scales the sums by channel out. The product is that of convolution_tile.py.

Bound: tensor cores, 2 taps Cin FLOPs an element of out: 2.39 TFLOP for 96 -> 96 channels of 12 frames at 832
x 480, 2.41 ms at 989 TFLOP/s, against 2.0 GB in and out, 0.60 ms. A program copies rows + pixels values of
each channel and tap from L2: 192 x 256 or 128 x 256 tiles ask for 37 or 48 bytes a cycle at full rate
(computed).
"""

# T frames, H rows, W columns of pixels. Channels out are the rows of the product.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.convolution_tile import (
    accumulate,
    finish,
    operands,
    place_of_program,
    plan,
)

KERNELS = ((3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1))


@triton.jit
def _causal_conv3d_kernel(
    x, weight, tail_weight,
    x_stride_t, x_stride_h, x_stride_w,
    weight_stride_a, weight_stride_b, weight_stride_n, weight_stride_k,
    weight_stride_t, weight_stride_h, weight_stride_w,
    scale, bias, out,
    out_stride_t, out_stride_h, out_stride_w, out_stride_a, out_stride_b,
    frames, height, width, channels_out,
    PHASES: tl.constexpr, CHANNELS: tl.constexpr,
    KERNEL_T: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DESCRIBED: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of pixels and up to ROWS + TAIL channels of one frame; of one phase, where there are four."""
    row_parts = tl.cdiv(channels_out, ROWS + TAIL)
    part, frame, top, left = place_of_program(row_parts * PHASES, frames, width, BLOCK_H, BLOCK_W)
    first = part % row_parts * (ROWS + TAIL)
    phase = part // row_parts
    a, b = phase // 2, phase % 2
    sums, tail_sums = accumulate(
        x, weight, tail_weight, frame, top - KERNEL_H // 2 + a, left - KERNEL_W // 2 + b, first, phase,
        height, width, channels_out, x_stride_t, x_stride_h, x_stride_w,
        weight_stride_a, weight_stride_b, weight_stride_n, weight_stride_k,
        weight_stride_t, weight_stride_h, weight_stride_w,
        DESCRIBED, CHANNELS, KERNEL_T, KERNEL_H, KERNEL_W, ROWS, TAIL, BLOCK_H, BLOCK_W, BLOCK_K,
    )  # fmt: skip
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h, w = top + pixel // BLOCK_W, left + pixel % BLOCK_W
    inside = (h < height) & (w < width)
    out += frame.to(tl.int64) * out_stride_t + a * out_stride_a + b * out_stride_b
    at = out + (h.to(tl.int64) * out_stride_h + w * out_stride_w)
    n = first + tl.arange(0, ROWS)
    values = finish(sums, n, channels_out, scale, bias).to(out.dtype.element_ty)
    tl.store(at[:, None] + n[None, :], values.T, mask=inside[:, None] & (n < channels_out)[None, :])
    if TAIL:
        n = first + ROWS + tl.arange(0, TAIL)
        values = finish(tail_sums, n, channels_out, scale, bias).to(out.dtype.element_ty)
        tl.store(at[:, None] + n[None, :], values.T, mask=inside[:, None] & (n < channels_out)[None, :])


def launch(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, form: str | None
) -> None:
    """Run the kernel for weight [Cout, Cin, kt, kh, kw], or [2, 2, Cout, Cin, 2, 2] by phase."""
    by_phase = weight.ndim == 6
    channels_out, channels = weight.shape[2:4] if by_phase else weight.shape[:2]
    kernel = (1, 2, 2) if by_phase else tuple(weight.shape[2:])
    frames, height, width = x.shape[0] - kernel[0] + 1, x.shape[1], x.shape[2]
    tile, programs = plan(x, weight, frames, form)
    # an output phase takes every other row and column
    step = 2 if by_phase else 1
    strides = (out.stride(0), step * out.stride(1), step * out.stride(2), out.stride(1), out.stride(2))
    _causal_conv3d_kernel[(programs,)](
        *operands(x, weight, tile), scale, bias, out, *strides, frames, height, width, channels_out,
        PHASES=4 if by_phase else 1, CHANNELS=channels,
        KERNEL_T=kernel[0], KERNEL_H=kernel[1], KERNEL_W=kernel[2], **tile.parameters,
    )  # fmt: skip


def check_layout(x: Tensor, weight: Tensor) -> None:
    """ValueError for tensors of another dtype or rank than the convolutions take."""
    if x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}; both must be bfloat16, float16 or float32, or in the "
            "fp8 form, float8_e4m3fn"
        )
    if x.stride(-1) != 1:
        raise ValueError(f"x has strides {x.stride()}; its channels must be contiguous: call contiguous()")


def output_of(x: Tensor, weight: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`out`, or a new tensor [T, H, W, Cout]; ValueError for kernels and outputs that are not served."""
    channels_out, channels, *kernel = weight.shape
    if tuple(kernel) not in KERNELS or channels != x.shape[3] or x.shape[0] < kernel[0]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; give x [T + kt - 1, H, W, Cin] and a "
            f"kernel of {', '.join('x'.join(map(str, kernel)) for kernel in KERNELS)} over Cin channels"
        )
    shape = (x.shape[0] - kernel[0] + 1, *x.shape[1:3], channels_out)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=x.device)
    if tuple(out.shape) != shape or out.stride(3) != 1:
        raise ValueError(
            f"out is {tuple(out.shape)} with strides {out.stride()}; it must be {shape} with contiguous "
            "channels"
        )
    return out


@torch.library.custom_op("rfengine::causal_conv3d", mutates_args=["out"])
def _causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, form: str | None) -> None:
    launch(x, weight, None, bias, out, form)


@torch.library.custom_op("rfengine::causal_conv3d_fp8", mutates_args=["out"])
def _causal_conv3d_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, form: str | None
) -> None:
    launch(x, weight, scale, bias, out, form)


for _op in (_causal_conv3d, _causal_conv3d_fp8):
    _op.register_fake(lambda *_: None)


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None, form: str | None = None
) -> Tensor:
    """Convolution over time without padding and over height and width padded with zeros to their size.

    x [T + kt - 1, H, W, Cin]; weight [Cout, Cin, kt, kh, kw], any strides, fast in memory as [Cout, kt, kh,
    kw, Cin]; bias [Cout]. Returns `out` [T, H, W, Cout], overwritten, or a new tensor. form: "descriptor" or
    "pointer", chosen when None. ValueError for channels that are not contiguous in x or out and for other
    kernels.
    """
    check_layout(x, weight)
    out = output_of(x, weight, out, x.dtype)
    _causal_conv3d(x, weight, bias, out, form)
    return out


def causal_conv3d_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None,
    form: str | None = None,
) -> Tensor:  # fmt: skip
    """causal_conv3d of e4m3 x and weight, the sums times scale [Cout] (float32: that of x times that of the
    channel's weights) plus bias; in the dtype of out, or bfloat16. Needs a GPU with FP8 (sm_89 or later)."""
    if not x.dtype == weight.dtype == torch.float8_e4m3fn:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; both must be torch.float8_e4m3fn")
    out = output_of(x, weight, out, torch.bfloat16)
    _causal_conv3d_fp8(x, weight, scale, bias, out, form)
    return out
