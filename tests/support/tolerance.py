"""How near a kernel has to be: measured on the reference itself, never set by hand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rfengine.accuracy import beyond_reference_error


def assert_within_reference_error(name: str, kernel: Tensor, reference: Tensor, truth: Tensor) -> None:
    """The kernel's error against float64 truth is at most twice the reference's own."""
    assert kernel.isfinite().all(), f"{name} has values that were never written or overflowed"
    problem = beyond_reference_error(kernel, reference, truth)
    assert not problem, f"{name} is {problem}"


def assert_draws_within_reference_error(name: str, draws: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """The same of (kernel, reference, truth) of several draws together: in one small tensor of float32 the
    reference may be nearly exact by chance."""
    assert_within_reference_error(name, *(torch.stack(each) for each in zip(*draws, strict=True)))
