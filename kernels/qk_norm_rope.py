"""RMS norm of q and k over the whole model dimension, rotation of every head, and the writes to the arena.

    n = round(x / sqrt(mean(x^2) + eps));  y = round(n * weight)
    (a, b) = y[2j : 2j + 2];  out[2j : 2j + 2] = round(a cos - b sin, a sin + b cos)

q, k, v [B, T, D], three strided views (of a packed [B, T, 3 D], or apart); rotation [2, T, E / 2] float32 for
all heads; slots int64 [F], where each frame of the chunk lies in the arena, read by the device. One program
for each token: a row of D elements lies in registers, loaded once, 16 bytes at a time;
both elements of a pair lie in one thread, so that in 16-bit rotating moves nothing between threads. Sums in
float32. No fused multiply-add: the keys equal rephase_keys of the raw keys bit for bit, as in the reference.
Bound: memory; the write reads 6 and writes 6 bytes (8 with raw keys) for each element of a row in 16-bit.

Backward: dy is dout turned back; dn = dy * weight; dx = (dn - n mean(dn n)) / rms. All of it in float32 and
rounded once at the end, where autograd of the reference also rounds dy and dn. The gradients of the weights
are summed in two stages, each in a fixed order.
"""

# B batch, T tokens, D model dim = H heads * E head dim. BLOCK is D rounded up to a power of two; what lies
# beyond D is masked: it reads as 0 and adds nothing to the sums

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import contiguous_rows, row_launch, rows_per_sum
from rfengine.kernels.rephase_keys import check_layout, check_rotation, rotate_pairs


@triton.jit
def norm_row(x, weight, mean_squares, at, eps, D: tl.constexpr, DTYPE: tl.constexpr):
    """RMS norm of x [BLOCK] float32 with the two roundings of the op; returns float32. mean_squares: entry
    `at` is the mean of the squares of the row; None where x is the whole row."""
    if mean_squares is None:
        normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    else:
        normed = x * tl.rsqrt(tl.load(mean_squares + at) + eps)
    return (normed.to(DTYPE).to(tl.float32) * weight).to(DTYPE).to(tl.float32)


@triton.jit
def row_angles(rotation, token, num_tokens, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines [1, BLOCK / 2] of one token, repeated for every head."""
    pair = tl.arange(0, BLOCK // 2)[None, :]
    at = rotation + token * (E // 2) + pair % (E // 2)
    mask = pair < D // 2
    cos = tl.load(at, mask=mask, other=0.0)
    sin = tl.load(at + num_tokens.to(tl.int64) * (E // 2), mask=mask, other=0.0)
    return cos, sin


@triton.jit
def turn_row(x, cos, sin, BLOCK: tl.constexpr):
    return tl.reshape(rotate_pairs(tl.reshape(x, (1, BLOCK)), cos, sin, 1, BLOCK), (BLOCK,))


@triton.jit(do_not_specialize=["num_tokens", "frame_tokens"])
def _qk_norm_rope_kernel(
    q, k, v, weight_q, weight_k, rotation, out_q, keys, values, raw_keys, slots, mean_squares,
    q_b, q_t, k_b, k_t, v_b, v_t,
    keys_b, keys_t, keys_h, values_b, values_t, values_h, raw_b, raw_t, raw_h,
    num_tokens, frame_tokens, eps,
    D: tl.constexpr, E: tl.constexpr, HAS_V: tl.constexpr, HAS_RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = token  # in the tensors that keys and values go to
    if HAS_V:
        place = tl.load(slots + token // frame_tokens) * frame_tokens + token % frame_tokens
    column = tl.arange(0, BLOCK)
    mask = column < D
    head, inner = column // E, column % E
    dtype: tl.constexpr = out_q.dtype.element_ty
    row_q = tl.load(q + b * q_b + token * q_t + column, mask=mask, other=0.0).to(tl.float32)
    row_k = tl.load(k + b * k_b + token * k_t + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_V:
        row_v = tl.load(v + b * v_b + token * v_t + column, mask=mask, other=0.0)
        tl.store(values + b * values_b + place * values_t + head * values_h + inner, row_v, mask=mask)
    scale_q = tl.load(weight_q + column, mask=mask, other=0.0).to(tl.float32)
    scale_k = tl.load(weight_k + column, mask=mask, other=0.0).to(tl.float32)
    cos, sin = row_angles(rotation, token, num_tokens, D, E, BLOCK)
    at_q = b * num_tokens + token  # in the rows [2, B, T] of q and k
    at_k = at_q + tl.num_programs(1).to(tl.int64) * num_tokens
    turned = turn_row(norm_row(row_q, scale_q, mean_squares, at_q, eps, D, dtype), cos, sin, BLOCK)
    tl.store(out_q + (b * num_tokens + token) * D + column, turned.to(dtype), mask=mask)
    raw = norm_row(row_k, scale_k, mean_squares, at_k, eps, D, dtype)
    turned = turn_row(raw, cos, sin, BLOCK)
    tl.store(keys + b * keys_b + place * keys_t + head * keys_h + inner, turned.to(dtype), mask=mask)
    if HAS_RAW:
        tl.store(raw_keys + b * raw_b + place * raw_t + head * raw_h + inner, raw.to(dtype), mask=mask)


@triton.jit
def _row_gradient(x, grad, weight, eps, cos, sin, D: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """dx and the row's share of dweight, both [BLOCK] float32."""
    grad = turn_row(grad, cos, -sin, BLOCK)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    normed = x * inverse
    dn = grad * weight
    dx = (dn - normed * (tl.sum(dn * normed, axis=0) / D)) * inverse
    return dx, grad * normed.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "rows_per_program"])
def _qk_norm_rope_backward_kernel(
    q, k, weight_q, weight_k, rotation, grad_q, grad_k, dq, dk, partial,
    q_b, q_t, k_b, k_t, gq_b, gq_t, gq_h, gk_b, gk_t, gk_h,
    num_tokens, num_rows, rows_per_program, eps,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    mask = column < D
    head, inner = column // E, column % E
    is_k = tl.program_id(1)
    dtype: tl.constexpr = dq.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    if is_k == 0:
        weight = tl.load(weight_q + column, mask=mask, other=0.0).to(tl.float32)
    else:
        weight = tl.load(weight_k + column, mask=mask, other=0.0).to(tl.float32)
    row = tl.program_id(0) * rows_per_program
    end = tl.minimum(row + rows_per_program, num_rows)
    while row < end:  # not range: the interpreter of Triton 3.6 cannot count to a tensor with numpy 2.4
        b, token = (row // num_tokens).to(tl.int64), (row % num_tokens).to(tl.int64)
        cos, sin = row_angles(rotation, token, num_tokens, D, E, BLOCK)
        if is_k == 0:
            x = tl.load(q + b * q_b + token * q_t + column, mask=mask, other=0.0)
            grad = tl.load(grad_q + b * gq_b + token * gq_t + head * gq_h + inner, mask=mask, other=0.0)
        else:
            x = tl.load(k + b * k_b + token * k_t + column, mask=mask, other=0.0)
            grad = tl.load(grad_k + b * gk_b + token * gk_t + head * gk_h + inner, mask=mask, other=0.0)
        x, grad = x.to(tl.float32), grad.to(tl.float32)
        dx, share = _row_gradient(x, grad, weight, eps, cos, sin, D, dtype, BLOCK)
        total += share
        if is_k == 0:
            tl.store(dq + (b * num_tokens + token) * D + column, dx.to(dtype), mask=mask)
        else:
            tl.store(dk + (b * num_tokens + token) * D + column, dx.to(dtype), mask=mask)
        row += 1
    slot = (is_k * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    tl.store(partial + slot * D + column, total, mask=mask)


def _check(rotation: Tensor, dim: int, **tensors: Tensor | None) -> None:
    check_layout(**tensors)
    check_rotation(rotation)
    if dim % 2:
        raise ValueError(f"the head dim is {dim}; it must be even, to be rotated in pairs")


@torch.library.custom_op("rfengine::qk_norm_rope", mutates_args=[])
def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm of q and k over the whole model dimension, then rotation of every head.

    q, k: [B, T, D], last axis contiguous (ValueError); weights [D]; rotation: [2, T, E / 2], float32. Returns
    q, k as [B, T, H, E], rounded after the norm, after the weight and after rotation. Differentiable in q, k
    and the weights.
    """
    batch, tokens, dim = q.shape
    head_dim = dim // num_heads
    _check(rotation, head_dim, q=q, k=k, weight_q=weight_q, weight_k=weight_k)
    out_q, out_k = (x.new_empty(batch, tokens, num_heads, head_dim) for x in (q, k))
    block, num_warps = row_launch(dim)
    _qk_norm_rope_kernel[(tokens, batch)](
        q, k, k, weight_q, weight_k, rotation, out_q, out_k, out_k, out_k, rotation, None,
        *q.stride()[:2], *k.stride()[:2], *k.stride()[:2],
        *out_k.stride()[:3], *out_k.stride()[:3], *out_k.stride()[:3],
        tokens, tokens, eps,
        D=dim, E=head_dim, HAS_V=False, HAS_RAW=False, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out_q, out_k


@qk_norm_rope.register_fake
def _(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = q.shape
    shape = (batch, tokens, num_heads, dim // num_heads)
    return q.new_empty(shape), k.new_empty(shape)


@torch.library.custom_op("rfengine::qk_norm_rope_backward", mutates_args=[])
def qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor,
    rotation: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k [B, T, D] and of the two weights [D] from those of the rotated q, k [B, T, H, E]."""
    grad_q, grad_k = map(contiguous_rows, (grad_q, grad_k))
    batch, tokens, dim = q.shape
    rows = batch * tokens
    rows_per_program = rows_per_sum(rows)
    programs = triton.cdiv(rows, rows_per_program)
    dq, dk = q.new_empty(batch, tokens, dim), k.new_empty(batch, tokens, dim)
    partial = q.new_empty(2, programs, dim, dtype=torch.float32)
    block, num_warps = row_launch(dim)
    _qk_norm_rope_backward_kernel[(programs, 2)](
        q, k, weight_q, weight_k, rotation, grad_q, grad_k, dq, dk, partial,
        *q.stride()[:2], *k.stride()[:2], *grad_q.stride()[:3], *grad_k.stride()[:3],
        tokens, rows, rows_per_program, eps,
        D=dim, E=grad_q.shape[-1], BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    dweight_q, dweight_k = partial.sum(dim=1).unbind()
    return dq, dk, dweight_q.to(weight_q.dtype, copy=True), dweight_k.to(weight_k.dtype, copy=True)


@qk_norm_rope_backward.register_fake
def _(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor,
    rotation: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), torch.empty_like(weight_q), torch.empty_like(weight_k)


def _setup_context(ctx, inputs, output) -> None:
    q, k, weight_q, weight_k, rotation, _, ctx.eps = inputs
    ctx.save_for_backward(q, k, weight_q, weight_k, rotation)


def _backward(ctx, grad_q: Tensor, grad_k: Tensor):
    gradients = qk_norm_rope_backward(grad_q, grad_k, *ctx.saved_tensors, ctx.eps)
    return *gradients, None, None, None


qk_norm_rope.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("rfengine::qk_norm_rope_write", mutates_args=["keys", "values", "raw_keys"])
def qk_norm_rope_write(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, eps: float,
    keys: Tensor, values: Tensor, raw_keys: Tensor | None, slots: Tensor, mean_squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Norm and rotate q and k, and write the frames of a chunk to their slots of the arena: rotated keys,
    values and, when given, raw keys.

    q, k, v: [B, T, D]; rotation: [2, T, E / 2], float32; keys, values, raw_keys: [B, S, H, E], changed in
    place; slots: int64 [F], no two equal and all within the arena, which nothing checks. The last axis of
    every tensor must be contiguous (ValueError); the other strides are free. mean_squares: float32 [2, B, T],
    contiguous, the means of squares of the rows of which q and k are parts. Returns the rotated q [B, T, H,
    E]. Raw keys are those after the norm and before rotation, already rounded.
    """
    batch, tokens, dim = q.shape
    heads, head_dim = keys.shape[2:]
    _check(
        rotation, head_dim, q=q, k=k, v=v, weight_q=weight_q, weight_k=weight_k,
        keys=keys, values=values, raw_keys=raw_keys, slots=slots,
    )  # fmt: skip
    out_q = q.new_empty(batch, tokens, heads, head_dim)
    raw = keys if raw_keys is None else raw_keys
    block, num_warps = row_launch(dim)
    _qk_norm_rope_kernel[(tokens, batch)](
        q, k, v, weight_q, weight_k, rotation, out_q, keys, values, raw, slots, mean_squares,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *keys.stride()[:3], *values.stride()[:3], *raw.stride()[:3],
        tokens, tokens // slots.shape[0], eps,
        D=dim, E=head_dim, HAS_V=True, HAS_RAW=raw_keys is not None, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out_q


@qk_norm_rope_write.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, eps: float,
    keys: Tensor, values: Tensor, raw_keys: Tensor | None, slots: Tensor, mean_squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:2], *keys.shape[2:])
