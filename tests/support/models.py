"""Small models and inputs that several tests share."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.checkpoint.checkpoint import write_config
from rfengine.checkpoint.loader import save_weights
from rfengine.config import (
    CacheConfig,
    EngineConfig,
    RuntimeConfig,
    ScheduleConfig,
    TextConfig,
    VAEConfig,
    WanConfig,
)
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.models.fp8_products import quantise
from rfengine.models.text_encoder import ByteTokenizer, TextEncoder, build_umt5
from rfengine.models.vae import WanVAE
from rfengine.pipeline import Pipeline
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule
from rfengine.stream import VideoStream

if TYPE_CHECKING:
    from rfengine.diffusion_forcing.pipeline import DiffusionForcingPipeline

SMALL = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=8, in_dim=4, out_dim=4)
SMALL_VAE = VAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 1, 2, 2),
    num_res_blocks=1,
    latents_mean=(0.1,) * 4,
    latents_std=(1.2,) * 4,
)
TWO_STEPS = ScheduleConfig(denoising_steps=(1000, 500))
GRID = LatentGrid(32, 48)  # 2 x 3 tokens in a frame


def small_model(config: WanConfig = SMALL, seed: int = 0) -> WanDiT:
    """Random weights large enough that every part moves the output."""
    generator = torch.Generator().manual_seed(seed)
    model = WanDiT(config).eval()
    for parameter in model.parameters():
        scale = 0.5 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
        offset = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)
    return model


def small_runner(model: WanDiT, steps: tuple[int, ...] = (1000, 500), graphs: bool = False) -> ChunkRunner:
    return ChunkRunner(model, FlowSchedule(ScheduleConfig(denoising_steps=steps)), graphs)


def small_cache(
    config: CacheConfig, model: WanConfig = SMALL, dtype: torch.dtype = torch.float32
) -> StreamingKVCache:
    return StreamingKVCache(model, config, GRID, dtype=dtype)


def noise_of(chunk: int, frames: int, steps: int = 2, channels: int = SMALL.in_dim) -> torch.Tensor:
    """[steps, 1, C, frames, h, w] for one chunk, the same for every call."""
    generator = torch.Generator().manual_seed(1000 + chunk)
    shape = (steps, 1, channels, frames, GRID.latent_height, GRID.latent_width)
    return torch.randn(shape, generator=generator)


def text_states(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, SMALL.text_len, SMALL.text_dim, generator=torch.Generator().manual_seed(seed))


def small_config(
    cache: CacheConfig | None = None,
    vae_config: VAEConfig = SMALL_VAE,
    schedule: ScheduleConfig = TWO_STEPS,
) -> EngineConfig:
    """That of small_pipeline, which takes seconds to import what builds its text encoder."""
    return EngineConfig(
        "small", dataclasses.replace(SMALL, text_len=64), vae_config,
        TextConfig(259, 16, 16, 24, 2, 1, tokenizer="bytes"), cache or CacheConfig(),
        schedule,
        GRID.latent_height * vae_config.spatial_stride, GRID.latent_width * vae_config.spatial_stride,
    )  # fmt: skip


def small_pipeline(
    cache: CacheConfig | None = None,
    seed: int = 0,
    vae_config: VAEConfig = SMALL_VAE,
    schedule: ScheduleConfig = TWO_STEPS,
) -> Pipeline:
    """A whole pipeline with random weights, two denoising steps unless a schedule is given, a byte tokenizer
    and 2 x 3 tokens a frame, 32 x 48 pixels of the usual VAE."""
    config = small_config(cache, vae_config, schedule)
    vae, encoder = vae_and_text_encoder(config, seed)
    return Pipeline(config, small_model(config.model, seed), vae, encoder, f"small-{seed}")


def vae_and_text_encoder(config: EngineConfig, seed: int) -> tuple[WanVAE, TextEncoder]:
    """Those of a pipeline of `config`, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = WanVAE(config.vae).eval().requires_grad_(False)
        return vae, TextEncoder(build_umt5(config.text), ByteTokenizer(), config.model.text_len)


def with_runtime(pipe: Pipeline, runtime: RuntimeConfig) -> Pipeline:
    """The same models under another runtime, put into FP8 where it asks for that."""
    if runtime.multiplies_fp8 and pipe.model.left_out_of_fp8 is None:
        quantise(pipe.model)
    config = dataclasses.replace(pipe.config, runtime=runtime)
    return Pipeline(config, pipe.model, pipe.vae, pipe.text_encoder, pipe._engine.fingerprint)


def frames_of(stream: VideoStream, chunks: int) -> numpy.ndarray:
    """The frames of the next chunks of a stream, uint8 [T, H, W, 3]."""
    return numpy.concatenate([chunk.frames for chunk in itertools.islice(stream, chunks)])


def write_pipeline(directory: Path, pipeline: Pipeline | DiffusionForcingPipeline) -> Path:
    """Make `directory` a checkpoint of the pipeline, with another text encoder of its shape."""
    write_config(directory, pipeline.config)
    parts = {
        "transformer": pipeline.model,
        "vae": pipeline.vae,
        "text_encoder": build_umt5(pipeline.config.text),
    }
    for name, module in parts.items():
        tensors = {key: value for key, value in module.state_dict().items() if "embed_tokens" not in key}
        save_weights(directory / f"{name}.safetensors", tensors)
    return directory
