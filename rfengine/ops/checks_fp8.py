"""Shape checks of the FP8 ops, as checks.py has those of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.ops import checks
from rfengine.ops.checks import require
from rfengine.ops.reference_fp8_attention import aligned_tokens

E4M3 = torch.float8_e4m3fn


def linear_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, *_: object
) -> None:
    require(
        x.dtype == weight.dtype == E4M3,
        lambda: f"x is {x.dtype} and the weight {weight.dtype}; both must be {E4M3}",
    )
    parts = row_scale.shape[-1]
    require(
        row_scale.shape[:-1] == x.shape[:-1] and parts > 0 and x.shape[-1] % parts == 0,
        lambda: (
            f"row_scale is {tuple(row_scale.shape)} for x of {tuple(x.shape)}; it must be [..., G] with "
            "one for each of G equal parts of a row"
        ),
    )
    _weight(x, weight, weight_scale, bias)


def linear_gelu_rows_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, reach: Tensor
) -> None:
    linear_fp8(x, row_scale, weight, weight_scale, bias)
    require(
        row_scale.shape[-1] == 1 and tuple(reach.shape) == (2,),
        lambda: (
            f"row_scale is {tuple(row_scale.shape)} and reach {tuple(reach.shape)}; they must be [..., 1] "
            "and [2]"
        ),
    )


def linear_heads_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, heads: int) -> None:
    require(
        weight.dtype == E4M3 and x.dtype == bias.dtype,
        lambda: (
            f"x is {x.dtype}, the weight {weight.dtype} and the bias {bias.dtype}; the weight must be {E4M3} "
            "and the others alike"
        ),
    )
    require(
        heads > 0 and x.shape[-1] % heads == 0,
        lambda: f"x is {tuple(x.shape)}; {heads} heads must divide its last axis",
    )
    _weight(x, weight, weight_scale, bias)


def _weight(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> None:
    outputs = tuple(weight.shape[:1])
    require(
        weight.ndim == 2
        and weight.shape[1] == x.shape[-1]
        and tuple(weight_scale.shape) == tuple(bias.shape) == outputs,
        lambda: (
            f"weight is {tuple(weight.shape)}, its scale {tuple(weight_scale.shape)} and bias "
            f"{tuple(bias.shape)} for x of {tuple(x.shape)}; they must be [N, K], [N] and [N]"
        ),
    )


def _sized(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    require(
        tensor.dtype == dtype and tuple(tensor.shape) == shape,
        lambda: f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} {shape}",
    )


def _copies(keys_fp8: Tensor, values_fp8: Tensor, *arena: int) -> None:
    """Of an arena [..., B, S, H, E]."""
    *outer, tokens, heads, head_dim = arena
    _sized("keys_fp8", keys_fp8, E4M3, *arena)
    values_shape = (*outer, heads, head_dim, aligned_tokens(tokens))
    _sized("values_fp8", values_fp8, E4M3, *values_shape)


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
    raw_keys: Tensor | None = None, mean_squares: Tensor | None = None,
) -> None:  # fmt: skip
    arenas = keys_fp8, keys_fp8, raw_keys
    checks.qk_norm_rope_write(q, k, v, weight_q, weight_k, rotation, eps, *arenas, slots, mean_squares)
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
    _sized("q", q, E4M3, batch, tokens, heads, head_dim)
    _copies(keys_fp8, values_fp8, batch, keys_fp8.shape[1], heads, head_dim)
    _sized("logit_scale", logit_scale, torch.float32, 1)
    _sized("value_unit", value_unit, torch.float32, batch, heads)
    _filled(kv_len, keys_fp8.shape[1])
