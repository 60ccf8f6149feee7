"""Attention over e4m3 copies of the window with on-device tensor descriptors (TMA), two forms of
sink_window_attention_fp8.py: `descriptor` and `specialised`, as sink_window_attention_descriptor.py has them,
with its units of work, its parts of the last wave, and its bound in FP8.

Values come transposed, [H E, kv_len] tokens contiguous, since WGMMA takes the second factor of FP8 along its
sums only; descriptors end at kv_len, and what lies behind it is read as zero. The weights stay in registers
as the first factor of the second product, which wants them in another order than the first product leaves
them in: 64 of the 488 instructions between the two (sm_90, Triton 3.9).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import count_processors
from rfengine.kernels.sink_window_attention_descriptor import Parts, allocate_scratch, place_unit, store_rows

# B batch, Tq query tokens, S arena tokens, S8 the same aligned, H heads, D head dim

LN2 = tl.constexpr(0.6931471805599453)
WEIGHT_BITS = tl.constexpr(8.0)  # the largest weight of a row is between 2^7 and 2^8


@triton.jit
def weigh_keys_fp8(q, k, maximum, total, scale, columns_left, MASKED: tl.constexpr):
    """Weights [M, N] of one tile of keys [D, N] in e4m3; the new running maximum, a whole number, and total
    of the weights before rounding, in base 2; the power of two by which everything summed before decays."""
    logits = tl.dot(q, k)
    if MASKED:
        logits = tl.where(tl.arange(0, k.shape[1])[None, :] < columns_left, logits, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.ceil(tl.max(logits, 1) * scale))
    weights = tl.exp2(logits * scale - (new_maximum - WEIGHT_BITS)[:, None])
    decay = tl.exp2(maximum - new_maximum)
    return weights.to(tl.float8e4nv), new_maximum, total * decay + tl.sum(weights, 1), decay


@triton.jit(do_not_specialize=["tokens", "whole_tiles", "units", "parts"])
def _attention_fp8_descriptor_kernel(
    q_ptr, keys_ptr, values_ptr, kv_len_ptr, logit_scale_ptr, value_unit_ptr, out_ptr, row_scale_ptr,
    part_ptr, part_lse_ptr, q_stride_b, q_stride_t, keys_stride_b, keys_stride_t, values_stride_b,
    values_stride_d, heads, tokens, whole_tiles, units, parts,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    kv_len = tl.load(kv_len_ptr)
    scale = tl.load(logit_scale_ptr) / LN2
    width = heads * HEAD_DIM
    queries = tl.make_tensor_descriptor(
        q_ptr + batch * q_stride_b, [tokens, width], [q_stride_t, 1], [BLOCK_M, HEAD_DIM]
    )
    keys = tl.make_tensor_descriptor(
        keys_ptr + batch * keys_stride_b, [kv_len, width], [keys_stride_t, 1], [BLOCK_N, HEAD_DIM]
    )
    values = tl.make_tensor_descriptor(
        values_ptr + batch * values_stride_b, [width, kv_len], [values_stride_d, 1], [HEAD_DIM, BLOCK_N]
    )
    key_tiles = tl.cdiv(kv_len, BLOCK_N)
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    if SPECIALISED:
        first_unit, stop_unit, step = tl.program_id(0), units, tl.num_programs(0)
    else:
        first_unit, stop_unit, step = tl.program_id(0), tl.program_id(0) + 1, 1
    for unit in range(first_unit, stop_unit, step):
        head, row, first, stop, cut = place_unit(
            unit, whole_tiles, parts, key_tiles, row_tiles, BLOCK_M, BLOCK_N
        )
        q = queries.load([row, head * HEAD_DIM])
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        # a product of its own for every tile: at most BLOCK_N = 128 terms are added in the tensor core, whose
        # sums in FP8 have about 14 bits; the rest is float32
        if SPECIALISED:
            for start in tl.range(first, stop, BLOCK_N, warp_specialize=True):
                k = keys.load([start, head * HEAD_DIM]).T
                weights, maximum, total, decay = weigh_keys_fp8(
                    q, k, maximum, total, scale, kv_len - start, True
                )
                v = values.load([head * HEAD_DIM, start]).T
                sums = sums * decay[:, None] + tl.dot(weights, v)
        else:
            last = tl.maximum(stop - BLOCK_N, 0)
            k = keys.load([last, head * HEAD_DIM]).T
            weights, maximum, total, decay = weigh_keys_fp8(q, k, maximum, total, scale, kv_len - last, True)
            v = values.load([head * HEAD_DIM, last]).T
            sums = tl.dot(weights, v)
            for start in tl.range(first, last, BLOCK_N):
                k = keys.load([start, head * HEAD_DIM]).T
                weights, maximum, total, decay = weigh_keys_fp8(q, k, maximum, total, scale, 0, False)
                v = values.load([head * HEAD_DIM, start]).T
                sums = sums * decay[:, None] + tl.dot(weights, v)

        # a whole tile goes to out, a part to its own rows of `part`, value and rest
        within = tl.arange(0, BLOCK_M)
        left = tokens - row
        of_part = within < tl.where(cut < 0, 0, left)
        result = sums * (tl.load(value_unit_ptr + batch * heads + head) / total)[:, None]
        cuts = units - whole_tiles
        part_row = (batch * cuts + cut) * BLOCK_M
        rest_row = part_row + tl.num_programs(1).to(tl.int64) * cuts * BLOCK_M
        tl.store(
            part_lse_ptr + part_row + within, (maximum - WEIGHT_BITS + tl.log2(total)) * LN2, mask=of_part
        )
        rounded = result.to(part_ptr.dtype.element_ty)
        rest = (result - rounded.to(tl.float32)).to(part_ptr.dtype.element_ty)
        store_rows(rest, part_ptr, None, rest_row, within, of_part)
        if row_scale_ptr is None:
            out_row = (batch * tokens + row) * heads + head
            start = tl.where(cut < 0, out_ptr + out_row * HEAD_DIM, part_ptr + part_row * HEAD_DIM)
            store_rows(rounded, start, None, 0, within * tl.where(cut < 0, heads, 1), within < left)
        else:
            store_rows(rounded, part_ptr, None, part_row, within, of_part)
            of_whole = within < tl.where(cut < 0, left, 0)
            # rows within the sample, and not within the tile: those are the same for every unit, and kept
            first_row = batch * tokens * heads + head
            store_rows(rounded, out_ptr, row_scale_ptr, first_row, (row + within) * heads, of_whole)


def attend_fp8_with_descriptors(
    q: Tensor, keys: Tensor, values: Tensor, logit_scale: Tensor, value_unit: Tensor, kv_len: Tensor,
    out: Tensor, row_scale: Tensor | None, dtype: torch.dtype, specialised: bool,
) -> None:  # fmt: skip
    """Into out [B, Tq, H, D], which is e4m3 where there is row_scale [B, Tq, H]; inputs and dtype as in
    sink_window_attention_fp8."""
    batch, tokens, heads, head_dim = q.shape
    block_m, block_n = 128, 128
    processors = count_processors(q.device)
    parts = Parts.of(q, dtype, keys.shape[1], block_m, block_n, processors)
    split = parts.split
    triton.set_allocator(allocate_scratch)
    programs = min(processors, split.units) if specialised else split.units
    _attention_fp8_descriptor_kernel[(programs, batch)](
        q, keys, values, kv_len, logit_scale, value_unit, out, row_scale, parts.part, parts.lse,
        *q.stride()[:2], *keys.stride()[:2], values.stride(0), values.stride(2),
        heads, tokens, split.whole, split.units, split.parts,
        HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, SPECIALISED=specialised,
        num_warps=4 if specialised else 8, num_stages=3,
    )  # fmt: skip
    parts.add_up(kv_len, out, row_scale, None, block_n)
