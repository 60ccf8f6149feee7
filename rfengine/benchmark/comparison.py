"""The engine and the baseline alternating, in one process; the ratio of their chunk times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfengine.benchmark.attention_libraries import fastest_attention
from rfengine.benchmark.eager_baseline import EagerStream, EagerTransformer, device_noise
from rfengine.benchmark.timing import Advance, frames_of, latents_of, recorded_chunks, spread, time_chunks
from rfengine.grid import LatentGrid
from rfengine.pipeline import Pipeline

PROMPT, SEED = "comparison", 5
ROUNDS = 3


@dataclass(frozen=True)
class Pair:
    """Chunks of the engine and of the baseline, and whether the device has to be waited for after each."""

    name: str
    engine: Advance
    baseline: Advance
    waits: bool


def compare(pipeline: Pipeline, grid: LatentGrid, chunks: int, decodes: bool) -> dict[str, Any]:
    """Ratio of chunk times, baseline over engine, without the VAE and, where it decodes, end to end.

    ROUNDS rounds of `chunks` chunks of each, alternating, once the window is full and graphs are recorded.
    """
    device = pipeline.model.device
    attention, pairs = _pairs(pipeline, grid, decodes)
    warm_up = recorded_chunks(pipeline.config.cache)
    results: dict[str, Any] = {
        "attention": attention, "vae": "full", "rounds": ROUNDS, "chunks_a_round": chunks
    }  # fmt: skip
    for pair in pairs:
        for advance in (pair.engine, pair.baseline):
            time_chunks(advance, warm_up, device, pair.waits)
        ratios, engine_ms, baseline_ms = [], [], []
        for _ in range(ROUNDS):
            engine = time_chunks(pair.engine, chunks, device, pair.waits)
            baseline = time_chunks(pair.baseline, chunks, device, pair.waits)
            engine_ms.append(sum(engine.seconds) / chunks * 1e3)
            baseline_ms.append(sum(baseline.seconds) / chunks * 1e3)
            ratios.append(baseline_ms[-1] / engine_ms[-1])
        results[pair.name] = {
            "ratio": spread(ratios),
            "engine_chunk_ms": spread(engine_ms),
            "baseline_chunk_ms": spread(baseline_ms),
        }
    return results


def _pairs(pipeline: Pipeline, grid: LatentGrid, decodes: bool) -> tuple[str, list[Pair]]:
    model, config = pipeline.model, pipeline.config
    weights = model.state_dict()
    frames = config.cache.chunk_frames
    name, attend = fastest_attention(*_attention_inputs(pipeline, grid))
    transformer = EagerTransformer(config.model, config.cache, weights, attend)
    states = pipeline.text_encoder.encode([PROMPT], model.device, model.dtype)

    def baseline() -> EagerStream:
        noise = device_noise(config, grid, weights["patch_embedding.weight"], SEED)
        return EagerStream(config, transformer, pipeline.vae, grid, states, noise)

    def baseline_latents() -> Advance:
        stream = baseline()
        return lambda: stream.advance_latents().shape[2] * grid.temporal_stride

    def baseline_frames() -> Advance:
        stream = baseline()
        return lambda: len(stream.advance())

    def engine() -> Any:
        return pipeline.stream(PROMPT, seed=SEED, height=grid.height, width=grid.width)

    pairs = [Pair("without_vae", latents_of(engine(), frames), baseline_latents(), True)]
    if decodes:
        pairs.insert(0, Pair("end_to_end", frames_of(engine()), baseline_frames(), False))
    return name, pairs


def _attention_inputs(pipeline: Pipeline, grid: LatentGrid) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the steady window, random."""
    model, cache = pipeline.model, pipeline.config.cache
    heads = (model.config.num_heads, model.config.head_dim)
    generator = torch.Generator(model.device).manual_seed(SEED)
    lengths = (cache.chunk_frames, cache.window_frames, cache.window_frames)
    q, k, v = (
        torch.randn(
            (1, frames * grid.frame_tokens, *heads),
            generator=generator,
            dtype=model.dtype,
            device=model.device,
        )
        for frames in lengths
    )
    return q, k, v
