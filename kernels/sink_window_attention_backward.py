"""Backward of sink_window_attention.py: gradients of the queries, and of the keys and values of a slot.

From the saved log-sum-exp of a row, p = exp(s / sqrt(D) - lse) is formed again, tile by tile, with s = q k^T:
    delta = rowsum(grad * out);  dp = grad v^T;  ds = p (dp - delta) / sqrt(D);
    dq = ds k;  dk = ds^T q;  dv = p^T grad.
Two passes without atomics, so results repeat bit for bit: one over the keys for each tile of queries, which
leaves delta behind, and one over the queries for each tile of keys; the second covers a range of the arena:
the current chunk's slot, where that is all that has a gradient.

q, grad, out [B, Tq, H, D]; keys, values [B, S, H, D]; lse, delta [B, H, Tq] float32.
Bound: tensor cores, 6 B H Tq kv_len D FLOPs for dq, 8 B H Tq T D for a slot of T tokens.
Rounding: sums are float32; p and ds are rounded to the dtype of q before they are multiplied, gradients once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import contiguous_rows

# B batch, Tq query tokens, T tokens of the slot, S arena tokens, H heads, D head dim

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens"])
def _attention_backward_query_kernel(
    grad_ptr, q_ptr, keys_ptr, values_ptr, kv_len_ptr, out_ptr, lse_ptr, grad_q_ptr, delta_ptr,
    grad_stride_b, grad_stride_t, grad_stride_h, q_stride_b, q_stride_t, q_stride_h, keys_stride_b,
    keys_stride_t, keys_stride_h, values_stride_b, values_stride_t, values_stride_h, heads, tokens, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    columns = tl.arange(0, HEAD_DIM)
    wide_rows = rows.to(tl.int64)[:, None]
    kv_len = tl.load(kv_len_ptr)

    q_start = q_ptr + batch * q_stride_b + head * q_stride_h
    grad_start = grad_ptr + batch * grad_stride_b + head * grad_stride_h
    q = tl.load(q_start + wide_rows * q_stride_t + columns[None, :], mask=inside[:, None], other=0.0)
    grad = tl.load(grad_start + wide_rows * grad_stride_t + columns[None, :], mask=inside[:, None], other=0.0)
    dense = ((batch * tokens + wide_rows) * heads + head) * HEAD_DIM + columns[None, :]
    out = tl.load(out_ptr + dense, mask=inside[:, None], other=0.0)
    statistics = (batch * heads + head) * tokens + rows
    lse = tl.load(lse_ptr + statistics, mask=inside, other=0.0) * LOG2_E
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=inside)

    keys_start = keys_ptr + batch * keys_stride_b + head * keys_stride_h
    values_start = values_ptr + batch * values_stride_b + head * values_stride_h
    offsets = tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in tl.range(0, kv_len, BLOCK_N):
        filled = start + offsets < kv_len
        keys_tile = offsets[:, None] * keys_stride_t + columns[None, :]
        values_tile = offsets[:, None] * values_stride_t + columns[None, :]
        k = tl.load(keys_start + keys_tile, mask=filled[:, None], other=0.0)
        v = tl.load(values_start + values_tile, mask=filled[:, None], other=0.0)
        logits = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2_E)
        weights = tl.where(filled[None, :], tl.exp2(logits - lse[:, None]), 0.0)
        slopes = weights * (tl.dot(grad, v.T, input_precision="ieee") - delta[:, None])
        sums = tl.dot(slopes.to(k.dtype), k, sums, input_precision="ieee")
        keys_start += BLOCK_N * keys_stride_t
        values_start += BLOCK_N * values_stride_t
    tl.store(grad_q_ptr + dense, (sums * scale).to(grad_q_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "slot_tokens", "slot_start"])
def _attention_backward_keys_kernel(
    grad_ptr, q_ptr, keys_ptr, values_ptr, kv_len_ptr, lse_ptr, delta_ptr, grad_keys_ptr, grad_values_ptr,
    grad_stride_b, grad_stride_t, grad_stride_h, q_stride_b, q_stride_t, q_stride_h, keys_stride_b,
    keys_stride_t, keys_stride_h, values_stride_b, values_stride_t, values_stride_h, heads, tokens,
    slot_start, slot_tokens, scale, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    slot_rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, HEAD_DIM)
    filled = (slot_rows < slot_tokens) & (slot_start + slot_rows < tl.load(kv_len_ptr))
    wide_rows = slot_rows.to(tl.int64)[:, None]
    keys_start = keys_ptr + batch * keys_stride_b + head * keys_stride_h
    values_start = values_ptr + batch * values_stride_b + head * values_stride_h
    keys_tile = (slot_start + wide_rows) * keys_stride_t + columns[None, :]
    values_tile = (slot_start + wide_rows) * values_stride_t + columns[None, :]
    k = tl.load(keys_start + keys_tile, mask=filled[:, None], other=0.0)
    v = tl.load(values_start + values_tile, mask=filled[:, None], other=0.0)

    q_start = q_ptr + batch * q_stride_b + head * q_stride_h
    grad_start = grad_ptr + batch * grad_stride_b + head * grad_stride_h
    statistics = (batch * heads + head) * tokens
    offsets = tl.arange(0, BLOCK_M)
    key_sums = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    value_sums = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in tl.range(0, tokens, BLOCK_M):
        inside = start + offsets < tokens
        q_tile = offsets[:, None] * q_stride_t + columns[None, :]
        grad_tile = offsets[:, None] * grad_stride_t + columns[None, :]
        q = tl.load(q_start + q_tile, mask=inside[:, None], other=0.0)
        grad = tl.load(grad_start + grad_tile, mask=inside[:, None], other=0.0)
        lse = tl.load(lse_ptr + statistics + start + offsets, mask=inside, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + statistics + start + offsets, mask=inside, other=0.0)
        logits = tl.dot(k, q.T, input_precision="ieee") * (scale * LOG2_E)
        held = filled[:, None] & inside[None, :]
        weights = tl.where(held, tl.exp2(logits - lse[None, :]), 0.0)
        value_sums = tl.dot(weights.to(grad.dtype), grad, value_sums, input_precision="ieee")
        slopes = weights * (tl.dot(v, grad.T, input_precision="ieee") - delta[None, :])
        key_sums = tl.dot(slopes.to(q.dtype), q, key_sums, input_precision="ieee")
        q_start += BLOCK_M * q_stride_t
        grad_start += BLOCK_M * grad_stride_t
    dense = ((batch * slot_tokens + wide_rows) * heads + head) * HEAD_DIM + columns[None, :]
    stored = (slot_rows < slot_tokens)[:, None]
    tl.store(grad_keys_ptr + dense, (key_sums * scale).to(grad_keys_ptr.dtype.element_ty), mask=stored)
    tl.store(grad_values_ptr + dense, value_sums.to(grad_values_ptr.dtype.element_ty), mask=stored)


def backward_launch(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows of the outer tile, rows of the inner tile, num_warps, num_stages) of both passes; unmeasured.

    A program holds two [outer, D] tiles, up to two float32 sums of that size and the logits: 64 rows on 8
    warps is the largest without a spill on Hopper. Float32 multiplies in registers: 32 by 16, where the pass
    over the keys still spills 208 bytes a thread for a head of 128.
    """
    return (32, 16, 8, 1) if dtype == torch.float32 else (64, 64, 8, 2)


@torch.library.custom_op("rfengine::sink_window_attention_backward_query", mutates_args=())
def attention_backward_query(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of q, contiguous [B, Tq, H, D]; delta [B, H, Tq] float32 = rowsum(grad * out)).

    grad may have any strides but those of a broadcast last axis, which is copied; out and lse are contiguous.
    """
    grad = contiguous_rows(grad)
    batch, tokens, heads, head_dim = q.shape
    block_m, block_n, warps, stages = backward_launch(q.dtype)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _attention_backward_query_kernel[(triton.cdiv(tokens, block_m), heads, batch)](
            grad, q, keys, values, kv_len, out, lse, grad_q, delta,
            *grad.stride()[:3], *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            heads, tokens, 1 / math.sqrt(head_dim),
            HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return grad_q, delta


@attention_backward_query.register_fake
def _(grad, q, keys, values, kv_len, out, lse):
    return q.new_empty(q.shape), lse.new_empty(lse.shape)


@torch.library.custom_op("rfengine::sink_window_attention_backward_keys", mutates_args=())
def attention_backward_keys(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor, lse: Tensor, delta: Tensor,
    slot_start: int, slot_tokens: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the arena's keys and values slot_start .. slot_start + slot_tokens, contiguous [B, T, H,
    D].

    They are zero from kv_len on.
    """
    grad = contiguous_rows(grad)
    batch, tokens, heads, head_dim = q.shape
    block_n, block_m, warps, stages = backward_launch(q.dtype)
    grad_keys = torch.empty((batch, slot_tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    grad_values = torch.empty((batch, slot_tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        _attention_backward_keys_kernel[(triton.cdiv(slot_tokens, block_n), heads, batch)](
            grad, q, keys, values, kv_len, lse, delta, grad_keys, grad_values,
            *grad.stride()[:3], *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            heads, tokens, slot_start, slot_tokens, 1 / math.sqrt(head_dim),
            HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return grad_keys, grad_values


@attention_backward_keys.register_fake
def _(grad, q, keys, values, kv_len, lse, delta, slot_start, slot_tokens):
    shape = (q.shape[0], slot_tokens, *q.shape[2:])
    return q.new_empty(shape), q.new_empty(shape)
