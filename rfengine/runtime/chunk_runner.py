"""ChunkRunner: one chunk is evict, re-phase, denoise, context pass.

The program is `_chunk`, all that follows the start of the chunk in the cache. It does the device's work
alone: every decision is an integer of the plan, made before, and all else that it reads is in tensors. So it
runs op by op, or is recorded as a CUDA graph and replayed: the same kernels on the same numbers either way.

Recorded is the steady state, where the window is full: programs then differ only in the slot they write, so a
cache has one for every slot of its window, two in the published setting. A slot's first chunk runs op by op,
which builds every kernel, handle and workspace; its second is captured. Capture executes nothing, so no state
needs restoring. The chunks that fill the window always run op by op: each comes once in a video, so that
recording it would cost the launches it could save, and the first frame would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rfengine.cache.kv_cache import CachePlan, StreamingKVCache
from rfengine.cuda_graph import CapturedCall, GraphPool, graph_pool
from rfengine.host_state import ordinary
from rfengine.models.dit import Modulation, TextKeysValues, WanDiT
from rfengine.nvtx_ranges import nvtx_range
from rfengine.schedule import FlowSchedule

StepCallback = Callable[[int, float, Tensor], Tensor | None]


class ChunkGraphs:
    """The recorded programs of one cache, and the static tensors that all of them read.

    calls: program by the slot it writes; None stands for a program that has run op by op once.
    """

    def __init__(self, noise: Tensor, text: TextKeysValues) -> None:
        self.calls: dict[int, CapturedCall[Tensor] | None] = {}
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
    is its graphs, as long as the cache lives.

    graphs: record and replay, on a CUDA device. All graphs share one memory pool, so the chunks of a runner
    must not run at the same time: call it on one CUDA stream.
    """

    def __init__(self, model: WanDiT, schedule: FlowSchedule, graphs: bool = False) -> None:
        self.model = model
        self.schedule = schedule
        self.graphs = graphs
        self.step_modulations = [self._modulation(timestep) for timestep in schedule.denoising_timesteps]
        self.context_modulation = self._modulation(schedule.context_timestep)
        self._graphs_by_cache: WeakKeyDictionary[StreamingKVCache, ChunkGraphs] = WeakKeyDictionary()
        self._pool: GraphPool | None = None

    @torch.no_grad()
    def _modulation(self, timestep: float) -> Modulation:
        return self.model.modulation(
            torch.tensor([[timestep]], dtype=torch.float32, device=self.model.device)
        )

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
        """Denoise the planned chunk, write its clean keys and values, commit it. Returns x0 [B, C, F, h, w],
        which is the caller's.

        noise: [num_steps, B, C, F, h, w], the initial noise and the fresh noise of every later step.
        on_step(step, timestep, latents) is called after each denoising step with what the next one starts
        from; a tensor it returns takes their place. Such a chunk is not replayed from a graph.
        A call that fails before commit can be repeated with the same plan: nothing is folded into the sink
        twice.
        """
        if noise.shape[0] != self.num_steps:
            raise ValueError(
                f"noise holds {noise.shape[0]} draws; {self.num_steps} denoising steps need as many"
            )
        with nvtx_range("chunk"):
            # a chunk that is repeated may have failed before its kernels were built
            eager = on_step is not None or cache.begun_chunk == plan.chunk
            graph = None if eager else self._graph(cache, plan, noise, text)
            with nvtx_range("evict"):
                cache.begin_chunk(plan)
            x0 = graph.replay().clone() if graph else self._chunk(cache, plan, noise, text, on_step)
        cache.commit(plan)
        return x0

    def _chunk(
        self,
        cache: StreamingKVCache,
        plan: CachePlan,
        noise: Tensor,
        text: TextKeysValues,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """The work of a begun chunk on the device: what a graph records. Returns x0."""
        x, sigmas = noise[0], self.schedule.denoising_sigmas
        for step, modulation in enumerate(self.step_modulations):
            with nvtx_range(f"step {step}"):
                tokens = self.model.forward_chunk(x, modulation, text, cache, plan)
                last = step + 1 == self.num_steps
                fresh, next_sigma = (None, 0.0) if last else (noise[step + 1], sigmas[step + 1])
                x = self.model.ops.flow_step(tokens, x, sigmas[step], fresh, next_sigma)
            if on_step is not None:
                replaced = on_step(step, self.schedule.denoising_timesteps[step], x)
                x = x if replaced is None else ordinary(replaced)
        self._context_pass(cache, plan, x, text)
        return x

    def _graph(
        self, cache: StreamingKVCache, plan: CachePlan, noise: Tensor, text: TextKeysValues
    ) -> CapturedCall[Tensor] | None:
        """The recorded program for these inputs, which are then in its static tensors; None for one that is
        to run op by op."""
        if not self.graphs or not plan.evicts:
            return None
        graphs = self._graphs_by_cache.get(cache)
        if graphs is None:
            graphs = self._graphs_by_cache[cache] = ChunkGraphs(noise, text)
        if plan.slot not in graphs.calls:
            graphs.calls[plan.slot] = None
            return None
        graphs.fill(noise, text)
        if graphs.calls[plan.slot] is None:
            static = (cache, plan, graphs.noise, graphs.text)
            pool = self._shared_pool()
            call = CapturedCall(lambda: self._chunk(*static), None, self.model.device, pool)
            graphs.calls[plan.slot] = call
        return graphs.calls[plan.slot]

    def _shared_pool(self) -> GraphPool:
        """The pool of this runner's graphs; a new one where none is left that holds the old one open."""
        held = (call for graphs in self._graphs_by_cache.values() for call in graphs.calls.values())
        if self._pool is None or all(call is None for call in held):
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
    def recache(self, cache: StreamingKVCache, chunks: dict[int, Tensor], text: TextKeysValues) -> None:
        """WanDiT.recache at this runner's context timestep."""
        self.model.recache(chunks, self.context_modulation, text, cache)

    def _context_pass(
        self, cache: StreamingKVCache, plan: CachePlan, x0: Tensor, text: TextKeysValues
    ) -> None:
        with nvtx_range("context pass"):
            self.model.context_pass(x0, self.context_modulation, text, cache, plan)
