"""Shape checks of the products with weights in int8, as checks.py has them for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.ops.checks import require


def linear_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Also of linear_gelu_int8."""
    require(weight.dtype == torch.int8, lambda: f"weight is {weight.dtype}; it must be {torch.int8}")
    outputs = tuple(weight.shape[:1])
    shapes = {tuple(weight_scale.shape), outputs if bias is None else tuple(bias.shape)}
    require(
        weight.ndim == 2 and weight.shape[1] == x.shape[-1] and shapes == {outputs},
        lambda: (
            f"weight is {tuple(weight.shape)}, its scale {tuple(weight_scale.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)} for x of {tuple(x.shape)}; they must be [N, K], "
            "[N] and [N]"
        ),
    )
