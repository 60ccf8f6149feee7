"""The meaning of attention in FP8, as reference.py has that of the other ops, with its shapes.

A chunk of the steady state may attend in e4m3 over copies of the arena: `window_fp8` makes the copies before
its first pass, `qk_norm_rope_write_fp8` brings them up to date in every pass, `sink_window_attention_fp8`
reads them. Units are sizes: a number is its e4m3 value times its unit; what is divided by a unit is
multiplied by the reciprocal of it in float32, and saturates at 448. S8 is S rounded up to a multiple of 16.
In float64 (the e4m3 tensors too) nothing is rounded: the truth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rfengine.ops.reference import (
    LARGEST_E4M3,
    rms_norm,
    rotate,
    row_fp8,
    to_e4m3,
    unit_or_one,
    widened,
    write_frames,
)

HEADROOM = 16.0  # of the values' unit, over the largest value of the window
WEIGHT_BITS = 8  # the largest weight of a row is between 2^7 and 2^8
TOKEN_ALIGNMENT = 16  # bytes, of a stride that the tensor memory accelerator reads


def aligned_tokens(tokens: int) -> int:
    """S8, the row length of transposed e4m3 values for an arena of so many tokens."""
    return -(-tokens // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in e4m3, to nearest, saturating; as it is in float64."""
    return x if dtype == torch.float64 else to_e4m3(x)


def window_fp8(
    rotated: Tensor, values: Tensor, key_unit: Tensor, key_mean: Tensor, value_unit: Tensor,
    keys_fp8: Tensor, values_fp8: Tensor, kv_len: int, filled_tokens: Tensor | None = None,
) -> None:  # fmt: skip
    """The first kv_len tokens of the arena in e4m3, all layers at once, with their means and units.

    rotated, values: [L, B, S, H, E], of which only the first kv_len tokens are read. key_unit: float32 [L],
    so large that no key less the mean exceeds 448 of it. In place: key_mean, float32 [L, B, H, E], the mean
    over the tokens of the rotated keys (softmax stays the same when all keys lose one vector); value_unit,
    float32 [L, B, H], unit_or_one(HEADROOM * max |values of the head| / 448), so that values of a later pass
    fit as well; keys_fp8, e4m3 [L, B, S, H, E], (rotated - key_mean) / key_unit; values_fp8, e4m3 [L, B,
    H, E, S8], values / value_unit with tokens contiguous. Tokens from kv_len on stay as they are.
    filled_tokens: int32 [1] on the device, the same number as kv_len, which a backend reads there.
    """
    rotated, values = widened(rotated[:, :, :kv_len]), widened(values[:, :, :kv_len])
    key_mean.copy_(rotated.mean(2))
    value_unit.copy_(unit_or_one(values.abs().amax((2, 4)) * HEADROOM / LARGEST_E4M3))
    keys = (rotated - key_mean[:, :, None]) * key_unit.reciprocal()[:, None, None, None, None]
    keys_fp8[:, :, :kv_len] = _rounded(keys, keys_fp8.dtype)
    values = values * value_unit.reciprocal()[:, :, None, :, None]
    values_fp8[..., :kv_len] = _rounded(values, values_fp8.dtype).permute(0, 1, 3, 4, 2)


def qk_norm_rope_write_fp8(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, eps: float,
    query_unit: Tensor, key_unit: Tensor, key_mean: Tensor, value_unit: Tensor, keys_fp8: Tensor,
    values_fp8: Tensor, slots: Tensor, keys: Tensor | None = None, values: Tensor | None = None,
    raw_keys: Tensor | None = None, mean_squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """qk_norm_rope_write into the e4m3 copies of one layer, and where given into the arena.

    q, k, v, weights, rotation, eps, slots and mean_squares: as in qk_norm_rope_write, with its roundings.
    query_unit, key_unit: float32 [1]; key_mean: float32 [B, H, E]; value_unit: float32 [B, H], as window_fp8
    left them.
    In place: keys_fp8, e4m3 [B, S, H, E], (rotated k - key_mean) / key_unit; values_fp8, e4m3 [B, H, E, S8],
    v / value_unit; keys, values, raw_keys: [B, S, H, E] or None, what qk_norm_rope_write writes there.
    Returns rotated q / query_unit in e4m3, [B, T, H, E].
    """
    num_heads = keys_fp8.shape[2]
    means = (None, None) if mean_squares is None else mean_squares
    q = rotate(rms_norm(q, weight_q, eps, means[0]).unflatten(-1, (num_heads, -1)), rotation)
    raw = rms_norm(k, weight_k, eps, means[1]).unflatten(-1, (num_heads, -1))
    rotated, v = rotate(raw, rotation), v.unflatten(-1, (num_heads, -1))
    for arena, chunk in ((keys, rotated), (values, v), (raw_keys, raw)):
        if arena is not None:
            write_frames(arena, chunk, slots)
    centred = (widened(rotated) - key_mean[:, None]) * key_unit.reciprocal()
    write_frames(_bytes(keys_fp8), _bytes(_rounded(centred, keys_fp8.dtype)), slots)
    by_token = _bytes(values_fp8)[..., : keys_fp8.shape[1]].permute(0, 3, 1, 2)
    scaled = widened(v) * value_unit.reciprocal()[:, None, :, None]
    write_frames(by_token, _bytes(_rounded(scaled, values_fp8.dtype)), slots)
    return _rounded(widened(q) * query_unit.reciprocal(), keys_fp8.dtype)


def _bytes(x: Tensor) -> Tensor:
    """e4m3 as bytes, which torch can write by index."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def sink_window_attention_fp8(
    q: Tensor, keys_fp8: Tensor, values_fp8: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: int,
    filled_tokens: Tensor | None, dtype: torch.dtype, rows: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(logit_scale * q k^T) v * value_unit over the first kv_len tokens, without mask.

    q: e4m3 [B, T, H, E]; keys_fp8: e4m3 [B, S, H, E]; values_fp8: e4m3 [B, H, E, S8]; logit_scale: float32
    [1], query_unit * key_unit / sqrt(E); value_unit: float32 [B, H]. filled_tokens: int32 [1] on the device,
    the same number as kv_len, which a backend reads there. Sums are float32. With x the logits in base 2 and
    m the largest of a row, rounded up to an integer, a weight is 2^(x - m + WEIGHT_BITS), rounded to e4m3
    before it meets the values, and not rounded in the sum of weights. Returns [B, T, H, E] in dtype; with
    rows, of that, row_fp8 of each token and head: e4m3 [B, T, H, E] and float32 scales [B, T, H].
    """
    queries, keys = (widened(x).transpose(1, 2) for x in (q, keys_fp8[:, :kv_len]))
    logits = (queries @ keys.mT).mul_(logit_scale * math.log2(math.e))
    weights = logits.sub_(logits.amax(-1, keepdim=True).ceil_() - WEIGHT_BITS).exp2_()
    total = weights.sum(-1, keepdim=True)
    sums = widened(_rounded(weights, q.dtype)) @ widened(values_fp8[..., :kv_len]).mT
    result = (sums / total * value_unit[:, :, None, None]).transpose(1, 2)
    if q.dtype != torch.float64:
        result = result.to(dtype)
    if not rows:
        return result
    eights, scale = row_fp8(result)
    return eights, scale.squeeze(-1)
