"""Shape checks of the FP8 ops, as checks.py has them for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.ops.checks import require

E4M3 = torch.float8_e4m3fn


def linear_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, *_: object
) -> None:
    require(
        x.dtype == weight.dtype == E4M3,
        lambda: f"x is {x.dtype} and the weight {weight.dtype}; both must be {E4M3}",
    )
    parts = row_scale.shape[-1]
    require(
        row_scale.shape[:-1] == x.shape[:-1] and parts > 0 and x.shape[-1] % parts == 0,
        lambda: (
            f"row_scale is {tuple(row_scale.shape)} for x of {tuple(x.shape)}; it must be [..., G] with "
            "one for each of G equal parts of a row"
        ),
    )
    _weight(x, weight, weight_scale, bias)


def linear_gelu_rows_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, reach: Tensor
) -> None:
    linear_fp8(x, row_scale, weight, weight_scale, bias)
    require(
        row_scale.shape[-1] == 1 and tuple(reach.shape) == (2,),
        lambda: (
            f"row_scale is {tuple(row_scale.shape)} and reach {tuple(reach.shape)}; they must be [..., 1] "
            "and [2]"
        ),
    )


def linear_heads_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, heads: int) -> None:
    require(
        weight.dtype == E4M3 and x.dtype == bias.dtype,
        lambda: (
            f"x is {x.dtype}, the weight {weight.dtype} and the bias {bias.dtype}; the weight must be {E4M3} "
            "and the others alike"
        ),
    )
    require(
        heads > 0 and x.shape[-1] % heads == 0,
        lambda: f"x is {tuple(x.shape)}; {heads} heads must divide its last axis",
    )
    _weight(x, weight, weight_scale, bias)


def _weight(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> None:
    outputs = tuple(weight.shape[:1])
    require(
        weight.ndim == 2
        and weight.shape[1] == x.shape[-1]
        and tuple(weight_scale.shape) == tuple(bias.shape) == outputs,
        lambda: (
            f"weight is {tuple(weight.shape)}, its scale {tuple(weight_scale.shape)} and bias "
            f"{tuple(bias.shape)} for x of {tuple(x.shape)}; they must be [N, K], [N] and [N]"
        ),
    )
