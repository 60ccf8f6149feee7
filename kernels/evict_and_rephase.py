"""Eviction and re-phasing in one launch: ema_evict of the sink, then rephase_keys of every filled slot.

    values[sink] <- average(values[sink], values[leaving]);  raw[sink] <- average(raw[sink], raw[leaving])
    rotated <- rotate(raw)   for all S tokens, the sink's from registers

raw, rotated, values [L, B, S, H, E], the filled part of the arenas; the sink is their first sink_tokens
tokens, the leaving chunk the sink_tokens tokens from `leaving` on, which are only read. The memory it leaves
is, bit for bit, that of the two ops one after the other. Bound: memory. With three slots, split, in 16-bit,
an element of the sink costs 30 bytes over all slots, and 32 in two launches: what is saved is reading the
sink's new keys, and a launch.
"""

# L layers, B batch, S tokens, H heads, E head dim. A row is one head of one token. Programs along the first
# grid axis: keys of the sink, keys of the other slots, values of the sink

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import rows_per_program
from rfengine.kernels.ema_evict import average, check_pairs
from rfengine.kernels.rephase_keys import (
    check_layout,
    check_rotation,
    load_rotation,
    rotate_pairs,
)


@triton.jit(do_not_specialize=["num_tokens", "sink_tokens", "leaving", "sink_programs", "key_programs"])
def _evict_and_rephase_kernel(
    raw, rotated, values, low_keys, low_values, rotation,
    raw_l, raw_b, raw_s, raw_h,
    rotated_l, rotated_b, rotated_s, rotated_h,
    low_l, low_b, low_s, low_h,
    batch, num_tokens, sink_tokens, leaving, sink_programs, key_programs, alpha, rest,
    H: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    layer, b = (tl.program_id(1) // batch).to(tl.int64), (tl.program_id(1) % batch).to(tl.int64)
    is_values = tl.program_id(0) >= key_programs
    in_sink = is_values | (tl.program_id(0) < sink_programs)
    first = tl.where(in_sink, 0, sink_tokens)
    block = tl.program_id(0) - tl.where(is_values, key_programs, tl.where(in_sink, 0, sink_programs))
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = first + row // H, row % H
    column = tl.arange(0, WIDTH)[None, :]
    valid = token < tl.where(in_sink, sink_tokens, num_tokens)
    mask = valid & (column < E)
    own = layer * raw_l + b * raw_b + token * raw_s + head * raw_h + column
    gone = own + leaving.to(tl.int64) * raw_s
    low = layer * low_l + b * low_b + token * low_s + head * low_h + column
    if is_values:
        average(values + own, low_values + low, values + gone, mask, alpha, rest, SPLIT)
    else:
        target = rotated + layer * rotated_l + b * rotated_b + token * rotated_s + head * rotated_h + column
        cos, sin = load_rotation(rotation, token, valid, num_tokens, E, WIDTH)
        if in_sink:
            x = average(raw + own, low_keys + low, raw + gone, mask, alpha, rest, SPLIT)
        else:
            x = tl.load(raw + own, mask=mask, other=0.0)
        turned = rotate_pairs(x.to(tl.float32), cos, sin, ROWS, WIDTH)
        tl.store(target, turned.to(rotated.dtype.element_ty), mask=mask)


@torch.library.custom_op(
    "rfengine::evict_and_rephase", mutates_args=["raw", "rotated", "values", "low_keys", "low_values"]
)
def evict_and_rephase(
    raw: Tensor, rotated: Tensor, values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    rotation: Tensor, sink_tokens: int, leaving: int, alpha: float,
) -> None:  # fmt: skip
    """Fold the chunk at token `leaving` into the sink, then rotate all keys again.

    raw, rotated, values: [L, B, S, H, E], the filled part of the arenas, changed in place: the first
    sink_tokens of raw and values, all of rotated. low_keys, low_values: [L, B, sink_tokens, H, E], changed in
    place, or None for the published form. rotation: [2, S, E / 2], float32.
    Raises ValueError when the leaving chunk overlaps the sink or the arena's end, the last axis of a tensor
    is not contiguous, or keys and values (also of the low part) differ in strides or dtype.
    """
    if not 0 < sink_tokens <= leaving <= raw.shape[2] - sink_tokens:
        raise ValueError(
            f"a chunk of {sink_tokens} tokens that leaves from token {leaving} does not lie between the sink "
            f"and the end of {raw.shape[2]} tokens; pass the start of a filled slot"
        )
    if (low_keys is None) != (low_values is None):
        raise ValueError("low_keys and low_values must both be given, or both be None")
    split = low_keys is not None and low_values is not None
    low_pair = (low_keys, low_values) if split else (raw, values)
    check_pairs(arena=(raw, values), low=low_pair)
    check_layout(raw=raw, rotated=rotated, low_keys=low_pair[0])
    check_rotation(rotation)
    layers, batch, tokens, heads, head_dim = raw.shape
    width = triton.next_power_of_2(head_dim)
    rows = rows_per_program(width)
    sink_programs = triton.cdiv(sink_tokens * heads, rows)
    key_programs = sink_programs + triton.cdiv((tokens - sink_tokens) * heads, rows)
    _evict_and_rephase_kernel[(key_programs + sink_programs, layers * batch)](
        raw, rotated, values, *low_pair, rotation,
        *raw.stride()[:4], *rotated.stride()[:4], *low_pair[0].stride()[:4],
        batch, tokens, sink_tokens, leaving, sink_programs, key_programs, alpha, 1 - alpha,
        H=heads, E=head_dim, SPLIT=split, ROWS=rows, WIDTH=width, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
