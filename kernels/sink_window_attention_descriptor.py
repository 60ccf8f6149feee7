"""Attention over the arena with on-device tensor descriptors (TMA): two forms of sink_window_attention.py.

  descriptor   8 warps, one unit of work for each program; the last tile of keys is peeled off, before the
               loop. (Peeled after it, or in a persistent program, ptxas serialises WGMMA or spills.)
  specialised  4 warps, which the compiler turns into a producer and two consumer groups of 64 query rows;
               persistent: the producer fetches the next unit while the consumers finish this one. Triton 3.6
               and 3.9 specialise one loop without branches and without a dot beside it, so its mask stays
               inside: 90 of the 471 instructions between the two products (unmeasured; computed: they hide
               behind the other group's products)
Descriptors end at kv_len: what lies behind it in the arena is read as zero, so no NaN of it meets a weight 0.

Units: a (head, query tile) over all keys, while there is one for every multiprocessor. The tiles of the last,
incomplete wave are cut along the keys into `parts` units, whose results, normalised, are kept as value + rest
in the output dtype and added up by a second kernel with the weights exp(lse - max lse). At 4680 x 12 heads
and 132 multiprocessors: 444 tiles are 3.36 waves; 396 whole tiles and 48 x 5 units take 3.4 waves instead of
4 (computed).
Bound: tensor cores, 4 B H Tq kv_len D FLOPs; the parts cost 2 x 15.7 MB more, mostly in L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import count_processors
from rfengine.kernels.e4m3 import row_unit

# B batch, Tq query tokens, S arena tokens, H heads, D head dim. Units, parts: see above.

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def weigh_keys(q, k, maximum, total, scale, columns_left, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Weights [M, N] of one tile of keys [D, N]; also the new running maximum and total weight, in base 2,
    and the factor by which everything summed before decays."""
    logits = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        logits = tl.where(tl.arange(0, k.shape[1])[None, :] < columns_left, logits, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    return weights, new_maximum, total * decay + tl.sum(weights, 1), decay


@triton.jit
def place_unit(unit, whole_tiles, parts, key_tiles, row_tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Head, first query, first key, the key after the last, and the index among the units of the last wave,
    which is negative for a whole tile."""
    cut = unit - whole_tiles
    is_part = cut >= 0
    tile = tl.where(is_part, whole_tiles + cut // parts, unit)
    part = tl.where(is_part, cut % parts, 0)
    of_parts = tl.where(is_part, parts, 1)
    first = key_tiles * part // of_parts * BLOCK_N
    stop = key_tiles * (part + 1) // of_parts * BLOCK_N
    return tile // row_tiles, tile % row_tiles * BLOCK_M, first, stop, cut


@triton.jit(do_not_specialize=["tokens", "whole_tiles", "units", "parts"])
def _sink_window_attention_descriptor_kernel(
    q_ptr, keys_ptr, values_ptr, kv_len_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, q_stride_b,
    q_stride_t, keys_stride_b, keys_stride_t, values_stride_b, values_stride_t, heads, tokens, whole_tiles,
    units, parts, scale, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    kv_len = tl.load(kv_len_ptr)
    width = heads * HEAD_DIM
    queries = tl.make_tensor_descriptor(
        q_ptr + batch * q_stride_b, [tokens, width], [q_stride_t, 1], [BLOCK_M, HEAD_DIM]
    )
    keys = tl.make_tensor_descriptor(
        keys_ptr + batch * keys_stride_b, [kv_len, width], [keys_stride_t, 1], [BLOCK_N, HEAD_DIM]
    )
    values = tl.make_tensor_descriptor(
        values_ptr + batch * values_stride_b, [kv_len, width], [values_stride_t, 1], [BLOCK_N, HEAD_DIM]
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
        is_part = cut >= 0
        q = queries.load([row, head * HEAD_DIM])
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        if SPECIALISED:
            for start in tl.range(first, stop, BLOCK_N, warp_specialize=True):
                k = keys.load([start, head * HEAD_DIM]).T
                weights, maximum, total, decay = weigh_keys(
                    q, k, maximum, total, scale, kv_len - start, True, "ieee"
                )
                v = values.load([start, head * HEAD_DIM])
                sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None])
        else:
            last = tl.maximum(stop - BLOCK_N, 0)
            k = keys.load([last, head * HEAD_DIM]).T
            weights, maximum, total, decay = weigh_keys(
                q, k, maximum, total, scale, kv_len - last, True, "ieee"
            )
            v = values.load([last, head * HEAD_DIM])
            sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None])
            for start in tl.range(first, last, BLOCK_N):
                k = keys.load([start, head * HEAD_DIM]).T
                weights, maximum, total, decay = weigh_keys(q, k, maximum, total, scale, 0, False, "ieee")
                v = values.load([start, head * HEAD_DIM])
                sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None])

        # A whole tile goes to out, a part to its own rows of `part`, and what rounding took from it to the
        # second half: value and rest, since a float32 tile staged beside the pipeline overruns shared memory.
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, HEAD_DIM)
        inside = row + rows < tokens
        cuts = units - whole_tiles
        part_row = (batch * cuts + cut) * BLOCK_M
        rest_row = part_row + tl.num_programs(1).to(tl.int64) * cuts * BLOCK_M
        out_start = out_ptr + (batch * tokens + row) * width + head * HEAD_DIM
        start = tl.where(is_part, part_ptr + part_row * HEAD_DIM, out_start)
        stride = tl.where(is_part, HEAD_DIM, width)
        lse_start = lse_ptr + (batch * heads + head) * tokens + row
        lse_start = tl.where(is_part, part_lse_ptr + part_row, lse_start)
        tl.store(lse_start + rows, (maximum + tl.log2(total)) * LN2, mask=inside)
        result = sums / total[:, None]
        high = result.to(out_ptr.dtype.element_ty)
        low = (result - high.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(start + rows[:, None] * stride + columns[None, :], high, mask=inside[:, None])
        rest = part_ptr + rest_row * HEAD_DIM + rows[:, None] * HEAD_DIM + columns[None, :]
        tl.store(rest, low, mask=(rows < tl.where(is_part, tokens - row, 0))[:, None])


@triton.jit
def store_rows(result, out_ptr, row_scale_ptr, first, rows, mask):
    """result [M, D] at rows first + rows of out [..., D], `first` in 64 bits; with row_scale [...], in e4m3
    with a scale for each row as well, its row_unit."""
    if row_scale_ptr is not None:
        wide = result.to(tl.float32)
        scale = row_unit(wide, 1)
        tl.store(row_scale_ptr + first + rows, scale, mask=mask)
        # by the reciprocal, since 64 correctly rounded divisions a thread spill; at most 448 (1 + 2^-22) in
        # magnitude, which rounds to 448: nothing is left to saturate
        result = (wide * tl.div_rn(1.0, scale)[:, None]).to(tl.float8e4nv)
    columns = tl.arange(0, result.shape[1])
    out_start = out_ptr + first * result.shape[1]
    tl.store(out_start + rows[:, None] * result.shape[1] + columns[None, :], result, mask=mask[:, None])


@triton.jit(do_not_specialize=["tokens", "whole_tiles", "parts"])
def _add_parts_kernel(
    part_ptr, part_lse_ptr, kv_len_ptr, out_ptr, row_scale_ptr, lse_ptr, heads, tokens, whole_tiles, parts,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    cut_tile = tl.program_id(1)
    cuts = tl.num_programs(1) * parts
    key_tiles = tl.cdiv(tl.load(kv_len_ptr), BLOCK_N)
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    head = (whole_tiles + cut_tile) // row_tiles
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = (whole_tiles + cut_tile) % row_tiles * BLOCK_M + within
    inside = rows < tokens
    columns = tl.arange(0, HEAD_DIM)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for part in range(parts):
        if key_tiles * part // parts < key_tiles * (part + 1) // parts:  # a part without keys holds nothing
            part_rows = (batch * cuts + cut_tile * parts + part) * BLOCK_M + within
            rest_rows = part_rows + tl.num_programs(2).to(tl.int64) * cuts * BLOCK_M
            lse = tl.load(part_lse_ptr + part_rows, mask=inside, other=0.0) / LN2
            high = tl.load(part_ptr + part_rows[:, None] * HEAD_DIM + columns[None, :], mask=inside[:, None])
            low = tl.load(part_ptr + rest_rows[:, None] * HEAD_DIM + columns[None, :], mask=inside[:, None])
            new_maximum = tl.maximum(maximum, lse)
            decay = tl.exp2(maximum - new_maximum)
            weight = tl.exp2(lse - new_maximum)
            total = total * decay + weight
            result = high.to(tl.float32) + low.to(tl.float32)
            sums = sums * decay[:, None] + result * weight[:, None]
            maximum = new_maximum
    result = (sums / total[:, None]).to(part_ptr.dtype.element_ty)
    store_rows(result, out_ptr, row_scale_ptr, batch * tokens * heads + head, rows * heads, inside)
    if lse_ptr is not None:
        lse = (maximum + tl.log2(total)) * LN2
        tl.store(lse_ptr + (batch * heads + head) * tokens + rows, lse, mask=inside)


@dataclass(frozen=True, slots=True)
class TileSplit:
    """The first `whole` of the tiles are units of their own; each of the `cut` others is `parts` units."""

    whole: int
    cut: int
    parts: int

    @property
    def units(self) -> int:
        return self.whole + self.cut * self.parts


def split_tiles(tiles: int, processors: int, most_parts: int) -> TileSplit:
    """Cut the tiles of the last, incomplete wave so that the multiprocessors finish together (unmeasured).

    The time of the last wave, in whole tiles, is ceil(cut * parts / processors) / parts; a hundredth of a
    tile is added for each part: what it costs to write and read its result."""
    cut = tiles % processors
    costs = [-(-cut * parts // processors) / parts + 0.01 * parts for parts in range(1, most_parts + 1)]
    parts = costs.index(min(costs)) + 1
    return TileSplit(tiles, 0, 1) if parts == 1 or cut == 0 else TileSplit(tiles - cut, cut, parts)


def allocate_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for a launch's descriptors, from torch's allocator: from the pool of a graph being captured."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@dataclass(frozen=True, slots=True)
class Parts:
    """How the tiles are given out, and where the parts of the last wave leave their results until they are
    added up: part [2, B, units, M, D], value and rest in 16 bits or float32; lse [B, units, M] float32."""

    split: TileSplit
    part: Tensor
    lse: Tensor

    @classmethod
    def of(
        cls, q: Tensor, dtype: torch.dtype, arena_tokens: int, block_m: int, block_n: int, processors: int
    ) -> Parts:
        """For q [B, Tq, H, D] and results in dtype; each multiprocessor holds one program."""
        batch, tokens, heads, head_dim = q.shape
        # a part has at least four tiles of keys of a full arena, and eight parts are the most that can pay
        most_parts = max(1, min(8, arena_tokens // (4 * block_n)))
        split = split_tiles(triton.cdiv(tokens, block_m) * heads, processors, most_parts)
        rows = (batch, split.cut * split.parts, block_m)
        part = torch.empty((2, *rows, head_dim), dtype=dtype, device=q.device)
        return cls(split, part, torch.empty(rows, dtype=torch.float32, device=q.device))

    def add_up(
        self, kv_len: Tensor, out: Tensor, row_scale: Tensor | None, lse: Tensor | None, block_n: int
    ) -> None:
        """Into out [B, Tq, H, D], and where given row_scale [B, Tq, H], which makes out e4m3, and lse [B, H,
        Tq]."""
        split, rows = self.split, 16
        if not split.cut:
            return
        (batch, tokens, heads, head_dim), block_m = out.shape, self.part.shape[3]
        _add_parts_kernel[(block_m // rows, split.cut, batch)](
            self.part, self.lse, kv_len, out, row_scale, lse, heads, tokens, split.whole, split.parts,
            HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, ROWS=rows, num_warps=4, num_stages=1,
        )  # fmt: skip


def attend_with_descriptors(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor, block_m: int, block_n: int, specialised: bool
) -> tuple[Tensor, Tensor]:
    """(out [B, Tq, H, D], natural log-sum-exp [B, H, Tq] float32); inputs as in sink_window_attention."""
    batch, tokens, heads, head_dim = q.shape
    processors = count_processors(q.device)
    parts = Parts.of(q, q.dtype, keys.shape[1], block_m, block_n, processors)
    split = parts.split
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    triton.set_allocator(allocate_scratch)
    programs = min(processors, split.units) if specialised else split.units
    _sink_window_attention_descriptor_kernel[(programs, batch)](
        q, keys, values, kv_len, out, lse, parts.part, parts.lse,
        *q.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
        heads, tokens, split.whole, split.units, split.parts, head_dim**-0.5 / LN2.value,
        HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, SPECIALISED=specialised,
        num_warps=4 if specialised else 8, num_stages=2,
    )  # fmt: skip
    parts.add_up(kv_len, out, None, lse, block_n)
    return out, lse
