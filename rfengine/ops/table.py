"""The table of ops: meaning, shape check, backends and part of a profile, one row for each op.

A new op is a function in reference.py, a row here, a kernel in kernels/, and a test.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from rfengine.ops import (
    backends,
    checks,
    checks_fp8,
    checks_int8,
    cpu,
    library_fp8,
    native,
    reference,
    reference_fp8,
    reference_fp8_attention,
    reference_int8,
)


@dataclass(frozen=True, slots=True)
class Op:
    """One op. All of its functions have the arguments of `reference`.

    part: of a profile (benchmark/parts.py). check: raises ValueError for shapes that do not fit. backends:
    besides the reference, by name, in the order in which autotune tries them; a string is "file:function" in
    kernels/, which is imported when the op is bound. by_shape: the sizes, from the arguments, by which a
    backend can be chosen for one shape alone; None where one backend runs every shape. by_request: backends
    that neither "auto" nor autotune takes.
    """

    reference: Callable[..., object]
    part: str
    check: Callable[..., None] | None = None
    backends: Mapping[str, str | Callable[..., object]] = field(default_factory=dict)
    by_shape: Callable[..., tuple[int, ...]] | None = None
    by_request: tuple[str, ...] = ()


def _product_sizes(x: Tensor, weight: Tensor, *_: object) -> tuple[int, ...]:
    return tuple(weight.shape)


def _fp8_product_sizes(x: Tensor, row_scale: Tensor, weight: Tensor, *_: object) -> tuple[int, ...]:
    """Those of the weight, then the scales of a row."""
    return *weight.shape, row_scale.shape[-1]


def _gated_product_sizes(x: Tensor, y: Tensor, weight: Tensor, *_: object) -> tuple[int, ...]:
    return tuple(weight.shape)


def _convolution_sizes(x: Tensor, weight: Tensor, *_: object) -> tuple[int, ...]:
    """Those of the weight, then height and width of the input."""
    return *weight.shape, *x.shape[1:3]


OPS: dict[str, Op] = {
    "linear": Op(
        reference.linear, "linears", by_shape=_product_sizes,
        backends={
            "cublaslt": backends.cublaslt_linear, "triton": "linear:linear", "cpu": cpu.linear,
        },
    ),
    "linear_gelu": Op(
        reference.linear_gelu, "linears", by_shape=_product_sizes,
        backends={
            "cublaslt": backends.cublaslt_linear_gelu, "triton": "linear:linear_gelu", "cpu": cpu.linear_gelu,
        },
    ),
    "gated_linear": Op(
        reference.gated_linear, "linears", checks.gated_linear, by_shape=_gated_product_sizes,
        backends={"triton": "linear:gated_linear"},
    ),
    "linear_fp8": Op(
        reference_fp8.linear_fp8, "linears", checks_fp8.linear_fp8, by_shape=_fp8_product_sizes,
        backends={"cublaslt": library_fp8.linear_fp8, "triton": "linear_fp8:linear_fp8"},
    ),
    "linear_gelu_fp8": Op(
        reference_fp8.linear_gelu_fp8, "linears", checks_fp8.linear_fp8, by_shape=_fp8_product_sizes,
        backends={"cublaslt": library_fp8.linear_gelu_fp8, "triton": "linear_fp8:linear_gelu_fp8"},
    ),
    "linear_gelu_rows_fp8": Op(
        reference_fp8.linear_gelu_rows_fp8, "linears", checks_fp8.linear_gelu_rows_fp8,
        by_shape=_fp8_product_sizes,
        backends={"cublaslt": library_fp8.linear_gelu_rows_fp8, "triton": "linear_fp8:linear_gelu_rows_fp8"},
    ),
    "linear_heads_fp8": Op(
        reference_fp8.linear_heads_fp8, "linears", checks_fp8.linear_heads_fp8,
        backends={"triton": "linear_fp8:linear_heads_fp8"},
    ),
    "linear_int8": Op(
        reference_int8.linear_int8, "linears", checks_int8.linear_int8,
        backends={"triton": "linear_int8:linear_int8"},
    ),
    "linear_gelu_int8": Op(
        reference_int8.linear_gelu_int8, "linears", checks_int8.linear_int8,
        backends={"triton": "linear_int8:linear_gelu_int8"},
    ),
    "sink_window_attention": Op(
        reference.sink_window_attention, "self-attention", checks.sink_window_attention,
        backends={
            "triton": backends.triton_window_attention,
            "triton-descriptor": partial(backends.triton_window_attention, form="descriptor"),
            "triton-pointer": partial(backends.triton_window_attention, form="pointer"),
            "cudnn": backends.cudnn_window_attention,
            "flash": backends.flash_window_attention,
        },
    ),
    "clip_attention": Op(
        reference.clip_attention, "cross-attention", checks.clip_attention, by_request=("triton",),
        backends={
            "cudnn": backends.cudnn_attention,
            "flash": backends.flash_attention,
            "triton": backends.triton_clip_attention,
        },
    ),
    "adaptive_layer_norm": Op(
        reference.adaptive_layer_norm, "row kernels", checks.adaptive_layer_norm,
        backends={"triton": "layer_norm:adaptive_layer_norm", "cpu": cpu.adaptive_layer_norm},
    ),
    "affine_layer_norm": Op(
        reference.affine_layer_norm, "row kernels",
        backends={"triton": "layer_norm:affine_layer_norm"},
    ),
    "gated_residual_adaptive_norm": Op(
        reference.gated_residual_adaptive_norm, "row kernels", checks.gated_residual_adaptive_norm,
        backends={
            "triton": "gated_residual_norm:gated_residual_adaptive_norm",
            "cpu": cpu.gated_residual_adaptive_norm,
        },
    ),
    "gated_residual_affine_norm": Op(
        reference.gated_residual_affine_norm, "row kernels", checks.gated_residual_affine_norm,
        backends={"triton": "gated_residual_norm:gated_residual_affine_norm"},
    ),
    "adaptive_layer_norm_fp8": Op(
        reference_fp8.adaptive_layer_norm_fp8, "row kernels", checks.adaptive_layer_norm,
        backends={"triton": "layer_norm:adaptive_layer_norm_fp8"},
    ),
    "gated_residual_adaptive_norm_fp8": Op(
        reference_fp8.gated_residual_adaptive_norm_fp8, "row kernels", checks.gated_residual_adaptive_norm,
        backends={"triton": "gated_residual_norm:gated_residual_adaptive_norm_fp8"},
    ),
    "gated_residual_affine_norm_fp8": Op(
        reference_fp8.gated_residual_affine_norm_fp8, "row kernels", checks.gated_residual_affine_norm,
        backends={"triton": "gated_residual_norm:gated_residual_affine_norm_fp8"},
    ),
    "rms_norm": Op(
        reference.rms_norm, "row kernels", checks.rms_norm,
        backends={"triton": "rms_norm:rms_norm", "cpu": cpu.rms_norm},
    ),
    "qk_norm_rope": Op(
        reference.qk_norm_rope, "row kernels", checks.qk_norm_rope,
        backends={"triton": "qk_norm_rope:qk_norm_rope", "cpu": cpu.qk_norm_rope},
    ),
    "qk_norm_rope_write": Op(
        reference.qk_norm_rope_write, "row kernels", checks.qk_norm_rope_write,
        backends={"triton": "qk_norm_rope:qk_norm_rope_write", "cpu": cpu.qk_norm_rope_write},
    ),
    "unpatchify": Op(reference.unpatchify, "row kernels"),
    "flow_step": Op(
        reference.flow_step, "row kernels", checks.flow_step, backends={"triton": "flow_step:flow_step"}
    ),
    "rephase_keys": Op(
        reference.rephase_keys, "eviction", checks.rephase_keys,
        backends={"triton": "rephase_keys:rephase_keys", "cpu": cpu.rephase_keys},
    ),
    "ema_evict": Op(
        reference.ema_evict, "eviction", checks.ema_evict, backends={"triton": "ema_evict:ema_evict"}
    ),
    "evict_and_rephase": Op(
        reference.evict_and_rephase, "eviction", checks.evict_and_rephase,
        backends={
            "triton": "evict_and_rephase:evict_and_rephase", "native": native.evict_and_rephase,
            "cpu": cpu.evict_and_rephase,
        },
    ),
    "channel_norm_silu": Op(
        reference.channel_norm_silu, "VAE", checks.channel_norm_silu,
        backends={"triton": "channel_norm_silu:channel_norm_silu", "cpu": cpu.channel_norm_silu},
    ),
    "causal_conv3d": Op(
        reference.causal_conv3d, "VAE", checks.causal_conv3d, by_shape=_convolution_sizes,
        backends={
            "triton": "causal_conv3d:causal_conv3d",
            "cudnn": backends.cudnn_causal_conv3d,
            "native": backends.native_causal_conv3d,
        },
    ),
    "causal_conv3d_fp8": Op(
        reference.causal_conv3d_fp8, "VAE", checks.causal_conv3d_fp8,
        backends={"triton": "causal_conv3d:causal_conv3d_fp8"},
    ),
    "phase_conv": Op(
        reference.phase_conv, "VAE", checks.phase_conv, by_shape=_convolution_sizes,
        backends={"triton": "phase_conv:phase_conv", "cudnn": reference.join_phases},
    ),
    "frame_attention": Op(
        reference.frame_attention, "VAE", checks.frame_attention,
        backends={"triton": "frame_attention:frame_attention"},
    ),
    "conv_frame_pack": Op(
        reference.conv_frame_pack, "VAE", checks.conv_frame_pack,
        backends={"triton": "conv_frame_pack:conv_frame_pack"},
    ),
    "frame_pack": Op(
        reference.frame_pack, "VAE", checks.frame_pack, backends={"triton": "frame_pack:frame_pack"}
    ),
    "window_fp8": Op(
        reference_fp8_attention.window_fp8, "eviction", checks_fp8.window_fp8,
        backends={"triton": "window_fp8:window_fp8"},
    ),
    "qk_norm_rope_write_fp8": Op(
        reference_fp8_attention.qk_norm_rope_write_fp8, "row kernels", checks_fp8.qk_norm_rope_write_fp8,
        backends={"triton": "qk_norm_rope_fp8:qk_norm_rope_write_fp8"},
    ),
    "sink_window_attention_fp8": Op(
        reference_fp8_attention.sink_window_attention_fp8, "self-attention",
        checks_fp8.sink_window_attention_fp8,
        backends={"triton": "sink_window_attention_fp8:sink_window_attention_fp8"},
    ),
}  # fmt: skip


def has_backend(op: str, backend: str) -> bool:
    """Whether `op` has a form for `backend`."""
    return backend == "reference" or backend in OPS[op].backends


def implementation(op: str, backend: str) -> Callable[..., object]:
    """The function that runs `op` on `backend`, with the signature of the op in reference.py."""
    if backend == "reference":
        return OPS[op].reference
    found = OPS[op].backends[backend]
    if callable(found):
        return found
    file, _, name = found.partition(":")
    return getattr(importlib.import_module(f"rfengine.kernels.{file}"), name)


def shape_key(op: str, *sizes: int) -> str:
    """The key in Ops.choice of `op` for one shape alone, such as "linear@4608x1536".

    sizes: those of the weight; for a convolution, followed by the height and width of its input.
    """
    return f"{op}@{'x'.join(map(str, sizes))}"


def op_of(key: str) -> str:
    """The op of a key of Ops.choice."""
    return key.partition("@")[0]
