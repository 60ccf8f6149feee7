"""GELU of a finished product in e4m3, for products that a library makes: one read and one write.

    values = round(GELU(y) / scale), scale = row_scale * reach[0] + reach[1], 1 where that is below 2^-126

GELU in its tanh form, as in linear.py. A row's scale is known before the row is (reference_fp8.hidden_unit),
so nothing is summed. Bound: memory, 3 bytes an element in 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.e4m3 import hidden_unit
from rfengine.kernels.linear import gelu

# M rows, N values of a row

BLOCK = 1024  # values of a program: 8 of each of 128 threads, a 16-byte load in 16 bits. Not timed on a GPU


@triton.jit
def _gelu_rows_kernel(y, row_scale, reach, values, scales, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    scale = hidden_unit(tl.load(row_scale + row), reach)
    if tl.program_id(1) == 0:
        tl.store(scales + row, scale)
    value = tl.load(y + row * width + column, mask=inside, other=0.0).to(tl.float32)
    value = gelu(value) * (1.0 / scale)
    tl.store(values + row * width + column, value.to(tl.float8e4nv), mask=inside)


@torch.library.custom_op("rfengine::gelu_rows_fp8", mutates_args=())
def gelu_rows_fp8(y: Tensor, row_scale: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of y [M, N], contiguous, in e4m3, and its scales [M, 1]. row_scale: float32 [M, 1]; reach:
    float32 [2]. No gradient."""
    values = y.new_empty(y.shape, dtype=torch.float8_e4m3fn)
    scales = row_scale.new_empty(row_scale.shape)
    if values.numel():
        blocks = triton.cdiv(y.shape[1], BLOCK)
        _gelu_rows_kernel[(y.shape[0], blocks)](
            y, row_scale.contiguous(), reach, values, scales, y.shape[1], BLOCK=BLOCK, num_warps=4
        )
    return values, scales


@gelu_rows_fp8.register_fake
def _(y, row_scale, reach):
    return y.new_empty(y.shape, dtype=torch.float8_e4m3fn), row_scale.new_empty(row_scale.shape)
