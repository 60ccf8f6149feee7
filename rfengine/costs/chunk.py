"""FLOPs and bytes of one chunk, part by part, from the configuration alone.

Every part is counted as one kernel that reads its inputs once and writes its results once; biases, residual
additions of the VAE and quantisation belong to the kernel before them. History is copied in front of temporal
convolutions, as the code does it now. Modulation is made when the model is loaded and is in no chunk.

The feed-forward's GELU is in the epilogue of its product and no pass of its own: in 16 bits in that of
cuBLASLt, the default on CUDA, and in Triton's; in FP8 in Triton's, which writes one byte and a scale for each
row. cuBLASLt's FP8 product, the default before autotune, has no such epilogue: it writes two bytes, and a
kernel of its own reads them and writes one, five bytes an element where one is counted.

In FP8 every product of the blocks is in e4m3, those too that a table of `rfengine calibrate` leaves out.
Norms write e4m3 for the products that read them, but for the one before the head. Attention is in 16 bits,
and its result is rounded as the product reads it; with "fp8-attention" a chunk that evicts attends in FP8,
over copies of the window, in all passes but those of RuntimeConfig.sixteen_bit_passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rfengine.cache.eviction import is_fused
from rfengine.cache.sink_policy import EMPTY, CachePlan, frames_after, plan_frames
from rfengine.config import WanConfig
from rfengine.costs.ops import (
    BYTE,
    BYTES,
    FROM_NORM_FP8,
    GELU_ROWS_FP8,
    HALF,
    HEADS_FP8,
    SINGLE,
    SIXTEEN_BITS,
    ProductForm,
    from_heads_fp8,
    resident_bytes,
)
from rfengine.costs.shapes import Shapes
from rfengine.costs.vae import VAEWork, decode_work
from rfengine.tensor_parallel import TensorParallel

Precision = Literal["bf16", "fp8", "fp8-attention"]  # those of RuntimeConfig, where bf16 is the default's too
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
    pixels, and the passes that stay in 16 bits. vae_in_fp8: the VAE's large convolutions are in FP8. ranks:
    those that hold the transformer together; the parts are then of one of them, which decodes alone, without
    what they send each other (splits.py).
    """

    shapes: Shapes
    index: int
    precision: Precision = "bf16"
    vae_in_fp8: bool = False
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ValueError(f"the chunk is {self.index}; chunks count from 0")

    @property
    def own(self) -> Shapes:
        """Those of the heads and feed-forward columns of one rank."""
        config = self.shapes.config
        return Shapes(replace(config, model=TensorParallel(0, self.ranks).own(config.model)))

    @classmethod
    def steady(cls, shapes: Shapes, precision: Precision = "bf16", vae_in_fp8: bool = False) -> ChunkWork:
        """The first chunk that evicts another."""
        return cls(shapes, shapes.config.cache.filling_chunks, precision, vae_in_fp8)

    @property
    def multiplies_fp8(self) -> bool:
        return self.precision != "bf16"

    @property
    def fp8_passes(self) -> tuple[int, ...]:
        """The passes of this chunk whose attention is in FP8; the context pass is the last. Raises ValueError
        for "fp8-attention" in a rolling schedule, which has none."""
        if self.precision != "fp8-attention":
            return ()
        runtime = replace(self.shapes.config.runtime, precision=self.precision)
        config = replace(self.shapes.config, runtime=runtime)  # which refuses a rolling schedule
        return config.fp8_passes if self.evicts else ()

    @property
    def _keeps_fp8(self) -> bool:
        """Whether the context pass, which leaves the chunk in the arena, attends in FP8."""
        return self.chunk_runs - 1 in self.fp8_passes

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
        linears = self._block_linears().values()
        return self.shapes.layers * sum(inputs * outputs for inputs, outputs in linears)

    def _block_linears(self) -> dict[str, tuple[int, int]]:
        return block_linears(self.shapes.config.model, self.own.config.model)

    def _by_attention(self, runs: Runs) -> Iterator[tuple[Runs, bool]]:
        """`runs` apart by whether their attention is in FP8."""
        in_fp8 = len(self.fp8_passes)
        for count, is_fp8 in ((runs.count - in_fp8, False), (in_fp8, True)):
            if count:
                yield replace(runs, count=count), is_fp8

    def _forms(self, attends_fp8: bool) -> dict[str, ProductForm]:
        """What each product of a block reads and writes, by its name in block_linears."""
        if not self.multiplies_fp8:
            return dict.fromkeys(self._block_linears(), SIXTEEN_BITS)
        return {
            "self-attention q, k, v": FROM_NORM_FP8,
            "self-attention out": from_heads_fp8(self.own.heads) if attends_fp8 else HEADS_FP8,
            "cross-attention q": FROM_NORM_FP8,
            "cross-attention out": HEADS_FP8,
            "feed-forward in": GELU_ROWS_FP8,
            "feed-forward out": FROM_NORM_FP8,
        }

    def _linears(self) -> Iterator[Part]:
        model, dim, layers = self.shapes.config.model, self.shapes.dim, self.shapes.layers
        patch = model.patch_size[1] * model.patch_size[2]
        for runs in self.runs:
            tokens = runs.frames * self.shapes.grid.frame_tokens
            for same, attends_fp8 in self._by_attention(runs):
                forms = self._forms(attends_fp8)
                for name, (inputs, outputs) in self._block_linears().items():
                    size = (tokens, inputs, outputs)
                    yield _linear("linears", name, size, same.count * layers, forms[name])
            yield _linear("linears", "patch embedding", (tokens, patch * model.in_dim, dim), runs.count)
            yield _linear("linears", "head", (tokens, dim, patch * model.out_dim), runs.count)

    def _attention(self) -> Iterator[Part]:
        frame_tokens = self.shapes.grid.frame_tokens
        for reads in self.reads:
            for runs, is_fp8 in self._by_attention(reads):
                yield self._attended("self-attention", runs, runs.seen * frame_tokens, is_fp8)
        for runs in self.runs:
            yield self._attended("cross-attention", runs, self.shapes.config.model.text_len)

    def _attended(self, group: str, runs: Runs, keys: int, is_fp8: bool = False) -> Part:
        """In FP8 the result has a scale for each token and head."""
        dim, tokens = self.own.dim, runs.frames * self.shapes.grid.frame_tokens
        name = "sink_window_attention" if group == "self-attention" else "clip_attention"
        moved = 2 * (tokens + keys) * dim * (BYTE if is_fp8 else HALF)
        if is_fp8:
            name, moved = f"{name}_fp8", moved + tokens * self.own.heads * SINGLE
        calls = runs.count * self.shapes.layers
        return Part(group, name, 4 * tokens * keys * dim * calls, moved * calls, is_fp8)

    def _row_kernels(self) -> Iterator[Part]:
        fp8 = "_fp8" if self.multiplies_fp8 else ""
        before_head = self.chunk_runs if fp8 else 0  # the head is in 16 bits
        of_heads = ("rms_norm", "qk_norm_rope")
        for name, case, count in (
            (f"adaptive_layer_norm{fp8}", f"adaptive_layer_norm{fp8}", self.chunk_runs),
            *self._key_writes(),
            # adaptive or affine, the gated norms move the same
            (f"gated_residual_affine_norm{fp8}", f"gated_residual_adaptive_norm{fp8}", self.layer_calls),
            ("rms_norm", "rms_norm", self.layer_calls),
            (
                f"gated_residual_adaptive_norm{fp8}",
                f"gated_residual_adaptive_norm{fp8}",
                2 * self.layer_calls - before_head,
            ),
            ("gated_residual_adaptive_norm", "gated_residual_adaptive_norm", before_head),
        ):
            if count:
                shapes = self.own if case.startswith(of_heads) else self.shapes
                yield Part("row kernels", name, bytes=BYTES[case](shapes) * count)

    def _key_writes(self) -> Iterator[tuple[str, str, int]]:
        """What norms and rotates queries and keys and writes the window: name of the part, of its bytes, and
        calls. The context pass writes the arena in any case, the others in FP8 the copies alone."""
        layers = self.shapes.layers
        keeps_raw = self.shapes.config.cache.positions == "relative"
        context = self._keeps_fp8
        steps = layers * (len(self.fp8_passes) - context)
        raw = layers if keeps_raw and not context else 0
        name = "qk_norm_rope_write"
        yield name, name, self.layer_calls - steps - layers * context - raw
        yield f"{name}, raw keys too", f"{name}_raw", raw
        yield f"{name}_fp8", f"{name}_fp8", steps
        kept = "raw" if keeps_raw else "arena"
        yield f"{name}_fp8, arena too", f"{name}_fp8_{kept}", layers * context

    def saved_by_fusing(self) -> list[Part]:
        """The bytes that it saves to round operands to e4m3 in the kernels that make or read them, against
        a pass of its own for every operand, which reads two bytes an element and writes one. Scales of rows
        are written and read either way.
        """
        if not self.multiplies_fp8:
            return []
        written = (HALF + HALF + BYTE) - BYTE  # in 16 bits, by the pass, against one byte at once
        read = (HALF + BYTE + BYTE) - HALF  # by the pass, and what it wrote, against 16 bits at once
        rows, inner = self.shapes.chunk * self.layer_calls, self.own.config.model.ffn_dim
        attends = self.own.chunk * self.shapes.layers * len(self.fp8_passes)
        kept = self.own.chunk * self.shapes.layers * self._keeps_fp8
        saved = {
            "norms": 3 * rows * written,
            "GELU": rows // self.shapes.dim * inner * written,
            "attention results": (2 * rows // self.ranks - attends) * read + attends * written,
            # the arena of a context pass has keys and values in two bytes too
            "queries, keys and values": 3 * attends * written - 2 * kept * HALF,
        }
        parts = [Part("rounding", name, bytes=moved) for name, moved in saved.items() if moved]
        if self.vae_in_fp8:
            work = self._decode_work()
            elements = sum(count for path, count in work.norm_elements.items() if path in work.large)
            parts.append(Part("rounding", "norms of the VAE", bytes=elements * written, decodes=True))
        return parts

    def _eviction(self) -> Iterator[Part]:
        cache = self.shapes.config.cache
        if self.fp8_passes:
            yield Part("eviction", "window_fp8", bytes=BYTES["window_fp8"](self.own))
        if not self.evicts or cache.positions == "absolute":
            return
        form, folds = "" if cache.sink_precision == "split" else "_plain", self.plan.folds
        if is_fused(cache, folds):
            yield Part("eviction", "evict_and_rephase", bytes=BYTES[f"evict_and_rephase{form}"](self.own))
            return
        if folded := sum(fold.count for fold in folds):
            moved = BYTES[f"ema_evict{form}"](self.own) * folded // cache.chunk_frames
            yield Part("eviction", "ema_evict", bytes=moved)
        if cache.eviction == "similarity":
            yield Part("eviction", "frame scores", bytes=resident_bytes(self.own))
        yield Part("eviction", "rephase_keys", bytes=BYTES["rephase_keys"](self.own))

    def _decoding(self) -> Iterator[Part]:
        shapes, work = self.shapes, self._decode_work()
        yield from _vae_parts(work, work.large if self.vae_in_fp8 else frozenset())
        flow = BYTES["flow_step"](shapes)
        yield Part("copies", "flow_step", bytes=flow * (self.chunk_runs - 1))
        copied = HALF * work.copied_elements
        yield Part("copies", "VAE history and upsampling", bytes=copied, decodes=True)
        pixels = self.pixel_frames * shapes.grid.height * shapes.grid.width
        packed = BYTES["frame_pack"](shapes) * pixels // shapes.pixels
        yield Part("copies", "frame_pack", bytes=packed, decodes=True)

    def _decode_work(self) -> VAEWork:
        shapes = self.shapes
        return decode_work(shapes.config.vae, shapes.grid, shapes.frames, self.index == 0)


def block_linears(model: WanConfig, own: WanConfig | None = None) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linears of one block that run in every pass. own: of one rank."""
    own = own or model
    dim, heads, columns = model.dim, own.dim, own.ffn_dim
    return {
        "self-attention q, k, v": (dim, 3 * heads),
        "self-attention out": (heads, dim),
        "cross-attention q": (dim, heads),
        "cross-attention out": (heads, dim),
        "feed-forward in": (dim, columns),
        "feed-forward out": (columns, dim),
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


def _linear(
    group: str, name: str, size: tuple[int, int, int], calls: int, form: ProductForm = SIXTEEN_BITS
) -> Part:
    """size: rows, inputs, outputs."""
    rows, inputs, outputs = size
    return Part(group, name, 2 * rows * inputs * outputs * calls, form.bytes(*size) * calls, form.is_fp8)


def _vae_parts(work: VAEWork, in_fp8: frozenset[str]) -> Iterator[Part]:
    """in_fp8: paths of convolutions with operands of one byte, and of the norms that write them."""
    for path, product in work.products.items():
        is_fp8 = path in in_fp8
        moved = (BYTE if is_fp8 else HALF) * product.read_elements + HALF * product.written_elements
        yield Part("VAE decode", work.stages[path], product.flops, moved, is_fp8, decodes=True)
    for path, elements in work.norm_elements.items():
        moved = (HALF + (BYTE if path in in_fp8 else HALF)) * elements
        yield Part("VAE decode", f"{work.stages[path]}, norms", bytes=moved, decodes=True)
