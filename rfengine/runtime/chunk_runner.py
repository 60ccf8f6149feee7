"""ChunkRunner: one chunk as one function: evict, re-phase, denoise, context pass. Runs eagerly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rfengine.cache.kv_cache import EMPTY, CachePlan, StreamingKVCache
from rfengine.models.dit import Modulation, TextKeysValues, WanDiT
from rfengine.schedule import FlowSchedule

StepCallback = Callable[[int, float, Tensor], Tensor | None]


class ChunkRunner:
    """Runs chunks of one model. It keeps no stream: the cache and the text come with every call."""

    def __init__(self, model: WanDiT, schedule: FlowSchedule) -> None:
        self.model = model
        self.schedule = schedule
        self.step_modulations = [self._modulation(timestep) for timestep in schedule.denoising_timesteps]
        self.context_modulation = self._modulation(schedule.context_timestep)

    @torch.no_grad()
    def _modulation(self, timestep: float) -> Modulation:
        return self.model.modulation(torch.tensor([[timestep]], device=self.model.device))

    @property
    def num_steps(self) -> int:
        return len(self.step_modulations)

    @torch.no_grad()
    def advance(
        self,
        cache: StreamingKVCache,
        plan: CachePlan,
        noise: Tensor,
        text: TextKeysValues,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Denoise the planned chunk, write its clean keys and values, commit it. Returns x0 [B, C, F, h, w].

        noise: [num_steps, B, C, F, h, w], the initial noise and the fresh noise of every later step.
        on_step(step, timestep, latents) is called after each denoising step with what the next one starts
        from; a tensor it returns takes their place.
        A call that fails before commit can be repeated with the same plan: nothing is folded into the sink
        twice.
        """
        if noise.shape[0] != self.num_steps:
            raise ValueError(
                f"noise holds {noise.shape[0]} draws; {self.num_steps} denoising steps need as many"
            )
        cache.begin_chunk(plan)
        x = noise[0]
        sigmas = self.schedule.denoising_sigmas
        for step, modulation in enumerate(self.step_modulations):
            tokens = self.model.forward_chunk(x, modulation, text, cache, plan)
            last = step + 1 == self.num_steps
            fresh, next_sigma = (None, 0.0) if last else (noise[step + 1], sigmas[step + 1])
            x = self.model.ops.flow_step(tokens, x, sigmas[step], fresh, next_sigma)
            if on_step is not None:
                replaced = on_step(step, self.schedule.denoising_timesteps[step], x)
                x = x if replaced is None else replaced
        self._context_pass(cache, plan, x, text)
        cache.commit(plan)
        return x

    @torch.no_grad()
    def prefill(
        self, cache: StreamingKVCache, plan: CachePlan, latents: Tensor, text: TextKeysValues
    ) -> None:
        """Take the planned chunk as given: only the context pass runs. latents: [B, C, F, h, w], clean."""
        cache.begin_chunk(plan)
        self._context_pass(cache, plan, latents, text)
        cache.commit(plan)

    @torch.no_grad()
    def recache(self, cache: StreamingKVCache, chunks: dict[int, Tensor], text: TextKeysValues) -> None:
        """Recompute the keys and values of the window under `text` from clean latents (spec 2.7).

        chunks: clean latents [B, C, F, h, w] by chunk number, for every chunk in the window outside the sink.
        The sink keeps what it holds. Each chunk is run at t = 0 at its present time index and sees the sink
        and the chunks before it, so the slots are first put into chronological order.
        """
        sink = cache.config.sink_chunks
        window = sorted(chunk for chunk in cache.slot_chunks[sink:] if chunk != EMPTY)
        missing = [chunk for chunk in window if chunk not in chunks]
        if missing:
            raise ValueError(f"latents of chunk {missing[0]} are needed to recompute the window; keep them")
        cache.slot_chunks[sink : sink + len(window)] = window
        for place, chunk in enumerate(window):
            plan = cache.begin_rewrite(sink + place)
            self._context_pass(cache, plan, chunks[chunk], text)

    def _context_pass(
        self, cache: StreamingKVCache, plan: CachePlan, x0: Tensor, text: TextKeysValues
    ) -> None:
        self.model.forward_chunk(x0, self.context_modulation, text, cache, plan, keep_raw=True)
