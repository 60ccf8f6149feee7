"""Every kernel with inputs of the engine's own shapes: what is compiled for the report, checked and timed.

Bytes are those a kernel has to move once, FLOPs those it has to do: its floor. Shapes: L layers, B batch (1),
T tokens of a chunk, S tokens of the window, H heads, E head dim, D dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import kernel_inputs as inputs
import torch
import torch.nn.functional as F
from engine_shapes import Draw, Shapes
from kernel_inputs import Arguments
from torch import Tensor

from rfengine.ops import reference

HALF = 2  # bytes of an element in 16 bits
SINGLE = 4


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


def _slot_bytes(bytes_for_element: int) -> Callable[[Shapes], int]:
    """Bytes for each element of one slot of all layers."""
    return lambda s: s.layers * s.chunk * bytes_for_element


def _row_bytes(bytes_for_element: int) -> Callable[[Shapes], int]:
    return lambda s: s.chunk * bytes_for_element


def _rephase_bytes(shapes: Shapes) -> int:
    rotation = shapes.window_tokens * shapes.head_dim * SINGLE
    return shapes.layers * shapes.window_tokens * shapes.dim * 2 * HALF + rotation


def _attention_flops(shapes: Shapes) -> int:
    return 4 * shapes.tokens * shapes.window_tokens * shapes.dim


def _attention_bytes(shapes: Shapes) -> int:
    return 2 * HALF * (shapes.tokens + shapes.window_tokens) * shapes.dim


def _flow_bytes(shapes: Shapes) -> int:
    grid = shapes.grid
    return 4 * HALF * shapes.config.model.out_dim * shapes.frames * grid.latent_height * grid.latent_width


def _ffn_dim(shapes: Shapes) -> int:
    return shapes.config.model.ffn_dim


def _product_flops(outputs: Callable[[Shapes], int]) -> Callable[[Shapes], int]:
    """Of a product between D and `outputs` numbers, either way."""
    return lambda s: 2 * s.tokens * s.dim * outputs(s)


def _product_bytes(outputs: Callable[[Shapes], int], rows_of_dim: int = 1) -> Callable[[Shapes], int]:
    """Rows in and out and the weight; rows_of_dim: how many rows of D numbers are read or written."""
    return lambda s: HALF * (rows_of_dim * s.chunk + (s.tokens + s.dim) * outputs(s))


def _cublaslt_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x[0], weight.t(), use_gelu=True)


def _conv_flops(level: int) -> Callable[[Shapes], int]:
    return lambda s: 2 * 27 * s.vae_levels[level].channels ** 2 * s.vae_levels[level].pixels


def _conv_bytes(level: int, bytes_in: int = HALF) -> Callable[[Shapes], int]:
    """The halo in and the result out."""

    def moved(shapes: Shapes) -> int:
        size = shapes.vae_levels[level]
        halo = size.pixels * (size.frames + 2) // size.frames
        return size.channels * (halo * bytes_in + size.pixels * HALF)

    return moved


def _time_conv_bytes(shapes: Shapes) -> int:
    """Twice the channels come out."""
    return _conv_bytes(0)(shapes) + HALF * shapes.vae_levels[0].channels * shapes.vae_levels[0].pixels


def _phase_flops(level: int) -> Callable[[Shapes], int]:
    """Four taps of C channels for each of the C / 2 channels of every pixel."""
    return lambda s: 8 * s.vae_levels[level - 1].channels ** 2 // 2 * s.vae_levels[level].pixels


def _phase_bytes(level: int) -> Callable[[Shapes], int]:
    return lambda s: HALF * s.vae_levels[level - 1].channels * 3 * s.vae_levels[level].pixels // 4


def _norm_bytes(level: int) -> Callable[[Shapes], int]:
    """x and the residual read, their sum and the result written."""
    return lambda s: 4 * HALF * s.vae_levels[level].channels * s.vae_levels[level].pixels


def _frame_attention_flops(shapes: Shapes) -> int:
    size = shapes.vae_levels[0]
    return 4 * size.channels * size.pixels * size.height * size.width


def _pack_bytes(bytes_out: float) -> Callable[[Shapes], int]:
    return lambda s: _conv_bytes(-1)(s) + int((bytes_out - HALF * s.vae_levels[-1].channels) * s.pixels)


def _pack_flops(shapes: Shapes) -> int:
    return 2 * 27 * 3 * shapes.vae_levels[-1].channels * shapes.pixels


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
        "sink_window_attention", "sink_window_attention", inputs.attention(), _attention_bytes,
        _attention_flops,
        reference=_attention_reference,
    ),
    KernelCase(
        "sink_window_attention_descriptor", "sink_window_attention", inputs.attention("descriptor"),
        _attention_bytes, _attention_flops, call="sink_window_attention", reference=_attention_reference,
        minimum_capability=90,
    ),
    KernelCase(
        "sink_window_attention_pointer", "sink_window_attention", inputs.attention("pointer"),
        _attention_bytes,
        _attention_flops, call="sink_window_attention", reference=_attention_reference,
    ),
    KernelCase(
        "attention_backward_query", "sink_window_attention_backward", inputs.attention_backward_query,
        _attention_bytes, lambda s: 3 * _attention_flops(s) // 2,
    ),
    KernelCase(
        "attention_backward_keys", "sink_window_attention_backward", inputs.attention_backward_keys,
        _attention_bytes, lambda s: 2 * _attention_flops(s) * s.tokens // s.window_tokens,
    ),
    KernelCase("adaptive_layer_norm", "adaptive_layer_norm", inputs.adaptive, _row_bytes(4), is_row=True),
    KernelCase(
        "adaptive_layer_norm_fp8", "adaptive_layer_norm", inputs.adaptive, _row_bytes(3),
        reference=_fp8("adaptive_layer_norm"), results=_dequantised, is_row=True, minimum_capability=89,
    ),
    KernelCase(
        "affine_layer_norm", "affine_layer_norm", inputs.affine, _row_bytes(4),
        rivals={"F.layer_norm": _layer_norm}, is_row=True,
    ),
    KernelCase(
        "gated_residual_adaptive_norm", "gated_residual_norm", inputs.gated_adaptive, _row_bytes(8),
        is_row=True
    ),
    KernelCase(
        "gated_residual_affine_norm", "gated_residual_norm", inputs.gated_affine, _row_bytes(8), is_row=True
    ),
    KernelCase(
        "gated_residual_adaptive_norm_fp8", "gated_residual_norm", inputs.gated_adaptive, _row_bytes(7),
        reference=_fp8("gated_residual_adaptive_norm"), results=_dequantised, is_row=True,
        minimum_capability=89,
    ),
    KernelCase(
        "layer_norm_backward", "layer_norm", inputs.norm_backward(False), _row_bytes(6),
        call="layer_norm_backward"
    ),
    KernelCase(
        "gated_layer_norm_backward", "layer_norm", inputs.norm_backward(True), _row_bytes(12),
        call="layer_norm_backward",
    ),
    KernelCase("rms_norm", "rms_norm", inputs.rms, _row_bytes(4), rivals={"F.rms_norm": _rms_norm},
    is_row=True),
    KernelCase("rms_norm_backward", "rms_norm", inputs.rms_backward, _row_bytes(6)),
    KernelCase("qk_norm_rope", "qk_norm_rope", inputs.qk_norm_rope, _row_bytes(8), is_row=True),
    KernelCase(
        "qk_norm_rope_write", "qk_norm_rope", inputs.qk_norm_rope_write(False), _row_bytes(12),
        results=_written_slot, is_row=True,
    ),
    KernelCase(
        "qk_norm_rope_write_raw", "qk_norm_rope", inputs.qk_norm_rope_write(True), _row_bytes(14),
        call="qk_norm_rope_write", results=_written_slot, is_row=True,
    ),
    KernelCase("qk_norm_rope_backward", "qk_norm_rope", inputs.qk_norm_rope_backward, _row_bytes(12)),
    KernelCase("ema_evict", "ema_evict", inputs.evict(True), _slot_bytes(2 * 10), results=_sinks),
    KernelCase(
        "ema_evict_plain", "ema_evict", inputs.evict(False), _slot_bytes(2 * 6), call="ema_evict",
        results=_sinks
    ),
    KernelCase(
        "rephase_keys", "rephase_keys", inputs.rephase, _rephase_bytes,
        results=lambda arguments, _: (arguments[1],),
    ),
    # rotating costs 4 bytes an element of the window, less reading the sink's new keys: they are in registers
    KernelCase(
        "evict_and_rephase", "evict_and_rephase", inputs.evict_and_rephase(True),
        lambda s: _slot_bytes(2 * 10 - HALF)(s) + _rephase_bytes(s), results=_evicted,
    ),
    KernelCase(
        "evict_and_rephase_plain", "evict_and_rephase", inputs.evict_and_rephase(False),
        lambda s: _slot_bytes(2 * 6 - HALF)(s) + _rephase_bytes(s), call="evict_and_rephase",
        results=_evicted,
    ),
    KernelCase("flow_step", "flow_step", inputs.flow_step, _flow_bytes),
    KernelCase("frame_pack", "frame_pack", inputs.pixels, lambda s: s.pixels * 9, results=_bytes_as_numbers),
    KernelCase(
        "frame_pack_nv12", "frame_pack", inputs.pixels, lambda s: s.pixels * 15 // 2,
        results=_bytes_as_numbers
    ),
    *(
        KernelCase(
            f"linear_{name}", "linear", inputs.linear(outputs), _product_bytes(outputs),
            _product_flops(outputs), call="linear",
        )
        for name, outputs in (("qkv", lambda s: 3 * s.dim), ("out", lambda s: s.dim))
    ),
    KernelCase(
        "linear_gelu", "linear", inputs.linear(_ffn_dim), _product_bytes(_ffn_dim), _product_flops(_ffn_dim),
        rivals={"cuBLASLt": _cublaslt_gelu},
    ),
    *(
        KernelCase(
            f"gated_linear_{name}", "linear", inputs.gated_linear(inner), _product_bytes(inner, 2),
            _product_flops(inner), call="gated_linear",
        )
        for name, inner in (("out", lambda s: s.dim), ("ffn", _ffn_dim))
    ),
    *(
        KernelCase(
            f"channel_norm_silu_level_{level}", "channel_norm_silu", inputs.channel_norm_silu(level),
            _norm_bytes(level), call="channel_norm_silu", results=_total_and_normed,
        )
        for level in (2, 3)
    ),
    KernelCase(
        "channel_norm_silu_fp8", "channel_norm_silu", inputs.channel_norm_silu_fp8(3),
        lambda s: 7 * _norm_bytes(3)(s) // 8, call="channel_norm_silu", results=_total_and_eights,
        minimum_capability=89,
    ),
    *(
        KernelCase(
            f"causal_conv3d_level_{level}", "causal_conv3d", inputs.causal_conv3d(level), _conv_bytes(level),
            _conv_flops(level), call="causal_conv3d", reference=_conv_reference,
        )
        for level in range(4)
    ),
    KernelCase(
        "causal_conv3d_pointer", "causal_conv3d", inputs.causal_conv3d(2, "pointer"), _conv_bytes(2),
        _conv_flops(2), call="causal_conv3d", reference=_conv_reference,
    ),
    KernelCase(
        "causal_conv3d_time", "causal_conv3d", inputs.time_conv, _time_conv_bytes,
        lambda s: 2 * _conv_flops(0)(s) // 9, call="causal_conv3d", reference=_conv_reference,
    ),
    *(
        KernelCase(
            f"causal_conv3d_fp8_level_{level}", "causal_conv3d", inputs.causal_conv3d_fp8(level),
            _conv_bytes(level, 1), _conv_flops(level), call="causal_conv3d_fp8",
            reference=_conv_fp8_reference, minimum_capability=89,
        )
        for level in (1, 2, 3)
    ),
    KernelCase(
        "frame_attention", "frame_attention", inputs.frame_attention,
        lambda s: 4 * HALF * s.vae_levels[0].channels * s.vae_levels[0].pixels, _frame_attention_flops,
    ),
    *(
        KernelCase(
            name, "conv_frame_pack", inputs.conv_frame_pack, _pack_bytes(bytes_out), _pack_flops,
            results=_bytes_as_numbers,
        )
        for name, bytes_out in (("conv_frame_pack", 3), ("conv_frame_pack_nv12", 1.5))
    ),
    *(
        KernelCase(
            f"phase_conv_to_level_{level}", "phase_conv", inputs.phase_conv(level), _phase_bytes(level),
            _phase_flops(level), call="phase_conv",
        )
        for level in (1, 2, 3)
    ),
)  # fmt: skip
CASES_BY_NAME = {case.name: case for case in CASES}


def cases_of(file: str) -> list[KernelCase]:
    """The cases that are timed of one file of kernels/."""
    return [case for case in CASES if case.file == file and case.is_forward]
