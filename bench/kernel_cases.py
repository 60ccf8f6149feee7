"""Every kernel with inputs of the engine's own shapes: what is compiled for the report, checked and timed.

Bytes are those a kernel has to move once, FLOPs those it has to do: its floor. Shapes: L layers, B batch (1),
T tokens of a chunk, S tokens of the window, H heads, E head dim, D dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import bench.kernel_inputs as inputs
from bench.kernel_inputs import Arguments, Draw
from rfengine.costs.ops import (
    BYTES,
    HALF,
    attention_bytes,
    attention_flops,
    conv_bytes,
    conv_flops,
    ffn_dim,
    frame_attention_flops,
    norm_bytes,
    pack_bytes,
    pack_flops,
    phase_bytes,
    phase_flops,
    product_bytes,
    product_flops,
    row_bytes,
    slot_bytes,
    time_conv_bytes,
)
from rfengine.costs.shapes import Shapes
from rfengine.ops import reference


@dataclass(frozen=True)
class KernelCase:
    """One call of an op at its real shape.

    call: the function in kernels/`file`.py. floor_bytes, floor_flops: what has to be moved and done.
    results: the tensors to check, from the arguments after the call and what it returned. rivals: other
    functions of the same arguments.
    """

    name: str
    file: str
    inputs: Callable[[Shapes, Draw], Arguments]
    floor_bytes: Callable[[Shapes], int]
    floor_flops: Callable[[Shapes], int] | None = None
    call: str = ""  # the name, unless it says otherwise
    reference: Callable[..., Tensor | tuple[Tensor, ...] | None] | None = None
    results: Callable[[Arguments, Tensor | tuple[Tensor, ...] | None], tuple[Tensor, ...]] | None = None
    rivals: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    is_row: bool = False  # a row kernel over a chunk, which should reach the rate of a copy
    minimum_capability: int = 80  # 89: the first with FP8; 90: with tensor descriptors

    @property
    def is_forward(self) -> bool:
        return "backward" not in self.name

    @property
    def op(self) -> str:
        return self.call or self.name

    def kernel(self) -> Callable[..., Tensor | tuple[Tensor, ...] | None]:
        return getattr(importlib.import_module(f"rfengine.kernels.{self.file}"), self.op)

    def meaning(self) -> Callable[..., Tensor | tuple[Tensor, ...] | None]:
        """The same in plain PyTorch."""
        return self.reference or getattr(reference, self.op)

    def checked(
        self, arguments: Arguments, returned: Tensor | tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        if self.results is not None:
            return self.results(arguments, returned)
        return returned if isinstance(returned, tuple) else (returned,)

    def __str__(self) -> str:
        return self.name


def _written_slot(arguments: Arguments, returned: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    return returned, *(view for view in arguments[7:10] if view is not None)


def _attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, filled_tokens: Tensor, _: str | None
) -> Tensor:
    return reference.sink_window_attention(q, keys, values, keys.shape[1], filled_tokens)


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
    """The reference of an FP8 norm: the last result of `norm` in e4m3, with the scales of its rows.

    In float64, which stands for the truth, the rows are left as they are and the scales are 1.
    """

    def rows(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor]:
        normed = getattr(reference, norm)(*arguments)
        normed = normed[-1] if isinstance(normed, tuple) else normed
        if normed.dtype == torch.float64:
            return normed, normed.new_ones(())
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = normed.float().abs().amax(-1, keepdim=True) / largest
        scale = torch.where(scale > 0, scale, 1.0)
        return (normed.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale

    return rows


def _dequantised(_: Arguments, returned: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    values, scale = returned[-2:]
    return (values.to(scale.dtype) * scale,)


def _bytes_as_numbers(_: Arguments, returned: Tensor) -> tuple[Tensor, ...]:
    return (returned.float(),)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _cublaslt_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x[0], weight.t(), use_gelu=True)


def _total_and_normed(arguments: Arguments, total: Tensor) -> tuple[Tensor, ...]:
    return total, arguments[-1]


def _total_and_eights(arguments: Arguments, total: Tensor) -> tuple[Tensor, ...]:
    return total, arguments[-2].double()


def _conv_reference(x: Tensor, weight: Tensor, bias: Tensor, *_: object) -> Tensor:
    return reference.causal_conv3d(x, weight, bias)


def _conv_fp8_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Exact products of the 8-bit values, rounded once to bf16; in float64, the truth, not rounded."""
    is_truth = x.dtype == torch.float64
    wide = torch.float64 if is_truth else torch.float32
    scaled = weight.to(wide) * scale.to(wide)[:, None, None, None, None]
    result = reference.causal_conv3d(x.to(wide), scaled, bias.to(wide))
    return result if is_truth else result.to(torch.bfloat16)


CASES: tuple[KernelCase, ...] = (
    KernelCase(
        "sink_window_attention", "sink_window_attention", inputs.attention(), attention_bytes,
        attention_flops,
        reference=_attention_reference,
    ),
    KernelCase(
        "sink_window_attention_descriptor", "sink_window_attention", inputs.attention("descriptor"),
        attention_bytes, attention_flops, call="sink_window_attention", reference=_attention_reference,
        minimum_capability=90,
    ),
    KernelCase(
        "sink_window_attention_pointer", "sink_window_attention", inputs.attention("pointer"),
        attention_bytes,
        attention_flops, call="sink_window_attention", reference=_attention_reference,
    ),
    KernelCase(
        "attention_backward_query", "sink_window_attention_backward", inputs.attention_backward_query,
        attention_bytes, lambda s: 3 * attention_flops(s) // 2,
    ),
    KernelCase(
        "attention_backward_keys", "sink_window_attention_backward", inputs.attention_backward_keys,
        attention_bytes, lambda s: 2 * attention_flops(s) * s.tokens // s.window_tokens,
    ),
    KernelCase("adaptive_layer_norm", "layer_norm", inputs.adaptive,
        BYTES["adaptive_layer_norm"], is_row=True),
    KernelCase(
        "adaptive_layer_norm_fp8", "layer_norm", inputs.adaptive, BYTES["adaptive_layer_norm_fp8"],
        reference=_fp8("adaptive_layer_norm"), results=_dequantised, is_row=True, minimum_capability=89,
    ),
    KernelCase(
        "affine_layer_norm", "layer_norm", inputs.affine, row_bytes(4),
        rivals={"F.layer_norm": _layer_norm}, is_row=True,
    ),
    KernelCase(
        "gated_residual_adaptive_norm", "gated_residual_norm", inputs.gated_adaptive,
        BYTES["gated_residual_adaptive_norm"],
        is_row=True
    ),
    KernelCase(
        "gated_residual_affine_norm", "gated_residual_norm", inputs.gated_affine, row_bytes(8), is_row=True
    ),
    KernelCase(
        "gated_residual_adaptive_norm_fp8", "gated_residual_norm", inputs.gated_adaptive,
        BYTES["gated_residual_adaptive_norm_fp8"],
        reference=_fp8("gated_residual_adaptive_norm"), results=_dequantised, is_row=True,
        minimum_capability=89,
    ),
    KernelCase(
        "layer_norm_backward", "layer_norm", inputs.norm_backward(False), row_bytes(6),
        call="layer_norm_backward"
    ),
    KernelCase(
        "gated_layer_norm_backward", "layer_norm", inputs.norm_backward(True), row_bytes(12),
        call="layer_norm_backward",
    ),
    KernelCase("rms_norm", "rms_norm", inputs.rms, BYTES["rms_norm"], rivals={"F.rms_norm": _rms_norm},
    is_row=True),
    KernelCase("rms_norm_backward", "rms_norm", inputs.rms_backward, row_bytes(6)),
    KernelCase("qk_norm_rope", "qk_norm_rope", inputs.qk_norm_rope, row_bytes(8), is_row=True),
    KernelCase(
        "qk_norm_rope_write", "qk_norm_rope", inputs.qk_norm_rope_write(False), BYTES["qk_norm_rope_write"],
        results=_written_slot, is_row=True,
    ),
    KernelCase(
        "qk_norm_rope_write_raw", "qk_norm_rope", inputs.qk_norm_rope_write(True),
        BYTES["qk_norm_rope_write_raw"],
        call="qk_norm_rope_write", results=_written_slot, is_row=True,
    ),
    KernelCase("qk_norm_rope_backward", "qk_norm_rope", inputs.qk_norm_rope_backward, row_bytes(12)),
    KernelCase("ema_evict", "ema_evict", inputs.evict(True), slot_bytes(2 * 10), results=_sinks),
    KernelCase(
        "ema_evict_plain", "ema_evict", inputs.evict(False), slot_bytes(2 * 6), call="ema_evict",
        results=_sinks
    ),
    KernelCase(
        "rephase_keys", "rephase_keys", inputs.rephase, BYTES["rephase_keys"],
        results=lambda arguments, _: (arguments[1],),
    ),
    KernelCase(
        "evict_and_rephase", "evict_and_rephase", inputs.evict_and_rephase(True),
        BYTES["evict_and_rephase"], results=_evicted,
    ),
    KernelCase(
        "evict_and_rephase_plain", "evict_and_rephase", inputs.evict_and_rephase(False),
        BYTES["evict_and_rephase_plain"], call="evict_and_rephase",
        results=_evicted,
    ),
    KernelCase("flow_step", "flow_step", inputs.flow_step, BYTES["flow_step"]),
    KernelCase("frame_pack", "frame_pack", inputs.pixels, BYTES["frame_pack"], results=_bytes_as_numbers),
    *(
        KernelCase(
            f"linear_{name}", "linear", inputs.linear(outputs), product_bytes(outputs),
            product_flops(outputs), call="linear",
        )
        for name, outputs in (("qkv", lambda s: 3 * s.dim), ("out", lambda s: s.dim))
    ),
    KernelCase(
        "linear_gelu", "linear", inputs.linear(ffn_dim), product_bytes(ffn_dim), product_flops(ffn_dim),
        rivals={"cuBLASLt": _cublaslt_gelu},
    ),
    *(
        KernelCase(
            f"gated_linear_{name}", "linear", inputs.gated_linear(inner), product_bytes(inner, 2),
            product_flops(inner), call="gated_linear",
        )
        for name, inner in (("out", lambda s: s.dim), ("ffn", ffn_dim))
    ),
    *(
        KernelCase(
            f"channel_norm_silu_level_{level}", "channel_norm_silu", inputs.channel_norm_silu(level),
            norm_bytes(level), call="channel_norm_silu", results=_total_and_normed,
        )
        for level in (2, 3)
    ),
    KernelCase(
        "channel_norm_silu_fp8", "channel_norm_silu", inputs.channel_norm_silu_fp8(3),
        lambda s: 7 * norm_bytes(3)(s) // 8, call="channel_norm_silu", results=_total_and_eights,
        minimum_capability=89,
    ),
    *(
        KernelCase(
            f"causal_conv3d_level_{level}", "causal_conv3d", inputs.causal_conv3d(level), conv_bytes(level),
            conv_flops(level), call="causal_conv3d", reference=_conv_reference,
        )
        for level in range(4)
    ),
    KernelCase(
        "causal_conv3d_pointer", "causal_conv3d", inputs.causal_conv3d(2, "pointer"), conv_bytes(2),
        conv_flops(2), call="causal_conv3d", reference=_conv_reference,
    ),
    KernelCase(
        "causal_conv3d_time", "causal_conv3d", inputs.time_conv, time_conv_bytes,
        lambda s: 2 * conv_flops(0)(s) // 9, call="causal_conv3d", reference=_conv_reference,
    ),
    *(
        KernelCase(
            f"causal_conv3d_fp8_level_{level}", "causal_conv3d", inputs.causal_conv3d_fp8(level),
            conv_bytes(level, 1), conv_flops(level), call="causal_conv3d_fp8",
            reference=_conv_fp8_reference, minimum_capability=89,
        )
        for level in (1, 2, 3)
    ),
    KernelCase(
        "frame_attention", "frame_attention", inputs.frame_attention,
        lambda s: 4 * HALF * s.vae_levels[0].channels * s.vae_levels[0].pixels, frame_attention_flops,
    ),
    KernelCase(
        "conv_frame_pack", "conv_frame_pack", inputs.conv_frame_pack, pack_bytes, pack_flops,
        results=_bytes_as_numbers,
    ),
    *(
        KernelCase(
            f"phase_conv_to_level_{level}", "phase_conv", inputs.phase_conv(level), phase_bytes(level),
            phase_flops(level), call="phase_conv",
        )
        for level in (1, 2, 3)
    ),
)  # fmt: skip
CASES_BY_NAME = {case.name: case for case in CASES}


def cases_of(file: str) -> list[KernelCase]:
    """The cases that are timed of one file of kernels/."""
    return [case for case in CASES if case.file == file and case.is_forward]


def chosen_cases(names: Sequence[str]) -> list[KernelCase]:
    """The cases of these names, all where there are none. Raises ValueError for a name that no case has."""
    unknown = [name for name in names if name not in CASES_BY_NAME]
    if unknown:
        raise ValueError(f"--case is {unknown[0]!r}; use one of {', '.join(CASES_BY_NAME)}")
    return [CASES_BY_NAME[name] for name in names] or list(CASES)
