"""Every op of the engine by its name in reference.py: checks shapes, then calls the backend chosen at
start."""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine import reference
from rfengine.config import Backend

BACKENDS: tuple[str, ...] = ("reference",)


def resolve_backend(requested: Backend, device: torch.device | str) -> str:
    """The backend that runs on `device`: the requested one, or the best there is for "auto".

    Raises RuntimeError when the requested backend cannot run here, with the reason.
    """
    if requested == "auto":
        return "reference"
    if requested not in BACKENDS:
        raise RuntimeError(
            f"backend {requested!r} is not built into this version and cannot run on {device}; "
            f"use one of {', '.join(('auto', *BACKENDS))}"
        )
    return requested


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_modulation(x: Tensor, *tables: Tensor | None) -> None:
    _check(x.ndim == 3, f"x is {tuple(x.shape)}; it must be [B, T, D]")
    for table in tables:
        if table is None:
            continue
        fits = table.ndim == 3 and table.shape[0] in (1, x.shape[0]) and table.shape[2] == x.shape[2]
        _check(
            fits and x.shape[1] % table.shape[1] == 0,
            f"a modulation of {tuple(table.shape)} does not fit x of {tuple(x.shape)}; "
            "it must be [B or 1, F or 1, D]",
        )


def _check_same(name: str, x: Tensor, other_name: str, y: Tensor) -> None:
    _check(
        x.shape == y.shape,
        f"{name} is {tuple(x.shape)} but {other_name} is {tuple(y.shape)}; they must be equal",
    )


def adaptive_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    _check_modulation(x, shift, scale)
    return reference.adaptive_layer_norm(x, shift, scale, eps)


def affine_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return reference.affine_layer_norm(x, weight, bias, eps)


def gated_residual_adaptive_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check_same("x", x, "y", y)
    _check_modulation(x, gate, shift, scale)
    return reference.gated_residual_adaptive_norm(x, y, gate, shift, scale, eps)


def gated_residual_affine_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check_same("x", x, "y", y)
    _check_modulation(x, gate)
    return reference.gated_residual_affine_norm(x, y, gate, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(
        weight.shape == x.shape[-1:],
        f"weight is {tuple(weight.shape)} for x of {tuple(x.shape)}; it must cover the last axis",
    )
    return reference.rms_norm(x, weight, eps)


def _check_rotation(rotation: Tensor, tokens: int, head_dim: int) -> None:
    expected = (2, tokens, head_dim // 2)
    _check(tuple(rotation.shape) == expected, f"rotation is {tuple(rotation.shape)}; it must be {expected}")


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    _check_same("q", q, "k", k)
    _check_rotation(rotation, q.shape[1], q.shape[2] // num_heads)
    return reference.qk_norm_rope(q, k, weight_q, weight_k, rotation, num_heads, eps)


def qk_norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rotation: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    raw_keys: Tensor | None,
) -> Tensor:
    batch, tokens, dim = q.shape
    slot = (batch, tokens, *keys.shape[2:])
    _check(
        keys.shape == values.shape == slot and keys.shape[2] * keys.shape[3] == dim,
        f"the slot is {tuple(keys.shape)} for a chunk of {tuple(q.shape)}; it must hold exactly that chunk",
    )
    _check_rotation(rotation, tokens, keys.shape[3])
    return reference.qk_norm_rope_write(q, k, v, weight_q, weight_k, rotation, eps, keys, values, raw_keys)


def sink_window_attention(q: Tensor, keys: Tensor, values: Tensor, kv_len: int) -> Tensor:
    _check_same("keys", keys, "values", values)
    _check(0 < kv_len <= keys.shape[1], f"kv_len is {kv_len}; the arena holds 1 to {keys.shape[1]} tokens")
    return reference.sink_window_attention(q, keys, values, kv_len)


def clip_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    _check_same("k", k, "v", v)
    return reference.clip_attention(q, k, v, mask)


def rephase_keys(raw: Tensor, rotated: Tensor, rotation: Tensor) -> None:
    _check_same("raw", raw, "rotated", rotated)
    _check_rotation(rotation, raw.shape[2], raw.shape[4])
    reference.rephase_keys(raw, rotated, rotation)


def ema_evict(
    sink_keys: Tensor,
    sink_values: Tensor,
    low_keys: Tensor | None,
    low_values: Tensor | None,
    keys: Tensor,
    values: Tensor,
    alpha: float,
) -> None:
    _check_same("the sink", sink_keys, "the evicted chunk", keys)
    _check_same("the sink's values", sink_values, "the evicted values", values)
    reference.ema_evict(sink_keys, sink_values, low_keys, low_values, keys, values, alpha)


def unpatchify(tokens: Tensor, like: Tensor) -> Tensor:
    return reference.unpatchify(tokens, like)


def flow_step(tokens: Tensor, x: Tensor, sigma: float, noise: Tensor | None, next_sigma: float) -> Tensor:
    if noise is not None:
        _check_same("x", x, "noise", noise)
    return reference.flow_step(tokens, x, sigma, noise, next_sigma)
