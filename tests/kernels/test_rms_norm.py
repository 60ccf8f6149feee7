import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfengine.kernels import rms_norm as rms_norm_file
from rfengine.kernels.rms_norm import rms_norm, rms_norm_backward
from rfengine.ops import checks, reference
from support.against_reference import assert_op_matches
from support.interpreter_rounding import round_to_nearest_even
from support.tolerance import assert_draws_within_reference_error, assert_within_reference_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def gpu_rounding_and_seed(monkeypatch):
    torch.manual_seed(0)
    round_to_nearest_even(monkeypatch)


def inputs(*shape, dtype=torch.float32):
    x = (2 * torch.randn(shape, device=DEVICE) + 0.5).to(dtype)
    return x, torch.randn(shape[-1], device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 192), (2, 21, 48), (1, 3, 1536)])
def test_norm_and_gradients_agree_with_the_reference(shape, dtype):
    assert_op_matches(rms_norm, reference.rms_norm, inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_rounded_before_the_weight_and_again_after_it(dtype):
    x, weight = inputs(1, 12, 96, dtype=dtype)
    found, expected = rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
    wide = x.float()
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    once = (norm * weight.float()).to(dtype)
    # rows that differ at all differ by the last bit of rsqrt; rounding only once would differ in many more
    assert (found != expected).sum() < 0.01 * found.numel() < (once != expected).sum()


def test_programs_that_sum_over_several_tokens_leave_none_out(monkeypatch):
    monkeypatch.setattr(rms_norm_file, "rows_per_sum", lambda rows: 4)
    assert_op_matches(rms_norm, reference.rms_norm, inputs(2, 7, 24))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.unsqueeze(1).transpose(0, 2),
        lambda x: x[0],
        lambda x: x[0, 0],
    ],
    ids=["every other row", "axes swapped", "last axis not contiguous", "four axes", "two axes", "one axis"],
)
def test_any_layout_agrees_with_the_reference(view):
    x, weight = inputs(2, 6, 48)
    assert_op_matches(rms_norm, reference.rms_norm, (view(x), weight))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(2, 70))
def test_any_shape_agrees_with_the_reference(batch, tokens, dim):
    torch.manual_seed(0)
    draws = []
    for _ in range(8):
        x, weight = inputs(batch, tokens, dim)
        truth = reference.rms_norm(x.double(), weight.double(), 1e-6)
        draws.append((rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), truth))
    assert_draws_within_reference_error("norm", draws)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_each_row_is_normed_by_the_mean_of_the_whole_row(dtype):
    x, weight = inputs(2, 5, 96, dtype=dtype)
    means = x.double().square().mean(-1).float()
    truth = reference.rms_norm(x.double(), weight.double(), 1e-6)
    for part in (slice(0, 32), slice(32, 96)):
        given = x[..., part], weight[part], 1e-6, means
        found, expected = rms_norm(*given), reference.rms_norm(*given)
        assert_within_reference_error("norm", found, expected, truth[..., part])


def test_a_part_of_a_row_has_no_gradient_and_every_row_its_mean():
    x, weight = inputs(2, 3, 8)
    with pytest.raises(ValueError, match="mean_squares are given and a gradient is asked for"):
        rms_norm(x.requires_grad_(), weight, 1e-6, torch.ones(2, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"mean_squares are \(2, 4\) for rows of \(2, 3\)"):
        checks.rms_norm(x, weight, 1e-6, torch.ones(2, 4))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="x is torch.float64; the norm kernels serve"):
        rms_norm(*inputs(1, 2, 8, dtype=torch.float64), 1e-6)


def test_torch_sees_the_ops_as_it_must():
    x, weight = inputs(2, 4, 16)
    torch.library.opcheck(rms_norm, (x.requires_grad_(), weight.requires_grad_(), 1e-6))
    torch.library.opcheck(
        rms_norm_backward, (x.detach(), weight.detach(), torch.randn_like(x.detach()), 1e-6)
    )
