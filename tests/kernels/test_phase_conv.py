"""The four phases of an upsampled convolution in one launch, against the reference and plain upsampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from rfengine.kernels.phase_conv import phase_conv  # noqa: E402
from rfengine.ops import reference  # noqa: E402
from support.tolerance import assert_within_reference_error  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("pointer", "descriptor")


def inputs(frames, height, width, channels, channels_out, dtype):
    """x [T, H, W, Cin], the 3 x 3 weight it stands for, that folded, and a bias."""
    generator = torch.Generator().manual_seed(0)
    outside = torch.full((frames, height + 2, width + 2, channels), float("nan"))
    outside[:, 1:-1, 1:-1] = torch.randn(frames, height, width, channels, generator=generator)
    plain = torch.randn(channels_out, channels, 3, 3, generator=generator).mul(channels**-0.5)
    plain, bias = plain.to(DEVICE, dtype), torch.randn(channels_out, generator=generator).to(DEVICE, dtype)
    x = outside.to(DEVICE, dtype)[:, 1:-1, 1:-1]
    return x, plain, reference.fold_upsample_weight(plain), bias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2, 5, 9, 24, 24), torch.float32),
        ((1, 1, 1, 8, 16), torch.float16),
        ((1, 3, 17, 16, 96), torch.float16),
    ],
    ids=str,
)
def test_phases_match_the_reference(form, dtype, sizes):
    x, _, weight, bias = inputs(*sizes, dtype)
    out = phase_conv(x, weight, bias, form)
    truth = reference.phase_conv(x.double(), weight.double(), bias.double())
    assert_within_reference_error("out", out, reference.phase_conv(x, weight, bias), truth)


@pytest.mark.parametrize("form", FORMS)
def test_folded_weights_equal_upsampling_and_a_convolution(form):
    x, plain, weight, bias = inputs(2, 4, 6, 16, 8, torch.float32)
    upsampled = F.interpolate(x.double().permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    truth = F.conv2d(upsampled, plain.double(), bias.double(), padding=1).permute(0, 2, 3, 1)
    expected = reference.phase_conv(x, weight, bias)
    assert_within_reference_error("out", phase_conv(x, weight, bias, form), expected, truth)


def test_weights_of_any_layout_are_read_through_their_strides():
    x, _, weight, _ = inputs(1, 3, 4, 16, 8, torch.float16)
    out = phase_conv(x, weight.contiguous(), None, "pointer")
    truth = reference.phase_conv(x.double(), weight.double(), None)
    assert_within_reference_error("out", out, reference.phase_conv(x, weight, None), truth)


def test_a_weight_of_another_layout_is_an_error():
    x, plain, _, bias = inputs(1, 3, 4, 16, 8, torch.float32)
    with pytest.raises(ValueError, match="it must be"):
        phase_conv(x, plain, bias)


def test_operator_passes_opcheck():
    x, _, weight, bias = inputs(1, 3, 4, 16, 8, torch.float32)
    torch.library.opcheck(torch.ops.rfengine.phase_conv, (x.contiguous(), weight, bias, None))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [192, 384])
def test_bfloat16_matches_the_reference(channels):
    x, _, weight, bias = inputs(3, 60, 104, channels, channels // 2, torch.bfloat16)
    truth = reference.phase_conv(x.double(), weight.double(), bias.double())
    assert_within_reference_error(
        "out", phase_conv(x, weight, bias), reference.phase_conv(x, weight, bias), truth
    )
