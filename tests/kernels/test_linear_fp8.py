"""The FP8 products against the reference; the interpreter converts to e4m3 as a GPU does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfengine.accuracy import relative_error
from rfengine.kernels import gelu_fp8, linear_fp8
from rfengine.kernels.linear_tile import Device, Tile
from rfengine.ops import reference_fp8
from rfengine.ops.reference import channel_fp8, row_fp8
from rfengine.ops.reference_fp8 import product_reach
from support.interpreter_rounding import round_to_nearest_even
from support.tolerance import assert_within_reference_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
HOPPER = Device(132, 227 * 1024, (9, 0))
BLACKWELL = Device(148, 227 * 1024, (10, 0))
ADA = Device(142, 99 * 1024, (8, 9))
AMPERE = Device(108, 163 * 1024, (8, 0))
PRODUCTS = ["linear_fp8", "linear_gelu_fp8"]
# Share of e4m3 values that are rounded to the other neighbour: a sum that is at a tie but for its last bits
MOST_FLIPPED = 2e-3


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch):
    round_to_nearest_even(monkeypatch)


@pytest.fixture(params=["pointer", "descriptor"])
def form(request, monkeypatch):
    """Of the kernel's loads, both of which the interpreter runs."""
    if DEVICE == "cpu":
        device = HOPPER if request.param == "descriptor" else ADA
        monkeypatch.setattr(linear_fp8, "describe_device", lambda _: device)


def operands(rows=(2, 21), inputs=48, outputs=80, parts=1, dtype=torch.float16, seed=0):
    """x, row_scale, weight, weight_scale and bias of an FP8 product, of rows with sizes of their own."""
    torch.manual_seed(seed)
    x = torch.randn(*rows, inputs) * (0.1 + 3 * torch.rand(*rows, 1))
    values, scale = row_fp8(x.unflatten(-1, (parts, -1)))
    weight, weight_scale = channel_fp8(torch.randn(outputs, inputs) / inputs**0.5)
    bias = torch.randn(outputs).to(dtype)
    case = values.flatten(-2), scale.squeeze(-1), weight, weight_scale, bias
    return [tensor.to(DEVICE) for tensor in case]


def assert_matches(name, case):
    meaning = getattr(reference_fp8, name)
    found, expected = getattr(linear_fp8, name)(*case), meaning(*case)
    assert found.dtype == expected.dtype == case[4].dtype and found.is_contiguous()
    assert_within_reference_error(name, found, expected, meaning(*(tensor.double() for tensor in case)))


def flipped(found, expected):
    """The share of e4m3 values that differ; they may differ by one step."""
    assert found.dtype == expected.dtype == E4M3
    steps = (found.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    assert ((steps <= 1) | (found.float() == expected.float())).all()
    return (found.float() != expected.float()).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_products_agree_with_the_reference(name, dtype, form):
    for rows, inputs, outputs in (((1, 1), 16, 16), ((1, 63), 144, 40), ((2, 21), 48, 200)):
        assert_matches(name, operands(rows, inputs, outputs, dtype=dtype))


@pytest.mark.parametrize(("inputs", "parts"), [(64, 2), (384, 3), (512, 2), (96, 1), (120, 5)])
def test_a_row_may_have_a_scale_for_each_part(inputs, parts, form):
    assert_matches("linear_fp8", operands((1, 37), inputs, parts=parts))


@pytest.mark.parametrize("tile", [Tile(128, 256, 0, 128, 8, 4, 1.0), Tile(64, 64, 0, 128, 4, 3, 0.65)])
def test_tiles_are_cut_at_the_edges(tile, form, monkeypatch):
    monkeypatch.setattr(linear_fp8, "tile_of", lambda *_: tile)
    assert_matches("linear_gelu_fp8", operands((1, tile.rows + 5), 144, tile.columns + 8))


@given(
    rows=st.integers(1, 40), inputs=st.integers(1, 6), outputs=st.integers(1, 90), seed=st.integers(0, 2**20)
)
@settings(max_examples=15, deadline=None)
def test_any_shape_agrees(rows, inputs, outputs, seed):
    assert_matches("linear_fp8", operands((1, rows), 8 * inputs, outputs, seed=seed))


@pytest.mark.parametrize(("device", "plain"), [(HOPPER, 256), (BLACKWELL, 128)])
def test_on_blackwell_256_columns_are_for_gelu_which_stores_them_in_pieces(device, plain):
    columns = [linear_fp8.tile_of(1560, 4608, device, 1536, False, False, gelu).columns for gelu in (0, 1)]
    assert columns == [plain, 256]
    assert linear_fp8.tile_of(1560, 4608, device, 128, True, False, False).columns == 128


def test_gelu_is_rounded_in_units_known_before_the_row_is(form):
    case = operands((2, 33), 144, 200)
    reach = product_reach(*case[2:])
    values, scale = linear_fp8.linear_gelu_rows_fp8(*case, reach)
    expected, expected_scale = reference_fp8.linear_gelu_rows_fp8(*case, reach)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert flipped(values, expected) <= MOST_FLIPPED
    exact = reference_fp8.linear_gelu_fp8(*case[:4], case[4].double())
    assert relative_error(values.double() * scale, exact) < 0.04  # as e4m3 rounds: 2^-4 at most


@pytest.mark.parametrize("bias", [0.0, 1e3])
def test_no_gelu_can_saturate(bias):
    """Every value of the row is at 448, with the signs of the channel that reaches furthest, to which a bias
    as large may be added."""
    _, _, weight, weight_scale, _ = operands(inputs=144, outputs=80)
    furthest = (weight.float().abs().sum(1) * weight_scale).argmax()
    x = (448 * weight[furthest].float().sign()).to(E4M3).view(1, 1, -1)
    bias = torch.full((80,), bias, dtype=torch.float32, device=DEVICE)
    case = x, torch.full((1, 1, 1), 0.3, device=DEVICE), weight, weight_scale, bias
    values, scale = linear_fp8.linear_gelu_rows_fp8(*case, product_reach(weight, weight_scale, bias))
    assert values.float().max() == 448  # it reaches the end of the range, and no further
    exact = reference_fp8.linear_gelu_fp8(*case)
    assert relative_error(values.double() * scale, exact.double()) < 0.04


@pytest.mark.parametrize(("inputs", "heads"), [(192, 3), (256, 2), (96, 4), (120, 5), (64, 1)])
def test_heads_are_rounded_as_they_are_read(inputs, heads, form):
    *_, weight, weight_scale, bias = operands(inputs=inputs)
    x = torch.randn(2, 37, inputs, device=DEVICE).half() * torch.rand(2, 37, 1, device=DEVICE).half()
    found = linear_fp8.linear_heads_fp8(x, weight, weight_scale, bias, heads)
    expected = reference_fp8.linear_heads_fp8(x, weight, weight_scale, bias, heads)
    assert relative_error(found, expected.double()) <= torch.finfo(torch.float16).eps


def test_strided_rows_and_rows_of_zeros(form):
    x, row_scale, *rest = operands((1, 20), 64)
    wide = torch.zeros(1, 20, 160, dtype=E4M3, device=DEVICE)
    wide[..., 32:96] = x
    wide[:, 3] = 0
    assert_matches("linear_fp8", [wide[..., 32:96], row_scale, *rest])
    heads = torch.zeros(1, 20, 64, device=DEVICE, dtype=torch.float16)
    found = linear_fp8.linear_heads_fp8(heads, *rest, 2)
    assert torch.equal(found, rest[2].expand(1, 20, -1))
    values, scale = linear_fp8.linear_gelu_rows_fp8(
        torch.zeros_like(x), torch.ones_like(row_scale), *rest[:2], torch.zeros_like(rest[2]),
        torch.zeros(2, device=DEVICE),
    )  # fmt: skip
    assert not values.float().any() and torch.equal(scale, torch.ones_like(scale))


def test_no_rows_give_none():
    x, row_scale, *rest = operands((2, 0), 64)
    for name in PRODUCTS:
        assert getattr(linear_fp8, name)(x, row_scale, *rest).shape == (2, 0, 80)
    values, scale = linear_fp8.linear_gelu_rows_fp8(x, row_scale, *rest, product_reach(*rest))
    assert values.shape == (2, 0, 80) and scale.shape == (2, 0, 1)
    assert linear_fp8.linear_heads_fp8(x.half(), *rest, 2).shape == (2, 0, 80)


def test_the_gelu_of_a_librarys_product_is_rounded_alike():
    case = operands((1, 33), 144, 1100)
    reach = product_reach(*case[2:])
    product = reference_fp8.linear_fp8(*case[:4], case[4].float()).flatten(0, 1)
    values, scale = gelu_fp8.gelu_rows_fp8(product, case[1].flatten(0, 1), reach)
    expected, expected_scale = reference_fp8.linear_gelu_rows_fp8(*case[:4], case[4].float(), reach)
    torch.testing.assert_close(scale, expected_scale.flatten(0, 1), rtol=1e-6, atol=0)
    assert flipped(values, expected.flatten(0, 1)) <= MOST_FLIPPED
    nothing = torch.zeros_like(reach)  # of a weight and a bias of zeros
    values, scale = gelu_fp8.gelu_rows_fp8(torch.zeros_like(product), case[1].flatten(0, 1), nothing)
    assert not values.float().any() and torch.equal(scale, torch.ones_like(scale))


def test_hidden_rows_that_are_nearly_zero_become_zero(form):
    x, row_scale, weight, weight_scale, bias = operands((1, 20), 64, dtype=torch.float32)
    weight[3] = torch.zeros(64, device=DEVICE).to(E4M3)  # of each row a value is 0
    case = x, torch.full_like(row_scale, 1e-41), weight, weight_scale, torch.zeros_like(bias)
    reach = product_reach(*case[2:])
    product = reference_fp8.linear_fp8(*case).flatten(0, 1)
    for values, scale in (
        linear_fp8.linear_gelu_rows_fp8(*case, reach),
        reference_fp8.linear_gelu_rows_fp8(*case, reach),
        gelu_fp8.gelu_rows_fp8(product, case[1].flatten(0, 1), reach),
    ):
        assert not values.float().any() and (scale == 1).all()


def test_a_gpu_without_fp8_and_heads_that_are_too_wide_are_refused(monkeypatch):
    case = operands()
    monkeypatch.setattr(linear_fp8, "describe_device", lambda _: AMPERE)
    with pytest.raises(ValueError, match="the GPU is sm_80 and FP8 products need sm_89 or later; use"):
        linear_fp8.linear_fp8(*case)
    monkeypatch.setattr(linear_fp8, "describe_device", lambda _: HOPPER)
    x = torch.zeros(1, 4, 512, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(16, 512, dtype=E4M3, device=DEVICE)
    scale, bias = torch.ones(16, device=DEVICE), torch.zeros(16, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="a head has 256 inputs; the product rounds heads of at most 128"):
        linear_fp8.linear_heads_fp8(x, weight, scale, bias, 2)
    with pytest.raises(ValueError, match="x is torch.float16 and weight torch.float8_e4m3fn; they must be"):
        linear_fp8.linear_fp8(x, torch.ones(1, 4, 1, device=DEVICE), weight, scale, bias)
    for place, name in ((2, "weight"), (3, "weight_scale"), (4, "bias")):
        apart = torch.stack((case[place],) * 2, -1)[..., 0]  # equal, with a gap after each value
        with pytest.raises(ValueError, match=f"the last axis of {name} has stride 2; it must be contiguous"):
            linear_fp8.linear_fp8(*case[:place], apart, *case[place + 1 :])


@pytest.mark.parametrize("name", [*PRODUCTS, "linear_gelu_rows_fp8"])
def test_the_ops_pass_the_checks_of_custom_ops(name):
    case = operands((1, 5), 16, 24, dtype=torch.float32)
    extra = (product_reach(*case[2:]),) if "rows" in name else ()
    # the other checks multiply e4m3 tensors, which torch does not
    torch.library.opcheck(getattr(linear_fp8, name), (*case, *extra), test_utils="test_faketensor")
