"""The e4m3 copies of a full window: what they hold, when they are made, and what a stream makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.cache.window_fp8 import WindowFP8
from rfengine.config import CacheConfig, RuntimeConfig
from rfengine.models.fp8_products import attention_units
from rfengine.ops import REFERENCE_OPS
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule
from support.models import (
    TWO_STEPS,
    frames_of,
    noise_of,
    small_cache,
    small_model,
    small_pipeline,
    text_states,
    with_runtime,
)

STEADY = 3  # the first chunk that evicts, of the default cache
EVERY_PASS = RuntimeConfig(precision="fp8-attention", sixteen_bit_passes=())
CACHES = [
    CacheConfig(),
    CacheConfig(sink="frozen", sink_frames=3, window_frames=12, positions="absolute"),
    CacheConfig(sink="none", sink_frames=0, window_frames=9),
    CacheConfig(chunk_frames=2, sink="frozen", sink_frames=1, window_frames=7, memory_rates=(0.1,)),
]


def latents_of(
    runner: ChunkRunner, cache_config: CacheConfig, chunks: int = 7, on_step: Callable | None = None
) -> list[Tensor]:
    cache, model = small_cache(cache_config), runner.model
    text, found = model.text_keys_values(text_states()), []
    for chunk in range(chunks):
        plan = cache.plan_chunk()
        found.append(runner.advance(cache, plan, noise_of(chunk, plan.frames), text, on_step))
    return found


def runner_with(fp8_passes: tuple[int, ...]) -> ChunkRunner:
    return ChunkRunner(small_model().requires_grad_(False), FlowSchedule(TWO_STEPS), False, fp8_passes)


@pytest.mark.parametrize("config", CACHES, ids=["reward", "absolute", "window", "memory"])
def test_chunks_are_as_before_until_the_window_is_full_and_near_afterwards(config: CacheConfig) -> None:
    exact, found = (latents_of(runner_with(passes), config) for passes in ((), (0, 1, 2)))
    steady = config.filling_chunks
    for chunk, (ours, true) in enumerate(zip(found, exact, strict=True)):
        if chunk < steady:
            assert torch.equal(ours, true)
    assert 1e-4 < relative_error(found[steady], exact[steady]) < 0.2
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("passes", [(0,), (1,), (2,)])
def test_each_pass_can_be_in_fp8_alone(passes: tuple[int, ...]) -> None:
    """The context pass changes nothing of its own chunk: the next one sees what it left."""
    exact, found = (latents_of(runner_with(each), CacheConfig()) for each in ((), passes))
    assert torch.equal(found[STEADY], exact[STEADY]) == (passes == (2,))
    assert not torch.equal(found[STEADY + 1], exact[STEADY + 1])


def test_the_copies_are_those_of_the_arena() -> None:
    model, cache = small_model(), small_cache(CacheConfig())
    for arena in (cache.keys, cache.values):
        arena.copy_(torch.randn(arena.shape, generator=torch.Generator().manual_seed(1)))
    window = WindowFP8.of(cache.keys, attention_units(model))
    window.begin(cache, REFERENCE_OPS)
    unit = window.units.key[:, None, None, None, None]
    keys = window.keys.float() * unit + window.key_mean[:, :, None]
    assert relative_error(keys, cache.keys.double()) < 0.04
    tokens = cache.keys.shape[2]
    values = window.values[..., :tokens].float() * window.value_unit[..., None, None]
    assert relative_error(values.permute(0, 1, 4, 2, 3), cache.values.double()) < 0.04


def test_no_query_and_no_key_can_saturate() -> None:
    """A row with everything in the two values that turn into one, where the norm's weight is largest."""
    model = small_model()
    units, dim = attention_units(model), model.config.dim
    assert torch.equal(torch.log2(units.key), torch.log2(units.key).round())
    for layer, block in enumerate(model.blocks):
        for weight, unit, means in (
            (block.self_attn.norm_q.weight, units.query[layer], 0),
            (block.self_attn.norm_k.weight, units.key[layer], 1),
        ):
            longest = dim**0.5 * weight.abs().max() * (1 + means)
            assert longest <= 448 * unit < 4.2 * longest
    assert torch.allclose(units.logit, units.query * units.key / model.config.head_dim**0.5)


def test_a_chunk_that_failed_in_a_step_is_repeated_to_the_bit() -> None:
    """What the failed passes have written to the chunk's slots is in no mean and no unit."""
    runner = runner_with((0, 2))  # the second step writes to the arena itself
    exact = latents_of(runner, CacheConfig())
    failures = iter([False] * 2 * STEADY + [False, True])

    class Stopped(Exception):
        pass

    def on_step(step: int, timestep: float, latents: Tensor) -> None:
        if next(failures, False):
            raise Stopped

    cache, text = small_cache(CacheConfig()), runner.model.text_keys_values(text_states())
    for chunk in range(len(exact)):
        plan, noise = cache.plan_chunk(), noise_of(chunk, 3)
        try:
            found = runner.advance(cache, plan, noise, text, on_step)
        except Stopped:
            assert chunk == STEADY
            found = runner.advance(cache, plan, noise, text, on_step)
        assert torch.equal(found, exact[chunk])


@pytest.mark.parametrize("runtime", [RuntimeConfig(precision="fp8"), EVERY_PASS], ids=["fp8", "attention"])
def test_a_stream_in_fp8_repeats_and_continues_from_a_snapshot_to_the_bit(runtime: RuntimeConfig) -> None:
    exact = frames_of(small_pipeline().stream("a cat", seed=4), 9)
    pipeline = with_runtime(small_pipeline(), runtime)
    stream = pipeline.stream("a cat", seed=4)
    first = frames_of(stream, 5)
    snapshot = stream.snapshot()
    rest = frames_of(stream, 4)
    whole = numpy.concatenate([first, rest])
    assert numpy.array_equal(whole, frames_of(pipeline.stream("a cat", seed=4), 9))
    assert numpy.array_equal(rest, frames_of(pipeline.restore(snapshot), 4))
    stream.rewind(snapshot)
    assert numpy.array_equal(rest, frames_of(stream, 4))
    assert not numpy.array_equal(whole, exact)
    message = (
        "the snapshot's precision is 'fp8.*', this pipeline's is 'without FP8'; restore it with the model"
    )
    with pytest.raises(ValueError, match=message):
        small_pipeline().restore(snapshot)
    other = with_runtime(small_pipeline(), dataclasses.replace(EVERY_PASS, sixteen_bit_passes=(0,)))
    with pytest.raises(
        ValueError, match="the snapshot's precision is 'fp8.*', this pipeline's is 'fp8-attention"
    ):
        other.restore(snapshot)


def test_a_snapshot_names_the_passes_however_they_were_given() -> None:
    given = [(0, -1), (2, 0), (-3, 2, 0)]  # of two steps and the context pass
    pipelines = [
        with_runtime(small_pipeline(), dataclasses.replace(EVERY_PASS, sixteen_bit_passes=passes))
        for passes in given
    ]
    stream = pipelines[0].stream("a cat", seed=4)
    frames_of(stream, 5)
    snapshot = stream.snapshot()
    assert snapshot.info["precision"] == "fp8-attention, attention in FP8 in passes 1"
    expected = frames_of(stream, 2)
    for pipeline in pipelines[1:]:
        assert numpy.array_equal(frames_of(pipeline.restore(snapshot), 2), expected)


def test_a_prompt_can_change_and_the_window_be_recomputed_in_fp8() -> None:
    pipeline = with_runtime(small_pipeline(), EVERY_PASS)
    streams = [pipeline.stream("a cat", seed=4) for _ in range(2)]
    for stream in streams:
        frames_of(stream, 5)
        stream.set_prompt("a dog", mode="recache")
    found, again = (frames_of(stream, 3) for stream in streams)
    assert numpy.array_equal(found, again)
