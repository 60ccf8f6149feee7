"""window_fp8: means and units of the reference, copies rounded from what float32 leaves open."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfengine.kernels import window_fp8 as window_fp8_file
from rfengine.kernels.window_fp8 import window_fp8
from rfengine.ops import reference_fp8_attention
from support.bits import DEVICE, DTYPES
from support.fp8_attention import KV_LEN, SIZE, Size, assert_rounded_from, copies, unit_of, window
from support.interpreter_rounding import round_to_nearest_even
from support.tolerance import assert_within_reference_error


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest_even(monkeypatch)


def length(kv_len: int) -> tuple[int, Tensor]:
    return kv_len, torch.tensor([kv_len], dtype=torch.int32, device=DEVICE)


def run(rotated: Tensor, values: Tensor, kv_len: int) -> tuple[Tensor, ...]:
    """key_unit, key_mean, value_unit, keys_fp8, values_fp8."""
    made = copies(rotated, unit_of(rotated))
    window_fp8(rotated, values, *made, *length(kv_len))
    return made


def assert_like_reference(rotated: Tensor, values: Tensor, kv_len: int) -> tuple[Tensor, ...]:
    unit, mean, value_unit, keys8, values8 = run(rotated, values, kv_len)
    expected, truth = copies(rotated, unit_of(rotated)), []
    reference_fp8_attention.window_fp8(rotated, values, *expected, kv_len)
    truth = [each.double() for each in expected]
    wide = rotated.double(), values.double()
    reference_fp8_attention.window_fp8(*wide, *truth, kv_len)
    assert_within_reference_error("key_mean", mean, expected[1], truth[1])
    assert torch.equal(value_unit, expected[2])
    keys, values = rotated[:, :, :kv_len].double(), values[:, :, :kv_len].double()
    # sums, the mean and two products: a few roundings of what is added and subtracted
    size = keys.abs() + keys.abs().amax(2, keepdim=True)
    exact, units = truth[3][:, :, :kv_len], unit.double()[:, None, None, None, None]
    assert_rounded_from("keys_fp8", keys8[:, :, :kv_len], exact, 2.0**-22 * size / units)
    exact = truth[4][..., :kv_len]
    assert_rounded_from("values_fp8", values8[..., :kv_len], exact, 2.0**-22 * exact.abs())
    assert keys8[:, :, kv_len:].isnan().all() and values8[..., kv_len:].isnan().all()
    return unit, mean, value_unit, keys8, values8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "kv_len"),
    [
        (SIZE, KV_LEN),
        (Size(1, 1, 1, 1, 64), 1),
        (Size(1, 2, 300, 2, 128), 256),
        (Size(2, 1, 131, 1, 24), 131),
        (Size(1, 1, 140, 1, 8), 127),
    ],
)
def test_copies_are_those_of_the_reference(size: Size, kv_len: int, dtype: torch.dtype) -> None:
    assert_like_reference(*window(dtype, size, kv_len), kv_len)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 150), heads=st.integers(1, 3), half=st.integers(4, 40), data=st.data())
def test_any_shape_has_the_copies_of_the_reference(tokens: int, heads: int, half: int, data) -> None:
    kv_len = data.draw(st.integers(1, tokens))
    with pytest.MonkeyPatch.context() as patch:
        round_to_nearest_even(patch)
        assert_like_reference(*window(torch.float16, Size(1, 1, tokens, heads, 2 * half), kv_len), kv_len)


def test_parts_are_summed_over_a_window_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_fp8_file, "PART_TOKENS", 32)
    assert_like_reference(*window(torch.float16, Size(1, 1, 600, 2, 8), 555), 555)  # 18 parts of 19


def test_a_run_repeats_bit_for_bit() -> None:
    rotated, values = window(torch.bfloat16, Size(1, 1, 140, 2, 64), 130)
    for own, again in zip(run(rotated, values, 130), run(rotated, values, 130), strict=True):
        assert torch.equal(own.contiguous().view(torch.uint8), again.contiguous().view(torch.uint8))


def test_heads_of_zeros_have_the_unit_one_and_alike_keys_are_zero() -> None:
    rotated, values = window(torch.float32)
    values[1, 0, :, 2] = 0.0
    rotated[0, 1, :KV_LEN] = 0.75
    _, mean, value_unit, keys8, values8 = assert_like_reference(rotated, values, KV_LEN)
    assert value_unit[1, 0, 2] == 1 and not values8[1, 0, 2, :, :KV_LEN].float().any()
    assert (mean[0, 1] == 0.75).all() and not keys8[0, 1, :KV_LEN].float().any()


def test_heads_that_are_nearly_zero_become_zero() -> None:
    """A unit below 2^-126 may have an infinite reciprocal, which makes NaN of a value 0."""
    rotated, values = window(torch.float32)
    values[0, :, :KV_LEN] *= 1e-39
    values[0, :, 3] = 0.0
    _, _, value_unit, _, values8 = assert_like_reference(rotated, values, KV_LEN)
    assert (value_unit[0] == 1).all() and not values8[0, ..., :KV_LEN].float().any()


def test_keys_beyond_their_unit_saturate() -> None:
    rotated, values = window(torch.float32)
    unit, *made = copies(rotated, unit_of(rotated) / 100)
    window_fp8(rotated, values, unit, *made, *length(KV_LEN))
    assert (made[2][:, :, :KV_LEN].float().abs() == 448).any() and made[2][
        :, :, :KV_LEN
    ].float().abs().max() == 448


def test_arenas_and_copies_that_lie_otherwise_in_memory_get_the_same_bits() -> None:
    size = Size(2, 2, 40, 3, 8)
    rotated, values = window(torch.float16, size, 37)
    expected = run(rotated, values, 37)
    apart = [each.transpose(2, 3).contiguous().transpose(2, 3) for each in (rotated, values)]
    unit, mean, value_unit, keys8, values8 = copies(rotated, unit_of(rotated))
    keys8 = keys8.transpose(1, 3).contiguous().transpose(1, 3)
    values8 = values8.transpose(1, 3).contiguous().transpose(1, 3)
    window_fp8(*apart, unit, mean, value_unit, keys8, values8, *length(37))
    for own, other in zip((mean, value_unit, keys8, values8), expected[1:], strict=True):
        assert torch.equal(own.float().nan_to_num(), other.float().nan_to_num())


def test_the_op_names_what_it_changes() -> None:
    schema = torch.ops.rfengine.window_fp8.default._schema
    changed = [argument.name for argument in schema.arguments if argument.is_write]
    assert changed == ["key_mean", "value_unit", "keys_fp8", "values_fp8"]


def test_what_it_cannot_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rotated, values = window(torch.float32, Size(1, 1, 8, 2, 8), 8)
    unit, mean, value_unit, keys8, values8 = copies(rotated, 1.0)
    with pytest.raises(ValueError, match="the last axis of rotated has stride"):
        window_fp8(rotated.mT.contiguous().mT, values, unit, mean, value_unit, keys8, values8, *length(8))
    with pytest.raises(ValueError, match="key_unit is torch.float64 .* must be float32 and contiguous"):
        window_fp8(rotated, values, unit.double(), mean, value_unit, keys8, values8, *length(8))
    monkeypatch.setattr(window_fp8_file, "capability_of", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match="compute capability 8.0 and FP8 comes with 8.9"):
        window_fp8(rotated, values, unit, mean, value_unit, keys8, values8, *length(8))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_len", [4680, 14040])
def test_the_window_of_the_engine_on_the_gpu(kv_len: int) -> None:
    assert_like_reference(*window(torch.bfloat16, Size(2, 1, 14040, 12, 128), kv_len), kv_len)
