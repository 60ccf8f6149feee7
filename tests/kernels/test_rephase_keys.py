"""rephase_keys against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from rfengine.kernels.rephase_keys import rephase_keys
from rfengine.ops import reference
from support.bits import DEVICE, DTYPES, angles, assert_same_bits, in_every_dtype, values
from support.interpreter_rounding import round_to_nearest_even


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest_even(monkeypatch)


# layers, batch, tokens, heads, head dim
SHAPES = [(1, 1, 1, 1, 64), (3, 2, 63, 3, 64), (2, 1, 100, 2, 128), (2, 2, 12, 2, 24), (1, 2, 7, 5, 6)]


@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(SHAPES))
def test_every_key_gets_the_rotation_of_the_reference_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    raw, rotation = values(*shape, seed=1, dtype=dtype), angles(shape[2], shape[4])
    rotated, expected = torch.empty_like(raw), torch.empty_like(raw)
    rephase_keys(raw, rotated, rotation)
    reference.rephase_keys(raw, expected, rotation)
    assert_same_bits("rotated", rotated, expected)


def test_filled_part_of_an_arena_is_rotated_and_the_rest_is_left_alone() -> None:
    layers, batch, tokens, heads, head_dim = 2, 2, 40, 3, 64
    arena = values(layers, batch, tokens, heads, head_dim, seed=2)
    rotated, rotation = values(layers, batch, tokens, heads, head_dim, seed=3), angles(25, head_dim)
    expected = rotated.clone()
    rephase_keys(arena[:, :, 5:30], rotated[:, :, 5:30], rotation)
    reference.rephase_keys(arena[:, :, 5:30], expected[:, :, 5:30], rotation)
    assert_same_bits("the whole arena", rotated, expected)


def test_axes_may_lie_in_any_order_in_memory() -> None:
    raw = values(3, 2, 5, 21, 64, seed=4).permute(1, 0, 3, 2, 4)  # [L 2, B 3, S 21, H 5, E 64]
    rotated, rotation = torch.empty(2, 5, 3, 21, 64, device=DEVICE).permute(0, 2, 3, 1, 4), angles(21, 64)
    expected = torch.empty(raw.shape, device=DEVICE)
    rephase_keys(raw, rotated, rotation)
    reference.rephase_keys(raw, expected, rotation)
    assert_same_bits("rotated", rotated, expected)


def test_rephase_keys_is_a_well_formed_op() -> None:
    raw, rotation = values(2, 1, 9, 2, 64, seed=5), angles(9, 64)
    torch.library.opcheck(rephase_keys, (raw, torch.zeros_like(raw), rotation))


def test_keys_with_a_strided_last_axis_are_refused() -> None:
    raw = values(1, 1, 64, 2, 8, seed=6).transpose(2, 4)
    with pytest.raises(ValueError, match="last axis of raw"):
        rephase_keys(raw, torch.zeros(raw.shape, device=DEVICE), angles(8, 64))


def test_rotation_in_float64_is_refused() -> None:
    raw = values(1, 1, 8, 2, 64, seed=7)
    with pytest.raises(ValueError, match="must be float32"):
        rephase_keys(raw, torch.zeros_like(raw), angles(8, 64).double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_window_of_the_engine_is_rotated_bit_for_bit_on_the_gpu(dtype: torch.dtype) -> None:
    raw, rotation = values(4, 1, 3 * 4680, 12, 128, seed=8, dtype=dtype), angles(3 * 4680, 128)
    rotated, expected = torch.empty_like(raw), torch.empty_like(raw)
    rephase_keys(raw, rotated, rotation)
    reference.rephase_keys(raw, expected, rotation)
    assert_same_bits("rotated", rotated, expected)
