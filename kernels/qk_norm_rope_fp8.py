"""qk_norm_rope_write into the e4m3 copies of one layer that attention in FP8 reads, and into the arena.

    n = round(x / sqrt(mean(x^2) + eps));  y = round(n * weight);  r = round(y turned by the token's angles)
    q8 = e4m3(r * (1 / query_unit));  k8 = e4m3((r - key_mean) * (1 / key_unit))
    v8 = e4m3(v * (1 / value_unit))

q, k, v [B, T, D] strided views; keys_fp8 [B, S, H, E]; values_fp8 [B, H, E, S8], tokens contiguous; arena
[B, S, H, E] or none; slots int64 [F], read by the device. Two launches: q and k, one program for each token,
as qk_norm_rope.py; values, one for each tile of tokens of a head, which is turned in shared memory so that
reads and writes are both of whole lines. Rounded as there, then to e4m3, which saturates: what is written is
window_fp8 of what qk_norm_rope_write writes, bit for bit.
Bound: memory, 9 bytes for each element of a row in 16 bits, 15 with the arena (6 read, 3 and 6 written).
"""

# B batch, F frames, T tokens, D model dim = H heads * E head dim, S arena tokens, S8 the same aligned. BLOCK
# and WIDTH are the powers of two that hold D and E

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import capability_of, require_fp8, row_launch
from rfengine.kernels.e4m3 import to_e4m3
from rfengine.kernels.qk_norm_rope import norm_row, row_angles, turn_row
from rfengine.kernels.rephase_keys import check_layout, check_rotation
from rfengine.kernels.window_fp8 import check_units


@triton.jit(do_not_specialize=["num_tokens", "frame_tokens"])
def _qk_norm_rope_fp8_kernel(
    q, k, weight_q, weight_k, rotation, query_unit, key_unit, key_mean, slots, out_q, keys_fp8, keys,
    raw_keys, mean_squares, q_b, q_t, k_b, k_t, keys8_b, keys8_t, keys8_h, keys_b, keys_t, keys_h,
    raw_b, raw_t, raw_h, num_tokens, frame_tokens, eps, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.load(slots + token // frame_tokens) * frame_tokens + token % frame_tokens
    column = tl.arange(0, BLOCK)
    mask = column < D
    head, inner = column // E, column % E
    dtype: tl.constexpr = q.dtype.element_ty
    row_q = tl.load(q + b * q_b + token * q_t + column, mask=mask, other=0.0).to(tl.float32)
    row_k = tl.load(k + b * k_b + token * k_t + column, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(key_mean + b * D + column, mask=mask, other=0.0)
    scale_q = tl.load(weight_q + column, mask=mask, other=0.0).to(tl.float32)
    scale_k = tl.load(weight_k + column, mask=mask, other=0.0).to(tl.float32)
    query_factor = tl.div_rn(1.0, tl.load(query_unit))
    key_factor = tl.div_rn(1.0, tl.load(key_unit))
    cos, sin = row_angles(rotation, token, num_tokens, D, E, BLOCK)
    at_q = b * num_tokens + token  # in the rows [2, B, T] of q and k
    at_k = at_q + tl.num_programs(1).to(tl.int64) * num_tokens
    turned = turn_row(norm_row(row_q, scale_q, mean_squares, at_q, eps, D, dtype), cos, sin, BLOCK).to(dtype)
    out = out_q + (b * num_tokens + token) * D + column
    tl.store(out, to_e4m3(turned.to(tl.float32) * query_factor), mask=mask)
    raw = norm_row(row_k, scale_k, mean_squares, at_k, eps, D, dtype)
    turned = turn_row(raw, cos, sin, BLOCK).to(dtype)
    eights = to_e4m3((turned.to(tl.float32) - mean) * key_factor)
    tl.store(keys_fp8 + b * keys8_b + place * keys8_t + head * keys8_h + inner, eights, mask=mask)
    if keys is not None:
        tl.store(keys + b * keys_b + place * keys_t + head * keys_h + inner, turned, mask=mask)
    if raw_keys is not None:
        tl.store(raw_keys + b * raw_b + place * raw_t + head * raw_h + inner, raw.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["frame_tokens"])
def _write_values_fp8_kernel(
    v, value_unit, slots, values_fp8, values, v_b, v_t, values8_b, values8_h, values8_e,
    values_b, values_t, values_h, frame_tokens, heads,
    E: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    frame, head, b = tl.program_id(1) // heads, tl.program_id(1) % heads, tl.program_id(2).to(tl.int64)
    within = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)
    mask = (within < frame_tokens)[:, None] & (column < E)[None, :]
    source = v + b * v_b + frame.to(tl.int64) * frame_tokens * v_t + head * E
    value = tl.load(source + within.to(tl.int64)[:, None] * v_t + column[None, :], mask=mask, other=0.0)
    first = tl.load(slots + frame) * frame_tokens
    if values is not None:
        target = values + b * values_b + (first + within)[:, None] * values_t + head * values_h
        tl.store(target + column[None, :], value, mask=mask)
    factor = tl.div_rn(1.0, tl.load(value_unit + b * heads + head))
    target = values_fp8 + b * values8_b + head * values8_h + column.to(tl.int64)[:, None] * values8_e
    target += tl.multiple_of(first, ALIGNMENT)
    # a frame is a multiple of ALIGNMENT: as many tokens of a channel may be stored at once
    mask = (column < E)[:, None] & (within // ALIGNMENT * ALIGNMENT < frame_tokens)[None, :]
    tl.store(target + within[None, :], tl.trans(to_e4m3(value.to(tl.float32) * factor)), mask=mask)


@torch.library.custom_op(
    "rfengine::qk_norm_rope_write_fp8",
    mutates_args=["keys_fp8", "values_fp8", "keys", "values", "raw_keys"],
)
def qk_norm_rope_write_fp8(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, eps: float,
    query_unit: Tensor, key_unit: Tensor, key_mean: Tensor, value_unit: Tensor, keys_fp8: Tensor,
    values_fp8: Tensor, slots: Tensor, keys: Tensor | None = None, values: Tensor | None = None,
    raw_keys: Tensor | None = None, mean_squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """qk_norm_rope_write into the e4m3 copies of one layer, and where given into the arena.

    q, k, v: [B, T, D]; rotation: [2, T, E / 2], float32; slots: int64 [F], no two equal and all within the
    arena, which nothing checks. query_unit, key_unit: float32 [1]; key_mean: float32 [B, H, E]; value_unit:
    float32 [B, H], all contiguous. In place: keys_fp8, e4m3 [B, S, H, E], rotated k less key_mean in
    key_unit; values_fp8, e4m3 [B, H, E, S8], v in value_unit; keys, values, raw_keys: [B, S, H, E] or None,
    as qk_norm_rope_write writes them; mean_squares: as there. The last axis of every tensor must be
    contiguous (ValueError); other strides of q, k, v, copies and arena are free. Returns rotated q in
    query_unit, e4m3 [B, T, H, E]. Raises RuntimeError for a GPU without FP8.
    """
    require_fp8(capability_of(q.device))
    batch, tokens, dim = q.shape
    heads, head_dim = keys_fp8.shape[2:]
    check_layout(
        q=q, k=k, v=v, weight_q=weight_q, weight_k=weight_k, keys_fp8=keys_fp8, values_fp8=values_fp8,
        keys=keys, values=values, raw_keys=raw_keys, slots=slots,
    )  # fmt: skip
    check_rotation(rotation)
    check_units(query_unit=query_unit, key_unit=key_unit, key_mean=key_mean, value_unit=value_unit)
    out_q = q.new_empty((batch, tokens, heads, head_dim), dtype=torch.float8_e4m3fn)
    strides = [(0, 0, 0) if arena is None else arena.stride()[:3] for arena in (keys, raw_keys, values)]
    frames = slots.shape[0]
    frame_tokens = tokens // frames
    block, num_warps = row_launch(dim)
    _qk_norm_rope_fp8_kernel[(tokens, batch)](
        q, k, weight_q, weight_k, rotation, query_unit, key_unit, key_mean, slots, out_q, keys_fp8, keys,
        raw_keys, mean_squares, *q.stride()[:2], *k.stride()[:2], *keys_fp8.stride()[:3],
        *strides[0], *strides[1], tokens, frame_tokens, eps,
        D=dim, E=head_dim, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    tile = 64  # tokens (unmeasured)
    _write_values_fp8_kernel[(triton.cdiv(frame_tokens, tile), frames * heads, batch)](
        v, value_unit, slots, values_fp8, values, *v.stride()[:2], *values_fp8.stride()[:3], *strides[2],
        frame_tokens, heads, E=head_dim, WIDTH=triton.next_power_of_2(head_dim), TOKENS=tile,
        ALIGNMENT=math.gcd(frame_tokens, 16), num_warps=8,
    )  # fmt: skip
    return out_q


@qk_norm_rope_write_fp8.register_fake
def _(q, k, v, weight_q, weight_k, rotation, eps, query_unit, key_unit, key_mean, value_unit, keys_fp8, *_):
    return q.new_empty((*q.shape[:2], *keys_fp8.shape[2:]), dtype=torch.float8_e4m3fn)
