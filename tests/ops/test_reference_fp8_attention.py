"""Attention in FP8: what its reference rounds and writes, and how near it is to attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.ops import REFERENCE_OPS, reference
from rfengine.ops import reference_fp8_attention as fp8
from rfengine.ops.reference_fp8_attention import HEADROOM, aligned_tokens
from support.fp8_attention import KV_LEN, SIZE, copies, unit_of, window, written

E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_the_copies_are_the_window_times_their_units() -> None:
    rotated, values = window(torch.float16)
    unit, mean, value_unit, keys8, values8 = copies(rotated, unit_of(rotated))
    fp8.window_fp8(rotated, values, unit, mean, value_unit, keys8, values8, KV_LEN)
    keys, values = rotated[:, :, :KV_LEN].double(), values[:, :, :KV_LEN].double()
    torch.testing.assert_close(mean.double(), keys.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value_unit.double(), values.abs().amax((2, 4)) * HEADROOM / 448)
    found = keys8[:, :, :KV_LEN].double() * unit[:, None, None, None, None] + mean[:, :, None]
    half_steps = 448 * unit.max().item() / 2**4  # e4m3 has four significant bits
    assert (found - keys).abs().max() <= half_steps
    found = values8[..., :KV_LEN].permute(0, 1, 4, 2, 3).double() * value_unit[:, :, None, :, None]
    # relative, or half the smallest step of e4m3
    limit = (values.abs() / 2**4).maximum(value_unit[:, :, None, :, None].double() / 2**10)
    assert ((found - values).abs() <= limit * (1 + 1e-6)).all()


def test_tokens_beyond_the_window_are_neither_read_nor_written() -> None:
    rotated, values = window(torch.float32)
    assert rotated[:, :, KV_LEN:].isnan().all()
    unit, mean, value_unit, keys8, values8 = copies(rotated, unit_of(rotated))
    fp8.window_fp8(rotated, values, unit, mean, value_unit, keys8, values8, KV_LEN)
    assert keys8[:, :, KV_LEN:].isnan().all() and values8[..., KV_LEN:].isnan().all()
    for tensor in (mean, value_unit, keys8[:, :, :KV_LEN].float(), values8[..., :KV_LEN].float()):
        assert tensor.isfinite().all()


def test_a_head_of_zeros_has_the_unit_one() -> None:
    rotated, values = window(torch.float32)
    values[0, 0, :, 1] = 0.0
    unit, mean, value_unit, keys8, values8 = copies(rotated, unit_of(rotated))
    fp8.window_fp8(rotated, values, unit, mean, value_unit, keys8, values8, KV_LEN)
    assert value_unit[0, 0, 1] == 1 and not values8[0, 0, 1, :, :KV_LEN].float().any()


def test_the_headroom_holds_values_sixteen_times_the_window_and_then_saturates() -> None:
    rotated, values = window(torch.float32)
    unit, mean, value_unit, keys8, values8 = copies(rotated, unit_of(rotated))
    fp8.window_fp8(rotated, values, unit, mean, value_unit, keys8, values8, KV_LEN)
    largest = values8[..., :KV_LEN].float().abs().amax((-1, -2))
    assert (largest == 448 / HEADROOM).all()
    layer = mean[0], value_unit[0], keys8[0], values8[0]
    q = written(layer, unit[:1], 100 * torch.ones(SIZE.batch, 3, SIZE.dim), torch.tensor([0]))
    assert q.float().abs().max() == 448 and layer[3][..., :3].float().min() == 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_is_written_as_the_window_would_be(dtype: torch.dtype) -> None:
    """With the arena given, copies of what was written there are what the op wrote beside it."""
    rotated, values = window(dtype)
    unit, mean, value_unit, keys8, values8 = copies(rotated, unit_of(rotated))
    fp8.window_fp8(rotated, values, unit, mean, value_unit, keys8, values8, KV_LEN)
    v = torch.randn(SIZE.batch, 6, SIZE.dim, dtype=dtype)
    arena = (rotated[0], values[0], torch.empty_like(rotated[0]))
    slots = torch.tensor([2, 0])
    written((mean[0], value_unit[0], keys8[0], values8[0]), unit[:1], v, slots, *arena)
    for slot, frame in ((2, 0), (0, 1)):
        tokens = slice(3 * slot, 3 * slot + 3)
        assert torch.equal(values[0][:, tokens].flatten(2), v[:, 3 * frame : 3 * frame + 3])
        centred = (rotated[0][:, tokens].float() - mean[0][:, None]) * unit[0].reciprocal()
        assert torch.equal(keys8[0][:, tokens].float(), centred.clamp(-448, 448).to(E4M3).float())
        scaled = values[0][:, tokens].float() * value_unit[0].reciprocal()[:, None, :, None]
        expected = scaled.clamp(-448, 448).to(E4M3).float().permute(0, 2, 3, 1)
        assert torch.equal(values8[0][..., tokens].float(), expected)
        assert arena[2][:, tokens].isfinite().all()


def attention_inputs(kv_len: int, tokens: int = 5) -> tuple[Tensor, ...]:
    q, keys = torch.randn(1, tokens, 2, 16).to(E4M3), torch.randn(1, 40, 2, 16).to(E4M3)
    values = torch.randn(1, 2, 16, aligned_tokens(40)).to(E4M3)
    keys[:, kv_len:], values[..., kv_len:] = float("nan"), float("nan")
    return q, keys, values, torch.tensor([0.25]), torch.tensor([[0.5, 2.0]])


@pytest.mark.parametrize("kv_len", [1, 37, 40])
def test_only_the_rounding_of_the_weights_parts_it_from_exact_attention(kv_len: int) -> None:
    q, keys, values, scale, unit = attention_inputs(kv_len)
    out = fp8.sink_window_attention_fp8(q, keys, values, scale, unit, kv_len, None, torch.float32)
    exact = reference.sink_window_attention(
        q.double(), keys.double(), values.permute(0, 3, 1, 2).double() * unit[:, :, None], kv_len
    )
    truth = fp8.sink_window_attention_fp8(
        *(tensor.double() for tensor in (q, keys, values, scale, unit)), kv_len, None, torch.bfloat16
    )
    torch.testing.assert_close(truth, exact)  # 0.25 is 1 / sqrt(16)
    rounding = 2**-4 * values[..., :kv_len].double().abs().amax((2, 3))[:, None, :, None] * unit[:, :, None]
    assert ((out - exact).abs() <= rounding).all()
    if kv_len > 1:
        assert relative_error(out, exact) > 1e-3  # the weights are rounded


def test_one_key_has_a_weight_of_its_own_size() -> None:
    """Sums of unrounded weights: where the one weight is rounded, so is the result."""
    q, keys, values, scale, unit = attention_inputs(1)
    out = fp8.sink_window_attention_fp8(q, keys, values, scale, unit, 1, None, torch.float64)
    logits = torch.einsum("bthe,bhe->bth", q.double(), keys[:, 0].double()) * scale / torch.tensor(2.0).log()
    weight = 2 ** (logits - logits.ceil() + 8)
    ratio = weight.float().to(E4M3).double() / weight
    expected = ratio[..., None] * (values[..., 0].double() * unit[..., None])[:, None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=0)
    assert (weight > 128).all() and (weight <= 256).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_row_fp8_of_the_rounded_result(dtype: torch.dtype) -> None:
    q, keys, values, scale, unit = attention_inputs(37)
    unit[0, 1] = 0.0
    arguments = (q, keys, values, scale, unit, 37, None, dtype)
    out, (eights, scales) = (
        fp8.sink_window_attention_fp8(*arguments),
        fp8.sink_window_attention_fp8(*arguments, True),
    )
    assert out.dtype == dtype and eights.dtype == E4M3 and scales.shape == q.shape[:3]
    expected, expected_scales = reference.row_fp8(out)
    assert (scales[..., 1] == 1).all() and torch.equal(scales, expected_scales[..., 0])
    assert torch.equal(eights.view(torch.uint8), expected.view(torch.uint8))


def whole_mode(keys: Tensor, values: Tensor, q: Tensor, smooth: bool) -> Tensor:
    """Attention in FP8 over [B, S, H, E] in float32; without smoothing the mean is left where it is."""
    size = keys.shape
    mean, unit = torch.empty(1, size[0], *size[2:]), torch.empty(1, size[0], size[2])
    keys8 = torch.empty(1, *size, dtype=E4M3)
    values8 = torch.empty(1, size[0], *size[2:], aligned_tokens(size[1]), dtype=E4M3)
    key_unit, query_unit = 2 * keys.abs().amax() / 448, q.abs().amax() / 448
    shift = torch.zeros(()) if smooth else keys.mean(1, keepdim=True)
    fp8.window_fp8((keys - shift)[None], values[None], key_unit[None], mean, unit, keys8, values8, size[1])
    if not smooth:
        keys8[0] = (keys / key_unit).to(E4M3)
    q8 = (q / query_unit).to(E4M3)
    scale = query_unit * key_unit * size[-1] ** -0.5
    return fp8.sink_window_attention_fp8(
        q8, keys8[0], values8[0], scale[None], unit[0], size[1], None, torch.float32
    )


@pytest.mark.parametrize("shared", [0.0, 8.0, 32.0])
def test_smoothing_takes_what_all_keys_share_out_of_the_error(shared: float) -> None:
    """shared: how far some channels of all keys are from 0.

    Rounding to e4m3 has a relative error of 2^-4 / sqrt(3) * 0.72 = 0.026 on average. Values and weights each
    bring that into the result, and q and k each into logits of about 1: sqrt(4) * 0.026 = 0.052.
    """
    generator = torch.Generator().manual_seed(3)
    q, keys, values = (torch.randn(1, n, 2, 64, generator=generator) for n in (64, 700, 700))
    keys[..., :4] += shared
    exact = reference.sink_window_attention(q.double(), keys.double(), values.double(), 700)
    plain, smoothed = (relative_error(whole_mode(keys, values, q, smooth), exact) for smooth in (False, True))
    assert smoothed < 0.055
    assert plain > smoothed * {0.0: 0.99, 8.0: 1.4, 32.0: 3.5}[shared]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q=a["q"].half()), "q is torch.float16 .*; it must be torch.float8_e4m3fn"),
        (lambda a: a.update(values_fp8=a["values_fp8"][..., :40]), r"values_fp8 is .*; it must be .*48\)"),
        (lambda a: a.update(value_unit=a["value_unit"][0]), r"value_unit is .*; it must be .*\(1, 2\)"),
        (lambda a: a.update(logit_scale=a["logit_scale"].double()), "logit_scale is torch.float64"),
        (lambda a: a.update(kv_len=41), "kv_len is 41; the arena holds 1 to 40 tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_errors_that_say_what_does(change, message: str) -> None:
    names = ("q", "keys_fp8", "values_fp8", "logit_scale", "value_unit")
    arguments = dict(zip(names, attention_inputs(40), strict=True)) | {"kv_len": 40}
    REFERENCE_OPS.sink_window_attention_fp8(*arguments.values(), None, torch.float32)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        REFERENCE_OPS.sink_window_attention_fp8(*arguments.values(), None, torch.float32)


def test_copies_and_means_of_another_shape_are_errors() -> None:
    rotated, values = window(torch.float32)
    unit, mean, value_unit, keys8, values8 = copies(rotated, unit_of(rotated))
    with pytest.raises(ValueError, match=r"rotated is .* and values .*; both must be \[L, B, S, H, E\]"):
        REFERENCE_OPS.window_fp8(rotated, values[:1], unit, mean, value_unit, keys8, values8, KV_LEN)
    with pytest.raises(ValueError, match="key_mean is torch.float32"):
        REFERENCE_OPS.window_fp8(rotated, values, unit, mean[0], value_unit, keys8, values8, KV_LEN)
    with pytest.raises(ValueError, match="keys_fp8 is torch.float32 .*; it must be torch.float8_e4m3fn"):
        REFERENCE_OPS.window_fp8(rotated, values, unit, mean, value_unit, keys8.float(), values8, KV_LEN)
    v = torch.randn(SIZE.batch, 6, SIZE.dim)
    layer = mean[0], value_unit[0], keys8[0], values8[0]
    with pytest.raises(ValueError, match="raw_keys is .* beside keys_fp8"):
        written(layer, unit[:1], v, torch.tensor([2, 0]), None, None, rotated, ops=REFERENCE_OPS)
    with pytest.raises(ValueError, match="key_unit is torch.float32"):
        written(layer, unit[:2], v, torch.tensor([2, 0]), ops=REFERENCE_OPS)
