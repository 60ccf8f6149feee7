"""How near one tensor is to another."""

from __future__ import annotations

import math

from torch import Tensor


def psnr_db(found: Tensor, exact: Tensor) -> float:
    """Of pixels that are clamped to [-1, 1], in dB; infinite where they are equal."""
    error = (found.double().clamp(-1, 1) - exact.double().clamp(-1, 1)).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf


def relative_error(found: Tensor, recorded: Tensor) -> float:
    """norm(found - recorded) / norm(recorded), in float64; infinite where that is no number.

    Where everything recorded is 0, the norm of `found` stands for it. Raises ValueError for different shapes.
    """
    if found.shape != recorded.shape:
        raise ValueError(f"the engine gives {list(found.shape)} where {list(recorded.shape)} is recorded")
    found, recorded = found.detach().cpu().double(), recorded.double()
    error = float((found - recorded).norm() / (float(recorded.norm()) or 1.0))
    return error if math.isfinite(error) else math.inf
