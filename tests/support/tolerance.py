"""How near a kernel has to be: measured on the reference itself, never set by hand."""

from __future__ import annotations

from torch import Tensor

from rfengine.accuracy import beyond_reference_error


def assert_within_reference_error(name: str, kernel: Tensor, reference: Tensor, truth: Tensor) -> None:
    """The kernel's error against float64 truth is at most twice the reference's own."""
    assert kernel.isfinite().all(), f"{name} has values that were never written or overflowed"
    problem = beyond_reference_error(kernel, reference, truth)
    assert not problem, f"{name} is {problem}"
