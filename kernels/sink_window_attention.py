"""Attention of a chunk over the sink and the window: softmax(q k^T / sqrt(D)) v, keys 0 .. kv_len.

Online softmax in base 2: with c = log2(e) / sqrt(D), every tile of keys does
    s = q k^T;  m' = max(m, c max(s));  p = 2^(c s - m');  l = 2^(m - m') l + sum(p);
    acc = 2^(m - m') acc + p v;         at the end out = acc / l.
The scale sits in the multiply-add of the exponent, which the subtraction needs anyway, so q is not rounded a
second time. kv_len is read from device memory: one compiled kernel, and one captured graph, serves every fill
of the arena.

q [B, Tq, H, D], keys and values [B, S, H, D], kv_len int32 [1]; out [B, Tq, H, D] contiguous.
Bound: tensor cores, 4 B H Tq kv_len D FLOPs (404 GFLOP at the shipped size) against 115 MB of inputs
and outputs.
Forms: `pointer` (here) loads through pointers, on any GPU, in any dtype; `descriptor` and `specialised` are
those of sink_window_attention_descriptor.py. Whole tiles of keys are loaded and weighed without mask; the
last one, which may be short, is peeled off and comes first, so the running maximum is finite from the start.
Rounding: logits, softmax and sums are float32; p is rounded to the dtype of v before the second product, out
once at the end; float32 inputs are multiplied in IEEE precision.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import capability_of, count_processors, fill, fits_descriptor
from rfengine.kernels.sink_window_attention_backward import attention_backward_keys, attention_backward_query
from rfengine.kernels.sink_window_attention_descriptor import attend_with_descriptors, weigh_keys

# B batch, Tq query tokens, T tokens of a slot, S arena tokens, H heads, D head dim

Form = Literal["pointer", "descriptor", "specialised"]
HEAD_DIMS = (64, 128)
HALF_TILE_RATE = 0.8  # of 64 query rows beside 128, which read the keys half as often (unmeasured)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["tokens"])
def _sink_window_attention_kernel(
    q_ptr, keys_ptr, values_ptr, kv_len_ptr, out_ptr, lse_ptr, q_stride_b, q_stride_t, q_stride_h,
    keys_stride_b, keys_stride_t, keys_stride_h, values_stride_b, values_stride_t, values_stride_h, heads,
    tokens, scale, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    columns = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, BLOCK_N)
    kv_len = tl.load(kv_len_ptr)
    last = (kv_len - 1) // BLOCK_N * BLOCK_N

    q_start = q_ptr + batch * q_stride_b + head * q_stride_h
    keys_start = keys_ptr + batch * keys_stride_b + head * keys_stride_h
    values_start = values_ptr + batch * values_stride_b + head * values_stride_h
    # within a tile 32 bits hold the offsets; where a tile starts is counted in 64
    keys_tile = offsets[None, :] * keys_stride_t + columns[:, None]
    values_tile = offsets[:, None] * values_stride_t + columns[None, :]

    q_rows = rows.to(tl.int64)[:, None] * q_stride_t
    q = tl.load(q_start + q_rows + columns[None, :], mask=inside[:, None], other=0.0)
    left = kv_len - last
    short = tl.arange(0, BLOCK_N) < left
    last_keys = keys_start + last.to(tl.int64) * keys_stride_t
    k = tl.load(last_keys + keys_tile, mask=short[None, :], other=0.0)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weights, maximum, total, decay = weigh_keys(q, k, maximum, total, scale, left, True, PRECISION)
    last_values = values_start + last.to(tl.int64) * values_stride_t
    v = tl.load(last_values + values_tile, mask=short[:, None], other=0.0)
    sums = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    for _ in tl.range(0, last, BLOCK_N):
        k = tl.load(keys_start + keys_tile)
        weights, maximum, total, decay = weigh_keys(q, k, maximum, total, scale, 0, False, PRECISION)
        v = tl.load(values_start + values_tile)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision=PRECISION)
        keys_start += BLOCK_N * keys_stride_t
        values_start += BLOCK_N * values_stride_t

    result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
    out_rows = ((batch * tokens + rows) * heads + head) * HEAD_DIM
    tl.store(out_ptr + out_rows[:, None] + columns[None, :], result, mask=inside[:, None])
    lse = (maximum + tl.log2(total)) * LN2
    tl.store(lse_ptr + (batch * heads + head) * tokens + rows, lse, mask=inside)


def choose_form(capability: tuple[int, int] | None, dtype: torch.dtype) -> Form:
    """The form for a device of this compute capability (None: no GPU); unmeasured. `specialised` on Hopper,
    the one architecture whose compiler was checked to specialise it; WGMMA knows no float32."""
    hopper = capability is not None and capability[0] == 9
    return "specialised" if hopper and dtype != torch.float32 else "pointer"


def pointer_launch(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, tokens: int, heads: int,
    processors: int,
) -> tuple[int, int, int, int]:  # fmt: skip
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of the pointer form; unmeasured, the largest without a spill.

    Float32 multiplies in registers: 16 keys. Ampere and consumer Blackwell hold both products' operands in
    registers: 32 keys for a head of 128, and 128 queries whatever their number (64 spill on 4 warps). Hopper
    and data centre Blackwell read them from shared memory: 64 queries in place of 128 where that fills the
    waves of programs better by more than HALF_TILE_RATE takes (docs/kernels.md). heads: of all samples.
    """
    if dtype == torch.float32:
        return 64, 16, 8, 2
    if capability is None or capability[0] not in (9, 10):
        return 128, 4096 // head_dim, 8, 3
    whole, half = (
        fill(tokens * heads, triton.cdiv(tokens, rows) * heads, rows, processors) for rows in (128, 64)
    )
    return (64, 64, 4, 3) if half * HALF_TILE_RATE > whole else (128, 64, 8, 3)


def _attend_with_pointers(q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = q.shape
    block_m, block_n, warps, stages = pointer_launch(
        capability_of(q.device), q.dtype, head_dim, tokens, batch * heads, count_processors(q.device)
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    _sink_window_attention_kernel[(triton.cdiv(tokens, block_m), heads, batch)](
        q, keys, values, kv_len, out, lse,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        heads, tokens, head_dim**-0.5 / LN2.value,
        HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, PRECISION="ieee",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def _check(q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor) -> None:
    batch, _, heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the head dim is {head_dim}; use one of {HEAD_DIMS}, or the reference backend")
    if keys.shape != values.shape or (keys.shape[0], *keys.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(
            f"keys are {tuple(keys.shape)} and values {tuple(values.shape)} for q of {tuple(q.shape)}; "
            "both must be [B, S, H, D] with its B, H and D"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}; cast them to one dtype")
    if any(tensor.stride(-1) != 1 for tensor in (q, keys, values)):
        raise ValueError("the last axis of q, keys or values is strided; call contiguous() on that tensor")
    if kv_len.dtype != torch.int32 or kv_len.numel() != 1 or kv_len.device != q.device:
        raise ValueError(
            f"kv_len is {kv_len.dtype} {tuple(kv_len.shape)} on {kv_len.device}; it must be one "
            f"int32 on {q.device}"
        )


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor, form: str | None
) -> tuple[Tensor, Tensor]:
    _check(q, keys, values, kv_len)
    operands = (q, keys, values)
    readable = all(each.stride(2) == q.shape[3] and fits_descriptor(each) for each in operands)
    if form is None:
        form = choose_form(capability_of(q.device), q.dtype) if readable else "pointer"
    if form not in get_args(Form):
        raise ValueError(f"the form is {form!r}; it must be one of {get_args(Form)}")
    with torch.cuda.device_of(q):
        if form == "pointer":
            return _attend_with_pointers(q, keys, values, kv_len)
        if not readable:
            raise ValueError(
                "q, keys or values has heads that are not adjacent, or a stride or start that is no "
                "multiple of 16 bytes; use the pointer form"
            )
        return attend_with_descriptors(q, keys, values, kv_len, 128, 128, form == "specialised")


@torch.library.custom_op("rfengine::sink_window_attention", mutates_args=())
def _attention_op(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor, form: str | None
) -> tuple[Tensor, Tensor]:
    return _attend(q, keys, values, kv_len, form)


@torch.library.custom_op("rfengine::sink_window_attention_slot", mutates_args=())
def _slot_op(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor, slot_keys: Tensor, slot_values: Tensor,
    slot_start: int, form: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    slot = (q.shape[0], slot_keys.shape[1], *q.shape[2:])
    if slot_keys.shape != slot or slot_values.shape != slot or slot_start + slot[1] > keys.shape[1]:
        raise ValueError(
            f"slot keys are {tuple(slot_keys.shape)} and values {tuple(slot_values.shape)} from token "
            f"{slot_start}; they must be {slot} and end within the arena of {keys.shape[1]} tokens"
        )
    return _attend(q, keys, values, kv_len, form)


@_slot_op.register_fake
@_attention_op.register_fake
def _(q, *_):
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def _save(ctx, inputs, output):
    q, keys, values, kv_len, *slot = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, keys, values, kv_len, *output)
    ctx.slot = (slot[2], slot[0].shape[1]) if len(slot) > 1 else (0, keys.shape[1])


def _gradients(ctx, grad, keys_wanted):
    q, keys, values, kv_len, out, lse = ctx.saved_tensors
    grad_q, delta = attention_backward_query(grad, q, keys, values, kv_len, out, lse)
    if not keys_wanted:
        return grad_q, None, None
    return grad_q, *attention_backward_keys(grad, q, keys, values, kv_len, lse, delta, *ctx.slot)


def _attention_backward(ctx, grad, _):
    grads = _gradients(ctx, grad, any(ctx.needs_input_grad[1:3]))
    return *grads, None, None


def _slot_backward(ctx, grad, _):
    grad_q, grad_keys, grad_values = _gradients(ctx, grad, any(ctx.needs_input_grad[4:6]))
    return grad_q, None, None, None, grad_keys, grad_values, None, None


_attention_op.register_autograd(_attention_backward, setup_context=_save)
_slot_op.register_autograd(_slot_backward, setup_context=_save)


def sink_window_attention(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor, form: Form | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the first kv_len tokens of the arena, without mask.

    q: [B, Tq, H, D]; keys, values: [B, S, H, D], any strides but the last; kv_len: int32 [1] on the device, 1
    to S, not checked. Tokens from kv_len on are not read: they may be NaN. form: None lets the device and
    dtype choose. Returns [B, Tq, H, D], contiguous. Differentiable in q, keys and values; where the arena
    does not require a gradient, none is computed for it. Autograd keeps the arena itself, not a copy: it must
    not be overwritten before backward (RuntimeError). Raises ValueError for head dims other than 64 and 128,
    mixed dtypes, a strided last axis, and a form that cannot read these strides.
    """
    return _attention_op(q, keys, values, kv_len, form)[0]


def sink_window_attention_slot(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor, slot_keys: Tensor, slot_values: Tensor,
    slot_start: int, form: Form | None = None,
) -> Tensor:  # fmt: skip
    """sink_window_attention with gradients for q and the current chunk's slot; the rest is constant.

    slot_keys, slot_values: [B, T, H, D], the numbers that lie in the arena at slot_start .. slot_start + T.
    Both passes read the arena alone; the slot tensors say where the gradient goes. Raises ValueError as
    sink_window_attention, and for a slot that does not lie in the arena.
    """
    keys, values = keys.detach(), values.detach()
    return _slot_op(q, keys, values, kv_len, slot_keys, slot_values, slot_start, form)[0]
