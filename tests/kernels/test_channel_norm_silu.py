"""Bias, residual, norm over channels and SiLU in one pass, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from rfengine.kernels.channel_norm_silu import channel_norm_silu  # noqa: E402
from rfengine.ops import reference  # noqa: E402
from support.interpreter_rounding import round_to_nearest_even  # noqa: E402
from support.tolerance import assert_draws_within_reference_error, assert_within_reference_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch):
    round_to_nearest_even(monkeypatch)


def inputs(frames, height, width, channels, dtype, bias=True, residual=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def values(*shape, mean=0.0):
        return (torch.randn(shape, generator=generator) + mean).to(DEVICE, dtype)

    shape = (frames, height, width, channels)
    return (
        3 * values(*shape),
        values(channels) if bias else None,
        values(*shape) if residual else None,
        values(channels, mean=1.0),
    )


def results(x, bias, residual, gamma, out=None):
    """(kernel, reference, truth) of the sum and of the norm.

    The kernel runs into the frames of a halo from the third on; its head stays as it was.
    """
    halo = torch.empty(x.shape[0] + 2, *x.shape[1:], dtype=x.dtype, device=DEVICE)  # NaN
    out = halo[2:] if out is None else out
    wide = [None if tensor is None else tensor.double() for tensor in (x, bias, residual, gamma)]
    expected, truth = torch.empty_like(x), torch.empty(x.shape, dtype=torch.float64, device=DEVICE)
    expected_total = reference.channel_norm_silu(x.clone(), bias, residual, gamma, expected)
    # the norm is that of the rounded sum
    rounded = expected_total.double()
    reference.channel_norm_silu(rounded, None, None, wide[3], truth)
    true_total = reference.channel_norm_silu(*wide, torch.empty_like(truth))
    total = channel_norm_silu(x, bias, residual, gamma, out)
    assert halo[:2].isnan().all()
    return (total, expected_total, true_total), (out, expected, truth)


def assert_like_reference(x, bias, residual, gamma, out=None):
    for name, tensors in zip(("total", "out"), results(x, bias, residual, gamma, out), strict=True):
        assert_within_reference_error(name, *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 8), (2, 5, 7, 24), (3, 3, 5, 96), (1, 2, 3, 384)], ids=str)
def test_sum_and_norm_match_the_reference(dtype, sizes):
    assert_like_reference(*inputs(*sizes, dtype))


@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True), (False, False)])
def test_bias_and_residual_are_optional(bias, residual):
    x, *rest = inputs(2, 4, 5, 16, torch.float16, bias, residual)
    before = x.clone()
    assert_like_reference(x, *rest)
    assert torch.equal(x, before) == (not bias and not residual)


def test_sum_is_written_over_x():
    x, bias, residual, gamma = inputs(1, 3, 4, 16, torch.float32)
    assert channel_norm_silu(x, bias, residual, gamma, torch.empty_like(x)) is x


def test_rows_with_gaps_are_read_and_written_through_their_strides():
    x, bias, residual, gamma = inputs(2, 6, 10, 16, torch.float32)
    x, residual = x[:, ::2, 1:6], residual[:, 1::2, ::2]
    around = torch.empty(2, 5, 7, 20, device=DEVICE)  # NaN
    assert_like_reference(x, bias, residual, gamma, around[:, 1:4, 1:6, 2:18])
    around[:, 1:4, 1:6, 2:18] = float("nan")
    assert around.isnan().all()


def test_a_pixel_of_zeros_stays_zero():
    x, _, _, gamma = inputs(1, 2, 3, 16, torch.float32)
    x[0, 1, 1] = 0.0
    out = torch.empty_like(x)
    channel_norm_silu(x, None, None, gamma, out)
    assert (out[0, 1, 1] == 0).all() and out.isfinite().all()


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70))
def test_any_shape_matches_the_reference(frames, height, width, channels):
    shape = (frames, height, width, channels)
    draws = [results(*inputs(*shape, torch.float32, seed=seed)) for seed in range(8)]
    for name, tensors in zip(("total", "out"), zip(*draws, strict=True), strict=True):
        assert_draws_within_reference_error(name, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp8_output_is_scaled_rounded_and_saturated(dtype):
    x, bias, residual, gamma = inputs(1, 4, 5, 32, dtype)
    gamma[0] = 1e4
    out = torch.zeros(x.shape, device=DEVICE).to(torch.float8_e4m3fn)
    expected = torch.empty(x.shape, device=DEVICE)
    reference.channel_norm_silu(x.clone(), bias, residual, gamma, expected)
    channel_norm_silu(x, bias, residual, gamma, out, 0.25)
    scaled = (expected / 0.25).clamp(-448, 448).to(torch.float8_e4m3fn)
    # a last bit of float32 may turn a tie of e4m3
    assert (out.float() != scaled.float()).float().mean() < 0.01
    assert out.float().abs().max() == 448


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, b, r, g, o: (x.double(), b, r, g, o), "x must be bfloat16"),
        (lambda x, b, r, g, o: (x, b, r[..., :8], g, o), "residual is"),
        (lambda x, b, r, g, o: (x, b, r, g, o.mT.contiguous().mT), "contiguous channels"),
    ],
)
def test_inputs_it_cannot_take_are_errors(change, message):
    x, *rest = inputs(1, 3, 4, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        channel_norm_silu(*change(x, *rest, torch.empty_like(x)))


def test_operator_passes_opcheck():
    x, bias, residual, gamma = inputs(1, 2, 3, 16, torch.float32)
    out = torch.zeros_like(x)
    torch.library.opcheck(torch.ops.rfengine.channel_norm_silu, (x, bias, residual, gamma, out, 1.0))
