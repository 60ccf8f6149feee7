import importlib.metadata
import importlib.util

import pytest
import torch

from rfengine.ops import reference
from rfengine.ops.backends import backend_reasons
from rfengine.ops.table import OPS, has_backend, implementation
from support.tolerance import assert_within_reference_error


def layer(dtype, device):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 21, 64), (96, 64), (96,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(device, dtype) for tensor in (x, weight / 8, bias)]


def test_cublaslt_runs_the_products_that_end_in_a_bias_and_nothing_else():
    assert {op for op in OPS if has_backend(op, "cublaslt")} == {
        "linear", "linear_gelu", "linear_fp8", "linear_gelu_fp8", "linear_gelu_rows_fp8",
    }  # fmt: skip
    assert "needs a CUDA device" in backend_reasons("cpu")["cublaslt"]


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [
        ("3.6.0", "2.3.5", True), ("3.6.0", "2.4.6", False), ("3.6.0+git1", "3.0.0", False),
        ("3.7.0", "2.4.6", True), ("3.10.0", "2.10.1", True), ("3.7rc1", "2.4.6", True),
    ],
)  # fmt: skip
def test_the_interpreter_of_an_early_triton_says_which_numpy_it_needs(monkeypatch, triton, numpy, runs):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    reason = backend_reasons("cpu")["triton"]
    assert reason == (
        ""
        if runs
        else f"the interpreter of Triton {triton} fails with numpy {numpy}: pip install 'numpy<2.4'"
    )
    assert backend_reasons("cuda")["triton"] == ""


def test_a_product_with_its_bias_equals_the_reference():
    case = layer(torch.float32, "cpu")
    torch.testing.assert_close(implementation("linear", "cublaslt")(*case), reference.linear(*case))


def test_gelu_in_the_epilogue_gives_way_where_a_gradient_is_recorded():
    case = [tensor.requires_grad_() for tensor in layer(torch.float32, "cpu")]
    found = implementation("linear_gelu", "cublaslt")(*case)
    assert torch.equal(found, reference.linear_gelu(*case))
    assert all(grad is not None for grad in torch.autograd.grad(found.sum(), case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["linear", "linear_gelu"])
def test_cublaslt_agrees_with_the_reference_on_a_gpu(op, dtype):
    case = layer(dtype, "cuda")
    truth = getattr(reference, op)(*(tensor.double() for tensor in case))
    found = implementation(op, "cublaslt")(*case)
    assert_within_reference_error(op, found, getattr(reference, op)(*case), truth)
