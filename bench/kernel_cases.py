"""Every kernel with inputs of the engine's own shapes: what is compiled for the report, checked and timed.

Bytes are those a kernel has to move once, FLOPs those it has to do: its floor. Shapes: L layers, B batch (1),
T tokens of a chunk, S tokens of the window, H heads, E head dim, D dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bench.kernel_inputs as inputs
from bench.kernel_inputs import Arguments, Draw
from rfengine.costs.ops import (
    BYTE,
    BYTES,
    FROM_NORM_FP8,
    GELU_ROWS_FP8,
    HALF,
    HEADS_FP8,
    attention_bytes,
    attention_flops,
    attention_fp8_bytes,
    conv_bytes,
    conv_flops,
    ffn_dim,
    frame_attention_flops,
    from_heads_fp8,
    gelu_rows_fp8_bytes,
    norm_bytes,
    pack_bytes,
    pack_flops,
    phase_bytes,
    phase_flops,
    product_bytes,
    product_flops,
    product_fp8_bytes,
    row_bytes,
    time_conv_bytes,
    window_fp8_bytes,
)
from rfengine.costs.shapes import Shapes
from rfengine.ops import library_fp8, native, reference, reference_fp8, reference_fp8_attention
from rfengine.ops.backends import cudnn_causal_conv3d
from rfengine.ops.table import OPS, implementation

SCALED_MM = "torch._scaled_mm"  # with a kernel of ours behind it where the product ends in a GELU
Result = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True)
class KernelCase:
    """One call of an op at its real shape.

    op: the name, unless it says otherwise. file: of kernels/, for what is no op of its own (backward passes).
    floor_bytes, floor_flops: what has to be moved and done. results: the tensors to check, from the arguments
    after the call and what it returned. part: the arguments of what the reference computes in the check, all
    where it is None. rivals: other functions of the same arguments.
    """

    name: str
    inputs: Callable[[Shapes, Draw], Arguments]
    floor_bytes: Callable[[Shapes], int]
    floor_flops: Callable[[Shapes], int] | None = None
    op: str = ""
    file: str = ""
    backend: str = "triton"
    reference: Callable[..., Result] | None = None
    results: Callable[[Arguments, Result], tuple[Tensor, ...]] | None = None
    part: Callable[[Arguments], Arguments] | None = None
    rivals: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    is_row: bool = False  # a row kernel over a chunk, which should reach the rate of a copy
    minimum_capability: int = 80  # 89: the first with FP8; 90: with tensor descriptors

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", self.op or self.name)

    def kernel(self) -> Callable[..., Result]:
        if not self.file:
            return implementation(self.op, self.backend)
        return getattr(importlib.import_module(f"rfengine.kernels.{self.file}"), self.op)

    def meaning(self) -> Callable[..., Result]:
        """The same in plain PyTorch."""
        return self.reference or OPS[self.op].reference

    def checked(self, arguments: Arguments, returned: Result) -> tuple[Tensor, ...]:
        if self.results is not None:
            return self.results(arguments, returned)
        return returned if isinstance(returned, tuple) else (returned,)

    def checked_part(self, arguments: Arguments) -> Arguments:
        return arguments if self.part is None else self.part(arguments)

    def __str__(self) -> str:
        return self.name


def _last_frame(arguments: Arguments) -> Arguments:
    """Those of a convolution for its last frame alone: all of them take seconds in float64."""
    x, weight, *rest = arguments
    past = weight.shape[2] - 1 if weight.ndim == 5 else 0
    outs = (item[-1:] if isinstance(item, Tensor) and item.ndim == 4 else item for item in rest)
    return x[x.shape[0] - 1 - past :], weight, *outs


def _of_last_frame(_: Arguments, returned: Tensor) -> tuple[Tensor, ...]:
    return (returned[-1:],)


def _written_chunk(arguments: Arguments, returned: Result) -> tuple[Tensor, ...]:
    """The queries, and the last tokens of each arena, where the chunk is written."""
    tokens = arguments[0].shape[1]
    return returned, *(arena[:, -tokens:] for arena in arguments[7:10] if arena is not None)


def _sinks(arguments: Arguments, _: object) -> tuple[Tensor, ...]:
    """The sink's keys and values with what rounding took from them, which is what the op is about."""
    return tuple(_whole(sink, low) for sink, low in zip(arguments[:2], arguments[2:4], strict=True))


def _whole(sink: Tensor, low: Tensor | None) -> Tensor:
    return sink if low is None else sink.double() + low.double()


def _evicted(arguments: Arguments, _: object) -> tuple[Tensor, ...]:
    raw, rotated, values, low_keys, low_values, _, sink, *_ = arguments
    pairs = ((raw, low_keys), (values, low_values))
    return rotated, *(_whole(arena[:, :, :sink], low) for arena, low in pairs)


def _fp8(norm: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The reference of an FP8 norm: row_fp8 of its last result; in float64, the truth, not rounded."""

    def rows(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor]:
        result = getattr(reference, norm)(*arguments)
        normed = result[-1] if isinstance(result, tuple) else result
        return (normed, normed.new_ones(())) if normed.dtype == torch.float64 else reference.row_fp8(normed)

    return rows


def _dequantised(_: Arguments, returned: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    values, scale = returned[-2:]
    return (values.to(scale.dtype) * scale,)


def _window_copies(arguments: Arguments, _: object) -> tuple[Tensor, ...]:
    """Means, units and copies; e4m3 as numbers."""
    mean, unit, *copies = arguments[3:7]
    return mean, unit, *(copy.double() for copy in copies)


def _written_copies(arguments: Arguments, returned: Tensor) -> tuple[Tensor, ...]:
    """The queries and what is written of a chunk, which is the last of the window."""
    keys, values, _, *arenas = arguments[11:]
    tokens, last = arguments[0].shape[1], keys.shape[1]
    written = keys[:, last - tokens :], values[..., last - tokens : last]
    return returned.double(), *(copy.double() for copy in written), *(arena[:, -tokens:] for arena in arenas)


def _attention_fp8_reference(*arguments: object) -> Tensor | tuple[Tensor, Tensor]:
    """Without the form; in float64, the truth, whose rows are not rounded."""
    *given, rows = arguments[:9]
    if arguments[0].dtype != torch.float64 or not rows:
        return reference_fp8_attention.sink_window_attention_fp8(*given, rows)
    result = reference_fp8_attention.sink_window_attention_fp8(*given)
    return result, result.new_ones(result.shape[:3])


def _attended_rows(_: Arguments, returned: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    values, scale = returned
    return (values.to(scale.dtype) * scale[..., None],)


def _as_numbers(_: Arguments, returned: Tensor) -> tuple[Tensor, ...]:
    return (returned.float(),)


def _cublaslt_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x[0], weight.t(), use_gelu=True)


def _gelu_rows_fp8(y: Tensor, row_scale: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to e4m3; in float64, the truth, not rounded."""
    is_truth, scale = y.dtype == torch.float64, reference_fp8.hidden_unit(row_scale, reach)
    values = F.gelu(y if is_truth else y.float(), approximate="tanh") / scale
    return values if is_truth else reference.to_e4m3(values), scale


def _flops_of(outputs: Callable[[Shapes], int], inner: Callable[[Shapes], int]) -> Callable[[Shapes], int]:
    return lambda s: 2 * s.tokens * outputs(s) * inner(s)


def product_int8_bytes(outputs: Callable[[Shapes], int]) -> Callable[[Shapes], int]:
    """As product_bytes, with one byte for each weight and a scale for each output."""
    return lambda s: product_bytes(outputs)(s) - outputs(s) * s.dim * (HALF - BYTE) + outputs(s) * HALF


def _conv_fp8_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Exact products of the 8-bit values, rounded once to bf16; in float64, the truth, not rounded."""
    is_truth = x.dtype == torch.float64
    wide = torch.float64 if is_truth else torch.float32
    scaled = weight.to(wide) * scale.to(wide)[:, None, None, None, None]
    result = reference.causal_conv3d(x.to(wide), scaled, bias.to(wide))
    return result if is_truth else result.to(torch.bfloat16)


def _of_one_frame(case: KernelCase) -> KernelCase:
    """The case in a chunk of one latent frame, whose tiles may be others."""
    flops = case.floor_flops
    return replace(
        case, name=f"{case.name}_one_frame", inputs=lambda s, draw: case.inputs(s.with_chunk(1), draw),
        floor_bytes=lambda s: case.floor_bytes(s.with_chunk(1)),
        floor_flops=None if flops is None else lambda s: flops(s.with_chunk(1)),
    )  # fmt: skip


_LAST_FRAME: dict[str, Any] = {"part": _last_frame, "results": _of_last_frame}
_CHUNK_CASES: tuple[KernelCase, ...] = (
    *(
        KernelCase(
            f"sink_window_attention{form.replace('-', '_')}", inputs.attention, attention_bytes,
            attention_flops, op="sink_window_attention", backend=f"triton{form}", minimum_capability=least,
        )
        for form, least in (("", 80), ("-descriptor", 90), ("-pointer", 80))
    ),
    *(
        KernelCase(
            name, partial(inputs.attention_fp8, rows=rows, form=form), attention_fp8_bytes(rows),
            attention_flops, op="sink_window_attention_fp8", reference=_attention_fp8_reference,
            results=_attended_rows if rows else None, minimum_capability=least,
        )
        for name, rows, form, least in (
            ("sink_window_attention_fp8", False, None, 89),
            ("sink_window_attention_fp8_rows", True, None, 89),
            ("sink_window_attention_fp8_descriptor", False, "descriptor", 90),
            ("sink_window_attention_fp8_pointer", False, "pointer", 89),
        )
    ),
    KernelCase(
        "window_fp8", inputs.window_fp8, window_fp8_bytes, results=_window_copies, minimum_capability=89,
    ),
    *(
        KernelCase(
            name, partial(inputs.qk_norm_rope_write_fp8, into_arena=into_arena), BYTES[name],
            op="qk_norm_rope_write_fp8", results=_written_copies, is_row=True, minimum_capability=89,
        )
        for name, into_arena in (("qk_norm_rope_write_fp8", False), ("qk_norm_rope_write_fp8_raw", True))
    ),
    KernelCase("qk_norm_rope_write_fp8_part", inputs.qk_norm_rope_write_fp8_part,
               BYTES["qk_norm_rope_write_fp8_raw"], op="qk_norm_rope_write_fp8", results=_written_copies,
               is_row=True, minimum_capability=89),
    KernelCase(
        "attention_backward_query", inputs.attention_backward_query, attention_bytes,
        lambda s: 3 * attention_flops(s) // 2, file="sink_window_attention_backward",
    ),
    KernelCase(
        "attention_backward_keys", inputs.attention_backward_keys, attention_bytes,
        lambda s: 2 * attention_flops(s) * s.tokens // s.window_tokens, file="sink_window_attention_backward",
    ),
    KernelCase("adaptive_layer_norm", inputs.adaptive, BYTES["adaptive_layer_norm"], is_row=True),
    KernelCase(
        "affine_layer_norm", inputs.affine, row_bytes(4), is_row=True,
        rivals={"F.layer_norm": lambda x, *rest: F.layer_norm(x, x.shape[-1:], *rest)},
    ),
    KernelCase(
        "gated_residual_adaptive_norm", inputs.gated_adaptive, BYTES["gated_residual_adaptive_norm"],
        is_row=True,
    ),
    KernelCase("gated_residual_affine_norm", inputs.gated_affine, row_bytes(8), is_row=True),
    *(
        KernelCase(f"{norm}_fp8", drawn, BYTES[f"{norm}_fp8"], reference=_fp8(norm), results=_dequantised,
                   is_row=True, minimum_capability=89)
        for norm, drawn in (
            ("adaptive_layer_norm", inputs.adaptive),
            ("gated_residual_adaptive_norm", inputs.gated_adaptive),
        )
    ),
    *(
        KernelCase(f"{name}_backward", partial(inputs.norm_backward, gate=gate), row_bytes(moved),
                   op="layer_norm_backward", file="layer_norm")
        for name, gate, moved in (("layer_norm", False, 6), ("gated_layer_norm", True, 12))
    ),
    KernelCase(
        "rms_norm", inputs.rms, BYTES["rms_norm"], is_row=True,
        rivals={"F.rms_norm": lambda x, *rest: F.rms_norm(x, x.shape[-1:], *rest)},
    ),
    KernelCase("rms_norm_part", inputs.rms_part, BYTES["rms_norm"], op="rms_norm", is_row=True),
    KernelCase("rms_norm_backward", inputs.rms_backward, row_bytes(6), file="rms_norm"),
    KernelCase("qk_norm_rope", inputs.qk_norm_rope, row_bytes(8), is_row=True),
    *(
        KernelCase(name, partial(inputs.qk_norm_rope_write, keep_raw=keep_raw), BYTES[name],
                   op="qk_norm_rope_write", results=_written_chunk, is_row=True)
        for name, keep_raw in (("qk_norm_rope_write", False), ("qk_norm_rope_write_raw", True))
    ),
    KernelCase("qk_norm_rope_write_part", inputs.qk_norm_rope_write_part, BYTES["qk_norm_rope_write_raw"],
               op="qk_norm_rope_write", results=_written_chunk, is_row=True),
    KernelCase("qk_norm_rope_backward", inputs.qk_norm_rope_backward, row_bytes(12), file="qk_norm_rope"),
    *(
        KernelCase(name, partial(inputs.evict, split=split), BYTES[name], op="ema_evict", results=_sinks)
        for name, split in (("ema_evict", True), ("ema_evict_plain", False))
    ),
    KernelCase(
        "rephase_keys", inputs.rephase, BYTES["rephase_keys"], results=lambda arguments, _: (arguments[1],)
    ),
    *(
        KernelCase(name, partial(inputs.evict_and_rephase, split=split), BYTES[name], op="evict_and_rephase",
                   results=_evicted, rivals={"native": native.evict_and_rephase})
        for name, split in (("evict_and_rephase", True), ("evict_and_rephase_plain", False))
    ),
    KernelCase("flow_step", inputs.flow_step, BYTES["flow_step"]),
    *(  # the same kernels, with a noise level for every latent frame
        KernelCase(f"{op}_by_frame", partial(drawn, by_frame=True), BYTES[op], op=op, is_row=is_row)
        for op, drawn, is_row in (
            ("flow_step", inputs.flow_step, False), ("adaptive_layer_norm", inputs.adaptive, True),
            ("gated_residual_adaptive_norm", inputs.gated_adaptive, True),
        )
    ),
    KernelCase("frame_pack", inputs.pixels, BYTES["frame_pack"], results=_as_numbers),
    *(
        KernelCase(name, partial(inputs.linear, outputs=outputs), product_bytes(outputs),
                   product_flops(outputs), op=op,
                   rivals={"cuBLASLt": _cublaslt_gelu} if op == "linear_gelu" else {})
        for name, op, outputs in (
            ("linear_qkv", "linear", lambda s: 3 * s.dim), ("linear_out", "linear", lambda s: s.dim),
            ("linear_gelu", "linear_gelu", ffn_dim),
        )
    ),
    *(
        KernelCase(name, partial(inputs.linear_int8, outputs=outputs), product_int8_bytes(outputs),
                   product_flops(outputs), op=op)
        for name, op, outputs in (
            ("linear_int8_qkv", "linear_int8", lambda s: 3 * s.dim),
            ("linear_gelu_int8", "linear_gelu_int8", ffn_dim),
        )
    ),
    *(
        KernelCase(f"gated_linear_{name}", partial(inputs.gated_linear, inner=inner), product_bytes(inner, 2),
                   product_flops(inner), op="gated_linear")
        for name, inner in (("out", lambda s: s.dim), ("ffn", ffn_dim))
    ),
    *(
        KernelCase(
            name, partial(inputs.linear_fp8, outputs=outputs, inner=inner),
            product_fp8_bytes(FROM_NORM_FP8, outputs, inner), _flops_of(outputs, inner), op=op,
            rivals={SCALED_MM: getattr(library_fp8, op)}, minimum_capability=89,
        )
        for name, op, outputs, inner in (
            ("linear_fp8_qkv", "linear_fp8", lambda s: 3 * s.dim, lambda s: s.dim),
            ("linear_fp8_out", "linear_fp8", lambda s: s.dim, lambda s: s.dim),
            ("linear_fp8_ffn", "linear_fp8", lambda s: s.dim, ffn_dim),
            ("linear_gelu_fp8", "linear_gelu_fp8", ffn_dim, lambda s: s.dim),
        )
    ),
    KernelCase(
        "linear_fp8_heads",
        partial(inputs.linear_fp8, outputs=lambda s: s.dim, inner=lambda s: s.dim, has_heads=True),
        lambda s: from_heads_fp8(s.heads).bytes(s.tokens, s.dim, s.dim), product_flops(lambda s: s.dim),
        op="linear_fp8", minimum_capability=89,
    ),
    KernelCase(
        "linear_heads_fp8", inputs.linear_heads_fp8,
        product_fp8_bytes(HEADS_FP8, lambda s: s.dim, lambda s: s.dim), product_flops(lambda s: s.dim),
        minimum_capability=89,
    ),
    KernelCase(
        "linear_gelu_rows_fp8", inputs.linear_gelu_rows_fp8,
        product_fp8_bytes(GELU_ROWS_FP8, ffn_dim, lambda s: s.dim), product_flops(ffn_dim),
        results=_dequantised, rivals={SCALED_MM: library_fp8.linear_gelu_rows_fp8}, minimum_capability=89,
    ),
    KernelCase(
        "gelu_rows_fp8", inputs.gelu_rows_fp8, gelu_rows_fp8_bytes, file="gelu_fp8",
        reference=_gelu_rows_fp8, results=_dequantised, is_row=True, minimum_capability=89,
    ),
    *(
        KernelCase(
            f"channel_norm_silu_level_{level}", partial(inputs.channel_norm_silu, level=level),
            norm_bytes(level), op="channel_norm_silu",
            results=lambda arguments, total: (total, arguments[-1]),
        )
        for level in (2, 3)
    ),
    KernelCase(
        "channel_norm_silu_fp8", partial(inputs.channel_norm_silu_fp8, level=3),
        lambda s: 7 * norm_bytes(3)(s) // 8, op="channel_norm_silu", minimum_capability=89,
        results=lambda arguments, total: (total, arguments[-2].double()),
    ),
    *(
        KernelCase(f"causal_conv3d_level_{level}", partial(inputs.causal_conv3d, level=level),
                   conv_bytes(level), conv_flops(level), op="causal_conv3d", **_LAST_FRAME,
                   rivals={"native": native.causal_conv3d, "cuDNN": cudnn_causal_conv3d})
        for level in range(4)
    ),
    KernelCase(
        "causal_conv3d_pointer", lambda s, draw: (*inputs.causal_conv3d(s, draw, 2), None, "pointer"),
        conv_bytes(2), conv_flops(2), op="causal_conv3d",
        reference=lambda x, weight, bias, *_: reference.causal_conv3d(x, weight, bias), **_LAST_FRAME,
    ),
    KernelCase(
        "causal_conv3d_time", inputs.time_conv, time_conv_bytes, lambda s: 2 * conv_flops(0)(s) // 9,
        op="causal_conv3d", **_LAST_FRAME,
    ),
    *(
        KernelCase(
            f"causal_conv3d_fp8_level_{level}", partial(inputs.causal_conv3d_fp8, level=level),
            conv_bytes(level, 1), conv_flops(level), op="causal_conv3d_fp8",
            reference=_conv_fp8_reference, minimum_capability=89, **_LAST_FRAME,
        )
        for level in (1, 2, 3)
    ),
    KernelCase(
        "frame_attention", inputs.frame_attention,
        lambda s: 4 * HALF * s.vae_levels[0].channels * s.vae_levels[0].pixels, frame_attention_flops,
    ),
    KernelCase(
        "conv_frame_pack", inputs.conv_frame_pack, pack_bytes, pack_flops, part=_last_frame,
        results=lambda _, returned: (returned[-1:].float(),),
    ),
    *(
        KernelCase(f"phase_conv_to_level_{level}", partial(inputs.phase_conv, level=level),
                   phase_bytes(level), phase_flops(level), op="phase_conv", **_LAST_FRAME)
        for level in (1, 2, 3)
    ),
)  # fmt: skip
_ONE_FRAME = (
    "sink_window_attention", "sink_window_attention_pointer", "linear_qkv", "linear_out", "linear_gelu",
    "gated_linear_out", "gated_linear_ffn", "linear_fp8_qkv", "linear_fp8_out", "linear_fp8_ffn",
    "linear_fp8_heads", "linear_heads_fp8", "linear_gelu_fp8", "linear_gelu_rows_fp8",
)  # fmt: skip
CASES = (*_CHUNK_CASES, *(_of_one_frame(case) for case in _CHUNK_CASES if case.name in _ONE_FRAME))
CASES_BY_NAME = {case.name: case for case in CASES}


def chosen_cases(names: Sequence[str]) -> list[KernelCase]:
    """The cases of these names, all where there are none. Raises ValueError for a name that no case has."""
    unknown = [name for name in names if name not in CASES_BY_NAME]
    if unknown:
        raise ValueError(f"--case is {unknown[0]!r}; use one of {', '.join(CASES_BY_NAME)}")
    return [CASES_BY_NAME[name] for name in names] or list(CASES)
