"""The baseline computes what the engine computes, in the way it is meant to be slow."""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.benchmark import attention_libraries
from rfengine.benchmark.attention_libraries import fastest_attention, libraries, sdpa
from rfengine.benchmark.eager_baseline import EagerStream, EagerTransformer, LayerBuffer, device_noise
from rfengine.checkpoint.checkpoint import GivenTextStates
from rfengine.config import CacheConfig, EngineConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.ops import reference
from rfengine.pipeline import Pipeline
from rfengine.schedule import chunk_noise

SEED = 7
SIDE = 32  # pixels
CHUNKS = 7  # of which the last four evict
CLOSE = 1e-5  # of the engine from the baseline in float64; 6.7e-6 with the shipped weights


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    pipeline = Pipeline.from_pretrained("tiny", "cpu")
    config = pipeline.config.model
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, config.text_len // 2, config.text_dim, generator=generator)
    pipeline.text_encoder = GivenTextStates(states)
    return pipeline


def baseline_of(
    pipeline: Pipeline, cache: CacheConfig | None = None, dtype: torch.dtype = torch.float32
) -> EagerStream:
    """The baseline with the engine's noise; its transformer, cache and latents in `dtype`."""
    config: EngineConfig = replace(pipeline.config, cache=cache or pipeline.config.cache)
    grid = LatentGrid.of(config, SIDE, SIDE)
    shape = (1, config.model.in_dim, config.cache.chunk_frames, grid.latent_height, grid.latent_width)
    weights = {name: value.to(dtype) for name, value in pipeline.model.state_dict().items()}
    transformer = EagerTransformer(config.model, config.cache, weights)
    states = pipeline.text_encoder.states.to(dtype)
    return EagerStream(
        config,
        transformer,
        pipeline.vae,
        grid,
        states,
        lambda chunk, step: chunk_noise(SEED, chunk, step, shape).to(dtype),
    )


def test_gives_the_latents_and_frames_of_the_engine_past_four_evictions(pipeline: Pipeline) -> None:
    stream = pipeline.stream("any text", seed=SEED, height=SIDE, width=SIDE)
    baseline, exact = baseline_of(pipeline), baseline_of(pipeline, dtype=torch.float64)
    for _ in range(CHUNKS):
        frames = stream.advance().frames
        own = baseline.advance()
        assert own.shape == frames.shape and own.dtype == frames.dtype
        assert abs(own.astype(int) - frames.astype(int)).max() <= 1
        assert relative_error(exact.advance_latents(), stream.latents) < CLOSE


def test_a_sink_that_stands_still_gives_other_latents(pipeline: Pipeline) -> None:
    """What the comparison above would see: one of the habits left out."""
    frozen = baseline_of(pipeline, CacheConfig(sink="frozen"))
    averaged = baseline_of(pipeline)
    errors = [relative_error(frozen.advance_latents(), averaged.advance_latents()) for _ in range(CHUNKS)]
    assert max(errors[:3]) == 0.0
    assert errors[-1] > 10 * CLOSE


def frame_buffer(dtype: torch.dtype, frames: int) -> tuple[EagerTransformer, LayerBuffer]:
    """One token in a frame, one head: entries of the buffer are numbers of frames."""
    config = WanConfig(dim=6, ffn_dim=6, num_heads=1, num_layers=1)
    weights = {"patch_embedding.weight": torch.zeros(1, dtype=dtype)}
    transformer = EagerTransformer(config, CacheConfig(window_frames=frames), weights)
    zeros = torch.zeros(1, frames, 1, 1, dtype=dtype)
    index = torch.zeros(1, dtype=torch.long)
    return transformer, LayerBuffer(zeros, zeros.clone(), index, index.clone())


def chunk_of(first: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(first, first + 3, dtype=dtype).view(1, 3, 1, 1)


def test_buffer_follows_the_trace_of_the_specification() -> None:
    """Spec 2.3: the sink after each eviction, and the frames behind it, with five passes a chunk."""
    transformer, buffer = frame_buffer(torch.float64, 9)
    expected = [None, None, None, 0.003, 0.009, 0.018, 0.030]
    for chunk, first_sink in enumerate(expected):
        ids = chunk_of(3 * chunk, torch.float64)
        for _ in range(5):
            transformer.write(buffer, ids, 10 * ids, start=3 * chunk, sink=3)
        if first_sink is not None:
            behind = [3 * chunk - 3, 3 * chunk - 2, 3 * chunk - 1, *ids.flatten().tolist()]
            assert buffer.keys.flatten()[3:].tolist() == behind
            assert round(buffer.keys.flatten()[0].item(), 3) == first_sink
            assert round(buffer.values.flatten()[0].item(), 2) == round(10 * first_sink, 2)
    assert buffer.filled.item() == 9 and buffer.seen.item() == 3 * len(expected)


def test_a_bf16_sink_stands_still_as_in_the_published_code() -> None:
    """Spec 2.4: 0.999 times a bf16 number is that number again."""
    transformer, buffer = frame_buffer(torch.bfloat16, 9)
    for chunk in range(5):
        transformer.write(
            buffer,
            chunk_of(100, torch.bfloat16),
            chunk_of(100, torch.bfloat16),
            start=3 * chunk,
            sink=3,
        )
    assert buffer.keys[:, :3].flatten().tolist() == [100, 101, 102]


def test_absolute_positions_are_refused() -> None:
    cache = CacheConfig(sink="frozen", positions="absolute")
    with pytest.raises(ValueError, match="'absolute'; the baseline knows 'relative' alone"):
        EagerTransformer(WanConfig(6, 6, 1, 1), cache, {})


def test_its_own_noise_is_seeded_and_never_the_same_twice(pipeline: Pipeline) -> None:
    grid = LatentGrid.of(pipeline.config, SIDE, SIDE)
    like = pipeline.model.patch_embedding.weight
    first, second = (device_noise(pipeline.config, grid, like, seed=3) for _ in range(2))
    draws = [first(0, 0), first(0, 1)]
    assert torch.equal(draws[0], second(0, 0)) and not torch.equal(*draws)


def random_heads(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_cpu_has_torchs_own_attention() -> None:
    q, k = random_heads(1, 5, 2, 8), random_heads(1, 9, 2, 8)
    name, attend = fastest_attention(q, k, k)
    assert name == "SDPA" and attend is sdpa
    assert torch.equal(attend(q, k, k), reference.clip_attention(q, k, k, None))


def test_flash_attention_is_found_and_its_statistics_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn_interface", None)
    module.flash_attn_func = lambda q, k, v: (sdpa(q, k, v), torch.zeros(1))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    q = random_heads(1, 5, 2, 8)
    assert torch.equal(libraries()["FlashAttention-3"](q, q, q), sdpa(q, q, q))


@pytest.mark.gpu
def test_the_fastest_library_is_timed_on_a_gpu() -> None:
    q, k = (random_heads(1, tokens, 2, 128).to("cuda", torch.bfloat16) for tokens in (64, 192))
    name, attend = fastest_attention(q, k, k)
    assert name in libraries()
    expected = reference.clip_attention(q.double(), k.double(), k.double(), None)
    assert relative_error(attend(q, k, k), expected) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_a_library_that_does_not_serve_the_shape_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("head dim 7 is not served")

    monkeypatch.setattr(attention_libraries, "libraries", lambda: {"broken": refuse, "SDPA": sdpa})
    q = random_heads(1, 8, 2, 16).cuda()
    assert fastest_attention(q, q, q)[0] == "SDPA"
