import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rfengine.kernels import gated_residual_norm, layer_norm
from rfengine.ops import reference
from rfengine.ops.reference import row_fp8
from support.against_reference import assert_op_matches
from support.interpreter_rounding import round_to_nearest_even

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ["gated_residual_adaptive_norm", "gated_residual_affine_norm"]


@pytest.fixture(autouse=True)
def gpu_rounding_and_seed(monkeypatch):
    torch.manual_seed(0)
    round_to_nearest_even(monkeypatch)


def inputs(name, batch=2, frames=2, tokens=4, dim=48, dtype=torch.float32, gated=True):
    """x, y, gate, and the two tables or parameters of the op."""
    x, y = (torch.randn(2, batch, tokens, dim, device=DEVICE) + 0.5).to(dtype)
    gate, shift, scale = torch.randn(batch, frames, 6, dim, device=DEVICE).unbind(2)[:3]
    pair = (shift, scale) if "adaptive" in name else torch.randn(2, dim, device=DEVICE).to(dtype)
    return x, y, gate if gated else None, *pair


def op_pair(name):
    return getattr(gated_residual_norm, name), getattr(reference, name)


@pytest.mark.parametrize(("dtype", "gated"), [*((dtype, True) for dtype in DTYPES), (torch.float16, False)])
@pytest.mark.parametrize("name", NAMES)
def test_sum_norm_and_gradients_agree_with_the_reference(name, dtype, gated):
    for shape in ((1, 1, 1, 192), (2, 3, 9, 48)):
        assert_op_matches(*op_pair(name), inputs(name, *shape, dtype=dtype, gated=gated))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_serves_several_frames_or_samples_gets_the_sum_of_their_gradients(name):
    x, y, gate, *pair = inputs(name)
    for one_for_all in (gate[:1], gate[:, :1], gate[:1, :1]):
        assert_op_matches(*op_pair(name), (x, y, one_for_all, *pair))


def test_programs_that_sum_over_several_tokens_leave_none_out(monkeypatch):
    monkeypatch.setattr(layer_norm, "rows_per_sum", lambda rows: 4)  # 6 tokens in a frame: 4, then 2
    assert_op_matches(*op_pair(NAMES[0]), inputs(NAMES[0], tokens=12))


@pytest.mark.parametrize("name", NAMES)
def test_x_receives_the_sum_when_nothing_is_recorded(name):
    kernel, plain = op_pair(name)
    case = inputs(name, dtype=torch.float16)
    total, normed = kernel(*(tensor.clone().requires_grad_() for tensor in case), 1e-6)
    for x in (case[0].clone(), torch.cat([case[0]] * 2, -1)[..., :48]):
        with torch.no_grad():
            found, found_normed = kernel(x, *case[1:], 1e-6)
        assert found is x
        assert torch.equal(x, total) and torch.equal(found_normed, normed)
    assert torch.equal(total, plain(*case, 1e-6)[0])


@pytest.mark.parametrize("name", NAMES)
def test_x_is_left_alone_when_a_gradient_will_be_asked_for(name):
    kernel, _ = op_pair(name)
    x, y, *rest = inputs(name)
    before = x.clone()
    total, _ = kernel(x, y.requires_grad_(), *rest, 1e-6)
    assert total is not x and torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_under_activation_checkpointing(name):
    kernel, _ = op_pair(name)
    case = [tensor.clone().requires_grad_() for tensor in inputs(name)]

    def loss(*tensors):
        return (torch.cat(kernel(*tensors, 1e-6)) ** 3).sum()

    plain = torch.autograd.grad(loss(*case), case)
    again = torch.autograd.grad(checkpoint(loss, *case, use_reentrant=False), case)
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_strided_rows_agree_with_the_reference(name):
    x, y, *rest = inputs(name, tokens=8)
    assert_op_matches(
        *op_pair(name), (x[:, ::2], y.transpose(1, 2).contiguous().transpose(1, 2)[:, 1::2], *rest)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_rows_are_the_rounded_norm_in_e4m3_and_x_receives_the_sum(name, dtype):
    case = inputs(name, dtype=dtype)
    x = case[0].clone()
    total, normed = getattr(gated_residual_norm, name)(case[0].clone(), *case[1:], 1e-6)
    found, values, row_scale = getattr(gated_residual_norm, f"{name}_fp8")(x, *case[1:], 1e-6)
    expected, expected_scale = row_fp8(normed)
    assert found is x and torch.equal(x, total)
    assert torch.equal(row_scale, expected_scale)
    assert values.dtype == torch.float8_e4m3fn and torch.equal(values.float(), expected.float())


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x[:1].expand(2, -1, -1)]
)
def test_an_x_that_cannot_receive_the_sum_is_refused(view):
    x, *rest = inputs(NAMES[0])
    with pytest.raises(ValueError, match="pass x.contiguous()"):
        gated_residual_norm.gated_residual_adaptive_norm(view(x), *rest, 1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_torch_sees_the_ops_as_it_must(gated):
    case = inputs(NAMES[0], frames=1, tokens=1, dim=16, gated=gated)
    recorded = [None if tensor is None else tensor.clone().requires_grad_() for tensor in case]
    torch.library.opcheck(gated_residual_norm.add_and_norm_op, (*recorded, 1e-6, True))
    for op in (gated_residual_norm.add_into_and_norm_op, gated_residual_norm.add_into_and_norm_fp8_op):
        torch.library.opcheck(op, (*case, 1e-6, False))
