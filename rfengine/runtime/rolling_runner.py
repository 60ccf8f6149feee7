"""RollingRunner: chunks at all denoising steps side by side, so that each pass finishes one.

Rolling Forcing (arXiv 2509.25161) denoises a window of chunks whose noise grows with time: a pass takes every
chunk one step on, the oldest is finished, and a new one of pure noise enters. In Wave Forcing (arXiv
2611.00859) a chunk sees the cleaner ones before it alone. Both see the sink and the clean past in the cache;
the context pass of the finished chunk leaves its keys and values there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.cache.sink_policy import CachePlan
from rfengine.config import ScheduleConfig
from rfengine.host_state import ordinary
from rfengine.models.dit import TextKeysValues, WanDiT
from rfengine.nvtx_ranges import nvtx_range
from rfengine.runtime.chunk_runner import ChunkRunner, DenoisingStep, StepCallback
from rfengine.schedule import FlowSchedule


class RollingRunner(ChunkRunner):
    """Runs the passes of a rolling schedule. What is in flight lies in the cache (joint_latents), the oldest
    chunk first. causal: a chunk sees those before it, as in Wave Forcing. Passes run op by op."""

    def __init__(self, model: WanDiT, schedule: FlowSchedule, causal: bool) -> None:
        super().__init__(model, schedule)
        self.causal = causal
        self._passes: dict[tuple[int, int], DenoisingStep] = {}

    def draws(self, cache: StreamingKVCache, chunk: int) -> tuple[tuple[int, int], ...]:
        """The (chunk, step) of every draw of noise that advance needs to finish chunk `chunk`: for each pass
        that of the chunk that enters, then those of the others that go on, the oldest first."""
        return tuple(draw for last in self._entering(cache, chunk) for draw in self._pass_draws(chunk, last))

    def passes(self, cache: StreamingKVCache, chunk: int) -> int:
        return len(self._entering(cache, chunk))

    def _entering(self, cache: StreamingKVCache, chunk: int) -> range:
        """The chunks that enter until `chunk` is finished: one for each pass."""
        return range(chunk + cache.joint_chunks, chunk + self.num_steps)

    def _pass_draws(self, oldest: int, entering: int) -> list[tuple[int, int]]:
        chunks = range(oldest, entering + 1)
        steps = ((chunk, entering - chunk + 1) for chunk in chunks)
        return [(entering, 0), *(draw for draw in steps if draw[1] < self.num_steps)]

    @torch.no_grad()
    def advance(
        self,
        cache: StreamingKVCache,
        plan: CachePlan,
        noise: Tensor,
        text: TextKeysValues,
        on_step: StepCallback | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """Finish the planned chunk, write its clean keys and values, commit it. Returns x0 [B, C, F, h, w].

        noise: [draws, B, C, F, h, w], in the order of `draws`. on_step(pass, timestep, latents) is called
        after each pass with a copy of the oldest chunk. A call that fails leaves what is in flight half-way.
        """
        if clean is not None:
            raise ValueError("a rolling schedule begins with whole chunks; no frame of one can be given")
        size, drawn = cache.config.chunk_frames, iter(noise)
        for number, _ in enumerate(self._entering(cache, plan.chunk)):
            with nvtx_range(f"pass {number}"):
                self._pass(cache, drawn, text)
            if on_step is not None:
                oldest = cache.joint_latents[:, :, :size].clone()
                replaced = on_step(number, self._step(cache.joint_chunks, size).timestep, oldest)
                cache.joint_latents[:, :, :size] = oldest if replaced is None else ordinary(replaced)
        x0 = cache.joint_latents[:, :, :size].clone()
        cache.joint_latents[:, :, :-size] = cache.joint_latents[:, :, size:].clone()
        cache.joint_chunks -= 1
        cache.begin_chunk(plan)
        self._context_pass(cache, plan, x0, text)
        cache.commit(plan)
        return x0

    def _pass(self, cache: StreamingKVCache, drawn: Iterator[Tensor], text: TextKeysValues) -> None:
        """A chunk enters, and all in flight go one step on."""
        size, count = cache.config.chunk_frames, cache.joint_chunks + 1
        x = cache.joint_latents[:, :, : size * count]
        x[:, :, -size:] = next(drawn)
        cache.joint_chunks = count
        plan, step = cache.begin_joint(self.causal), self._step(count, size)
        tokens = self.model.forward_chunk(x, step.modulation, text, cache, plan)
        fresh = torch.zeros_like(x)
        for chunk in range(count == self.num_steps, count):  # the oldest may be finished
            fresh[:, :, chunk * size : (chunk + 1) * size] = next(drawn)
        x.copy_(self.model.ops.flow_step(tokens, x, step.sigmas, fresh, step.next_sigmas))

    def _step(self, count: int, size: int) -> DenoisingStep:
        """The step of a pass over `count` chunks of `size` frames: the oldest has gone furthest."""
        if (count, size) not in self._passes:
            steps, device = self.schedule.steps_of(0), self.model.device
            stages = [stage for stage in reversed(range(count)) for _ in range(size)]
            sigmas = torch.tensor([*steps.sigmas, 0.0], dtype=torch.float64, device=device)
            following = [stage + 1 for stage in stages]
            self._passes[count, size] = DenoisingStep(
                steps.timesteps[count - 1], self._modulation([steps.timesteps[stage] for stage in stages]),
                sigmas[stages], sigmas[following],
            )  # fmt: skip
        return self._passes[count, size]


def runner_of(
    model: WanDiT, config: ScheduleConfig, graphs: bool, fp8_passes: Collection[int] = ()
) -> ChunkRunner:
    """What runs the chunks of a schedule; a rolling one records no graphs and has no passes in FP8."""
    if config.rolling == "none":
        return ChunkRunner(model, FlowSchedule(config), graphs, fp8_passes)
    return RollingRunner(model, FlowSchedule(config), config.rolling == "causal")
