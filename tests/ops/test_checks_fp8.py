"""What the FP8 products refuse before any backend sees it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.ops import REFERENCE_OPS

E4M3 = torch.float8_e4m3fn
K, N = 12, 8


def product(**changes: Tensor) -> tuple[Tensor, ...]:
    """x, row_scale, weight, weight_scale and bias, some of them others."""
    tensors = {
        "x": torch.zeros(1, 3, K).to(E4M3), "row_scale": torch.ones(1, 3, 1),
        "weight": torch.zeros(N, K).to(E4M3), "weight_scale": torch.ones(N), "bias": torch.zeros(N),
    }  # fmt: skip
    return tuple((tensors | changes).values())


@pytest.mark.parametrize("op", ["linear_fp8", "linear_gelu_fp8"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 3, K)}, "x is torch.float32 and the weight torch.float8_e4m3fn; both must be"),
        ({"row_scale": torch.ones(1, 3, 5)}, r"row_scale is \(1, 3, 5\) for x of \(1, 3, 12\); it must be"),
        ({"row_scale": torch.ones(3, 1)}, r"row_scale is \(3, 1\) for x of \(1, 3, 12\)"),
        (
            {"weight_scale": torch.ones(N, 1)},
            r"its scale \(8, 1\) and bias \(8,\) .* must be \[N, K\], \[N\]",
        ),
        ({"weight": torch.zeros(N, 4).to(E4M3)}, r"weight is \(8, 4\), .* for x of \(1, 3, 12\)"),
    ],
)
def test_a_product_that_does_not_fit_is_refused(op: str, changes: dict[str, Tensor], message: str) -> None:
    run = getattr(REFERENCE_OPS, op)
    assert run(*product()).shape == (1, 3, N)
    with pytest.raises(ValueError, match=message):
        run(*product(**changes))


def test_rows_that_are_made_in_fp8_have_one_scale_each() -> None:
    values, scale = REFERENCE_OPS.linear_gelu_rows_fp8(*product(), torch.ones(2))
    assert values.shape == (1, 3, N) and scale.shape == (1, 3, 1)
    for parts, reach in ((2, torch.ones(2)), (1, torch.ones(3))):
        with pytest.raises(
            ValueError, match=rf"row_scale is \(1, 3, {parts}\) and reach \({len(reach)},\); th"
        ):
            REFERENCE_OPS.linear_gelu_rows_fp8(*product(row_scale=torch.ones(1, 3, parts)), reach)


@pytest.mark.parametrize(
    ("x", "heads", "message"),
    [
        (
            torch.zeros(1, 3, K).half(),
            3,
            "x is torch.float16, .* and the bias torch.float32; the weight must",
        ),
        (torch.zeros(1, 3, K), 5, r"x is \(1, 3, 12\); 5 heads must divide its last axis"),
        (torch.zeros(1, 3, 4), 2, r"weight is \(8, 12\), .* for x of \(1, 3, 4\)"),
    ],
)
def test_heads_that_do_not_fit_are_refused(x: Tensor, heads: int, message: str) -> None:
    rest = product()[2:]
    assert REFERENCE_OPS.linear_heads_fp8(torch.zeros(1, 3, K), *rest, 3).shape == (1, 3, N)
    with pytest.raises(ValueError, match=message):
        REFERENCE_OPS.linear_heads_fp8(x, *rest, heads)
