"""A stream whose products and attention are in FP8, on the Triton kernels and on the reference."""

from __future__ import annotations

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig
from rfengine.models.dit import WanDiT
from rfengine.models.fp8_products import quantise
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule
from support.bits import DEVICE
from support.interpreter_rounding import round_to_nearest_even
from support.models import GRID, TWO_STEPS, noise_of, small_model, text_states
from support.on_triton import ONE_HEAD, on_triton

CACHE = CacheConfig(1, 3, "ema", 1, alpha=0.8)


def latents_of(model: WanDiT, passes: tuple[int, ...], graphs: bool = False) -> torch.Tensor:
    """The chunks that fill the window, and two of the steady state."""
    runner = ChunkRunner(model, FlowSchedule(TWO_STEPS), graphs, passes)
    cache = StreamingKVCache(ONE_HEAD, CACHE, GRID, dtype=model.dtype, device=DEVICE, ops=model.ops)
    text = model.text_keys_values(text_states().to(DEVICE))
    chunks = [noise_of(chunk, 1).to(DEVICE, model.dtype) for chunk in range(CACHE.filling_chunks + 2)]
    return torch.cat([runner.advance(cache, cache.plan_chunk(), each, text) for each in chunks], dim=2).cpu()


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("passes", [(), (0, 1, 2)], ids=["linears", "attention too"])
def test_a_stream_in_fp8_on_triton_is_that_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, passes: tuple[int, ...]
) -> None:
    round_to_nearest_even(monkeypatch)
    exact, plain = small_model(ONE_HEAD), small_model(ONE_HEAD).to(DEVICE)
    model = on_triton(exact)
    for each in (plain, model):
        quantise(each)
    found, expected = latents_of(model, passes), latents_of(plain, passes)
    without = latents_of(exact.to(DEVICE), ())
    # sums in another order round a few values to the other neighbour; FP8 itself is ten times as far off
    assert relative_error(found, expected) < 0.1 * relative_error(expected, without)
    assert relative_error(expected, without) > 0.01


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_in_fp8_is_replayed_to_the_bit(dtype: torch.dtype) -> None:
    model = on_triton(small_model(ONE_HEAD)).to(dtype)
    quantise(model)
    plain, replayed = (latents_of(model, (0, 1, 2), graphs) for graphs in (False, True))
    assert torch.equal(plain, replayed)
