"""ChunkRunner: one chunk is one program: evict, re-phase, denoise, context pass.

The program is `_chunk`. It does the device's work alone: every decision is an integer of the plan, made
before, and all else that it reads lies in tensors. So it runs op by op, or is recorded as a CUDA graph and
replayed: the same kernels on the same numbers either way.

Recorded is the steady state, where the window is full: programs then differ only in the slot they write, so a
cache has one for every slot of its window, two in the published setting. A program runs op by op when its
slot first comes up, which builds every kernel, handle and workspace, and is recorded the second time:
recording runs nothing, so there is no state to put back. The chunks that fill the window always run op by op:
each comes once in a video, so that recording it would cost the launches it could save, and the first frame
would wait for it.

Merged passes: the context pass of a chunk runs together with the first step of the next, and both share the
products with the weights. It is pending in the cache until then, or until `flush`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rfengine.cache.kv_cache import EMPTY, CachePlan, PendingContext, StreamingKVCache
from rfengine.cuda_graph import CapturedCall, GraphPool, graph_pool
from rfengine.host_state import ordinary
from rfengine.models.dit import Modulation, TextKeysValues, WanDiT
from rfengine.nvtx_ranges import nvtx_range
from rfengine.schedule import FlowSchedule

StepCallback = Callable[[int, float, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class ChunkInputs:
    """What one chunk is made from. noise: [num_steps, B, C, F, h, w]; context: the pass that the chunk before
    still owes, or None."""

    plan: CachePlan
    noise: Tensor
    text: TextKeysValues
    context: PendingContext | None


class ChunkGraphs:
    """The recorded programs of one cache, and the static tensors that all of them read.

    calls: program by the slot it writes and the slot of its merged context pass, EMPTY without one; None
    stands for a program that has run op by op once.
    """

    def __init__(self, inputs: ChunkInputs) -> None:
        self.calls: dict[tuple[int, int], CapturedCall[Tensor] | None] = {}
        self._noise = inputs.noise.clone()
        self._clean = torch.zeros_like(inputs.noise[0])
        self._text = TextKeysValues(inputs.text.keys.clone(), inputs.text.values.clone())
        self._text_source = inputs.text

    def fill(self, inputs: ChunkInputs) -> ChunkInputs:
        """The inputs in the static tensors; a text that lies there already is not copied again."""
        self._noise.copy_(inputs.noise)
        if self._text_source is not inputs.text:
            self._text.keys.copy_(inputs.text.keys)
            self._text.values.copy_(inputs.text.values)
            self._text_source = inputs.text
        context = None
        if inputs.context is not None:
            self._clean.copy_(inputs.context.latents)
            context = PendingContext(inputs.context.plan, self._clean, self._text)
        return ChunkInputs(inputs.plan, self._noise, self._text, context)


class ChunkRunner:
    """Runs chunks of one model. The cache and the text come with every call; what the runner keeps of a cache
    is its graphs, as long as the cache lives.

    graphs: record and replay, on a CUDA device. All graphs share one memory pool, so the chunks of a runner
    must not run at the same time: call it on one CUDA stream. merged_pass: see above.
    """

    def __init__(
        self, model: WanDiT, schedule: FlowSchedule, graphs: bool = False, merged_pass: bool = False
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.graphs = graphs
        self.merged_pass = merged_pass
        self.step_modulations = [self._modulation(timestep) for timestep in schedule.denoising_timesteps]
        self.context_modulation = self._modulation(schedule.context_timestep)
        both = (self.context_modulation, self.step_modulations[0])
        self._merged_modulation = Modulation(
            torch.cat([table.layers for table in both], dim=2),
            torch.cat([table.head for table in both], dim=1),
        )
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
        which is the caller's. With merged_pass those keys and values are left to the next call or to flush.

        noise: [num_steps, B, C, F, h, w], the initial noise and the fresh noise of every later step.
        on_step(step, timestep, latents) is called after each denoising step with what the next one starts
        from; a tensor it returns takes their place. Such a chunk is not replayed from a graph.
        A call that fails before commit can be repeated with the same plan: nothing is folded into the sink
        twice. One that fails inside a merged pass can not, and a repeated call says so (RuntimeError).
        """
        if noise.shape[0] != self.num_steps:
            raise ValueError(
                f"noise holds {noise.shape[0]} draws; {self.num_steps} denoising steps need as many"
            )
        with nvtx_range("chunk"):
            if cache.pending is not None and cache.pending.text is not text:
                self.flush(cache)
            inputs = ChunkInputs(cache.open_chunk(plan), noise, text, cache.pending)
            graph = self._graph(cache, inputs) if on_step is None else None
            if graph is None:
                if inputs.context is not None:
                    cache.mark_torn()
                x0 = self._chunk(cache, inputs, cache.mark_begun, on_step)
            else:
                x0 = graph.replay().clone()
                cache.mark_begun(plan)
        cache.commit(plan, PendingContext(plan, x0.clone(), text) if self.merged_pass else None)
        return x0

    def _chunk(
        self,
        cache: StreamingKVCache,
        inputs: ChunkInputs,
        on_begun: Callable[[CachePlan], None] | None = None,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """The chunk's whole work on the device: what a graph records. Returns x0.

        on_begun is called when eviction and re-phasing, which can not be repeated, are done.
        """
        plan, x, sigmas = inputs.plan, inputs.noise[0], self.schedule.denoising_sigmas
        tokens = self._begin(cache, inputs)
        if on_begun is not None:
            on_begun(plan)
        for step, modulation in enumerate(self.step_modulations):
            with nvtx_range(f"step {step}"):
                if step or tokens is None:
                    tokens = self.model.forward_chunk(x, modulation, inputs.text, cache, plan)
                last = step + 1 == self.num_steps
                fresh, next_sigma = (None, 0.0) if last else (inputs.noise[step + 1], sigmas[step + 1])
                x = self.model.ops.flow_step(tokens, x, sigmas[step], fresh, next_sigma)
            if on_step is not None:
                replaced = on_step(step, self.schedule.denoising_timesteps[step], x)
                x = x if replaced is None else ordinary(replaced)
        if not self.merged_pass:
            self._context_pass(cache, plan, x, inputs.text)
        return x

    def _begin(self, cache: StreamingKVCache, inputs: ChunkInputs) -> Tensor | None:
        """Evict and re-phase. With a context pass to merge, layer by layer inside it: the first step's tokens
        come with it then."""
        if inputs.context is None:
            with nvtx_range("evict"):
                cache.evict(inputs.plan)
            return None
        with nvtx_range("context pass"):
            return self.model.merged_pass(
                torch.cat((inputs.context.latents, inputs.noise[0]), dim=2),
                self._merged_modulation, inputs.text, cache, inputs.plan, inputs.context.plan,
            )  # fmt: skip

    def _graph(self, cache: StreamingKVCache, inputs: ChunkInputs) -> CapturedCall[Tensor] | None:
        """The recorded program for these inputs, which then lie in its static tensors; None for one that is
        to run op by op."""
        if not self.graphs or not inputs.plan.evicts:
            return None
        graphs = self._graphs_by_cache.get(cache)
        if graphs is None:
            graphs = self._graphs_by_cache[cache] = ChunkGraphs(inputs)
        program = (inputs.plan.slot, EMPTY if inputs.context is None else inputs.context.plan.slot)
        if program not in graphs.calls:
            graphs.calls[program] = None
            return None
        static, call = graphs.fill(inputs), graphs.calls[program]
        if call is None:
            pool = self._shared_pool()
            call = CapturedCall(lambda: self._chunk(cache, static), None, self.model.device, pool)
            graphs.calls[program] = call
        return call

    def _shared_pool(self) -> GraphPool:
        """The pool of this runner's graphs; a new one where none is left that holds the old one open."""
        held = (call for graphs in self._graphs_by_cache.values() for call in graphs.calls.values())
        if self._pool is None or all(call is None for call in held):
            self._pool = graph_pool()
        return self._pool

    @torch.no_grad()
    def flush(self, cache: StreamingKVCache) -> None:
        """Run the context pass that a merged chunk left pending; does nothing where there is none.

        A stream calls it before a snapshot, a change of the prompt and recache.
        """
        if cache.pending is not None:
            pending = cache.pending
            cache.show(pending.plan)
            self._context_pass(cache, pending.plan, pending.latents, pending.text)
            cache.pending = None

    @torch.no_grad()
    def prefill(
        self, cache: StreamingKVCache, plan: CachePlan, latents: Tensor, text: TextKeysValues
    ) -> None:
        """Take the planned chunk as given: only the context pass runs. latents: [B, C, F, h, w], clean."""
        self.flush(cache)
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
        self.flush(cache)
        cache.slot_chunks[sink : sink + len(window)] = window
        for place, chunk in enumerate(window):
            plan = cache.begin_rewrite(sink + place)
            self._context_pass(cache, plan, chunks[chunk], text)

    def _context_pass(
        self, cache: StreamingKVCache, plan: CachePlan, x0: Tensor, text: TextKeysValues
    ) -> None:
        with nvtx_range("context pass"):
            self.model.context_pass(x0, self.context_modulation, text, cache, plan)
