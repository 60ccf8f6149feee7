"""Rollouts: videos generated chunk by chunk over the streaming cache, as the engine streams them.

self_forced_rollout is the one a student learns from (arXiv 2512.04678): every chunk is denoised
without gradient up to an exit step drawn at random, that step alone is taken with gradient and ends the
chunk, and the context pass at exactly t = 0 leaves the clean keys and values. Chunks leave the window and
are averaged into the sink as in a stream: the published training never evicts anything. B batch, C latent
channels, F latent frames, L layers, S arena tokens, T tokens of a chunk, H heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rfengine.cache.kv_cache import LayerCache, StreamingKVCache
from rfengine.cache.sink_policy import CachePlan
from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import Modulation, TextKeysValues, WanDiT
from rfengine.models.vae import WanVAE
from rfengine.schedule import FlowSchedule
from rfengine.training.config import RolloutConfig

Noise = Callable[[int, int], Tensor]  # of (chunk, step): [B, C, chunk_frames, h, w]


def latent_shape(config: EngineConfig, batch: int, frames: int) -> tuple[int, ...]:
    """[B, C, F, h, w] of `batch` videos of `frames` latent frames."""
    grid = LatentGrid.of(config)
    return batch, config.model.in_dim, frames, grid.latent_height, grid.latent_width


def draw_exits(config: RolloutConfig, num_steps: int, generator: torch.Generator) -> tuple[int, ...]:
    """The step at which each chunk of a rollout ends: a drawn number of chunks, and one drawn step for all.

    Ranks that share a generator's seed draw the same.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))

    chunks, step = draw(config.min_chunks, config.max_chunks), draw(0, num_steps - 1)
    if config.first_share > float(torch.rand((), generator=generator, device=generator.device)):
        chunks = 1
    return (step,) * chunks


@dataclass(frozen=True, slots=True)
class PromptSwitch:
    """A rollout that begins with other prompts: their keys and values, the chunk that is the first under the
    rollout's own, and whether the window is recomputed under those."""

    before: TextKeysValues
    chunk: int
    recached: bool


def draw_switch(
    rollout: RolloutConfig, chunks: int, judged: int, window: int, generator: torch.Generator
) -> tuple[int, bool] | None:
    """The chunk of a switch and whether it recaches, or None for a rollout without one.

    The switch is with the first of the `judged` chunks at the end or up to `window` chunks before it. As many
    numbers are drawn in either case, and ranks that share a generator's seed draw the same.
    """
    share, recache, place = torch.rand(3, generator=generator, device=generator.device).tolist()
    first = chunks - judged
    if first < 1 or share >= rollout.switch_share:
        return None
    earliest = max(1, first - window)
    return earliest + int(place * (first - earliest + 1)), recache < rollout.recache_share


def self_forced_rollout(
    model: WanDiT,
    config: EngineConfig,
    text: TextKeysValues,
    noise: Noise,
    exits: tuple[int, ...],
    rollout: RolloutConfig,
    switch: PromptSwitch | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Generate a chunk for each of `exits`, the step at which it ends, with a fresh cache; see the module.

    text: cross-attention keys and values of the prompts, with their graph where the text layers learn.
    noise(chunk, step): step 0 starts the chunk, step k > 0 re-noises before step k. switch: a change of the
    prompts on the way. given: clean latents [B, C, G, h, w] of whole chunks, with which the videos begin, in
    place of the first of those that would be generated. The model's ops must be DifferentiableOps. Returns x0
    of every chunk, [B, C, F, h, w], the last gradient_chunks that are not given with a graph.
    """
    kind = model.device.type
    casts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if casts else model.dtype  # of keys and values
    video = _Generation(model, config, switch.before if switch else text, dtype)
    first_gradient = max(0, len(exits) - rollout.gradient_chunks)
    size = config.cache.chunk_frames
    known = 0 if given is None else given.shape[2] // size
    chunks: list[Tensor] = []
    for chunk, exit_step in enumerate(exits):
        if switch and chunk == switch.chunk:
            video.set_text(text, chunks if switch.recached else None)
        place = video.begin_chunk()
        if chunk < known:
            x0 = given[:, :, chunk * size : (chunk + 1) * size]
        else:
            learns = torch.is_grad_enabled() and chunk >= first_gradient
            x0 = video.generate(place, partial(noise, chunk), exit_step, learns, rollout.checkpointing)
        video.commit(place, x0.detach())
        chunks.append(x0)
    return torch.cat(chunks, dim=2)


class _Generation:
    """Videos that are being generated: the model, the prompts and the cache of what was drawn."""

    def __init__(self, model: WanDiT, config: EngineConfig, text: TextKeysValues, dtype: torch.dtype) -> None:
        self.model, self.text, self.schedule = model, text, FlowSchedule(config.schedule)
        self._sigmas = torch.tensor(
            self.schedule.denoising_sigmas, dtype=torch.float64, device=model.device
        ).split(1)
        grid, batch = LatentGrid.of(config), text.keys.shape[1]
        self.cache = StreamingKVCache(config.model, config.cache, grid, batch, dtype, model.device, model.ops)

    @torch.no_grad()
    def set_text(self, text: TextKeysValues, chunks: Sequence[Tensor] | None) -> None:
        """Go on under other prompts; with all chunks so far, the window is recomputed under them."""
        self.text = text
        if chunks is not None:
            frames = torch.cat([x0.detach() for x0 in chunks], dim=2).split(1, dim=2)
            clean = dict(enumerate(frames))
            self.model.recache(clean, self._modulation(self.schedule.context_timestep), text, self.cache)

    def begin_chunk(self) -> CachePlan:
        place = self.cache.plan_chunk()
        self.cache.begin_chunk(place)
        return place

    def denoise(
        self,
        place: CachePlan,
        x: Tensor,
        step: int,
        fresh: Tensor | None,
        view: _GradientCache | None = None,
    ) -> Tensor:
        """One denoising step: x0 without fresh noise, the start of the next step with it."""
        modulation = self._modulation(self.schedule.denoising_timesteps[step])
        tokens = self.model.forward_chunk(x, modulation, self.text, view or self.cache, place)
        following = None if fresh is None else self._sigmas[step + 1]
        return self.model.ops.flow_step(tokens, x, self._sigmas[step], fresh, following)

    def generate(
        self,
        place: CachePlan,
        noise: Callable[[int], Tensor],
        exit_step: int,
        learns: bool,
        checkpointing: bool,
    ) -> Tensor:
        """x0 of a chunk after the step at which it ends, which has a graph where it learns."""
        x = noise(0)
        with torch.no_grad():
            for step in range(exit_step):
                x = self.denoise(place, x, step, noise(step + 1))
        with torch.set_grad_enabled(learns):
            return self.exit_step(place, x, exit_step, checkpointing)

    def exit_step(self, place: CachePlan, x: Tensor, step: int, checkpointing: bool) -> Tensor:
        """The last step of a chunk: x0; with gradients it reads a copy of the cache, which will change."""
        if not torch.is_grad_enabled():
            return self.denoise(place, x, step, None)
        arguments = place, x, step, None, _GradientCache(self.cache, place)
        if checkpointing:
            return checkpoint(self.denoise, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self.denoise(*arguments)

    @torch.no_grad()
    def commit(self, place: CachePlan, x0: Tensor) -> None:
        """The context pass leaves the clean keys and values of the chunk in the cache."""
        context = self._modulation(self.schedule.context_timestep)
        self.model.context_pass(x0, context, self.text, self.cache, place)
        self.cache.commit(place)

    def _modulation(self, timestep: float) -> Modulation:
        return self.model.modulation(torch.tensor([[timestep]], device=self.model.device))


class _GradientCache:
    """What a pass with gradient sees of a cache: copies of the window as it is now, to be written once.

    It stands in for the cache in WanDiT.forward_chunk. Every layer gets a copy of its arena of its own, so
    that nothing autograd saved is overwritten later; a pass that is computed again gets another.
    """

    def __init__(self, cache: StreamingKVCache, place: CachePlan) -> None:
        self.query_rotation = cache.query_rotation.clone()
        self._slots = cache.write_slots.clone()
        (read,) = cache.layer(0, place, keep_raw=False).reads
        self._reads = (replace(read, filled_tokens=read.filled_tokens.clone()),)
        self._first = place.start * cache.grid.frame_tokens
        seen = slice(0, self._first + read.kv_len)
        self._keys, self._values = cache.keys[:, :, seen].clone(), cache.values[:, :, seen].clone()

    def layer(self, index: int, place: CachePlan, keep_raw: bool) -> LayerCache:
        keys, values = self._keys[index].clone(), self._values[index].clone()
        return LayerCache(
            keys[:, self._first :], values[:, self._first :], self._reads, keys, values, None, self._slots
        )


@torch.no_grad()
def roll_out(
    model: WanDiT,
    config: EngineConfig,
    text_states: Tensor,
    chunks: int,
    seed: int,
    switches: Mapping[int, tuple[Tensor, bool]] = MappingProxyType({}),
) -> Iterator[Tensor]:
    """Yields the clean latents [B, C, chunk_frames, h, w] of each of `chunks` chunks, one video for each
    text.

    text_states: [B, <= text_len, text_dim]. switches: before which chunk there are other text states, and
    whether the window is recomputed under them.
    """
    video = _Generation(model, config, model.text_keys_values(text_states), model.dtype)
    generator = torch.Generator().manual_seed(seed)
    shape = latent_shape(config, len(text_states), config.cache.chunk_frames)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device)

    steps = len(config.schedule.denoising_steps)
    made: list[Tensor] = []  # of which a switch may recompute the window
    for chunk in range(chunks):
        if chunk in switches:
            states, recached = switches[chunk]
            video.set_text(model.text_keys_values(states), made if recached else None)
        place = video.begin_chunk()
        latents = draw()
        for step in range(steps):
            latents = video.denoise(place, latents, step, None if step + 1 == steps else draw())
        video.commit(place, latents)
        if switches:
            made.append(latents)
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
