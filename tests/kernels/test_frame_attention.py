"""Attention inside each frame, in both forms, against the reference with errors measured in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from rfengine.kernels.frame_attention import frame_attention, split_channels  # noqa: E402
from rfengine.ops import reference  # noqa: E402
from support.tolerance import assert_within_reference_error  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("pointer", "descriptor")


def queries_keys_values(frames, positions, channels, dtype, scale=1.0):
    """Views of one [T, N, 3C] inside a larger tensor full of NaN."""
    outside = torch.full((frames + 1, positions + 3, 3 * channels), float("nan"))
    values = torch.randn(frames, positions, 3 * channels, generator=torch.Generator().manual_seed(0))
    outside[:frames, :positions] = scale * values
    return outside.to(DEVICE, dtype)[:frames, :positions].chunk(3, dim=-1)


def assert_like_reference(q, k, v, form=None):
    truth = reference.frame_attention(q.double(), k.double(), v.double())
    expected = reference.frame_attention(q, k, v)
    assert_within_reference_error("out", frame_attention(q, k, v, form), expected, truth)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 1, 16), torch.float16),
        ((2, 33, 48), torch.float32),
        ((2, 63, 64), torch.float16),
        ((1, 130, 96), torch.float16),
        ((1, 40, 384), torch.float16),
        ((1, 20, 512), torch.float32),
    ],
    ids=str,
)
def test_frames_match_the_reference(form, dtype, sizes):
    assert_like_reference(*queries_keys_values(*sizes, dtype), form)


@settings(deadline=None, max_examples=4)
@given(
    form=st.sampled_from(FORMS),
    frames=st.integers(1, 3),
    positions=st.integers(1, 140),
    channels=st.integers(1, 12).map(lambda count: 16 * count),
)
def test_any_shape_matches_the_reference(form, frames, positions, channels):
    assert_like_reference(*queries_keys_values(frames, positions, channels, torch.float16), form)


def test_large_logits_stay_finite():
    assert_like_reference(*queries_keys_values(1, 40, 64, torch.float32, scale=20.0))


def test_channels_are_cut_in_two_powers_of_two():
    assert [split_channels(channels) for channels in (16, 64, 80, 384, 400, 512)] == [
        (16, 0), (64, 0), (64, 16), (256, 128), (256, 256), (512, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[..., :24], k[..., :24], v[..., :24]), "multiple of 16"),
        (lambda q, k, v: (q, k.half(), v), "k is torch.float16"),
        (lambda q, k, v: (q, k, v.mT.contiguous().mT), "contiguous channels"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "cast it"),
        (lambda q, k, v: (q, k, v, "fast"), "must be one of"),
        (lambda q, k, v: (q[:, ::2, 1:17], k[:, ::2, 1:17], v[:, ::2, 1:17], "descriptor"), "16-byte"),
    ],
)
def test_inputs_it_cannot_take_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        frame_attention(*change(*queries_keys_values(1, 6, 32, torch.float32)))


def test_operator_passes_opcheck():
    q, k, v = queries_keys_values(1, 6, 32, torch.float32)
    torch.library.opcheck(torch.ops.rfengine.frame_attention, (q, k, v, None))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_shipped_shape_in_bfloat16_matches_the_reference(form):
    if form == "descriptor" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need Hopper or later")
    assert_like_reference(*queries_keys_values(3, 6240, 384, torch.bfloat16), form)
