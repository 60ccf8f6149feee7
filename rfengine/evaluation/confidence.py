"""Means with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of `count` values and the interval that holds it with 95%; None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean with its percentile interval over 2000 resamples of the values; the same each time.

    Raises ValueError without a value.
    """
    if not values:
        raise ValueError("0 values are given; a mean needs at least one")
    data = torch.tensor(values, dtype=torch.float64, device="cpu")
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, None, None, 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(
        len(data), (_RESAMPLES, len(data)), generator=generator, dtype=torch.int64, device="cpu"
    )
    means = data[drawn].mean(1)
    low, high = torch.quantile(
        means, torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64, device="cpu")
    )
    return Interval(mean, float(low), float(high), len(data))
