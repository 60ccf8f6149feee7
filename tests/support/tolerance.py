"""How near a kernel has to be: measured on the reference itself, never set by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_reference_error(
    name: str, kernel: Tensor, reference: Tensor, truth: Tensor, factor: float = 2.0
) -> None:
    """The kernel's error against float64 truth is at most `factor` times the reference's own.

    A sixteenth of the epsilon of the truth's norm is added, for where the reference happens to be exact.
    """
    assert kernel.shape == truth.shape, f"{name} is {tuple(kernel.shape)}, not {tuple(truth.shape)}"
    assert kernel.isfinite().all(), f"{name} has values that were never written or overflowed"
    scale = truth.double().norm()
    kernel_error = ((kernel.double() - truth.double()).norm() / scale).item()
    reference_error = ((reference.double() - truth.double()).norm() / scale).item()
    limit = factor * reference_error + torch.finfo(kernel.dtype).eps / 16
    assert kernel_error <= limit, f"{name}: error {kernel_error:.3e} exceeds {limit:.3e}"
