"""FLOPs and bytes of one chunk, part by part, from the configuration alone.

Every part is counted as one kernel that reads its inputs once and writes its results once; biases, residual
additions of the VAE and quantisation belong to the kernel before them. GELU is a pass of its own and history
is copied in front of temporal convolutions, as the code does it now. Modulation is made when the model is
loaded and is in no chunk. With FP8 linears their operands have one byte and their results two; with FP8
throughout, so have the convolutions, and the attention multiplies in FP8 what the cache holds in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rfengine.cache.eviction import is_fused
from rfengine.cache.sink_policy import EMPTY, CachePlan, frames_after, plan_frames
from rfengine.config import WanConfig
from rfengine.costs.ops import BYTES, HALF, resident_bytes
from rfengine.costs.shapes import Shapes
from rfengine.costs.vae import VAEWork, decode_work

Precision = Literal["bf16", "fp8-linears", "fp8"]
GROUPS = (
    "linears",
    "self-attention",
    "cross-attention",
    "row kernels",
    "eviction",
    "VAE decode",
    "copies",
)
PRODUCTS = ("linears", "self-attention", "cross-attention", "VAE decode")


@dataclass(frozen=True)
class Part:
    """Calls that share a name. flops: two for each multiply-add. is_fp8: they are done at the rate of FP8.
    decodes: only a chunk that is decoded has it."""

    group: str
    name: str
    flops: int = 0
    bytes: int = 0
    is_fp8: bool = False
    decodes: bool = False


@dataclass(frozen=True)
class Runs:
    """`count` runs of the transformer over `frames` latent frames, each of which sees `seen`."""

    count: int
    frames: int
    seen: int


@dataclass(frozen=True)
class ChunkWork:
    """One chunk of one configuration. index counts chunks from 0; from the first that evicts on they are
    alike, but for folds that wrap around the sink or the window.

    A first chunk is taken as one of chunk_frames in the steps of the others. shapes.config holds the size in
    pixels.
    """

    shapes: Shapes
    index: int
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ValueError(f"the chunk is {self.index}; chunks count from 0")

    @classmethod
    def steady(cls, shapes: Shapes, precision: Precision = "bf16") -> ChunkWork:
        """The first chunk that evicts another."""
        return cls(shapes, shapes.config.cache.filling_chunks, precision)

    @property
    def runs(self) -> tuple[Runs, ...]:
        """Runs of the transformer: every denoising step and the context pass; in a rolling schedule one over
        all chunks in flight, and the context pass."""
        cache, schedule = self.shapes.config.cache, self.shapes.config.schedule
        seen = min(cache.frames_before(self.index + 1), cache.resident_frames)
        if schedule.rolling == "none":
            return (Runs(len(schedule.denoising_steps) + 1, cache.chunk_frames, seen),)
        past = min(cache.frames_before(self.index), cache.resident_frames)
        return Runs(1, cache.joint_frames, past + cache.joint_frames), Runs(1, cache.chunk_frames, seen)

    @property
    def reads(self) -> tuple[Runs, ...]:
        """The runs as self-attention reads the window: in a causal schedule each chunk in flight sees those
        before it alone."""
        if self.shapes.config.schedule.rolling != "causal":
            return self.runs
        joint, context = self.runs
        size, past = context.frames, joint.seen - joint.frames
        ends = range(size, joint.frames + 1, size)
        return *(Runs(joint.count, size, past + end) for end in ends), context

    @property
    def plan(self) -> CachePlan:
        """What the cache does for it."""
        cache = self.shapes.config.cache
        held, first = [EMPTY] * cache.window_frames, 0
        for chunk in range(self.index + 1):
            frames = cache.chunk_frames if chunk else cache.first_chunk
            plan = plan_frames(cache, held, chunk, first, frames)
            held, first = frames_after(cache, held, plan.slots, first), first + frames
        return plan

    @property
    def chunk_runs(self) -> int:
        """Rows of a chunk that the runs take, in chunks."""
        return sum(runs.count * runs.frames for runs in self.runs) // self.shapes.frames

    @property
    def layer_calls(self) -> int:
        """Calls of a layer with the rows of one chunk."""
        return self.chunk_runs * self.shapes.layers

    @property
    def visible_tokens(self) -> int:
        """Keys that a query of this chunk sees in its last run."""
        return self.runs[-1].seen * self.shapes.grid.frame_tokens

    @property
    def evicts(self) -> bool:
        return self.index >= self.shapes.config.cache.filling_chunks

    @property
    def pixel_frames(self) -> int:
        """Frames that this chunk shows."""
        grid, frames = self.shapes.grid, self.shapes.frames
        return grid.pixel_frames(frames) if self.index == 0 else frames * grid.temporal_stride

    @property
    def linear_bytes(self) -> int:
        """Bytes of an operand of the blocks' linears."""
        return HALF if self.precision == "bf16" else 1

    def parts(self) -> list[Part]:
        """All parts, in the order of GROUPS; a stage of the VAE is as many parts as it has layers."""
        return [
            *self._linears(),
            *self._attention(),
            *self._row_kernels(),
            *self._eviction(),
            *self._decoding(),
        ]

    @property
    def pass_weights(self) -> int:
        """Parameters of the blocks' linears that one pass reads."""
        linears = block_linears(self.shapes.config.model).values()
        return self.shapes.layers * sum(inputs * outputs for inputs, outputs in linears)

    def _linears(self) -> Iterator[Part]:
        model, dim, layers = self.shapes.config.model, self.shapes.dim, self.shapes.layers
        patch = model.patch_size[1] * model.patch_size[2]
        for runs in self.runs:
            tokens = runs.frames * self.shapes.grid.frame_tokens
            for name, (inputs, outputs) in block_linears(model).items():
                size = (tokens, inputs, outputs)
                yield _linear("linears", name, size, runs.count * layers, self.linear_bytes)
            yield _linear("linears", "patch embedding", (tokens, patch * model.in_dim, dim), runs.count)
            yield _linear("linears", "head", (tokens, dim, patch * model.out_dim), runs.count)

    def _attention(self) -> Iterator[Part]:
        frame_tokens = self.shapes.grid.frame_tokens
        for runs in self.reads:
            yield self._attended("self-attention", "sink_window_attention", runs, runs.seen * frame_tokens)
        for runs in self.runs:
            text = self.shapes.config.model.text_len
            yield self._attended("cross-attention", "clip_attention", runs, text)

    def _attended(self, group: str, name: str, runs: Runs, keys: int) -> Part:
        dim, tokens = self.shapes.dim, runs.frames * self.shapes.grid.frame_tokens
        calls = runs.count * self.shapes.layers
        moved = (HALF * (tokens + 2 * keys) + self.linear_bytes * tokens) * dim
        return Part(group, name, 4 * tokens * keys * dim * calls, moved * calls, self.precision == "fp8")

    def _row_kernels(self) -> Iterator[Part]:
        shapes, calls = self.shapes, self.layer_calls
        fp8 = "" if self.precision == "bf16" else "_fp8"
        keeps_raw = shapes.layers if shapes.config.cache.positions == "relative" else 0
        for name, case, count in (
            ("adaptive_layer_norm", f"adaptive_layer_norm{fp8}", self.chunk_runs),
            ("qk_norm_rope_write", "qk_norm_rope_write", calls - keeps_raw),
            ("qk_norm_rope_write, raw keys too", "qk_norm_rope_write_raw", keeps_raw),
            # the FP8 forms of the gated norms move the same, adaptive or affine
            ("gated_residual_affine_norm", f"gated_residual_adaptive_norm{fp8}", calls),
            ("rms_norm", "rms_norm", calls),
            ("gated_residual_adaptive_norm", f"gated_residual_adaptive_norm{fp8}", 2 * calls),
        ):
            if count:
                yield Part("row kernels", name, bytes=BYTES[case](shapes) * count)
        elements = shapes.tokens * shapes.config.model.ffn_dim * calls
        yield Part("row kernels", "GELU", bytes=elements * (HALF + self.linear_bytes))

    def _eviction(self) -> Iterator[Part]:
        cache = self.shapes.config.cache
        if not self.evicts or cache.positions == "absolute":
            return
        form, folds = "" if cache.sink_precision == "split" else "_plain", self.plan.folds
        if is_fused(cache, folds):
            yield Part("eviction", "evict_and_rephase", bytes=BYTES[f"evict_and_rephase{form}"](self.shapes))
            return
        if folded := sum(fold.count for fold in folds):
            moved = BYTES[f"ema_evict{form}"](self.shapes) * folded // cache.chunk_frames
            yield Part("eviction", "ema_evict", bytes=moved)
        if cache.eviction == "similarity":
            yield Part("eviction", "frame scores", bytes=resident_bytes(self.shapes))
        yield Part("eviction", "rephase_keys", bytes=BYTES["rephase_keys"](self.shapes))

    def _decoding(self) -> Iterator[Part]:
        shapes, fp8 = self.shapes, self.precision == "fp8"
        work = decode_work(shapes.config.vae, shapes.grid, shapes.frames, self.index == 0)
        yield from _vae_parts(work, fp8)
        flow = BYTES["flow_step"](shapes)
        yield Part("copies", "flow_step", bytes=flow * (self.chunk_runs - 1))
        copied = HALF * work.copied_elements
        yield Part("copies", "VAE history and upsampling", bytes=copied, decodes=True)
        pixels = self.pixel_frames * shapes.grid.height * shapes.grid.width
        packed = BYTES["frame_pack"](shapes) * pixels // shapes.pixels
        yield Part("copies", "frame_pack", bytes=packed, decodes=True)


def block_linears(model: WanConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linears of one block that run in every pass."""
    dim, ffn_dim = model.dim, model.ffn_dim
    return {
        "self-attention q, k, v": (dim, 3 * dim),
        "self-attention out": (dim, dim),
        "cross-attention q": (dim, dim),
        "cross-attention out": (dim, dim),
        "feed-forward in": (dim, ffn_dim),
        "feed-forward out": (ffn_dim, dim),
    }


def prompt_parts(model: WanConfig) -> list[Part]:
    """What the transformer does once for each prompt: embed the text, project it to keys and values."""
    rows, dim = model.text_len, model.dim
    group = "once a prompt"
    return [
        _linear(group, "text embedding in", (rows, model.text_dim, dim), 1),
        _linear(group, "text embedding out", (rows, dim, dim), 1),
        _linear(group, "cross-attention k, v", (rows, dim, 2 * dim), model.num_layers),
    ]


def _linear(group: str, name: str, size: tuple[int, int, int], calls: int, operand_bytes: int = HALF) -> Part:
    """size: rows, inputs, outputs."""
    rows, inputs, outputs = size
    moved = (rows + outputs) * inputs * operand_bytes + rows * outputs * HALF
    return Part(group, name, 2 * rows * inputs * outputs * calls, moved * calls, operand_bytes < HALF)


def _vae_parts(work: VAEWork, fp8: bool) -> Iterator[Part]:
    operand = 1 if fp8 else HALF
    for path, product in work.products.items():
        moved = operand * product.read_elements + HALF * product.written_elements
        yield Part("VAE decode", work.stages[path], product.flops, moved, fp8, decodes=True)
    for path, elements in work.norm_elements.items():
        moved = (HALF + operand) * elements
        yield Part("VAE decode", f"{work.stages[path]}, norms", bytes=moved, decodes=True)
