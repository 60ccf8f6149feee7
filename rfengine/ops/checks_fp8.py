"""Shape checks of the ops of attention in FP8, as checks.py has those of the other ops."""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.ops import checks
from rfengine.ops.checks import require
from rfengine.ops.reference_fp8_attention import aligned_tokens


def _sized(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    require(
        tensor.dtype == dtype and tuple(tensor.shape) == shape,
        lambda: f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} {shape}",
    )


def _copies(keys_fp8: Tensor, values_fp8: Tensor, *arena: int) -> None:
    """Of an arena [..., B, S, H, E]."""
    *outer, tokens, heads, head_dim = arena
    _sized("keys_fp8", keys_fp8, torch.float8_e4m3fn, *arena)
    values_shape = (*outer, heads, head_dim, aligned_tokens(tokens))
    _sized("values_fp8", values_fp8, torch.float8_e4m3fn, *values_shape)


def _filled(kv_len: int, tokens: int) -> None:
    require(0 < kv_len <= tokens, lambda: f"kv_len is {kv_len}; the arena holds 1 to {tokens} tokens")


def window_fp8(
    rotated: Tensor, values: Tensor, key_unit: Tensor, key_mean: Tensor, value_unit: Tensor,
    keys_fp8: Tensor, values_fp8: Tensor, kv_len: int, *_: object,
) -> None:  # fmt: skip
    require(
        rotated.ndim == 5 and rotated.shape == values.shape,
        lambda: f"rotated is {tuple(rotated.shape)} and values {tuple(values.shape)}; both must be "
        "[L, B, S, H, E]",
    )  # fmt: skip
    layers, batch, tokens, heads, head_dim = rotated.shape
    _sized("key_unit", key_unit, torch.float32, layers)
    _sized("key_mean", key_mean, torch.float32, layers, batch, heads, head_dim)
    _sized("value_unit", value_unit, torch.float32, layers, batch, heads)
    _copies(keys_fp8, values_fp8, *rotated.shape)
    _filled(kv_len, tokens)


def qk_norm_rope_write_fp8(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, eps: float,
    query_unit: Tensor, key_unit: Tensor, key_mean: Tensor, value_unit: Tensor, keys_fp8: Tensor,
    values_fp8: Tensor, slots: Tensor, keys: Tensor | None = None, values: Tensor | None = None,
    raw_keys: Tensor | None = None,
) -> None:  # fmt: skip
    checks.qk_norm_rope_write(q, k, v, weight_q, weight_k, rotation, eps, keys_fp8, keys_fp8, raw_keys, slots)
    batch, _, heads, head_dim = keys_fp8.shape
    _copies(keys_fp8, values_fp8, *keys_fp8.shape)
    for name, arena in (("keys", keys), ("values", values), ("raw_keys", raw_keys)):
        require(
            arena is None or arena.shape == keys_fp8.shape,
            lambda name=name, arena=arena: f"{name} is {tuple(arena.shape)} beside keys_fp8 of "
            f"{tuple(keys_fp8.shape)}; they must be equal",
        )  # fmt: skip
    _sized("query_unit", query_unit, torch.float32, 1)
    _sized("key_unit", key_unit, torch.float32, 1)
    _sized("key_mean", key_mean, torch.float32, batch, heads, head_dim)
    _sized("value_unit", value_unit, torch.float32, batch, heads)


def sink_window_attention_fp8(
    q: Tensor, keys_fp8: Tensor, values_fp8: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: int,
    *_: object,
) -> None:  # fmt: skip
    batch, tokens, heads, head_dim = q.shape
    _sized("q", q, torch.float8_e4m3fn, batch, tokens, heads, head_dim)
    _copies(keys_fp8, values_fp8, batch, keys_fp8.shape[1], heads, head_dim)
    _sized("logit_scale", logit_scale, torch.float32, 1)
    _sized("value_unit", value_unit, torch.float32, batch, heads)
    _filled(kv_len, keys_fp8.shape[1])
