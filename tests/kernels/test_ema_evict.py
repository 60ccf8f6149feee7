"""ema_evict against the reference, bit for bit, in both precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.kernels.ema_evict import ema_evict
from rfengine.ops import reference
from support.bits import DTYPES, assert_same_bits, in_every_dtype, values
from support.interpreter_rounding import round_to_nearest_even


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest_even(monkeypatch)


# layers, batch, tokens, heads, head dim
SHAPES = [(1, 1, 1, 1, 64), (3, 2, 63, 3, 64), (2, 1, 50, 2, 128), (2, 2, 12, 2, 24), (1, 2, 7, 5, 6)]


def sink_state(shape: tuple[int, ...], dtype: torch.dtype, split: bool) -> list[Tensor | None]:
    """Sink keys and values, and what rounding took from them, or None."""
    sink = [values(*shape, seed=seed, dtype=dtype) for seed in (1, 2)]
    low = [values(*shape, seed=seed, dtype=dtype) * 2**-8 for seed in (3, 4)] if split else [None, None]
    return [*sink, *low]


def clones(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def assert_same_state(kernel: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for name, own, other in zip(("keys", "values", "low keys", "low values"), kernel, expected, strict=True):
        if own is None or other is None:
            assert own is other
            continue
        assert_same_bits(name, own, other)


@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(SHAPES))
@pytest.mark.parametrize(("split", "alpha"), [(True, 0.999), (False, 0.999), (False, 0.7)])
def test_evicted_chunk_is_averaged_into_the_sink_bit_for_bit(
    shape: tuple[int, ...], split: bool, dtype: torch.dtype, alpha: float
) -> None:
    state = sink_state(shape, dtype, split)
    expected = clones(state)
    leaving = [values(*shape, seed=seed, dtype=dtype) for seed in (5, 6)]
    ema_evict(*state, *leaving, alpha)
    reference.ema_evict(*expected, *leaving, alpha)
    assert_same_state(state, expected)


@pytest.mark.parametrize("split", [True, False])
def test_slots_of_one_arena_are_folded_and_the_others_left_alone(split: bool) -> None:
    tokens, sink, leaving = 30, slice(0, 10), slice(20, 30)
    keys, spare = (values(2, 2, tokens, 3, 64, seed=seed, dtype=torch.bfloat16) for seed in (7, 8))
    low = [values(2, 2, 10, 3, 64, seed=9, dtype=torch.bfloat16) if split else None for _ in range(2)]
    own, expected = clones([keys, spare, *low]), clones([keys, spare, *low])
    for run, (keys, spare, *low) in ((ema_evict, own), (reference.ema_evict, expected)):
        run(keys[:, :, sink], spare[:, :, sink], *low, keys[:, :, leaving], spare[:, :, leaving], 0.99)
    assert_same_state(own, expected)


def test_split_sink_follows_the_true_average_where_the_published_form_stands_still() -> None:
    shape, alpha, dtype = (1, 1, 8, 2, 64), 0.999, torch.bfloat16
    plain, split = sink_state(shape, dtype, split=False), sink_state(shape, dtype, split=False)
    split[2:] = [torch.zeros_like(split[0]) for _ in range(2)]
    truth = split[0].double()
    for step in range(20):
        leaving = [values(*shape, seed=100 + step, dtype=dtype) for _ in range(2)]
        ema_evict(*plain, *leaving, alpha)
        ema_evict(*split, *leaving, alpha)
        truth = alpha * truth + (1 - alpha) * leaving[0].double()
    split_error = (split[0].double() + split[2].double() - truth).norm()
    assert split_error < 0.02 * (plain[0].double() - truth).norm()


def test_axes_may_lie_in_any_order_in_memory() -> None:
    state = [tensor.permute(1, 0, 3, 2, 4) for tensor in sink_state((3, 2, 5, 21, 64), torch.float16, True)]
    expected = clones(state)
    leaving = [values(2, 21, 3, 5, 64, seed=seed, dtype=torch.float16).transpose(1, 2) for seed in (5, 6)]
    ema_evict(*state, *leaving, 0.9)
    reference.ema_evict(*expected, *leaving, 0.9)
    assert_same_state(state, expected)


@pytest.mark.parametrize("split", [True, False])
def test_ema_evict_is_a_well_formed_op(split: bool) -> None:
    leaving = [values(2, 1, 5, 2, 64, seed=seed) for seed in (5, 6)]
    torch.library.opcheck(ema_evict, (*sink_state((2, 1, 5, 2, 64), torch.float32, split), *leaving, 0.99))


def test_keys_and_values_that_lie_differently_are_refused() -> None:
    keys, spare, *low = sink_state((1, 1, 4, 2, 64), torch.float32, split=True)
    other = values(1, 1, 2, 4, 64, seed=5).transpose(2, 3)
    with pytest.raises(ValueError, match="must be equal"):
        ema_evict(keys, spare, *low, keys, other, 0.99)


def test_half_a_split_state_is_refused() -> None:
    keys, spare, low, _ = sink_state((1, 1, 4, 2, 64), torch.float32, split=True)
    with pytest.raises(ValueError, match="both"):
        ema_evict(keys, spare, low, None, keys, spare, 0.99)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sink_of_the_engine_is_folded_bit_for_bit_on_the_gpu(split: bool, dtype: torch.dtype) -> None:
    shape = (4, 1, 4680, 12, 128)
    state = sink_state(shape, dtype, split)
    expected = clones(state)
    leaving = [values(*shape, seed=seed, dtype=dtype) for seed in (5, 6)]
    for _ in range(3):
        ema_evict(*state, *leaving, 0.999)
        reference.ema_evict(*expected, *leaving, 0.999)
    assert_same_state(state, expected)
