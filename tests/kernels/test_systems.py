"""Cache policies and schedules on the Triton kernels, against a stream that keeps its frames in lists."""

from __future__ import annotations

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig, ScheduleConfig
from rfengine.runtime.rolling_runner import runner_of
from support.bits import DEVICE
from support.models import GRID, small_model, text_states
from support.on_triton import ONE_HEAD, on_triton
from support.plain_stream import PlainStream, noise
from support.systems import ONE, SYSTEMS

SHORT = {
    "ema over a wrap": (CacheConfig(2, 7, "ema", 2, alpha=0.8), ONE),
    "memory": (CacheConfig(1, 4, "none", 0, memory_rates=(0.2,)), ONE),
    "similarity": (CacheConfig(1, 4, "frozen", 1, eviction="similarity"), ONE),
    "wave": (
        CacheConfig(1, 4, "frozen", 1, joint_frames=2),
        ScheduleConfig(denoising_steps=(1000, 500), rolling="causal"),
    ),
}


@torch.no_grad()
def compare(cache_config: CacheConfig, schedule: ScheduleConfig, chunks: int, graphs: bool) -> None:
    plain_model = small_model(ONE_HEAD)
    model = on_triton(plain_model)
    plain = PlainStream(plain_model, cache_config, schedule, noise)
    text, plain_text = (each.text_keys_values(text_states().to(each.device)) for each in (model, plain_model))
    cache = StreamingKVCache(ONE_HEAD, cache_config, GRID, device=DEVICE, ops=model.ops)
    runner = runner_of(model, schedule, graphs)
    for chunk in range(chunks):
        plan = cache.plan_chunk()
        draws = [noise(*draw, plan.frames) for draw in runner.draws(cache, chunk)]
        found = runner.advance(cache, plan, torch.stack(draws).to(DEVICE), text)
        error = relative_error(found.cpu(), plain.advance(plain_text))
        assert error <= 1e-5, (chunk, error)  # twice that of the reference: kernels add in another order


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_system_on_triton_is_what_its_description_says(name: str) -> None:
    cache_config, schedule = SHORT[name]
    compare(cache_config, schedule, cache_config.filling_chunks + 2, graphs=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_on_the_gpu_is_what_its_description_says(name: str) -> None:
    cache_config, schedule = SYSTEMS[name]
    compare(cache_config, schedule, 2 * cache_config.filling_chunks + 4, graphs=schedule.rolling == "none")
