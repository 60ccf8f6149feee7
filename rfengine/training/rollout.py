"""Rollouts: videos generated chunk by chunk over the streaming cache in training, as the engine streams them.

self_forced_rollout is the one a student learns from (spec 7.3, the intent of it): every chunk is denoised
without gradient up to an exit step drawn at random, that step alone is taken with gradient and ends the
chunk, and the context pass at exactly t = 0 leaves the clean keys and values. Chunks leave the window and
are averaged into the sink as in a stream: the published training never evicts anything. B batch, C latent
channels, F latent frames, L layers, S arena tokens, T tokens of a chunk, H heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rfengine.cache.kv_cache import EMPTY, CachePlan, LayerCache, StreamingKVCache
from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.limits import Range, check_fields
from rfengine.models.dit import Modulation, TextKeysValues, WanDiT
from rfengine.models.vae import WanVAE
from rfengine.ops import reference
from rfengine.schedule import FlowSchedule

Chunks = Annotated[int, Range(1, 4096)]
Noise = Callable[[int, int], Tensor]  # of (chunk, step): [B, C, chunk_frames, h, w]


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How long the rollouts of a training are, and where gradients flow.

    Lengths are drawn evenly from min_chunks to max_chunks; the last gradient_chunks carry gradients.
    same_exit: one exit step for all chunks of a rollout, or one for each. carry_key_gradients: gradients of
    later chunks reach the keys and values that earlier ones had at their exit step, as they do in the
    published code (the numbers stay those of the context pass); off, every chunk is a graph of its own.
    checkpointing: activations of the exit steps are computed once more in backward.
    """

    min_chunks: Chunks = 7
    max_chunks: Chunks = 7
    gradient_chunks: Chunks = 7
    same_exit: bool = True
    carry_key_gradients: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.min_chunks > self.max_chunks:
            raise ValueError(
                f"min_chunks is {self.min_chunks} and max_chunks {self.max_chunks}; give 1 <= min <= max"
            )
        if self.carry_key_gradients and self.checkpointing:
            raise ValueError(
                "checkpointing computes a chunk once more on its own, so no gradient can be carried between "
                "chunks; turn carry_key_gradients or checkpointing off"
            )


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """What was drawn for one rollout: its length, and the step at which each chunk ends."""

    chunks: int
    exits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """latents: x0 of every chunk, [B, C, F, h, w], with a graph from first_gradient_frame on."""

    latents: Tensor
    first_gradient_frame: int


def draw_plan(config: RolloutConfig, num_steps: int, generator: torch.Generator) -> RolloutPlan:
    """Length and exit steps, all even; ranks that share a generator's seed draw the same."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))

    chunks = draw(config.min_chunks, config.max_chunks)
    if config.same_exit:
        return RolloutPlan(chunks, (draw(0, num_steps - 1),) * chunks)
    return RolloutPlan(chunks, tuple(draw(0, num_steps - 1) for _ in range(chunks)))


def self_forced_rollout(
    model: WanDiT,
    config: EngineConfig,
    text: TextKeysValues,
    noise: Noise,
    plan: RolloutPlan,
    rollout: RolloutConfig,
) -> Rollout:
    """Generate plan.chunks chunks with a fresh cache; see the module's docstring.

    text: cross-attention keys and values of the prompts, with their graph where the text layers learn.
    noise(chunk, step): step 0 starts the chunk, step k > 0 re-noises before step k. The model's ops must be
    DifferentiableOps.
    """
    schedule = FlowSchedule(config.schedule)
    batch = text.keys.shape[1]
    cache = StreamingKVCache(
        config.model, config.cache, LatentGrid.of(config), batch, _arithmetic(model), model.device, model.ops
    )
    carried = _CarriedKeys(cache) if rollout.carry_key_gradients else None
    first_gradient = max(0, plan.chunks - rollout.gradient_chunks)
    chunks = []
    for chunk, exit_step in enumerate(plan.exits):
        place = cache.plan_chunk()
        cache.begin_chunk(place)
        x = noise(chunk, 0)
        with torch.no_grad():
            for step in range(exit_step):
                fresh = noise(chunk, step + 1)
                x = _denoise(model, cache, place, text, schedule, x, step, fresh)
        if carried is not None:
            carried.begin(place)
        with torch.set_grad_enabled(torch.is_grad_enabled() and chunk >= first_gradient):
            x0 = _exit_step(model, cache, place, text, schedule, x, exit_step, rollout, carried)
        with torch.no_grad():
            context = _modulation(model, schedule.context_timestep)
            model.context_pass(x0.detach(), context, text, cache, place)
        cache.commit(place)
        chunks.append(x0)
    return Rollout(torch.cat(chunks, dim=2), first_gradient * config.cache.chunk_frames)


def _arithmetic(model: WanDiT) -> torch.dtype:
    """The dtype of keys and values as the model computes them."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def _modulation(model: WanDiT, timestep: float) -> Modulation:
    return model.modulation(torch.tensor([[timestep]], device=model.device))


def _denoise(
    model: WanDiT,
    cache: StreamingKVCache | _GradientCache,
    place: CachePlan,
    text: TextKeysValues,
    schedule: FlowSchedule,
    x: Tensor,
    step: int,
    fresh: Tensor | None,
) -> Tensor:
    """One denoising step: x0 without fresh noise, the start of the next step with it."""
    modulation = _modulation(model, schedule.denoising_timesteps[step])
    tokens = model.forward_chunk(x, modulation, text, cache, place)
    next_sigma = 0.0 if fresh is None else schedule.denoising_sigmas[step + 1]
    return model.ops.flow_step(tokens, x, schedule.denoising_sigmas[step], fresh, next_sigma)


def _exit_step(
    model: WanDiT,
    cache: StreamingKVCache,
    place: CachePlan,
    text: TextKeysValues,
    schedule: FlowSchedule,
    x: Tensor,
    step: int,
    rollout: RolloutConfig,
    carried: _CarriedKeys | None,
) -> Tensor:
    """The last step of a chunk: x0, on a copy of what the cache holds now, since the cache goes on
    changing."""
    if not torch.is_grad_enabled():
        return _denoise(model, cache, place, text, schedule, x, step, None)
    view = _GradientCache(cache, place, carried)

    def run(x: Tensor) -> Tensor:
        return _denoise(model, view, place, text, schedule, x, step, None)

    if rollout.checkpointing:
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return run(x)


class _CarriedKeys:
    """Keys before rotation and values that chunks had at their exit step, with their graph, by slot and
    layer.

    The sink's are those of its first chunks until something is averaged into it; from then on it is a
    constant.
    """

    def __init__(self, cache: StreamingKVCache) -> None:
        if cache.raw_keys is None:
            raise ValueError(
                "carry_key_gradients needs positions='relative', whose cache keeps keys before rotation; "
                "turn it off"
            )
        self._sink_slots = cache.config.sink_chunks
        self.slots: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def begin(self, place: CachePlan) -> None:
        """The planned slot is about to be written anew."""
        self.slots.pop(place.slot, None)
        if place.evicts:
            for slot in range(self._sink_slots):
                self.slots.pop(slot, None)

    def keep(self, slot: int, raw: Tensor, values: Tensor) -> None:
        self.slots.setdefault(slot, []).append((raw, values))


class _GradientCache:
    """What a pass with gradient sees of a cache: copies of the window as it is now, to be written once.

    It stands in for the cache in WanDiT.forward_chunk. Every layer gets a copy of its arena of its own, so
    that nothing autograd saved is overwritten later; a pass that is computed again gets another.
    """

    def __init__(self, cache: StreamingKVCache, place: CachePlan, carried: _CarriedKeys | None) -> None:
        self.query_rotation = cache.query_rotation.clone()
        self._filled_tokens = cache.filled_tokens.clone()
        self._tokens = cache.slot_tokens(place.slot)
        self._kv_len = place.filled_slots * cache.chunk_tokens
        self._keys = cache.keys[:, :, : self._kv_len].clone()
        self._values = cache.values[:, :, : self._kv_len].clone()
        self._slot = place.slot
        self._carried = carried
        self._rotations = {} if carried is None else self._slot_rotations(cache, place)

    def _slot_rotations(self, cache: StreamingKVCache, place: CachePlan) -> dict[int, tuple[slice, Tensor]]:
        """Tokens and rotation of every other slot that has a graph and a chunk in it."""
        tokens = {
            slot: cache.slot_tokens(slot)
            for slot in self._carried.slots
            if slot != place.slot and cache.slot_chunks[slot] != EMPTY
        }
        return {slot: (part, cache.rotation[:, part].clone()) for slot, part in tokens.items()}

    def layer(self, index: int, place: CachePlan, keep_raw: bool) -> LayerCache:
        keys, values = self._keys[index].clone(), self._values[index].clone()
        raw = None
        if self._carried is not None:
            for slot, (tokens, rotation) in self._rotations.items():
                raw_exit, values_exit = self._carried.slots[slot][index]
                _carry(keys[:, tokens], reference.rotate(raw_exit, rotation))
                _carry(values[:, tokens], values_exit)
            raw = torch.empty_like(keys[:, self._tokens])
            self._carried.keep(self._slot, raw, values[:, self._tokens])
        slot_keys, slot_values = keys[:, self._tokens], values[:, self._tokens]
        return LayerCache(keys, values, slot_keys, slot_values, raw, self._kv_len, self._filled_tokens)


def _carry(clean: Tensor, with_graph: Tensor) -> None:
    """Give `clean`, a view, the gradient path of `with_graph` and keep its numbers; in place."""
    clean += with_graph - with_graph.detach()


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
    cache = StreamingKVCache(
        config.model, config.cache, grid, len(text_states), model.dtype, model.device, model.ops
    )
    text = model.text_keys_values(text_states)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(len(text_states), *size, generator=generator).to(model.device)

    size = (config.model.in_dim, config.cache.chunk_frames, grid.latent_height, grid.latent_width)
    steps = len(schedule.denoising_timesteps)
    for _ in range(chunks):
        place = cache.plan_chunk()
        cache.begin_chunk(place)
        latents = draw()
        for step in range(steps):
            fresh = None if step + 1 == steps else draw()
            latents = _denoise(model, cache, place, text, schedule, latents, step, fresh)
        context = _modulation(model, schedule.context_timestep)
        model.context_pass(latents, context, text, cache, place)
        cache.commit(place)
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
