"""Ops: the engine's ops as methods, each of which checks shapes and calls the backend chosen at start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rfengine.config import Backend
from rfengine.ops.backends import SIXTEEN_BITS, backend_reasons, family, is_hopper
from rfengine.ops.table import OPS, has_backend, implementation, op_of, shape_key

logger = logging.getLogger(__name__)


class Ops:
    """The ops of one model, each bound once to its shape check and the backend that runs it. Models hold one
    of these and never call a kernel. Signatures and meaning: reference.py.

    choice: backend by op; a key of shape_key is the backend of one op for one shape. folds_gate: whether
    a block adds its branch to the residual stream in the product before (gated_linear) rather than in the
    norm after it.
    """

    def __init__(self, choice: Mapping[str, str], folds_gate: bool = False) -> None:
        self.choice = dict(choice)
        self.folds_gate = folds_gate
        self._run = {name: self._bound(name) for name in dict.fromkeys(map(op_of, self.choice))}

    def _bound(self, name: str) -> Callable[..., Any]:
        op, run = OPS[name], implementation(name, self.choice[name])
        by_shape = {
            key: implementation(name, backend)
            for key, backend in self.choice.items()
            if key != name and op_of(key) == name
        }

        def call(*arguments: Any) -> Any:
            if op.check is not None:
                op.check(*arguments)
            if by_shape:
                return by_shape.get(shape_key(name, *op.by_shape(*arguments)), run)(*arguments)
            return run(*arguments)

        return call

    def backend_of(self, name: str, *arguments: Any) -> str:
        """The backend that runs an op with a choice by shape for these arguments; the first ones suffice."""
        return self.choice.get(shape_key(name, *OPS[name].by_shape(*arguments)), self.choice[name])

    def adaptive_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return self._run["adaptive_layer_norm"](x, shift, scale, eps)

    def affine_layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self._run["affine_layer_norm"](x, weight, bias, eps)

    def gated_residual_adaptive_norm(
        self, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._run["gated_residual_adaptive_norm"](x, y, gate, shift, scale, eps)

    def gated_residual_affine_norm(
        self, x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._run["gated_residual_affine_norm"](x, y, gate, weight, bias, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._run["linear"](x, weight, bias)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._run["linear_gelu"](x, weight, bias)

    def gated_linear(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
        return self._run["gated_linear"](x, y, weight, bias, gate)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._run["rms_norm"](x, weight, eps)

    def qk_norm_rope(
        self, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, num_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self._run["qk_norm_rope"](q, k, weight_q, weight_k, rotation, num_heads, eps)

    def qk_norm_rope_write(
        self, q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor,
        eps: float, keys: Tensor, values: Tensor, raw_keys: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return self._run["qk_norm_rope_write"](
            q, k, v, weight_q, weight_k, rotation, eps, keys, values, raw_keys
        )

    def sink_window_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, kv_len: int, filled_tokens: Tensor
    ) -> Tensor:
        return self._run["sink_window_attention"](q, keys, values, kv_len, filled_tokens)

    def clip_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self._run["clip_attention"](q, k, v, mask)

    def rephase_keys(self, raw: Tensor, rotated: Tensor, rotation: Tensor) -> None:
        self._run["rephase_keys"](raw, rotated, rotation)

    def ema_evict(
        self, sink_keys: Tensor, sink_values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
        keys: Tensor, values: Tensor, alpha: float,
    ) -> None:  # fmt: skip
        self._run["ema_evict"](sink_keys, sink_values, low_keys, low_values, keys, values, alpha)

    def unpatchify(self, tokens: Tensor, like: Tensor) -> Tensor:
        return self._run["unpatchify"](tokens, like)

    def flow_step(
        self, tokens: Tensor, x: Tensor, sigma: float, noise: Tensor | None, next_sigma: float
    ) -> Tensor:
        return self._run["flow_step"](tokens, x, sigma, noise, next_sigma)

    def evict_and_rephase(
        self, raw: Tensor, rotated: Tensor, values: Tensor, low_keys: Tensor | None,
        low_values: Tensor | None, rotation: Tensor, sink_tokens: int, leaving: int, alpha: float,
    ) -> None:  # fmt: skip
        self._run["evict_and_rephase"](
            raw, rotated, values, low_keys, low_values, rotation, sink_tokens, leaving, alpha
        )

    def channel_norm_silu(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor, out: Tensor,
        out_scale: float = 1.0,
    ) -> Tensor:  # fmt: skip
        return self._run["channel_norm_silu"](x, bias, residual, gamma, out, out_scale)

    def causal_conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        return self._run["causal_conv3d"](x, weight, bias, out)

    def causal_conv3d_fp8(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        return self._run["causal_conv3d_fp8"](x, weight, scale, bias, out)

    def phase_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._run["phase_conv"](x, weight, bias)

    def frame_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run["frame_attention"](q, k, v)

    def conv_frame_pack(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._run["conv_frame_pack"](x, weight, bias)

    def frame_pack(self, pixels: Tensor) -> Tensor:
        return self._run["frame_pack"](pixels)

    def __deepcopy__(self, memo: dict) -> Ops:
        return self


REFERENCE_OPS = Ops(dict.fromkeys(OPS, "reference"))


def choose_ops(
    requested: Backend,
    device: torch.device | str,
    overrides: Mapping[str, str] | None = None,
    folds_gate: bool = False,
    dtype: torch.dtype | None = None,
) -> Ops:
    """The ops for `device`: on the requested backend, or on the best there is for "auto" in `dtype`.

    An op that the backend has no form for runs on the reference. overrides: backend by op, or by shape_key
    for one shape of a product or a convolution; tuning/autotune.py measures them, and folds_gate (see Ops).
    Raises RuntimeError when a requested backend cannot run here, with the reason, and ValueError for an op
    that is not there or that an override has no form for.
    """
    overrides = dict(overrides or {})
    reasons = backend_reasons(device)
    for key, backend in overrides.items():
        op = op_of(key)
        if op not in OPS or (key != op and OPS[op].by_shape is None):
            raise ValueError(f"there is no op {key!r}; there are {', '.join(OPS)}")
        if family(backend) in reasons and not has_backend(op, backend):
            raise ValueError(f"{op} has no form for backend {backend!r}; leave it to 'reference'")
    for backend in {requested, *overrides.values()} - {"auto"}:
        reason = reasons.get(family(backend), "it is not built into this version")
        if reason:
            known = ", ".join(("auto", *(name for name, absence in reasons.items() if not absence)))
            raise RuntimeError(f"backend {backend!r} cannot run on {device}: {reason}; use one of {known}")
    if requested == "auto":
        choice = default_choice(device, dtype)
    else:
        choice = {op: requested if has_backend(op, requested) else "reference" for op in OPS}
    choice |= overrides
    logger.info("ops on %s: %s", device, choice)
    return Ops(choice, folds_gate)


def default_choice(device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Backend by op that "auto" stands for on `device` in `dtype`, before anything is measured.

    On Hopper in 16 bits cuDNN attends over the window, which by estimate is a fifth faster than Triton's own
    form (docs/kernels.md); without a dtype nobody knows whether cuDNN serves it.
    """
    reasons = backend_reasons(device)
    choice = dict.fromkeys(OPS, "reference")  # on a CPU as well: Triton's interpreter is for tests
    if torch.device(device).type == "cuda" and not reasons["triton"]:
        choice |= _where_unasked("triton")
    if not reasons["cublaslt"]:  # before Triton's, which nobody has timed
        choice |= _where_unasked("cublaslt")
    if dtype in SIXTEEN_BITS and not reasons["cudnn"] and is_hopper(device):
        choice["sink_window_attention"] = "cudnn"
    return choice


def _where_unasked(backend: str) -> dict[str, str]:
    """`backend` for the ops that may take it without a request."""
    return {
        name: backend for name, op in OPS.items() if backend in op.backends and backend not in op.by_request
    }
