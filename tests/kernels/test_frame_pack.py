"""The Triton form of frame packing returns the reference's bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rfengine.kernels import frame_pack as kernels  # noqa: E402
from rfengine.ops import reference  # noqa: E402
from support.bits import DEVICE, in_every_dtype  # noqa: E402

SHAPES = [(1, 2, 2), (3, 18, 50), (2, 64, 96), (2, 7, 31)]


def pixels_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Some beyond [-1, 1], as a decoder gives them; every eighth lies halfway between two bytes."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand((3, *shape), generator=generator) * 2.4 - 1.2
    halves = (torch.randint(0, 255, pixels.shape, generator=generator) + 0.5) / 127.5 - 1
    chosen = torch.rand(pixels.shape, generator=generator) < 0.125
    return torch.where(chosen, halves, pixels).to(dtype).to(DEVICE)


@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(SHAPES))
def test_bytes_are_the_reference_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    pixels = pixels_of(shape, dtype)
    assert torch.equal(kernels.frame_pack(pixels), reference.frame_pack(pixels))


def test_strides_of_channel_and_frame_are_free() -> None:
    pixels = pixels_of((6, 18, 50), torch.float32)[:, ::2]
    assert torch.equal(kernels.frame_pack(pixels), reference.frame_pack(pixels))


def test_rows_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="one below the other"):
        kernels.frame_pack(pixels_of((1, 4, 8), torch.float32)[..., ::2])


def test_the_operator_is_registered_correctly() -> None:
    torch.library.opcheck(torch.ops.rfengine.frame_pack.default, (pixels_of((1, 4, 8), torch.float32),))
