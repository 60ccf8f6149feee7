"""The e4m3 copies of a full window: what they hold, when they are made, and what a stream makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.cache import window_fp8 as window_fp8_file
from rfengine.cache.window_fp8 import WindowFP8
from rfengine.config import CacheConfig, RuntimeConfig, ScheduleConfig
from rfengine.models.dit import TextKeysValues
from rfengine.models.fp8_products import attention_units
from rfengine.ops import REFERENCE_OPS, Ops, reference_fp8_attention
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
    CacheConfig(chunk_frames=2, sink="frozen", sink_frames=1, window_frames=8, eviction="similarity"),
]
NAMES = ["reward", "absolute", "window", "memory", "similarity"]


def latents_of(
    runner: ChunkRunner, cache_config: CacheConfig, chunks: int = 7, on_step: Callable | None = None
) -> list[Tensor]:
    cache, model = small_cache(cache_config), runner.model
    text, found = model.text_keys_values(text_states()), []
    for chunk in range(chunks):
        plan = cache.plan_chunk()
        noise = noise_of(chunk, plan.frames, len(runner.steps_of(chunk)))
        found.append(runner.advance(cache, plan, noise, text, on_step))
    return found


def runner_with(fp8_passes: tuple[int, ...], schedule: ScheduleConfig = TWO_STEPS) -> ChunkRunner:
    return ChunkRunner(small_model().requires_grad_(False), FlowSchedule(schedule), False, fp8_passes)


@pytest.mark.parametrize("config", CACHES, ids=NAMES)
def test_chunks_are_as_before_until_the_window_is_full_and_near_afterwards(config: CacheConfig) -> None:
    exact, found = (latents_of(runner_with(passes), config) for passes in ((), (0, 1, 2)))
    steady = config.filling_chunks
    for chunk, (ours, true) in enumerate(zip(found, exact, strict=True)):
        if chunk < steady:
            assert torch.equal(ours, true)
    assert 1e-4 < relative_error(found[steady], exact[steady]) < 0.2
    assert all(each.isfinite().all() for each in found)


class Unrounded(Ops):
    """FP8 attention on copies in float64, which rounds nothing."""

    def window_fp8(self, *arguments: object) -> None:
        reference_fp8_attention.window_fp8(*arguments)

    def qk_norm_rope_write_fp8(self, *arguments: object) -> Tensor:
        return reference_fp8_attention.qk_norm_rope_write_fp8(*arguments).double()

    def sink_window_attention_fp8(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: Tensor, unit: Tensor, *rest: object
    ) -> Tensor:
        run = reference_fp8_attention.sink_window_attention_fp8
        return run(q, keys, values, scale.double(), unit.double(), *rest).float()


def eventful_latents(runner: ChunkRunner, config: CacheConfig) -> list[Tensor]:
    """Chunks of two streams of a runner in turn: one is seen, the other under another prompt; with a chunk of
    another length, frames that are given, a window written once more, and a new start."""
    caches, kept, found = [small_cache(config) for _ in range(2)], {}, []
    texts = [runner.model.text_keys_values(text_states(seed)) for seed in range(2)]

    def advance(number: int, text: TextKeysValues, frames: int | None = None, given: int = 0) -> None:
        for cache, own in ((caches[0], text), (caches[1], texts[1])):
            plan = cache.plan_chunk(frames)
            noise = noise_of(number, plan.frames)
            clean = noise_of(50, plan.frames)[0][:, :, :given] if given else None
            x0 = runner.advance(cache, plan, noise, own, None, clean)
            if cache is caches[0]:
                kept.update(enumerate(x0.split(1, dim=2), plan.first_frame))
                found.append(x0)

    steady = config.filling_chunks + 1
    for number in range(steady + 2):
        advance(number, texts[0])
    advance(steady + 2, texts[0], frames=1)
    advance(steady + 3, texts[0], given=1)
    if config.eviction == "oldest":
        runner.recache(caches[0], kept, texts[1])
    for number in range(steady + 4, steady + 6):
        advance(number, texts[1])
    caches[0].reset()
    for number in range(steady + 6, 2 * steady + 8):
        advance(number, texts[0])
    return found


@pytest.mark.parametrize("passes", [(0, 1, 2), (0,), (1,), (2,)], ids=str)
@pytest.mark.parametrize("config", CACHES, ids=NAMES)
def test_only_rounding_parts_a_stream_in_fp8_from_one_without(
    config: CacheConfig, passes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read is what is in the window, in every pass: no copy is old and no slot another's."""
    exact = eventful_latents(runner_with(()), config)
    monkeypatch.setattr(window_fp8_file, "E4M3", torch.float64)
    runner = runner_with(passes)
    for module in runner.model.modules():
        if hasattr(module, "ops"):
            module.ops = Unrounded(REFERENCE_OPS.choice)
    found = eventful_latents(runner, config)
    assert max(relative_error(*pair) for pair in zip(found, exact, strict=True)) < 1e-5


@pytest.mark.parametrize("passes", [(0,), (1,), (2,)])
def test_each_pass_can_be_in_fp8_alone(passes: tuple[int, ...]) -> None:
    """The context pass changes nothing of its own chunk: the next one sees what it left."""
    exact, found = (latents_of(runner_with(each), CacheConfig()) for each in ((), passes))
    assert torch.equal(found[STEADY], exact[STEADY]) == (passes == (2,))
    assert not torch.equal(found[STEADY + 1], exact[STEADY + 1])


def test_chunks_with_steps_of_their_own_have_no_pass_in_fp8() -> None:
    """Pass 1 is the last step of the later chunks, and would be the context pass of those with one step."""
    first = STEADY + 2
    schedule = dataclasses.replace(TWO_STEPS, first_steps=(1000,), first_chunks=first)
    exact, found = (latents_of(runner_with(passes, schedule), CacheConfig()) for passes in ((), (1,)))
    assert [torch.equal(*pair) for pair in zip(found, exact, strict=True)] == [True] * first + [False] * 2


def test_a_chunk_of_another_length_has_no_pass_in_fp8() -> None:
    found = []
    for passes in ((), (0, 1, 2)):
        runner, cache = runner_with(passes), small_cache(CacheConfig())
        text = runner.model.text_keys_values(text_states())
        for chunk, frames in enumerate([3] * STEADY + [1]):
            plan = cache.plan_chunk(frames)
            x0 = runner.advance(cache, plan, noise_of(chunk, frames), text)
        assert plan.evicts
        found.append(x0)
    assert torch.equal(*found)


def test_a_step_in_fp8_leaves_the_arena_as_it_is_and_the_context_pass_writes_it() -> None:
    runner, cache, seen = runner_with((0, 1, 2)), small_cache(CacheConfig()), []
    text = runner.model.text_keys_values(text_states())

    def on_step(*_: object) -> None:
        seen.append({name: tensor.clone() for name, tensor in cache.tensors().items()})

    for chunk in range(STEADY + 1):
        runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), text, on_step)
    first, last = seen[-2:]
    for name, tensor in cache.tensors().items():
        assert torch.equal(first[name], last[name])
        if name in ("keys", "values", "raw_keys"):
            changed = (tensor != last[name]).unflatten(2, (9, -1)).any(3).any((0, 1, 3, 4))
            assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_units_follow_the_weights() -> None:
    runner = runner_with((0,))
    before = [unit.clone() for unit in runner._units]
    for block in runner.model.blocks:
        block.self_attn.norm_k.weight.mul_(5.0)
    kept = list(runner._units)
    runner.refresh()
    for own, fresh in zip(kept, attention_units(runner.model), strict=True):
        assert torch.equal(own, fresh)
    assert (kept[1] >= 4 * before[1]).all() and torch.equal(kept[0], before[0])


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


def test_a_chunk_whose_copies_failed_is_repeated_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_with((0, 1, 2))
    exact, begin, failures = latents_of(runner, CacheConfig()), WindowFP8.begin, iter([True, False, True])

    def begin_or_fail(self: WindowFP8, *arguments: object) -> None:
        if next(failures, False):
            raise MemoryError
        begin(self, *arguments)

    monkeypatch.setattr(WindowFP8, "begin", begin_or_fail)
    cache, text = small_cache(CacheConfig()), runner.model.text_keys_values(text_states())
    for chunk, latents in enumerate(exact):
        plan, noise = cache.plan_chunk(), noise_of(chunk, 3)
        if chunk in (STEADY, STEADY + 1):
            with pytest.raises(MemoryError):
                runner.advance(cache, plan, noise, text)
        assert torch.equal(runner.advance(cache, plan, noise, text), latents)


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
