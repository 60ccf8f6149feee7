"""The meaning of the transformer's ops in FP8, in plain PyTorch, as reference.py has it for all others.

An operand of a product is e4m3 with float32 scales: a weight has one for each channel out, rows have one
each, or one for each of G equal parts of a row. Products of two e4m3 values are exact in float32 and so are
their sums but for the order; a result is rounded once, to the dtype of the bias. So what FP8 does to a
stream can be seen on any device. In float64 (the e4m3 tensors too) no result of a product is rounded: the
truth. Shapes as in reference.py; K inputs and N outputs of a product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.ops.reference import (
    LARGEST_E4M3,
    adaptive_layer_norm,
    affine_layer_norm,
    gated_residual,
    row_fp8,
    to_e4m3,
    unit_or_one,
    widened,
)


def adaptive_layer_norm_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """row_fp8 of adaptive_layer_norm, which is rounded to the dtype of x first."""
    return row_fp8(adaptive_layer_norm(x, shift, scale, eps))


def gated_residual_adaptive_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + gate * y, row_fp8 of its adaptive norm). x may be overwritten; do not use it afterwards."""
    total = gated_residual(x, y, gate)
    return total, *adaptive_layer_norm_fp8(total, shift, scale, eps)


def gated_residual_affine_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + gate * y, row_fp8 of its affine norm). x may be overwritten; do not use it afterwards."""
    total = gated_residual(x, y, gate)
    return total, *row_fp8(affine_layer_norm(total, weight, bias, eps))


def linear_fp8(x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """(x * row_scale) (weight * weight_scale)^T + bias, rounded once to the dtype of bias.

    x: e4m3 [..., K]; row_scale: float32 [..., G], one for each of G equal parts of a row; weight: e4m3 [N,
    K]; weight_scale: float32 [N]; bias: [N]. Returns [..., N].
    """
    return _product(x, row_scale, weight, weight_scale, bias).to(bias.dtype)


def linear_gelu_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """GELU, in its tanh form, of linear_fp8, rounded once, after the GELU."""
    product = _product(x, row_scale, weight, weight_scale, bias)
    return F.gelu(product, approximate="tanh").to(bias.dtype)


def linear_gelu_rows_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """linear_gelu_fp8 in e4m3 with one scale for each row: (values [..., N], scale [..., 1] in float32).

    row_scale: [..., 1]. reach: float32 [2], from product_reach. A row's scale is its hidden_unit. e4m3 is a
    floating-point format: unused range costs nothing but the smallest values.
    """
    product = _product(x, row_scale, weight, weight_scale, bias)
    scale = hidden_unit(row_scale, reach)
    values = F.gelu(product, approximate="tanh") / scale
    return values if x.dtype == torch.float64 else to_e4m3(values), scale


def hidden_unit(row_scale: Tensor, reach: Tensor) -> Tensor:
    """unit_or_one(row_scale * reach[0] + reach[1]): a unit in which no row of linear_gelu_rows_fp8 saturates.

    No value of x is above 448 of its units, so no sum is above 448 * row_scale * reach[0] + 448 * reach[1],
    and no GELU is larger than its argument. So the unit is known before the row is, and each tile of a
    product can be rounded as it is made.
    """
    return unit_or_one(row_scale * reach[0] + reach[1])


def linear_heads_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, heads: int) -> Tensor:
    """linear_fp8 of x [..., K] in the dtype of bias, whose `heads` equal parts of a row are each rounded by
    row_fp8. Returns [..., N]."""
    values, scale = row_fp8(x.unflatten(-1, (heads, -1)))
    rows = values.flatten(-2).to(weight.dtype), scale.squeeze(-1).to(weight_scale.dtype)
    return linear_fp8(*rows, weight, weight_scale, bias)


def product_reach(weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """float32 [2]: the largest sum of magnitudes of a channel of weight [N, K] (e4m3, times weight_scale
    [N]), and max |bias| / 448: what linear_gelu_rows_fp8 takes."""
    sums = (weight.float().abs().sum(1) * weight_scale).amax()
    return torch.stack((sums, bias.float().abs().amax() / LARGEST_E4M3))


def _product(x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """linear_fp8, not rounded."""
    wide, weights = widened(x), widened(weight)
    if row_scale.shape[-1] == 1:  # one scale comes after the sum, as in every backend
        return F.linear(wide, weights) * (row_scale * weight_scale) + widened(bias)
    parts = wide.unflatten(-1, (row_scale.shape[-1], -1)) * row_scale.unsqueeze(-1)
    return F.linear(parts.flatten(-2), weights) * weight_scale + widened(bias)
