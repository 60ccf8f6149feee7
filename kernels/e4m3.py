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
