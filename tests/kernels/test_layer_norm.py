import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfengine.kernels import layer_norm
from rfengine.kernels.device import row_launch, rows_per_sum
from rfengine.kernels.layer_norm import (
    Affine,
    adaptive_layer_norm,
    adaptive_layer_norm_fp8,
    affine_layer_norm,
    launch_layer_norm,
    layer_norm_backward,
    layer_norm_fp8_op,
    layer_norm_op,
)
from rfengine.ops import reference
from rfengine.ops.reference import row_fp8
from support.against_reference import assert_op_matches
from support.interpreter_rounding import round_to_nearest_even
from support.tolerance import assert_draws_within_reference_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def gpu_rounding_and_seed(monkeypatch):
    torch.manual_seed(0)
    round_to_nearest_even(monkeypatch)


def rows(batch, tokens, dim, dtype=torch.float32):
    """Rows with means and spreads of their own."""
    x = torch.randn(batch, tokens, dim, device=DEVICE)
    return (x * (0.5 + torch.rand(batch, tokens, 1, device=DEVICE)) + 0.3 * x[..., :1]).to(dtype)


def tables(batch, frames, dim):
    """shift and scale, views of a table [B, F, 6, D]."""
    return torch.randn(batch, frames, 6, dim, device=DEVICE).unbind(2)[:2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "frames", "tokens", "dim"), [(1, 1, 1, 192), (2, 3, 9, 48), (1, 2, 4, 1536)]
)
def test_norm_and_gradients_agree_with_the_reference(batch, frames, tokens, dim, dtype):
    inputs = rows(batch, tokens, dim, dtype), *tables(batch, frames, dim)
    assert_op_matches(adaptive_layer_norm, reference.adaptive_layer_norm, inputs)


@pytest.mark.parametrize(
    ("shift_rows", "scale_rows"), [((1, 1), (1, 1)), ((2, 1), (1, 3)), ((1, 3), (2, 3)), ((2, 3), (2, 1))]
)
def test_a_row_that_serves_several_frames_or_samples_gets_the_sum_of_their_gradients(shift_rows, scale_rows):
    shift, scale = (torch.randn(*shape, 24, device=DEVICE) for shape in (shift_rows, scale_rows))
    assert_op_matches(adaptive_layer_norm, reference.adaptive_layer_norm, (rows(2, 6, 24), shift, scale))


def test_programs_that_sum_over_several_tokens_leave_none_out(monkeypatch):
    monkeypatch.setattr(layer_norm, "rows_per_sum", lambda rows: 4)  # 6 tokens in a frame: 4, then 2
    inputs = rows(2, 12, 24), *tables(2, 2, 24)
    assert_op_matches(adaptive_layer_norm, reference.adaptive_layer_norm, inputs)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: torch.cat([x, x], 1)[:, ::2],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[:1].expand(2, -1, -1),
    ],
    ids=["wider rows", "every other row", "last axis not contiguous", "one sample for all"],
)
def test_strided_rows_agree_with_the_reference(view):
    inputs = view(rows(2, 6, 48)), *tables(2, 3, 48)
    assert_op_matches(adaptive_layer_norm, reference.adaptive_layer_norm, inputs)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(2, 70))
def test_any_shape_agrees_with_the_reference(batch, frames, frame_tokens, dim):
    torch.manual_seed(0)
    draws = []
    for _ in range(8):
        x, (shift, scale) = rows(batch, frames * frame_tokens, dim), tables(batch, frames, dim)
        truth = reference.adaptive_layer_norm(x.double(), shift.double(), scale.double(), 1e-6)
        found = adaptive_layer_norm(x, shift, scale, 1e-6)
        draws.append((found, reference.adaptive_layer_norm(x, shift, scale, 1e-6), truth))
    assert_draws_within_reference_error("norm", draws)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_rows_are_the_rounded_norm_in_e4m3(dtype):
    x, (shift, scale) = rows(2, 9, 100, dtype), tables(2, 3, 100)
    values, row_scale = adaptive_layer_norm_fp8(x, shift, scale, 1e-6)
    expected, expected_scale = row_fp8(adaptive_layer_norm(x, shift, scale, 1e-6))
    assert values.dtype == torch.float8_e4m3fn and row_scale.shape == (2, 9, 1)
    assert torch.equal(row_scale, expected_scale)
    assert torch.equal(values.float(), expected.float())
    assert (values.float().abs().amax(-1) == 448).all()


def test_an_fp8_row_of_zeros_has_scale_one():
    shift = torch.zeros(1, 1, 48, device=DEVICE)
    values, row_scale = adaptive_layer_norm_fp8(rows(1, 3, 48), shift, shift - 1, 1e-6)
    assert (values.float() == 0).all() and (row_scale == 1).all()


def test_an_fp8_row_that_is_nearly_zero_becomes_zero():
    shift = torch.full((1, 1, 48), 1e-40, device=DEVICE)
    nearly = torch.zeros(1, 3, 48, device=DEVICE), shift, torch.zeros_like(shift), 1e-6
    for values, row_scale in (
        adaptive_layer_norm_fp8(*nearly),
        row_fp8(reference.adaptive_layer_norm(*nearly)),
    ):
        assert (values.float() == 0).all() and (row_scale == 1).all()


def affine_inputs(batch, tokens, dim, dtype=torch.float32, parameter_dtype=torch.float32):
    x = (3 * torch.randn(batch, tokens, dim, device=DEVICE) + 1).to(dtype)
    return x, *torch.randn(2, dim, device=DEVICE).to(parameter_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "dim"), [(1, 1, 192), (2, 5, 48), (1, 3, 1536)])
def test_affine_norm_and_gradients_agree_with_the_reference(batch, tokens, dim, dtype):
    case = affine_inputs(batch, tokens, dim, dtype, parameter_dtype=dtype)
    assert_op_matches(affine_layer_norm, reference.affine_layer_norm, case)


def test_float32_parameters_serve_rows_in_half_precision():
    assert_op_matches(affine_layer_norm, reference.affine_layer_norm, affine_inputs(1, 5, 48, torch.bfloat16))


def test_strided_rows_and_parameters_agree_with_the_reference():
    x, *_ = affine_inputs(2, 10, 48)
    weight, bias = torch.randn(48, 2, device=DEVICE).unbind(1)
    assert_op_matches(affine_layer_norm, reference.affine_layer_norm, (x[:, ::3], weight, bias))


def test_a_large_mean_does_not_cost_the_variance_its_digits():
    x, weight, bias = affine_inputs(1, 16, 192)
    assert_op_matches(affine_layer_norm, reference.affine_layer_norm, (x + 30, weight, bias))


def backward_case(batch=2, frames=3, tokens=6, dim=16):
    total, y, grad_total, grad_normed = torch.randn(4, batch, tokens, dim, device=DEVICE)
    gate, factor, offset = torch.randn(3, batch, frames, dim, device=DEVICE)
    return total, y, gate, factor, offset, grad_total, grad_normed, 1e-6, True


def test_tables_that_disagree_in_frames_are_refused():
    x, table = torch.randn(1, 12, 8), torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match=r"the tables have \[2, 3\] rows"):
        launch_layer_norm(x, Affine(table, table[:, :2], plus_one=True), 1e-6)


def test_other_dtypes_are_refused():
    table = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="x is torch.float64; the norm kernels serve"):
        launch_layer_norm(
            torch.zeros(1, 2, 8, dtype=torch.float64), Affine(table, table, plus_one=True), 1e-6
        )


@pytest.mark.parametrize("dim", [1, 48, 192, 1536, 5120])
def test_a_program_covers_a_row(dim):
    block, num_warps = row_launch(dim)
    assert block >= dim and block & (block - 1) == 0
    assert num_warps in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("rows", [1, 48, 4680, 100_000])
def test_backward_programs_share_all_rows_and_stay_few(rows):
    assert 1 <= -(-rows // rows_per_sum(rows)) <= 512


def test_gradients_are_bitwise_the_same_in_every_run():
    inputs = backward_case()
    for first, second in zip(layer_norm_backward(*inputs), layer_norm_backward(*inputs), strict=True):
        assert torch.equal(first, second)


def test_torch_sees_the_ops_as_it_must():
    x, factor, offset = rows(2, 2, 16), *tables(1, 2, 16)
    factor, offset = factor.requires_grad_(), offset.clone().requires_grad_()
    torch.library.opcheck(layer_norm_op, (x.requires_grad_(), factor, offset, 1e-6, True))
    torch.library.opcheck(layer_norm_op, (x, factor, offset, 1e-6, False))
    torch.library.opcheck(layer_norm_fp8_op, (x.detach(), factor.detach(), offset.detach(), 1e-6, False))


def test_torch_sees_the_backward_op_as_it_must():
    total, y, gate, factor, offset, *rest = backward_case(frames=2, tokens=2)
    torch.library.opcheck(layer_norm_backward, (total, y, gate, factor, offset, *rest))
    torch.library.opcheck(layer_norm_backward, (total, y, None, factor[:1], offset[:, :1], *rest))
    torch.library.opcheck(
        layer_norm_backward, (total, None, None, factor[0, 0], offset[0, 0], None, *rest[1:])
    )
