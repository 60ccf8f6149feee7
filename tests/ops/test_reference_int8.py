"""Weights in int8: how near they are, and what the products of them refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rfengine.accuracy import relative_error
from rfengine.ops import REFERENCE_OPS
from rfengine.ops.reference import channel_fp8
from rfengine.ops.reference_int8 import channel_int8, dequantised


def weight_of(outputs: int = 64, inputs: int = 1536) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 1, outputs).unsqueeze(1)  # every channel has a size of its own
    return sizes * torch.randn(outputs, inputs, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_weight_is_within_half_a_step_of_its_channel(dtype: torch.dtype) -> None:
    weight = weight_of()
    values, scale = channel_int8(weight, dtype)
    assert values.dtype == torch.int8 and scale.dtype == dtype and values.abs().max() == 127
    wide = scale.double().unsqueeze(1)
    off = (weight.double() - values.double() * wide).abs()
    # the largest of a channel saturates where its scale was rounded down, to three eighths of 1 %
    assert (off <= torch.maximum(0.501 * wide, weight.double().abs() * 2**-8)).all()


def test_int8_is_nearer_than_e4m3_where_a_channel_has_one_size() -> None:
    weight = weight_of()
    values, scale = channel_int8(weight, torch.bfloat16)
    e4m3, unit = channel_fp8(weight)
    of_int8 = relative_error(dequantised(values, scale, torch.float32), weight)
    of_e4m3 = relative_error(e4m3.float() * unit.unsqueeze(1), weight)
    assert of_int8 < 0.009 < 0.02 < of_e4m3


def test_a_channel_of_zeros_stays_zero() -> None:
    values, scale = channel_int8(torch.zeros(3, 8), torch.bfloat16)
    assert not values.any() and (scale == 1).all()


@pytest.mark.parametrize("name", ["linear_int8", "linear_gelu_int8"])
def test_a_product_is_that_of_the_weight_in_float32_but_for_eight_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = weight_of(), torch.randn(2, 5, 1536, generator=generator)
    bias = torch.randn(64, generator=generator)
    exact = F.linear(x, weight, bias)
    exact = F.gelu(exact, approximate="tanh") if name == "linear_gelu_int8" else exact
    found = getattr(REFERENCE_OPS, name)(x, *channel_int8(weight, torch.float32), bias)
    assert 1e-4 < relative_error(found, exact) < 0.012


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    values, scale = channel_int8(weight_of(4, 8), torch.float32)
    x, bias = torch.zeros(2, 8), torch.zeros(4)
    for case, message in (
        ((x, values.float(), scale, bias), "weight is torch.float32"),
        ((x[:, 1:], values, scale, bias), r"for x of \(2, 7\)"),
        ((x, values, scale[1:], bias), r"its scale \(3,\)"),
        ((x, values, scale, bias[1:]), r"bias \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            REFERENCE_OPS.linear_int8(*case)
