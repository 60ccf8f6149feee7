"""Attention of a chunk over e4m3 copies of the window: softmax(scale q k^T) v * value_unit, keys 0 .. kv_len.

Online softmax in base 2 as in sink_window_attention.py, with c = logit_scale * log2(e), read from the device:
    s = q k^T;  m' = max(m, ceil(c max(s)));  p = 2^(c s - m' + 8);  l = 2^(m - m') l + sum(p);
    acc = 2^(m - m') acc + e4m3(p) v;         at the end out = acc * value_unit / l.
Maxima are whole numbers, so a decay is a power of two and takes nothing from what was rounded: weights of
2^-6 and more, as they are at the end, round alike whatever the order of the tiles. Below that e4m3 has no
exponents left and a weight is off by 2^-10 at most; the largest is between 2^7 and 2^8. The sum l is of
weights before rounding. A product of its own for each tile: at most 128 terms are added in the tensor core,
which keeps about 14 bits of a sum in FP8 on Hopper, and the tiles in float32.

q [B, Tq, H, D], keys [B, S, H, D] and transposed values [B, H, D, S8], all e4m3; logit_scale float32 [1],
value_unit float32 [B, H], kv_len int32 [1] on the device; out [B, Tq, H, D] contiguous.
Bound: tensor cores, 4 B H Tq kv_len D FLOPs at twice the rate of 16 bits.
Forms: `pointer` (here) on any GPU with FP8; `descriptor` and `specialised` are those of
sink_window_attention_fp8_descriptor.py.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import capability_of, fits_descriptor, require_fp8
from rfengine.kernels.sink_window_attention_descriptor import store_rows
from rfengine.kernels.sink_window_attention_fp8_descriptor import (
    LN2,
    attend_fp8_with_descriptors,
    weigh_keys_fp8,
)

# B batch, Tq query tokens, S arena tokens, S8 the same aligned, H heads, D head dim

Form = Literal["pointer", "descriptor", "specialised"]
HEAD_DIMS = (64, 128)
E4M3 = torch.float8_e4m3fn
RESULTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["tokens"])
def _attention_fp8_kernel(
    q_ptr, keys_ptr, values_ptr, kv_len_ptr, logit_scale_ptr, value_unit_ptr, out_ptr, row_scale_ptr,
    q_stride_b, q_stride_t, q_stride_h, keys_stride_b, keys_stride_t, keys_stride_h,
    values_stride_b, values_stride_h, values_stride_d, heads, tokens,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    columns = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, BLOCK_N)
    kv_len = tl.load(kv_len_ptr)
    scale = tl.load(logit_scale_ptr) / LN2
    last = (kv_len - 1) // BLOCK_N * BLOCK_N

    q_rows = batch * q_stride_b + head * q_stride_h + rows.to(tl.int64) * q_stride_t
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=inside[:, None], other=0.0)
    keys_start = keys_ptr + batch * keys_stride_b + head * keys_stride_h
    values_start = values_ptr + batch * values_stride_b + head * values_stride_h
    # within a tile 32 bits hold the offsets of keys; where a tile starts is counted in 64
    keys_tile = offsets[None, :] * keys_stride_t + columns[:, None]
    values_tile = offsets[:, None] + columns[None, :].to(tl.int64) * values_stride_d

    left = kv_len - last
    short = offsets < left
    last_keys = keys_start + last.to(tl.int64) * keys_stride_t
    k = tl.load(last_keys + keys_tile, mask=short[None, :], other=0.0)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weights, maximum, total, decay = weigh_keys_fp8(q, k, maximum, total, scale, left, True)
    v = tl.load(values_start + last + values_tile, mask=short[:, None], other=0.0)
    sums = tl.dot(weights, v)
    for _ in tl.range(0, last, BLOCK_N):
        k = tl.load(keys_start + keys_tile)
        weights, maximum, total, decay = weigh_keys_fp8(q, k, maximum, total, scale, 0, False)
        v = tl.load(values_start + values_tile)
        sums = sums * decay[:, None] + tl.dot(weights, v)
        keys_start += BLOCK_N * keys_stride_t
        values_start += BLOCK_N

    result = sums * (tl.load(value_unit_ptr + batch * heads + head) / total)[:, None]
    first = batch * tokens * heads + head
    store_rows(result.to(DTYPE), out_ptr, row_scale_ptr, first, rows * heads, inside)


def choose_form(capability: tuple[int, int] | None, dtype: torch.dtype) -> Form:
    """The form for a device of this compute capability (None: no GPU) and a result in dtype; unmeasured. On
    Hopper `specialised`, which spills where it rounds results to float32 alone."""
    if capability is None or capability[0] != 9:
        return "pointer"
    return "descriptor" if dtype == torch.float32 else "specialised"


def _attend_with_pointers(
    q: Tensor, keys: Tensor, values: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: Tensor,
    out: Tensor, row_scale: Tensor | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    batch, tokens, heads, head_dim = q.shape
    # unmeasured: the largest without a spill on sm_89, sm_90, sm_100 and sm_120
    block_m, block_n = 128, 64
    _attention_fp8_kernel[(triton.cdiv(tokens, block_m), heads, batch)](
        q, keys, values, kv_len, logit_scale, value_unit, out, row_scale,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], heads, tokens,
        HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, DTYPE=RESULTS[dtype],
        num_warps=8, num_stages=3,
    )  # fmt: skip


def _check(
    q: Tensor, keys: Tensor, values: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: Tensor,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    batch, _, heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the head dim is {head_dim}; use one of {HEAD_DIMS}, or the reference backend")
    if (keys.shape[0], *keys.shape[2:]) != (batch, heads, head_dim) or keys.ndim != 4:
        raise ValueError(f"keys are {tuple(keys.shape)} for q of {tuple(q.shape)}; they must be [B, S, H, D]")
    if values.shape[:-1] != (batch, heads, head_dim) or values.shape[-1] < keys.shape[1]:
        raise ValueError(
            f"values are {tuple(values.shape)} for keys of {tuple(keys.shape)}; they must be [B, H, D, S8]"
        )
    if not q.dtype == keys.dtype == values.dtype == E4M3:
        raise ValueError(f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}; all must be {E4M3}")
    if any(tensor.stride(-1) != 1 for tensor in (q, keys, values)):
        raise ValueError("the last axis of q, keys or values is strided; call contiguous() on that tensor")
    if dtype not in RESULTS:
        raise ValueError(f"the result is asked for in {dtype}; use one of {(*RESULTS,)}")
    for name, tensor, wanted, shape in (
        ("kv_len", kv_len, torch.int32, (1,)), ("logit_scale", logit_scale, torch.float32, (1,)),
        ("value_unit", value_unit, torch.float32, (batch, heads)),
    ):  # fmt: skip
        if tensor.dtype != wanted or tuple(tensor.shape) != shape or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be {wanted} "
                f"{shape} on {q.device}"
            )


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: Tensor,
    dtype: torch.dtype, rows: bool, form: str | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    require_fp8(capability_of(q.device))
    _check(q, keys, values, logit_scale, value_unit, kv_len, dtype)
    head_dim = q.shape[-1]
    adjacent = q.stride(2) == keys.stride(2) == head_dim and values.stride(1) == head_dim * values.stride(2)
    readable = adjacent and all(fits_descriptor(each) for each in (q, keys, values))
    if form is None:
        form = choose_form(capability_of(q.device), dtype) if readable else "pointer"
    if form not in get_args(Form):
        raise ValueError(f"the form is {form!r}; it must be one of {get_args(Form)}")
    out = torch.empty(q.shape, dtype=E4M3 if rows else dtype, device=q.device)
    row_scale = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if rows else None
    given = (q, keys, values, logit_scale, value_unit.contiguous(), kv_len, out, row_scale, dtype)
    with torch.cuda.device_of(q):
        if form == "pointer":
            _attend_with_pointers(*given)
        elif readable:
            attend_fp8_with_descriptors(*given, form == "specialised")
        else:
            raise ValueError(
                "q, keys or values has heads that are not adjacent, or a stride or start that is no "
                "multiple of 16 bytes; use the pointer form"
            )
    return out, row_scale


@torch.library.custom_op("rfengine::sink_window_attention_fp8", mutates_args=())
def _attention_op(
    q: Tensor, keys: Tensor, values: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: Tensor,
    dtype: torch.dtype, form: str | None,
) -> Tensor:  # fmt: skip
    return _attend(q, keys, values, logit_scale, value_unit, kv_len, dtype, False, form)[0]


@torch.library.custom_op("rfengine::sink_window_attention_fp8_rows", mutates_args=())
def _rows_op(
    q: Tensor, keys: Tensor, values: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: Tensor,
    dtype: torch.dtype, form: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _attend(q, keys, values, logit_scale, value_unit, kv_len, dtype, True, form)


@_attention_op.register_fake
def _(q, keys, values, logit_scale, value_unit, kv_len, dtype, form):
    return q.new_empty(q.shape, dtype=dtype)


@_rows_op.register_fake
def _(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def sink_window_attention_fp8(
    q: Tensor, keys_fp8: Tensor, values_fp8: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: int,
    filled_tokens: Tensor, dtype: torch.dtype, rows: bool = False, form: Form | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(logit_scale * q k^T) v * value_unit over the first tokens of the copies, without mask.

    q: e4m3 [B, Tq, H, D]; keys_fp8: e4m3 [B, S, H, D]; values_fp8: e4m3 [B, H, D, S8]; any strides but the
    last. logit_scale: float32 [1]; value_unit: float32 [B, H]. filled_tokens: int32 [1] on the device, 1 to
    S, not checked, the number of tokens that are read, and the same as kv_len; the others may be NaN. Returns
    [B, Tq, H, D] in dtype, contiguous; with rows, e4m3 [B, Tq, H, D] and float32 scales [B, Tq, H], max |row|
    / 448 after rounding to dtype, 1 where that is below 2^-126. form: None lets the device choose. No
    gradient. Raises RuntimeError for a GPU without FP8, and ValueError for head dims other than 64 and 128,
    other dtypes, shapes that do not fit, a strided last axis, and a form that cannot read these strides.
    """
    given = (q, keys_fp8, values_fp8, logit_scale, value_unit, filled_tokens, dtype, form)
    return _rows_op(*given) if rows else _attention_op(*given)
