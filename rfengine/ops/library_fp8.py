"""The FP8 products that cuBLASLt makes (torch's scaled matrix product), with one scale for each row and
channel.

It sums in the tensor core, on Hopper with about 14 bits behind the leading one. Its results are in
bfloat16; where another dtype is wanted, or a row has several scales, Triton's product runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_fp8(x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    if not _serves(row_scale, weight, bias):
        from rfengine.kernels import linear_fp8 as kernel

        return kernel.linear_fp8(x, row_scale, weight, weight_scale, bias)
    return _product(x, row_scale, weight, weight_scale, bias).unflatten(0, x.shape[:-1])


def linear_gelu_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """The product is rounded before the GELU as well."""
    if not _serves(row_scale, weight, bias):
        from rfengine.kernels import linear_fp8 as kernel

        return kernel.linear_gelu_fp8(x, row_scale, weight, weight_scale, bias)
    product = _product(x, row_scale, weight, weight_scale, bias)
    return F.gelu(product, approximate="tanh").unflatten(0, x.shape[:-1])


def linear_gelu_rows_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """The product is rounded to 16 bits before the GELU, which a kernel of ours reads and rounds to
    e4m3."""
    if not _serves(row_scale, weight, bias):
        from rfengine.kernels import linear_fp8 as kernel

        return kernel.linear_gelu_rows_fp8(x, row_scale, weight, weight_scale, bias, reach)
    from rfengine.kernels.gelu_fp8 import gelu_rows_fp8

    product = _product(x, row_scale, weight, weight_scale, bias)
    values, scale = gelu_rows_fp8(product, row_scale.reshape(-1, 1), reach)
    return values.unflatten(0, x.shape[:-1]), scale.unflatten(0, x.shape[:-1])


def _serves(row_scale: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return serves(bias.dtype, row_scale.shape[-1], *weight.shape)


def serves(dtype: torch.dtype, scales: int, outputs: int, inputs: int) -> bool:
    """Whether cuBLASLt makes a product with results in `dtype` and so many scales of a row; its sizes are
    multiples of 16."""
    return dtype == torch.bfloat16 and scales == 1 and outputs % 16 == inputs % 16 == 0


def _product(x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """[M, N] in the dtype of bias."""
    return torch._scaled_mm(
        x.flatten(0, -2), weight.t(), row_scale.reshape(-1, 1), weight_scale.view(1, -1), bias=bias,
        out_dtype=bias.dtype, use_fast_accum=True,
    )  # fmt: skip
