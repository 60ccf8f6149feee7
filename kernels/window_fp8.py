"""The window in e4m3: rotated keys less their mean, and values transposed, of all layers at once.

    key_mean = mean of the keys;   keys_fp8 = e4m3((key - key_mean) * (1 / key_unit))
    value_unit = 16 max |v| / 448, 1 where that is below 2^-126;   values_fp8 = e4m3(v * (1 / value_unit))

rotated, values [L, B, S, H, E]; means [L, B, H, E] and value units [L, B, H] over the first filled_tokens
tokens, which the device reads; keys_fp8 [L, B, S, H, E]; values_fp8 [L, B, H, E, S8], tokens contiguous.
Three launches: sums of keys and maxima of values of PART_TOKENS tokens each, then means and units, then the
values. Sums are float32 in two stages, each in a fixed order: a run repeats bit for bit. A tile of values is
turned in shared memory, so that reads and writes are both of whole lines.
Bound: memory, 10 bytes for each element of the window in 16 bits (read twice, written once, keys and values).
"""

# L layers, B batch, S tokens, H heads, E head dim, WIDTH the power of two that holds E

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import capability_of, require_fp8
from rfengine.kernels.e4m3 import LARGEST, to_e4m3, unit_or_one
from rfengine.kernels.rephase_keys import check_layout

PART_TOKENS = 512  # that one program sums: 28 x 12 x 30 programs at the shipped size (unmeasured)
HEADROOM = tl.constexpr(16.0)  # of the values' unit, over the largest value of the window


@triton.jit(do_not_specialize=["parts"])
def _window_parts_kernel(
    rotated, values, filled_tokens, sums, maxima,
    rotated_l, rotated_b, rotated_s, rotated_h, values_l, values_b, values_s, values_h, batch, heads, parts,
    E: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    layer, b = sample // batch, sample % batch
    filled = tl.load(filled_tokens)
    column = tl.arange(0, WIDTH)
    rotated += layer * rotated_l + b * rotated_b + head * rotated_h
    values += layer * values_l + b * values_b + head * values_h
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    largest = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, PART, ROWS):
        token = part * PART + start + tl.arange(0, ROWS)
        mask = (token < filled)[:, None] & (column < E)[None, :]
        token = token.to(tl.int64)[:, None]
        total += tl.load(rotated + token * rotated_s + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + token * values_s + column[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    place = (sample * parts + part) * heads + head
    tl.store(sums + place * E + column, tl.sum(total, 0), mask=column < E)
    tl.store(maxima + place, tl.max(tl.max(largest, 1), 0))


@triton.jit(do_not_specialize=["parts"])
def _window_units_kernel(
    sums, maxima, filled_tokens, key_mean, value_unit, heads, parts,
    E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    largest = tl.zeros((ROWS,), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        place = (sample * parts + part) * heads + head
        mask = (part < parts)[:, None] & (column < E)[None, :]
        total += tl.load(sums + place[:, None] * E + column[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.load(maxima + place, mask=part < parts, other=0.0))
    filled = tl.load(filled_tokens).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 0), filled)
    tl.store(key_mean + (sample * heads + head) * E + column, mean, mask=column < E)
    unit = unit_or_one(tl.div_rn(tl.max(largest, 0) * HEADROOM, LARGEST))
    tl.store(value_unit + sample * heads + head, unit)


@triton.jit
def _window_fp8_kernel(
    rotated, values, key_unit, key_mean, value_unit, keys_fp8, values_fp8, filled_tokens,
    rotated_l, rotated_b, rotated_s, rotated_h, values_l, values_b, values_s, values_h,
    keys8_l, keys8_b, keys8_s, keys8_h, values8_l, values8_b, values8_h, values8_e, batch, heads,
    E: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    layer, b = sample // batch, sample % batch
    column = tl.arange(0, WIDTH)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    filled = tl.load(filled_tokens)
    mask = (token < filled)[:, None] & (column < E)[None, :]
    row = token.to(tl.int64)[:, None]
    place = sample * heads + head
    mean = tl.load(key_mean + place * E + column, mask=column < E, other=0.0)
    key_factor = tl.div_rn(1.0, tl.load(key_unit + layer))
    value_factor = tl.div_rn(1.0, tl.load(value_unit + place))

    source = rotated + layer * rotated_l + b * rotated_b + head * rotated_h
    key = tl.load(source + row * rotated_s + column[None, :], mask=mask, other=0.0).to(tl.float32)
    target = keys_fp8 + layer * keys8_l + b * keys8_b + head * keys8_h
    key = to_e4m3((key - mean[None, :]) * key_factor)
    tl.store(target + row * keys8_s + column[None, :], key, mask=mask)

    source = values + layer * values_l + b * values_b + head * values_h + row * values_s + column[None, :]
    target = values_fp8 + layer * values8_l + b * values8_b + head * values8_h
    target += column.to(tl.int64)[:, None] * values8_e + token[None, :]
    if (tl.program_id(0) + 1) * TOKENS <= filled:  # a mask that ends anywhere allows a byte at a time
        value = tl.load(source, mask=(column < E)[None, :], other=0.0).to(tl.float32)
        tl.store(target, tl.trans(to_e4m3(value * value_factor)), mask=(column < E)[:, None])
    else:
        value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, tl.trans(to_e4m3(value * value_factor)), mask=tl.trans(mask))


def check_units(**units: Tensor) -> None:
    """ValueError unless these are contiguous and float32."""
    for name, unit in units.items():
        if unit.dtype != torch.float32 or not unit.is_contiguous():
            raise ValueError(
                f"{name} is {unit.dtype} with strides {unit.stride()}; it must be float32 and contiguous"
            )


@torch.library.custom_op(
    "rfengine::window_fp8", mutates_args=["key_mean", "value_unit", "keys_fp8", "values_fp8"]
)
def _window_op(
    rotated: Tensor, values: Tensor, key_unit: Tensor, key_mean: Tensor, value_unit: Tensor,
    keys_fp8: Tensor, values_fp8: Tensor, filled_tokens: Tensor,
) -> None:  # fmt: skip
    require_fp8(capability_of(rotated.device))
    check_layout(rotated=rotated, values=values, keys_fp8=keys_fp8, values_fp8=values_fp8)
    check_units(key_unit=key_unit, key_mean=key_mean, value_unit=value_unit)
    layers, batch, tokens, heads, head_dim = rotated.shape
    width, samples = triton.next_power_of_2(head_dim), layers * batch
    parts = triton.cdiv(tokens, PART_TOKENS)
    sums, maxima = (
        torch.empty((samples, parts, heads, *each), dtype=torch.float32, device=rotated.device)
        for each in ((head_dim,), ())
    )
    arenas = *rotated.stride()[:4], *values.stride()[:4]
    _window_parts_kernel[(parts, heads, samples)](
        rotated, values, filled_tokens, sums, maxima, *arenas, batch, heads, parts,
        E=head_dim, WIDTH=width, PART=PART_TOKENS, ROWS=32, num_warps=4,
    )  # fmt: skip
    _window_units_kernel[(heads, samples)](
        sums, maxima, filled_tokens, key_mean, value_unit, heads, parts,
        E=head_dim, WIDTH=width, ROWS=16, num_warps=4,
    )  # fmt: skip
    tile = 128  # tokens: 32 of a warp's stores of values are one line (unmeasured)
    _window_fp8_kernel[(triton.cdiv(tokens, tile), heads, samples)](
        rotated, values, key_unit, key_mean, value_unit, keys_fp8, values_fp8, filled_tokens,
        *arenas, *keys_fp8.stride()[:4], *values_fp8.stride()[:4], batch, heads,
        E=head_dim, WIDTH=width, TOKENS=tile, num_warps=8,
    )  # fmt: skip


def window_fp8(
    rotated: Tensor, values: Tensor, key_unit: Tensor, key_mean: Tensor, value_unit: Tensor,
    keys_fp8: Tensor, values_fp8: Tensor, kv_len: int, filled_tokens: Tensor,
) -> None:  # fmt: skip
    """The first filled_tokens tokens of the arena in e4m3, all layers at once, with their means and units.

    rotated, values: [L, B, S, H, E], float32 or 16 bits; key_unit: float32 [L], in which no key less the mean
    exceeds 448. In place: key_mean, float32 [L, B, H, E]; value_unit, float32 [L, B, H]; keys_fp8, e4m3 [L,
    B, S, H, E]; values_fp8, e4m3 [L, B, H, E, S8]. filled_tokens: int32 [1] on the device, the same as
    kv_len; tokens from there on are neither read nor written. The last axis of the arenas and copies must be
    contiguous, means and units contiguous (ValueError); the other strides are free. Raises RuntimeError for a
    GPU without FP8.
    """
    _window_op(rotated, values, key_unit, key_mean, value_unit, keys_fp8, values_fp8, filled_tokens)
