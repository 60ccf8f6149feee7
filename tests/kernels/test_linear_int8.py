"""The products with weights in int8 against the reference."""

import pytest
import torch

from rfengine.kernels import linear_int8
from rfengine.kernels.linear_tile import Device, Tile
from rfengine.ops import reference_int8
from rfengine.ops.reference_int8 import channel_int8
from support.interpreter_rounding import round_to_nearest_even
from support.tolerance import assert_within_reference_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = Device(132, 227 * 1024, (9, 0))
AMPERE = Device(28, 99 * 1024, (8, 6))


# the interpreter multiplies no bfloat16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.fixture(params=["pointer", "descriptor"])
def form(request, monkeypatch):
    """Of the kernel's loads, both of which the interpreter runs."""
    round_to_nearest_even(monkeypatch)
    if DEVICE == "cpu":
        device = HOPPER if request.param == "descriptor" else AMPERE
        monkeypatch.setattr(linear_int8, "describe_device", lambda _: device)


def operands(rows=(2, 21), inputs=48, outputs=80, dtype=torch.float16, has_bias=True):
    torch.manual_seed(0)
    x = torch.randn(*rows, inputs).to(dtype)
    weight, scale = channel_int8(torch.randn(outputs, inputs) / inputs**0.5, dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    return [None if tensor is None else tensor.to(DEVICE) for tensor in (x, weight, scale, bias)]


def assert_matches(name, case):
    meaning = getattr(reference_int8, name)
    found, expected = getattr(linear_int8, name)(*case), meaning(*case)
    assert found.dtype == expected.dtype == case[0].dtype and found.is_contiguous()
    x, weight, *others = case
    exact = meaning(x.double(), weight, *(None if each is None else each.double() for each in others))
    assert_within_reference_error(name, found, expected, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["linear_int8", "linear_gelu_int8"])
def test_the_products_agree_with_the_reference(name, dtype, form):
    for rows, inputs, outputs in (((1, 1), 16, 16), ((1, 63), 144, 40), ((2, 21), 48, 200)):
        assert_matches(name, operands(rows, inputs, outputs, dtype))
    assert_matches(name, operands(dtype=dtype, has_bias=False))


@pytest.mark.parametrize("tile", [Tile(128, 256, 0, 64, 8, 3, 1.0), Tile(64, 64, 0, 64, 4, 3, 0.65)])
def test_tiles_are_cut_at_the_edges(tile, form, monkeypatch):
    monkeypatch.setattr(linear_int8, "tile_of", lambda *_: tile)
    assert_matches("linear_int8", operands((1, 150), 80, 272))


def test_rows_with_a_stride_of_their_own_are_read_where_they_are(form):
    x, *others = operands((1, 30), 96)
    wide = torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)
    assert torch.equal(linear_int8.linear_int8(wide[..., :96], *others), linear_int8.linear_int8(x, *others))


def test_a_tile_has_no_tail_and_room_for_the_widened_weight():
    for device in (HOPPER, AMPERE):
        for columns in (1536, 4608, 8960):
            tile = linear_int8.tile_of(4680, columns, torch.bfloat16, device)
            loads = tile.stages * (tile.rows * 2 + tile.columns) * tile.depth
            assert not tile.tail
            assert loads + tile.columns * tile.depth * 2 <= device.shared_bytes


def test_other_dtypes_and_shapes_are_refused():
    x, weight, scale, bias = operands()
    for case, message in (
        ((x, weight.float(), scale, bias), "they must be int8"),
        ((x[..., :-1], weight, scale, bias), "for rows of 47"),
        ((x, weight, scale[1:], bias), r"its scale \(79,\)"),
        ((x, weight, scale, bias[1:]), r"bias is \(79,\)"),
        ((x, weight.t().contiguous().t(), scale, bias), "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_int8.linear_int8(*case)
