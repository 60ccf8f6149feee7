"""Where weights lie in memory changes no value of them, and only for the products that read them faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rfengine.models.weight_layout import join, joined_view, lay_out
from rfengine.ops import REFERENCE_OPS, Ops

CPU_OPS = Ops(REFERENCE_OPS.choice | {"linear": "cpu"})


def drawn(rows: int, dtype: torch.dtype) -> nn.Parameter:
    values = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
    return nn.Parameter(values.to(dtype), requires_grad=False)


@pytest.mark.parametrize(
    ("ops", "dtype", "by_inputs"),
    [
        (CPU_OPS, torch.float32, True),
        (CPU_OPS, torch.bfloat16, False),
        (CPU_OPS, torch.float16, False),
        (REFERENCE_OPS, torch.float32, False),
    ],
)
def test_weights_of_an_input_lie_side_by_side_where_onednn_reads_them(
    ops: Ops, dtype: torch.dtype, by_inputs: bool
) -> None:
    parts = [drawn(4, dtype), drawn(5, dtype)]
    expected = [part.clone() for part in parts]
    lay_out(parts[0], ops)
    assert parts[0].stride() == ((1, 4) if by_inputs else (6, 1)) and torch.equal(parts[0], expected[0])
    join(parts, ops)
    assert all(part.stride() == ((1, 9) if by_inputs else (6, 1)) for part in parts)
    assert all(map(torch.equal, parts, expected))
    assert torch.equal(joined_view(parts), torch.cat(expected))
