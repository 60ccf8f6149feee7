"""The fused launch against ema_evict and then rephase_keys of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.kernels.evict_and_rephase import evict_and_rephase
from rfengine.ops import reference
from support.bits import DTYPES, angles, assert_same_bits, in_every_dtype, values
from support.interpreter_rounding import round_to_nearest_even


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest_even(monkeypatch)


NAMES = ("raw", "rotated", "values", "low keys", "low values")


def arenas(
    layers: int,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    sink: int,
    split: bool,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    full = [values(layers, batch, tokens, heads, head_dim, seed=seed, dtype=dtype) for seed in (1, 2, 3)]
    low = [values(layers, batch, sink, heads, head_dim, seed=seed, dtype=dtype) * 2**-8 for seed in (4, 5)]
    return [*full, *(low if split else (None, None))]


def clones(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def one_after_the_other(
    state: list[Tensor | None], rotation: Tensor, sink_tokens: int, leaving: int, alpha: float
) -> None:
    raw, rotated, spare, *low = state
    sink, gone = slice(0, sink_tokens), slice(leaving, leaving + sink_tokens)
    reference.ema_evict(raw[:, :, sink], spare[:, :, sink], *low, raw[:, :, gone], spare[:, :, gone], alpha)
    reference.rephase_keys(raw, rotated, rotation)


def assert_same_state(own: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for name, kernel, other in zip(NAMES, own, expected, strict=True):
        if kernel is not None and other is not None:
            assert_same_bits(name, kernel, other)


# layers, batch, heads, head dim, sink tokens, slots beside the sink
SIZES = [(1, 1, 1, 64, 1, 1), (2, 2, 3, 64, 21, 2), (1, 1, 2, 128, 33, 2), (2, 1, 2, 24, 12, 3)]


@pytest.mark.parametrize(("size", "dtype"), in_every_dtype(SIZES))
@pytest.mark.parametrize("split", [True, False])
def test_fused_launch_leaves_the_same_memory_as_the_two_ops(
    size: tuple[int, ...], split: bool, dtype: torch.dtype
) -> None:
    layers, batch, heads, head_dim, sink, slots = size
    tokens = sink * (1 + slots)
    rotation = angles(tokens, head_dim)
    for leaving in {sink, tokens - sink}:
        own = arenas(layers, batch, tokens, heads, head_dim, sink, split, dtype)
        expected = clones(own)
        evict_and_rephase(*own, rotation, sink, leaving, 0.99)
        one_after_the_other(expected, rotation, sink, leaving, 0.99)
        assert_same_state(own, expected)


def test_unfilled_slots_stay_as_they_were() -> None:
    own = arenas(2, 1, 40, 2, 64, 10, True, torch.float32)
    expected = clones(own)
    rotation = angles(30, 64)
    evict_and_rephase(*(x[:, :, :30] for x in own[:3]), *own[3:], rotation, 10, 20, 0.9)
    one_after_the_other([*(x[:, :, :30] for x in expected[:3]), *expected[3:]], rotation, 10, 20, 0.9)
    assert_same_state(own, expected)


@pytest.mark.parametrize("split", [True, False])
def test_evict_and_rephase_is_a_well_formed_op(split: bool) -> None:
    state = arenas(2, 1, 9, 2, 64, 3, split, torch.float32)
    torch.library.opcheck(evict_and_rephase, (*state, angles(9, 64), 3, 6, 0.99))


@pytest.mark.parametrize("leaving", [0, 2, 7])
def test_leaving_chunk_must_lie_behind_the_sink_and_inside_the_arena(leaving: int) -> None:
    state = arenas(1, 1, 9, 2, 64, 3, True, torch.float32)
    with pytest.raises(ValueError, match="start of a filled slot"):
        evict_and_rephase(*state, angles(9, 64), 3, leaving, 0.99)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_window_of_the_engine_is_the_same_bit_for_bit_on_the_gpu(split: bool, dtype: torch.dtype) -> None:
    own = arenas(4, 1, 3 * 4680, 12, 128, 4680, split, dtype)
    expected = clones(own)
    rotation = angles(3 * 4680, 128)
    for leaving in (4680, 2 * 4680):
        evict_and_rephase(*own, rotation, 4680, leaving, 0.999)
        one_after_the_other(expected, rotation, 4680, leaving, 0.999)
    assert_same_state(own, expected)
