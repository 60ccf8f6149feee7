"""Measures of how near one tensor is to another, and the rule by which an implementation counts as right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

REFERENCE_FACTOR = 2.0  # times the reference's own error that an implementation may be from float64


def psnr_db(found: Tensor, exact: Tensor) -> float:
    """PSNR in dB of pixels that are clamped to [-1, 1], a peak of 2; infinite where they are equal."""
    error = (found.double().clamp(-1, 1) - exact.double().clamp(-1, 1)).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf


def relative_error(found: Tensor, exact: Tensor) -> float:
    """norm(found - exact) / norm(exact) in float64, on the device of `exact`; infinite for a NaN.

    Where all of `exact` is 0, the norm of `found` stands for it. Raises ValueError for different shapes.
    """
    if found.shape != exact.shape:
        raise ValueError(f"the engine gives {list(found.shape)} where {list(exact.shape)} is recorded")
    error = _relative(found, exact)
    return error if math.isfinite(error) else math.inf


def _relative(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().to(exact.device).double(), exact.double()
    return float((found - exact).norm() / (float(exact.norm()) or 1.0))


def beyond_reference_error(found: Tensor, reference: Tensor, exact: Tensor) -> str:
    """Why `found` is further from `exact` than REFERENCE_FACTOR times the error of `reference`, or "".

    found, reference: an implementation and the reference in one dtype; exact: the reference in float64. A
    sixteenth of the epsilon is added, for where the reference happens to be exact. A NaN is beyond.
    """
    if found.shape != exact.shape:
        return f"{tuple(found.shape)}, not {tuple(exact.shape)}"
    error = _relative(found, exact)
    limit = REFERENCE_FACTOR * _relative(reference, exact) + torch.finfo(found.dtype).eps / 16
    return "" if error <= limit else f"{error:.2e} from float64, the limit is {limit:.2e}"
