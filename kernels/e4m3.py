"""Rounding to e4m3, as every kernel that writes it does: a number is its e4m3 value times a unit."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
SMALLEST_UNIT = tl.constexpr(2.0**-126)  # that of reference.py


@triton.jit
def to_e4m3(x):
    """Rounded to nearest; saturates."""
    return tl.clamp(x, -LARGEST, LARGEST).to(tl.float8e4nv)


@triton.jit
def unit_or_one(unit):
    """unit, or 1 where it is smaller than a normal number, such as that of zeros."""
    return tl.where(unit >= SMALLEST_UNIT, unit, 1.0)


@triton.jit
def row_unit(rows, AXIS: tl.constexpr):
    """The units of float32 rows along AXIS."""
    # a correctly rounded division: the plain one differs from torch's in the last bit
    return unit_or_one(tl.div_rn(tl.max(tl.abs(rows), AXIS), LARGEST))


@triton.jit
def row_fp8_of(rows, AXIS: tl.constexpr):
    """float32 rows along AXIS in e4m3 and their units, as reference.row_fp8 has them."""
    unit = row_unit(rows, AXIS)
    # at most 448 (1 + 2^-23) in magnitude, which rounds to 448: nothing is left to saturate
    values = tl.div_rn(rows, unit if AXIS == 0 else unit[:, None])
    return values.to(tl.float8e4nv), unit


@triton.jit
def hidden_unit(row_scale, reach):
    """The units of hidden rows, known before the rows are: reference_fp8.hidden_unit."""
    return unit_or_one(row_scale * tl.load(reach) + tl.load(reach + 1))
