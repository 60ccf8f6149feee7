"""Equality to the last bit, for the ops whose every rounding is part of their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Size = TypeVar("Size")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def in_every_dtype(sizes: Sequence[Size]) -> list[tuple[Size, torch.dtype]]:
    """Cases: the last size in every dtype, the others each in one of them."""
    others = [(size, DTYPES[index % len(DTYPES)]) for index, size in enumerate(sizes[:-1])]
    return others + [(sizes[-1], dtype) for dtype in DTYPES]


def assert_same_bits(name: str, kernel: Tensor, reference: Tensor) -> None:
    """Every element has the same bits, the sign of zero included; NaN is never expected."""
    assert kernel.shape == reference.shape, f"{name} is {tuple(kernel.shape)}, not {tuple(reference.shape)}"
    assert kernel.dtype == reference.dtype, f"{name} is {kernel.dtype}, not {reference.dtype}"
    assert reference.isfinite().all(), f"the reference of {name} is not finite: the test says nothing"
    whole = torch.int32 if kernel.element_size() == 4 else torch.int16
    different = kernel.contiguous().view(whole) != reference.contiguous().view(whole)
    assert not different.any(), (
        f"{name}: {int(different.sum())} of {kernel.numel()} elements differ, first "
        f"{kernel[different][0].item()} instead of {reference[different][0].item()}"
    )


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many magnitudes, with some exact zeros, the same for every call."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
        -8, 3, shape, generator=generator
    )
    numbers[torch.rand(shape, generator=generator) < 0.01] = 0.0
    return numbers.to(DEVICE, dtype)


def angles(tokens: int, head_dim: int, seed: int = 0) -> Tensor:
    """Cosines and sines [2, tokens, head_dim / 2] of random angles, float32."""
    angle = 6.3 * torch.rand(tokens, head_dim // 2, generator=torch.Generator().manual_seed(seed)).double()
    return torch.stack((angle.cos(), angle.sin())).float().to(DEVICE)
