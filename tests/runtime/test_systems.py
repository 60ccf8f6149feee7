"""Every cache policy and schedule on the engine against a stream that keeps its frames in lists."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.cache import sink_policy
from rfengine.cache.eviction import Evictor
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig, ScheduleConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.runtime.rolling_runner import runner_of
from support.models import SMALL, TWO_STEPS, small_cache, small_model, text_states
from support.plain_stream import PlainStream, noise
from support.systems import MEMORY, SYSTEMS
from support.work import Work, live_tensor_bytes


class EngineStream:
    def __init__(self, model, cache: CacheConfig, schedule: ScheduleConfig) -> None:
        self.cache, self.runner = small_cache(cache), runner_of(model, schedule, graphs=False)

    def advance(self, text, clean: torch.Tensor | None = None) -> torch.Tensor:
        plan = self.cache.plan_chunk()
        draws = [noise(*draw, plan.frames) for draw in self.runner.draws(self.cache, plan.chunk)]
        return self.runner.advance(self.cache, plan, torch.stack(draws), text, clean=clean)

    def given(self, x0: torch.Tensor, text) -> None:
        self.runner.prefill(self.cache, self.cache.plan_chunk(x0.shape[2]), x0, text)


@pytest.fixture(scope="module")
def model():
    return small_model()


@torch.no_grad()
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_streams_as_its_description_says(model, name: str) -> None:
    cache, schedule = SYSTEMS[name]
    texts = [model.text_keys_values(text_states(seed)) for seed in (0, 1)]
    plain, engine = PlainStream(model, cache, schedule, noise), EngineStream(model, cache, schedule)
    for chunk in range(3 * cache.filling_chunks + 3):
        text = texts[chunk > cache.filling_chunks + 1]
        error = relative_error(engine.advance(text), plain.advance(text))
        assert error <= 5e-6, (chunk, error)


@torch.no_grad()
@pytest.mark.parametrize("name", ["none", "ema", "memory", "first chunk of one frame", "four steps first"])
def test_a_stream_begins_with_given_latents_one_by_one(model, name: str) -> None:
    cache, schedule = SYSTEMS[name]
    text = model.text_keys_values(text_states())
    plain, engine = PlainStream(model, cache, schedule, noise), EngineStream(model, cache, schedule)
    for latent in noise(99, 0, 7).split(1, dim=2):
        plain.given(latent, text)
        engine.given(latent, text)
    for _ in range(2 * cache.filling_chunks):
        assert relative_error(engine.advance(text), plain.advance(text)) <= 5e-6


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["none", "ema", "window 18, sink 6, chunk 4"])
def test_given_frames_stay_as_they_are_inside_the_first_chunk(model, name: str, count: int) -> None:
    cache, schedule = SYSTEMS[name]
    text, clean = model.text_keys_values(text_states()), noise(99, 0, count)
    plain, engine = PlainStream(model, cache, schedule, noise), EngineStream(model, cache, schedule)
    found = engine.advance(text, clean)
    assert torch.equal(found[:, :, :count], clean)
    assert relative_error(found, plain.advance(text, clean)) <= 5e-6
    free = EngineStream(model, cache, schedule).advance(text)
    assert relative_error(found[:, :, count:], free[:, :, count:]) > 1e-3
    assert relative_error(engine.advance(text), plain.advance(text)) <= 5e-6


def disagreement(model, cache: CacheConfig, other: CacheConfig) -> float:
    """The largest error of an engine with `cache` against the description with `other`."""
    text = model.text_keys_values(text_states())
    plain, engine = PlainStream(model, other, TWO_STEPS, noise), EngineStream(model, cache, TWO_STEPS)
    chunks = range(2 * cache.filling_chunks)
    return max(relative_error(engine.advance(text), plain.advance(text)) for _ in chunks)


@torch.no_grad()
def test_a_wrong_rate_of_the_second_average_is_seen(model) -> None:
    other = dataclasses.replace(MEMORY, memory_rates=(0.01, 0.12))
    assert disagreement(model, MEMORY, MEMORY) <= 5e-6
    assert disagreement(model, other, MEMORY) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cache", [MEMORY, CacheConfig(alpha=0.8)])
def test_a_wrong_time_index_is_seen(model, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(config: CacheConfig, held) -> tuple[int, tuple[int, ...]]:
        start, times = right(config, held)
        return start, (times[1], times[0], *times[2:])

    right = sink_policy.time_indices
    monkeypatch.setattr(sink_policy, "time_indices", late)
    assert disagreement(model, cache, cache) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cache", [MEMORY, CacheConfig(3, 10, "ema", 3, alpha=0.8)])
def test_a_fold_that_comes_a_chunk_late_is_seen(
    model, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(self: Evictor, raw, rotated, values, rotation, folds) -> None:
        right(self, raw, rotated, values, rotation, held.pop() if held else ())
        held.append(folds)

    held, right = [], Evictor.evict
    monkeypatch.setattr(Evictor, "evict", late)
    assert disagreement(model, cache, cache) > 1e-4


@torch.no_grad()
def test_eviction_by_similarity_does_not_drop_the_oldest(model) -> None:
    cache = SYSTEMS["similarity"][0]
    assert disagreement(model, cache, dataclasses.replace(cache, eviction="oldest")) > 1e-3


@torch.no_grad()
def test_a_pass_with_one_level_for_all_frames_runs_the_ops_of_one_with_a_level_for_each(model) -> None:
    ran = []
    for timesteps in ([[500.0]], [[500.0, 500.0, 500.0]]):
        cache = small_cache(CacheConfig())
        plan, text = cache.plan_chunk(), model.text_keys_values(text_states())
        cache.begin_chunk(plan)
        modulation = model.modulation(torch.tensor(timesteps))
        with CountedOps(model) as counted:
            tokens = model.forward_chunk(noise(0, 0, 3), modulation, text, cache, plan)
        ran.append((counted.names, tokens))
    assert ran[0][0] == ran[1][0] and relative_error(ran[0][1], ran[1][1]) <= 1e-6
    assert ran[0][0].count("sink_window_attention") == SMALL.num_layers


class CountedOps:
    """The names of the ops that a model calls, in order."""

    def __init__(self, model) -> None:
        self.ops, self.names = model.ops, []

    def __enter__(self) -> CountedOps:
        self.before = dict(self.ops._run)
        for name, run in self.before.items():
            self.ops._run[name] = lambda *given, name=name, run=run: self.names.append(name) or run(*given)
        return self

    def __exit__(self, *_: object) -> None:
        self.ops._run.update(self.before)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["none", "frozen absolute", "ema", "ema over a wrap", "memory", "deep sink", "similarity", "one step",
     "first chunk of one frame", "rolling", "wave"],
)  # fmt: skip
def test_2000_chunks_cost_the_same_each_and_keep_no_memory(name: str) -> None:
    """The ops and what they write, of which time follows, at one place of the ring's period."""
    cache_config, schedule = SYSTEMS[name]
    tiny = WanConfig(12, 12, 1, 1, text_dim=16, text_len=8, freq_dim=16, in_dim=4, out_dim=4)
    model, grid = small_model(tiny), LatentGrid(16, 16)
    cache, runner = StreamingKVCache(tiny, cache_config, grid), runner_of(model, schedule, graphs=False)
    text = model.text_keys_values(text_states())
    period = math.lcm(cache_config.past_frames, cache_config.chunk_frames) // cache_config.chunk_frames
    early = cache_config.filling_chunks + 2 * period
    late = early + (1990 - early) // period * period
    work, sizes = {}, []
    for chunk in range(2000):
        plan = cache.plan_chunk()
        drawn = torch.randn(len(runner.draws(cache, chunk)), 1, 4, plan.frames, 2, 2)
        with Work() if chunk in (early, late) else nullcontext() as counted:
            latents = runner.advance(cache, plan, drawn, text)
        if counted:
            work[chunk] = counted.done
            sizes.append(live_tensor_bytes())
    assert latents.isfinite().all()
    assert sizes[1] == sizes[0]
    assert len(work[early]) > 50 and work[late] == work[early]
