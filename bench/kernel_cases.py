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

from rfengine import reference

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
)  # fmt: skip
CASES_BY_NAME = {case.name: case for case in CASES}


def cases_of(file: str) -> list[KernelCase]:
    """The cases that are timed of one file of kernels/."""
    return [case for case in CASES if case.file == file and case.is_forward]
