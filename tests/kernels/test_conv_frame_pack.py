"""The last convolution and the packing of its pixels: the bytes of the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rfengine.kernels import conv_frame_pack as kernels  # noqa: E402
from rfengine.kernels.causal_conv3d import KERNELS  # noqa: E402
from rfengine.ops import reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("pointer", "descriptor")


def exact_inputs(frames, height, width, channels, dtype, kernel=(3, 3, 3)):
    """Small whole numbers and weights in units of 1 / 128, whose sums float32 holds exactly, in the
    middle of frames full of NaN; some pixels lie outside [-1, 1]."""
    generator = torch.Generator().manual_seed(0)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).float()

    outside = torch.full((frames + kernel[0] + 1, height + 2, width + 2, channels), float("nan"))
    outside[1:-1, 1:-1, 1:-1] = whole(-3, 4, frames + kernel[0] - 1, height, width, channels)
    weight = (whole(-4, 5, 3, *kernel, channels) / 128).to(DEVICE, dtype).permute(0, 4, 1, 2, 3)
    return outside.to(DEVICE, dtype)[1:-1, 1:-1, 1:-1], weight, (whole(-16, 16, 3) / 128).to(DEVICE, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 2, 2, 8), torch.float32),
        ((1, 4, 18, 16), torch.float16),
        ((1, 5, 4, 24), torch.float16),
        ((2, 5, 7, 16), torch.float32),
        ((9, 3, 66, 8), torch.float32),  # two groups of frames, the second not full, and two strips
        ((8, 9, 130, 8), torch.float16),
    ],
    ids=str,
)
def test_bytes_of_exact_sums_are_those_of_the_reference(form, dtype, sizes):
    arguments = exact_inputs(*sizes, dtype)
    assert torch.equal(kernels.conv_frame_pack(*arguments, form), reference.conv_frame_pack(*arguments))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != (3, 3, 3)], ids=str)
def test_kernels_of_fewer_taps_give_the_bytes_of_the_reference(form, kernel):
    arguments = exact_inputs(4, 5, 6, 8, torch.float32, kernel)
    assert torch.equal(kernels.conv_frame_pack(*arguments, form), reference.conv_frame_pack(*arguments))


@pytest.mark.parametrize(
    ("frames", "height", "width", "band", "programs"),
    [  # by hand, for 132 multiprocessors
        (12, 480, 832, (6, 30, 256), 2 * 16 * 4),
        (12, 704, 1280, (6, 55, 256), 2 * 13 * 5),
        (9, 480, 832, (5, 30, 256), 2 * 16 * 4),
        (4, 480, 832, (4, 15, 256), 32 * 4),
    ],
)
def test_the_bands_of_large_frames_fill_one_wave(frames, height, width, band, programs):
    chosen = kernels.choose_band("descriptor", 2, (frames, height, width, 96), (3, 3, 3), 132)
    assert (chosen.frames, chosen.height, chosen.width) == band
    assert chosen.programs(frames, height, width) == programs <= 132
    assert chosen.stages * (kernels.ROWS + chosen.width) * chosen.channels * 2 <= 226 * 1024


def test_bytes_of_any_sums_are_at_most_one_apart():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 8, 16, generator=generator).to(DEVICE)
    weight = (0.03 * torch.randn(3, 16, 3, 3, 3, generator=generator)).to(DEVICE)
    packed, expected = kernels.conv_frame_pack(x, weight, None), reference.conv_frame_pack(x, weight, None)
    apart = (packed.int() - expected.int()).abs()
    # sums in another order may turn a tie, and nothing else
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


def test_a_weight_of_other_channels_or_taps_is_an_error():
    x, weight, bias = exact_inputs(1, 4, 4, 8, torch.float32)
    for wrong in (weight[:2], weight[..., :2]):
        with pytest.raises(
            ValueError, match=r"weight \[3, C, kt, kh, kw\] of 3x3x3, 1x3x3, 3x1x1, 1x1x1 taps"
        ):
            kernels.conv_frame_pack(x, wrong, bias)


def test_operator_passes_opcheck():
    x, weight, bias = exact_inputs(1, 2, 4, 8, torch.float32)
    torch.library.opcheck(torch.ops.rfengine.conv_frame_pack, (x.contiguous(), weight, bias, None))
