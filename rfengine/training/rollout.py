"""Generation in training: many videos at once, chunk by chunk over the streaming cache, as the engine streams
them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.schedule import FlowSchedule


@torch.no_grad()
def roll_out(
    model: WanDiT, config: EngineConfig, text_states: Tensor, chunks: int, seed: int
) -> Iterator[Tensor]:
    """Yields the clean latents [B, C, chunk_frames, h, w] of each of `chunks` chunks, one video for each
    text.

    text_states: [B, <= text_len, text_dim].
    """
    grid = LatentGrid.of(config)
    schedule = FlowSchedule(config.schedule)
    cache = StreamingKVCache(config.model, config.cache, grid, len(text_states), model.dtype)
    text = model.text_keys_values(text_states)
    context = model.modulation(torch.tensor([[schedule.context_timestep]]))
    steps = [model.modulation(torch.tensor([[timestep]])) for timestep in schedule.denoising_timesteps]
    sigmas = (*schedule.denoising_sigmas, 0.0)
    generator = torch.Generator().manual_seed(seed)
    size = (config.model.in_dim, config.cache.chunk_frames, grid.latent_height, grid.latent_width)
    for _ in range(chunks):
        plan = cache.plan_chunk()
        cache.begin_chunk(plan)
        latents = torch.randn(len(text_states), *size, generator=generator)
        for step, modulation in enumerate(steps):
            tokens = model.forward_chunk(latents, modulation, text, cache, plan)
            last = step + 1 == len(steps)
            fresh = None if last else torch.randn(latents.shape, generator=generator)
            latents = model.ops.flow_step(tokens, latents, sigmas[step], fresh, sigmas[step + 1])
        model.forward_chunk(latents, context, text, cache, plan, keep_raw=True)
        cache.commit(plan)
        yield latents


@torch.no_grad()
def decode_chunks(vae: WanVAE, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Pixels [B, 3, T, H, W], not clamped, of every chunk of latents, with the causal state of one video."""
    state = None
    for latents in chunks:
        if state is None:
            state = vae.decoder_state(
                latents.shape[0], *latents.shape[3:], vae.conv2.weight.dtype, latents.device
            )
        yield vae.decode(latents, state)
