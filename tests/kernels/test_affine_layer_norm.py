import pytest
import torch

from rfengine.kernels.affine_layer_norm import affine_layer_norm
from rfengine.ops import reference
from support.against_reference import assert_op_matches
from support.interpreter_rounding import round_to_nearest_even

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def gpu_rounding_and_seed(monkeypatch):
    torch.manual_seed(0)
    round_to_nearest_even(monkeypatch)


def inputs(batch, tokens, dim, dtype=torch.float32, parameter_dtype=torch.float32):
    x = (3 * torch.randn(batch, tokens, dim, device=DEVICE) + 1).to(dtype)
    return x, *torch.randn(2, dim, device=DEVICE).to(parameter_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "dim"), [(1, 1, 192), (2, 21, 48), (1, 3, 1536)])
def test_norm_and_gradients_agree_with_the_reference(batch, tokens, dim, dtype):
    case = inputs(batch, tokens, dim, dtype, parameter_dtype=dtype)
    assert_op_matches(affine_layer_norm, reference.affine_layer_norm, case)


def test_float32_parameters_serve_rows_in_half_precision():
    assert_op_matches(affine_layer_norm, reference.affine_layer_norm, inputs(1, 5, 48, torch.bfloat16))


def test_strided_rows_and_parameters_agree_with_the_reference():
    x, *_ = inputs(2, 10, 48)
    weight, bias = torch.randn(48, 2, device=DEVICE).unbind(1)
    assert_op_matches(affine_layer_norm, reference.affine_layer_norm, (x[:, ::3], weight, bias))


def test_a_large_mean_does_not_cost_the_variance_its_digits():
    x, weight, bias = inputs(1, 16, 192)
    assert_op_matches(affine_layer_norm, reference.affine_layer_norm, (x + 30, weight, bias))


def test_torch_sees_the_op_as_it_must():
    case = [tensor.requires_grad_() for tensor in (t.clone() for t in inputs(2, 4, 16))]
    torch.library.opcheck(affine_layer_norm, (*case, 1e-6))
