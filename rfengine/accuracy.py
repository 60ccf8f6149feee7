"""Measures of how near one tensor is to another, and the rule by which an implementation counts as right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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


def wrong_result(
    run: Callable[..., object],
    meaning: Callable[..., object],
    arguments: tuple[Any, ...],
    part: tuple[Any, ...],
    results: Callable[[tuple[Any, ...], Any], tuple[Tensor, ...]],
) -> str:
    """Why a result of `run` on `arguments`, which it may write into, is beyond_reference_error; "" if none.

    meaning: the same in plain PyTorch, which runs on `part`, in float64 for the exact results. results: the
    tensors to compare, from the arguments after a call and what it returned.
    """

    def results_of(call: Callable[..., object], given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return results(given, call(*given))

    def copied(change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        return tuple(change(item) if isinstance(item, Tensor) else item for item in part)

    own = copied(Tensor.clone)
    wide = copied(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.clone())
    found = results_of(run, arguments)
    compared = zip(found, results_of(meaning, own), results_of(meaning, wide), strict=True)
    for index, tensors in enumerate(compared):
        if problem := beyond_reference_error(*tensors):
            return f"result {index} is {problem}"
    return ""
