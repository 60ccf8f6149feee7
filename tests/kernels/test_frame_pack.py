"""The Triton forms of frame packing give the reference's bytes, and the reference gives the known ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rfengine.kernels import frame_pack as kernels  # noqa: E402
from rfengine.ops import reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 2, 2), (3, 18, 50), (2, 64, 96)]


def pixels_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Some beyond [-1, 1], as a decoder gives them; every eighth lies halfway between two bytes."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand((3, *shape), generator=generator) * 2.4 - 1.2
    halves = (torch.randint(0, 255, pixels.shape, generator=generator) + 0.5) / 127.5 - 1
    chosen = torch.rand(pixels.shape, generator=generator) < 0.125
    return torch.where(chosen, halves, pixels).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 7, 31)])
def test_rgb24_is_the_reference_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    pixels = pixels_of(shape, dtype)
    assert torch.equal(kernels.frame_pack(pixels), reference.frame_pack(pixels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nv12_is_the_reference_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    pixels = pixels_of(shape, dtype)
    assert torch.equal(kernels.frame_pack_nv12(pixels), reference.frame_pack_nv12(pixels))


def test_strides_of_channel_and_frame_are_free() -> None:
    pixels = pixels_of((6, 18, 50), torch.float32)[:, ::2]
    assert torch.equal(kernels.frame_pack(pixels), reference.frame_pack(pixels))
    assert torch.equal(kernels.frame_pack_nv12(pixels), reference.frame_pack_nv12(pixels))


def test_rows_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="one below the other"):
        kernels.frame_pack(pixels_of((1, 4, 8), torch.float32)[..., ::2])


def test_nv12_of_an_odd_height_is_refused() -> None:
    with pytest.raises(ValueError, match="even sides"):
        kernels.frame_pack_nv12(pixels_of((1, 3, 4), torch.float32))


@pytest.mark.parametrize("name", ["frame_pack", "frame_pack_nv12"])
def test_the_operator_is_registered_correctly(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.rfengine, name).default, (pixels_of((1, 4, 8), torch.float32),))


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        ((1, 1, 1), (235, 128, 128)),
        ((-1, -1, -1), (16, 128, 128)),
        ((1, -1, -1), (63, 102, 240)),
        ((-1, 1, -1), (173, 42, 26)),
        ((-1, -1, 1), (32, 240, 118)),
    ],
)
def test_nv12_of_the_primaries_is_that_of_bt709(rgb: tuple[int, ...], expected: tuple[int, ...]) -> None:
    pixels = torch.tensor(rgb, dtype=torch.float32, device=DEVICE).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    packed = reference.frame_pack_nv12(pixels).flatten().tolist()
    luma, blue, red = expected
    assert packed == [luma] * 4 + [blue, red]


def test_chroma_is_the_mean_of_its_block() -> None:
    pixels = pixels_of((1, 2, 4), torch.float32).clamp(-1, 1)
    blocks = torch.stack((pixels[..., :2].mean((-2, -1)), pixels[..., 2:].mean((-2, -1))), dim=-1)
    flat = blocks[:, :, None].expand(3, 1, 2, 2).repeat_interleave(2, dim=-1)
    assert torch.equal(reference.frame_pack_nv12(pixels)[:, 2], reference.frame_pack_nv12(flat)[:, 2])


def test_rgb24_is_what_the_video_writer_takes() -> None:
    from rfengine.video import frames_from_pixels

    pixels = pixels_of((2, 6, 10), torch.float32)
    assert reference.frame_pack(pixels).cpu().numpy().tolist() == frames_from_pixels(pixels[None]).tolist()
