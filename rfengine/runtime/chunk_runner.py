"""ChunkRunner: one chunk is evict, re-phase, denoise, context pass.

The program is `_chunk`, all that follows the start of the chunk in the cache. It does the device's work
alone: every decision is an integer of the plan, made before, and all else that it reads is in tensors. So it
runs op by op, or is recorded as a CUDA graph and replayed: the same kernels on the same numbers either way.

Recorded is the steady state, where the window is full: its chunks differ only in integers that the device
reads, so a cache has one recorded program. The first chunk of it runs op by op, which builds every kernel,
handle and workspace; the second is captured. Capture executes nothing, so no state needs restoring. The
chunks that fill the window always run op by op: each comes once in a video, so that recording it would cost
the launches it could save, and the first frame would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.cache.sink_policy import CachePlan
from rfengine.cache.window_fp8 import WindowFP8
from rfengine.cuda_graph import CapturedCall, GraphPool, graph_pool
from rfengine.host_state import ordinary
from rfengine.models.dit import Modulation, TextKeysValues, WanDiT
from rfengine.models.fp8_products import attention_units
from rfengine.nvtx_ranges import nvtx_range
from rfengine.schedule import FlowSchedule, Steps, chunk_noise

StepCallback = Callable[[int, float, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """One denoising step: its timestep, that of the frames which on_step gets, its modulation, and the levels
    before and after it, float64 [1] or one for each latent frame; next_sigmas is None after the last."""

    timestep: float
    modulation: Modulation
    sigmas: Tensor
    next_sigmas: Tensor | None


class ChunkGraph:
    """The recorded program of one cache, and the static tensors that it reads.

    call: the program; None until it is recorded.
    """

    def __init__(self, noise: Tensor, text: TextKeysValues) -> None:
        self.call: CapturedCall[Tensor] | None = None
        self.noise = noise.clone()
        self.text = TextKeysValues(text.keys.clone(), text.values.clone())
        self._text_source = text

    def fill(self, noise: Tensor, text: TextKeysValues) -> None:
        """Copy the inputs into the static tensors; a text that is there already is not copied again."""
        self.noise.copy_(noise)
        if self._text_source is not text:
            self.text.keys.copy_(text.keys)
            self.text.values.copy_(text.values)
            self._text_source = text


class ChunkRunner:
    """Runs chunks of one model. The cache and the text come with every call; what the runner keeps of a cache
    is its graph, as long as the cache lives.

    graphs: record and replay, on a CUDA device. All graphs share one memory pool, so the chunks of a runner
    must not run at the same time: call it on one CUDA stream. fp8_passes: those of a chunk in the steady
    state whose attention is in FP8; the denoising steps count from 0, and the context pass is the next.
    """

    def __init__(
        self,
        model: WanDiT,
        schedule: FlowSchedule,
        graphs: bool = False,
        fp8_passes: Collection[int] = (),
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.graphs = graphs
        self.fp8_passes = frozenset(fp8_passes)
        self._units = attention_units(model) if self.fp8_passes else None
        self._window_by_cache: WeakKeyDictionary[StreamingKVCache, WindowFP8] = WeakKeyDictionary()
        self._copied_chunk: WeakKeyDictionary[StreamingKVCache, int] = WeakKeyDictionary()
        self._modulations: dict[tuple[float, ...], Modulation] = {}
        steady = Steps(schedule.denoising_timesteps, schedule.denoising_sigmas)
        self._steps_by_levels = {steady: self._steps(steady)}
        self.steps = self._steps_by_levels[steady]
        self.context_modulation = self._modulation([schedule.context_timestep])
        self._graph_by_cache: WeakKeyDictionary[StreamingKVCache, ChunkGraph] = WeakKeyDictionary()
        self._pool: GraphPool | None = None

    def _steps(self, steps: Steps, clean: int = 0, noisy: int = 1) -> tuple[DenoisingStep, ...]:
        """Steps of chunks that begin with `clean` frames at level 0 and have `noisy` others."""

        def row(level: float) -> list[float]:
            return [0.0] * clean + [level] * noisy

        def levels(sigma: float) -> Tensor:
            return torch.tensor(row(sigma), dtype=torch.float64, device=self.model.device)

        sigmas = [levels(sigma) for sigma in steps.sigmas]
        return tuple(
            DenoisingStep(timestep, self._modulation(row(timestep)), own, following)
            for timestep, own, following in zip(steps.timesteps, sigmas, [*sigmas[1:], None], strict=True)
        )

    def _modulation(self, timesteps: list[float]) -> Modulation:
        """That of a chunk whose frames are at these timesteps, computed once."""
        key = tuple(timesteps)
        if key not in self._modulations:
            self._modulations[key] = self._computed_modulation(key)
        return self._modulations[key]

    @torch.no_grad()
    def _computed_modulation(self, timesteps: Sequence[float]) -> Modulation:
        return self.model.modulation(torch.tensor([timesteps], dtype=torch.float32, device=self.model.device))

    def refresh(self) -> None:
        """Compute what comes of the weights again once they are others, in the memory that graphs read."""
        if self._units is not None:
            for kept, fresh in zip(self._units, attention_units(self.model), strict=True):
                kept.copy_(fresh)
        for timesteps, kept in self._modulations.items():
            fresh = self._computed_modulation(timesteps)
            kept.layers.copy_(fresh.layers)
            kept.head.copy_(fresh.head)

    def steps_of(self, chunk: int) -> tuple[DenoisingStep, ...]:
        """The denoising steps of chunk `chunk` of a video."""
        steps = self.schedule.steps_of(chunk)
        if steps not in self._steps_by_levels:
            self._steps_by_levels[steps] = self._steps(steps)
        return self._steps_by_levels[steps]

    def draws(self, cache: StreamingKVCache, chunk: int) -> tuple[tuple[int, int], ...]:
        """The (chunk, step) of every draw of noise that advance needs for chunk `chunk`."""
        return tuple((chunk, step) for step in range(len(self.steps_of(chunk))))

    def draw_noise(self, cache: StreamingKVCache, chunk: int, frames: int, seed: int) -> Tensor:
        """These draws in the stream of `seed`: float32 [draws, 1, C, frames, h, w] in host memory."""
        shape = (1, self.model.config.in_dim, frames, cache.grid.latent_height, cache.grid.latent_width)
        return torch.stack([chunk_noise(seed, *draw, shape) for draw in self.draws(cache, chunk)])

    def passes(self, cache: StreamingKVCache, chunk: int) -> int:
        """How often advance calls on_step for chunk `chunk`, the next one of `cache`."""
        return len(self.steps_of(chunk))

    @property
    def num_steps(self) -> int:
        """Denoising steps of a chunk, but for the first ones where those have steps of their own."""
        return len(self.steps)

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
        """Denoise the planned chunk, write its clean keys and values, commit it. Returns x0 [B, C, F, h, w],
        which is the caller's.

        noise: [steps, B, C, F, h, w], the draws of `draws`: the initial noise and the fresh noise of every
        later step. on_step(step, timestep, latents) is called after each denoising step with what the next
        one starts from; a tensor it returns takes their place. Such a chunk is not replayed from a graph.
        clean: [B, C, N, h, w], the first N latent frames as they are: they stay at level 0 in every step.
        A call that fails in a step or in the context pass can be repeated with the same plan: nothing is
        folded into the sink twice.
        """
        steps = self.steps_of(plan.chunk)
        if noise.shape[0] != len(steps):
            raise ValueError(f"noise holds {noise.shape[0]} draws; {len(steps)} denoising steps need as many")
        if clean is not None:
            count = clean.shape[2]
            steps = self._steps(self.schedule.steps_of(plan.chunk), count, plan.frames - count)
            noise = torch.cat([torch.cat([clean, noise[0, :, :, count:]], dim=2)[None], noise[1:]])
        with nvtx_range("chunk"):
            # a chunk that is repeated may have failed before its kernels were built
            is_repeated = cache.begun_chunk == plan.chunk
            eager = on_step is not None or clean is not None or is_repeated
            window = self._window(cache, plan)
            graph = None if eager else self._graph(cache, plan, noise, text, window)
            with nvtx_range("evict"):
                cache.begin_chunk(plan)
                self._copy_window(cache, plan, window, is_repeated)
            # on a CPU every op costs less where autograd keeps no book at all; what a caller sees is ordinary
            with torch.inference_mode() if on_step is None and noise.is_cpu else nullcontext():
                given = (cache, plan, noise, text, steps, window, on_step)
                x0 = graph.replay() if graph else self._chunk(*given)
            x0 = x0.clone() if graph else ordinary(x0)
        cache.commit(plan)
        return x0

    def _window(self, cache: StreamingKVCache, plan: CachePlan) -> WindowFP8 | None:
        """The copies of `cache` for the planned chunk, made with the first chunk of a cache; None where the
        chunk has none."""
        if self._units is None:
            return None
        if cache not in self._window_by_cache:
            self._window_by_cache[cache] = WindowFP8.of(cache.keys, self._units)
        return self._window_by_cache[cache] if self._is_steady(cache, plan) else None

    def _copy_window(
        self, cache: StreamingKVCache, plan: CachePlan, window: WindowFP8 | None, is_repeated: bool
    ) -> None:
        """Once for each chunk: a pass that failed may have written to the slots that the copies come from."""
        if window is None or (is_repeated and self._copied_chunk.get(cache) == plan.chunk):
            return
        self._copied_chunk.pop(cache, None)
        window.begin(cache, self.model.ops)
        self._copied_chunk[cache] = plan.chunk

    def _is_steady(self, cache: StreamingKVCache, plan: CachePlan) -> bool:
        """Whether the window is full and the chunk as long as all later ones, in the same steps."""
        has_length = plan.frames == cache.config.chunk_frames
        return plan.evicts and has_length and self.steps_of(plan.chunk) is self.steps

    def _chunk(
        self,
        cache: StreamingKVCache,
        plan: CachePlan,
        noise: Tensor,
        text: TextKeysValues,
        steps: Sequence[DenoisingStep],
        window: WindowFP8 | None = None,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """The work of a begun chunk on the device: what a graph records. Returns x0."""
        x = noise[0]
        windows = [window if number in self.fp8_passes else None for number in range(len(steps) + 1)]
        for number, step in enumerate(steps):
            with nvtx_range(f"step {number}"):
                tokens = self.model.forward_chunk(
                    x, step.modulation, text, cache, plan, window=windows[number]
                )
                fresh = None if step.next_sigmas is None else noise[number + 1]
                x = self.model.ops.flow_step(tokens, x, step.sigmas, fresh, step.next_sigmas)
            if on_step is not None:
                replaced = on_step(number, step.timestep, x)
                x = x if replaced is None else ordinary(replaced)
        self._context_pass(cache, plan, x, text, windows[-1])
        return x

    def _graph(
        self,
        cache: StreamingKVCache,
        plan: CachePlan,
        noise: Tensor,
        text: TextKeysValues,
        window: WindowFP8 | None,
    ) -> CapturedCall[Tensor] | None:
        """The recorded program for these inputs, which are then in its static tensors; None for one that is
        to run op by op."""
        if not self.graphs or not self._is_steady(cache, plan):
            return None
        graph = self._graph_by_cache.get(cache)
        if graph is None:
            self._graph_by_cache[cache] = ChunkGraph(noise, text)
            return None
        graph.fill(noise, text)
        if graph.call is None:
            cache.show(plan)  # what is recorded reads where it puts the integers
            static = (cache, plan, graph.noise, graph.text, self.steps, window)
            pool = self._shared_pool()
            graph.call = CapturedCall(lambda: self._chunk(*static), None, self.model.device, pool)
        return graph.call

    def _shared_pool(self) -> GraphPool:
        """The pool of this runner's graphs; a new one where none is left that holds the old one open."""
        if self._pool is None or all(graph.call is None for graph in self._graph_by_cache.values()):
            self._pool = graph_pool()
        return self._pool

    @torch.no_grad()
    def prefill(
        self, cache: StreamingKVCache, plan: CachePlan, latents: Tensor, text: TextKeysValues
    ) -> None:
        """Take the planned chunk as given: only the context pass runs. latents: [B, C, F, h, w], clean."""
        cache.begin_chunk(plan)
        self._context_pass(cache, plan, latents, text)
        cache.commit(plan)

    @torch.no_grad()
    def recache(self, cache: StreamingKVCache, frames: dict[int, Tensor], text: TextKeysValues) -> None:
        """WanDiT.recache at this runner's context timestep."""
        self.model.recache(frames, self.context_modulation, text, cache)

    def _context_pass(
        self,
        cache: StreamingKVCache,
        plan: CachePlan,
        x0: Tensor,
        text: TextKeysValues,
        window: WindowFP8 | None = None,
    ) -> None:
        with nvtx_range("context pass"):
            self.model.context_pass(x0, self.context_modulation, text, cache, plan, window)
