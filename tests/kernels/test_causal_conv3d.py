"""The causal convolution in both forms against the reference, with errors measured in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from rfengine.kernels.causal_conv3d import causal_conv3d, causal_conv3d_fp8  # noqa: E402
from rfengine.ops import reference  # noqa: E402
from support.interpreter_rounding import round_to_nearest_even  # noqa: E402
from support.tolerance import assert_within_reference_error  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("pointer", "descriptor")
KERNELS = ((3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1))


def halo_in_nan(frames: int, height: int, width: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Frames [frames, H, W, C] that lie inside larger ones full of NaN."""
    outside = torch.full((frames + 2, height + 2, width + 2, channels), float("nan"))
    x = outside[1:-1, 1:-1, 1:-1]
    x.normal_(generator=torch.Generator().manual_seed(0))
    return outside.to(DEVICE, dtype)[1:-1, 1:-1, 1:-1]


def weight_of(channels_out: int, channels: int, kernel: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[Cout, Cin, kt, kh, kw], in memory [Cout, kt, kh, kw, Cin]."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(channels_out, *kernel, channels, generator=generator) * channels**-0.5
    return weight.to(DEVICE, dtype).permute(0, 4, 1, 2, 3)


def assert_like_reference(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = reference.causal_conv3d(x, weight, bias)
    truth = reference.causal_conv3d(x.double(), weight.double(), None if bias is None else bias.double())
    assert_within_reference_error("out", out, expected, truth)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("kernel", "size"),
    zip(KERNELS, [(1, 3, 18, 16, 8), (1, 5, 7, 8, 16), (2, 1, 5, 16, 48), (1, 5, 7, 8, 16)], strict=True),
    ids=str,
)
def test_odd_sizes_read_the_halo_alone(form, dtype, kernel, size):
    frames, height, width, channels, channels_out = size
    x = halo_in_nan(frames + kernel[0] - 1, height, width, channels, dtype)
    weight = weight_of(channels_out, channels, kernel, dtype)
    bias = torch.linspace(-1, 1, channels_out, device=DEVICE).to(dtype)
    assert_like_reference(causal_conv3d(x, weight, bias, form=form), x, weight, bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("channels", "channels_out"), [(48, 96), (8, 130)])
def test_channels_that_are_no_power_of_two_are_cut_in_rows_and_a_tail(form, channels, channels_out):
    x = halo_in_nan(1, 4, 6, channels, torch.float16)
    weight = weight_of(channels_out, channels, (1, 3, 3), torch.float16)
    assert_like_reference(causal_conv3d(x, weight, None, form=form), x, weight, None)


@pytest.mark.parametrize("form", FORMS)
def test_output_goes_to_every_other_frame_and_leaves_the_rest_alone(form):
    x = halo_in_nan(4, 5, 6, 16, torch.float32)
    weight = weight_of(24, 16, (3, 3, 3), torch.float32)
    pairs = torch.empty(2, 2, 5, 6, 24, device=DEVICE)  # NaN
    out = causal_conv3d(x, weight, None, pairs[:, 1], form)
    assert out.data_ptr() == pairs[:, 1].data_ptr()
    assert_like_reference(pairs[:, 1], x, weight, None)
    assert pairs[:, 0].isnan().all()


def test_output_may_have_gaps_between_its_pixels():
    x, weight = halo_in_nan(3, 5, 6, 16, torch.float32), weight_of(8, 16, (3, 3, 3), torch.float32)
    wide = torch.empty(1, 5, 6, 20, device=DEVICE)  # NaN
    causal_conv3d(x, weight, None, wide[..., 4:12])
    assert_like_reference(wide[..., 4:12], x, weight, None)
    assert wide[..., :4].isnan().all() and wide[..., 12:].isnan().all()


def test_weights_of_any_layout_are_read_through_their_strides():
    x = halo_in_nan(3, 4, 5, 16, torch.float16)
    weight = weight_of(24, 16, (3, 3, 3), torch.float16).contiguous()
    assert_like_reference(causal_conv3d(x, weight, None), x, weight, None)
    with pytest.raises(ValueError, match="in memory as"):
        causal_conv3d(x, weight, None, form="descriptor")


def test_channels_that_no_descriptor_can_read_take_the_pointer_form():
    x, weight = halo_in_nan(3, 4, 5, 5, torch.float16), weight_of(3, 5, (3, 3, 3), torch.float16)
    assert_like_reference(causal_conv3d(x, weight, None), x, weight, None)


@settings(deadline=None, max_examples=4)
@given(
    form=st.sampled_from(FORMS),
    kernel=st.sampled_from(KERNELS),
    frames=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 19),
    channels=st.sampled_from([8, 16, 24]),
    channels_out=st.integers(1, 70),
)
def test_any_shape_matches_the_reference(form, kernel, frames, height, width, channels, channels_out):
    x = halo_in_nan(frames + kernel[0] - 1, height, width, channels, torch.float16)
    weight = weight_of(channels_out, channels, kernel, torch.float16)
    assert_like_reference(causal_conv3d(x, weight, None, form=form), x, weight, None)


@pytest.mark.parametrize(("form", "channels"), [("pointer", 32), ("descriptor", 96)])
def test_fp8_multiplies_exactly_and_scales_by_channel(form, channels, monkeypatch):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs sm_89")
    round_to_nearest_even(monkeypatch)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 4, 6, channels, generator=generator).to(DEVICE, torch.float8_e4m3fn)
    weight = weight_of(24, channels, (3, 3, 3), torch.float8_e4m3fn)
    scale = torch.rand(24, generator=generator).to(DEVICE) + 0.5
    bias = torch.randn(24, generator=generator).to(DEVICE)
    out = causal_conv3d_fp8(x, weight, scale, bias, form=form)

    def expected(dtype):
        sums = reference.causal_conv3d(x.to(dtype), weight.to(dtype), None)
        return sums * scale.to(dtype) + bias.to(dtype)

    assert out.dtype == torch.bfloat16
    truth = expected(torch.float64)
    assert_within_reference_error("out", out, expected(torch.float32).to(torch.bfloat16), truth)
    half = torch.empty(out.shape, dtype=torch.float16, device=DEVICE)
    causal_conv3d_fp8(x, weight, scale, bias.half(), half, form)
    sums = reference.causal_conv3d(x.double(), weight.double(), None) * scale.double() + bias.half().double()
    assert_within_reference_error("half", half, sums.float().half(), sums)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x, w.half(), None), "both must be"),
        (lambda x, w: (x.transpose(2, 3).contiguous().transpose(2, 3), w, None), "call contiguous"),
        (lambda x, w: (x[..., :8], w, None), "over Cin channels"),
        (lambda x, w: (x, w[:, :, :2], None), "a kernel of 3x3x3"),
        (lambda x, w: (x[:2], w, None), "T \\+ kt - 1"),
        (lambda x, w: (x, w, None, x), "it must be"),
        (lambda x, w: (x, w, None, None, "fast"), "must be one of"),
    ],
)
def test_inputs_it_cannot_take_are_errors(change, message):
    x, weight = halo_in_nan(3, 4, 5, 16, torch.float32), weight_of(24, 16, (3, 3, 3), torch.float32)
    with pytest.raises(ValueError, match=message):
        causal_conv3d(*change(x, weight))


def test_fp8_form_refuses_other_dtypes():
    x, weight = halo_in_nan(3, 4, 5, 16, torch.float32), weight_of(24, 16, (3, 3, 3), torch.float32)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        causal_conv3d_fp8(x, weight, torch.ones(24), None)


def test_operators_pass_opcheck():
    x, weight = halo_in_nan(3, 2, 3, 8, torch.float32), weight_of(8, 8, (3, 3, 3), torch.float32)
    out = torch.zeros(1, 2, 3, 8, device=DEVICE)
    torch.library.opcheck(torch.ops.rfengine.causal_conv3d, (x.contiguous(), weight, None, out, None))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [96, 192, 384])
def test_bfloat16_matches_the_reference(form, channels):
    if form == "descriptor" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need Hopper or later")
    x = halo_in_nan(5, 60, 104, channels, torch.bfloat16)
    weight = weight_of(channels, channels, (3, 3, 3), torch.bfloat16)
    bias = torch.randn(channels, device=DEVICE).bfloat16()
    assert_like_reference(causal_conv3d(x, weight, bias, form=form), x, weight, bias)
