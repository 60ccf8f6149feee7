"""EMA eviction: the leaving chunk is folded into the sink in place, keys and values of all layers at once.

    split:  total = alpha * (sink + low) + (1 - alpha) * leaving   in float32
            sink = round(total);  low = round(total - sink)
    plain:  sink = round(round(alpha * sink) + round((1 - alpha) * leaving))   as in the published code

All tensors [L, B, S, H, E]. Every float32 product and sum is rounded on its own (no fused multiply-add), so
both forms equal the reference bit for bit. In place without a race: a program touches its own rows alone.
Bound: memory; split reads 6 and writes 4 bytes for each element in 16-bit, plain reads 4 and writes 2.
"""

# L layers, B batch, S tokens, H heads, E head dim. A row is one head of one token: S * H rows for each (l, b)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import rows_per_program
from rfengine.kernels.rephase_keys import check_layout


@triton.jit
def average(sink, low, leaving, mask, alpha, rest, SPLIT: tl.constexpr):
    """Fold the elements behind the pointers `leaving` into those behind `sink` and `low`.

    alpha, rest: the weights of the sink and of what leaves. Returns the new sink, rounded.
    """
    dtype: tl.constexpr = sink.dtype.element_ty
    kept = tl.load(sink, mask=mask, other=0.0).to(tl.float32)
    added = rest * tl.load(leaving, mask=mask, other=0.0).to(tl.float32)
    if SPLIT:
        total = alpha * (kept + tl.load(low, mask=mask, other=0.0).to(tl.float32)) + added
        high = total.to(dtype)
        tl.store(low, (total - high.to(tl.float32)).to(low.dtype.element_ty), mask=mask)
    else:
        high = ((alpha * kept).to(dtype).to(tl.float32) + added.to(dtype).to(tl.float32)).to(dtype)
    tl.store(sink, high, mask=mask)
    return high


@triton.jit(do_not_specialize=["num_tokens"])
def _ema_evict_kernel(
    sink_keys, sink_values, low_keys, low_values, keys, values,
    sink_l, sink_b, sink_s, sink_h,
    low_l, low_b, low_s, low_h,
    leaving_l, leaving_b, leaving_s, leaving_h,
    batch, num_tokens, alpha, rest,
    H: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    layer, b = (tl.program_id(1) // batch).to(tl.int64), (tl.program_id(1) % batch).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // H, row % H
    column = tl.arange(0, WIDTH)[None, :]
    mask = (token < num_tokens) & (column < E)
    sink = layer * sink_l + b * sink_b + token * sink_s + head * sink_h + column
    low = layer * low_l + b * low_b + token * low_s + head * low_h + column
    leaving = layer * leaving_l + b * leaving_b + token * leaving_s + head * leaving_h + column
    # two calls: a pointer chosen by a condition would lose its alignment, and with it the 16-byte accesses
    if tl.program_id(2) == 0:
        average(sink_keys + sink, low_keys + low, keys + leaving, mask, alpha, rest, SPLIT)
    else:
        average(sink_values + sink, low_values + low, values + leaving, mask, alpha, rest, SPLIT)


def check_pairs(**pairs: tuple[Tensor, Tensor]) -> None:
    """ValueError unless the keys and the values of every pair have one dtype and one set of strides."""
    for name, (keys, values) in pairs.items():
        if keys.stride() != values.stride() or keys.dtype != values.dtype:
            raise ValueError(
                f"{name}: keys are {keys.dtype} with strides {keys.stride()}, values {values.dtype} with "
                f"{values.stride()}; they must be equal: allocate both arenas alike"
            )


@torch.library.custom_op(
    "rfengine::ema_evict", mutates_args=["sink_keys", "sink_values", "low_keys", "low_values"]
)
def ema_evict(
    sink_keys: Tensor, sink_values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    keys: Tensor, values: Tensor, alpha: float,
) -> None:  # fmt: skip
    """Fold the evicted chunk into the sink in place: sink = alpha * sink + (1 - alpha) * evicted.

    All tensors: [L, B, S, H, E]; keys before rotation. low_keys, low_values: what rounding took from the
    sink, or None for the published form. The last axis must be contiguous, and keys and values of a pair must
    have the same strides and dtype (ValueError); the strides are free otherwise.
    """
    if (low_keys is None) != (low_values is None):
        raise ValueError("low_keys and low_values must both be given, or both be None")
    split = low_keys is not None and low_values is not None
    low_pair = (low_keys, low_values) if split else (sink_keys, sink_values)
    check_pairs(sink=(sink_keys, sink_values), low=low_pair, evicted=(keys, values))
    check_layout(sink_keys=sink_keys, low_keys=low_pair[0], keys=keys)
    layers, batch, tokens, heads, head_dim = sink_keys.shape
    width = triton.next_power_of_2(head_dim)
    rows = rows_per_program(width)
    grid = (triton.cdiv(tokens * heads, rows), layers * batch, 2)
    _ema_evict_kernel[grid](
        sink_keys, sink_values, *low_pair, keys, values,
        *sink_keys.stride()[:4], *low_pair[0].stride()[:4], *keys.stride()[:4],
        batch, tokens, alpha, 1 - alpha,
        H=heads, E=head_dim, SPLIT=split, ROWS=rows, WIDTH=width, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
