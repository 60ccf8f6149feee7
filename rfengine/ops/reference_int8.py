"""The meaning of products with weights in int8, in plain PyTorch, as reference.py has it for all others.

A weight is int8 with one scale for each channel out, in the dtype of the model: the scale is rounded first
and the values after it, so that its rounding costs nothing. Only the weight is rounded; rows, sums and
results are those of the dtype of x. Shapes as in reference.py; K inputs and N outputs of a product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_INT8 = 127


def channel_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight [N, K] in int8 with one scale for each channel out: (values, scale [N] in `dtype`), weight =
    values * scale.

    scale = max |weights of the channel| / 127, or 1 where that is 0 in `dtype`; values are rounded to nearest
    and saturate at 127.
    """
    wide = weight.float()
    scale = (wide.abs().amax(1) / LARGEST_INT8).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a NaN stays one
    values = (wide / scale.float().unsqueeze(1)).round_().clamp_(-LARGEST_INT8, LARGEST_INT8)
    return values.to(torch.int8), scale


def dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [N, K] times scale [N], in `dtype`: one new tensor."""
    return weight.to(dtype).mul_(scale.to(dtype).unsqueeze(1))


def linear_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (weight * weight_scale)^T + bias. x: [..., K]; weight: int8 [N, K]; weight_scale: [N]; bias: [N] or
    None. Returns [..., N] in the dtype of x.

    A backend multiplies by the scale after the sum; this one before it, in the dtype of x, and so has the
    weight once in that dtype while it runs.
    """
    return F.linear(x, dequantised(weight, weight_scale, x.dtype), bias)


def linear_gelu_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """GELU, in its tanh form, of linear_int8. A backend rounds once, after the GELU; this one before it as
    well."""
    return F.gelu(linear_int8(x, weight, weight_scale, bias), approximate="tanh")
