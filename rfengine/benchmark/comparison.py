"""The engine and what it is compared with alternating, in one process; the ratio of their chunk times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rfengine.benchmark.attention_libraries import fastest_attention
from rfengine.benchmark.eager_baseline import EagerStream, EagerTransformer, device_noise
from rfengine.benchmark.measured_engine import MeasuredEngine
from rfengine.benchmark.timing import Advance, frames_of, latents_of, recorded_chunks, spread, time_chunks
from rfengine.config import CacheConfig
from rfengine.grid import LatentGrid
from rfengine.pipeline import Pipeline
from rfengine.stream import VideoStream

PROMPT, SEED = "comparison", 5
ROUNDS = 3


def compare(pipeline: Pipeline, grid: LatentGrid, chunks: int, decodes: bool) -> dict[str, Any]:
    """Ratio of chunk times, baseline over engine, without the VAE and, where it decodes, end to end.

    ROUNDS rounds of `chunks` chunks of each, alternating, once the window is full and graphs are recorded.
    """
    model, config = pipeline.model, pipeline.config
    cache, idle = config.cache, pipeline.synchronize
    name, attend = fastest_attention(*_attention_inputs(pipeline, grid))
    weights = model.state_dict()
    transformer = EagerTransformer(config.model, cache, weights, attend)
    states = pipeline.text_encoder.encode([PROMPT], model.device, model.dtype)

    def baseline() -> EagerStream:
        noise = device_noise(config, grid, weights["patch_embedding.weight"], SEED)
        return EagerStream(config, transformer, pipeline.vae, grid, states, noise)

    def engine() -> VideoStream:
        return pipeline.stream(PROMPT, seed=SEED, height=grid.height, width=grid.width)

    results: dict[str, Any] = {
        "attention": name, "vae": "full", "rounds": ROUNDS, "chunks_a_round": chunks
    }  # fmt: skip
    if decodes:
        whole = baseline()
        ours = frames_of(engine())
        results["end_to_end"] = _alternate(cache, chunks, idle, ours, lambda: len(whole.advance()))
    stream = baseline()
    ours = latents_of(engine(), cache.chunk_frames)
    results["without_vae"] = _alternate(
        cache, chunks, idle, ours, lambda: stream.advance_latents().shape[2], waits=True
    )
    return results


def compare_with_default(engine: MeasuredEngine, plain: MeasuredEngine, chunks: int) -> dict[str, Any]:
    """The same ratios of `engine` over `plain`, the same engine with precisions as they are by default."""
    config = engine.pipeline.config

    def idle() -> None:
        engine.pipeline.synchronize()
        plain.pipeline.synchronize()

    results: dict[str, Any] = {
        "default": {"precision": config.runtime.precision, "vae_precision": config.runtime.vae_precision},
        "rounds": ROUNDS, "chunks_a_round": chunks,
    }  # fmt: skip
    if engine.decodes:
        ours, theirs = (frames_of(each.stream()) for each in (engine, plain))
        results["end_to_end"] = _alternate(config.cache, chunks, idle, ours, theirs)
    ours, theirs = (latents_of(each.stream(), config.cache.chunk_frames) for each in (engine, plain))
    results["without_vae"] = _alternate(config.cache, chunks, idle, ours, theirs, waits=True)
    return results


def _alternate(
    cache: CacheConfig,
    chunks: int,
    idle: Callable[[], None],
    engine: Advance,
    baseline: Advance,
    waits: bool = False,
) -> dict[str, Any]:
    """Chunk times of both and their ratio. idle, waits: time_chunks."""
    times = {"engine": [], "baseline": []}
    advances = {"engine": engine, "baseline": baseline}
    for advance in advances.values():
        time_chunks(advance, recorded_chunks(cache), idle, waits)
    for _ in range(ROUNDS):
        for name, advance in advances.items():
            times[name].append(sum(time_chunks(advance, chunks, idle, waits).seconds) / chunks * 1e3)
    return {
        "ratio": spread([slow / fast for fast, slow in zip(*times.values(), strict=True)]),
        **{f"{name}_chunk_ms": spread(found) for name, found in times.items()},
    }


def _attention_inputs(pipeline: Pipeline, grid: LatentGrid) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the steady window, random."""
    model, cache = pipeline.model, pipeline.config.cache
    heads = (model.config.num_heads, model.config.head_dim)
    generator = torch.Generator(model.device).manual_seed(SEED)
    lengths = (cache.chunk_frames, cache.window_frames, cache.window_frames)
    like = {"generator": generator, "dtype": model.dtype, "device": model.device}
    q, k, v = (torch.randn(1, frames * grid.frame_tokens, *heads, **like) for frames in lengths)
    return q, k, v
