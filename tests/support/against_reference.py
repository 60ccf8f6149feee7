"""Compares an op, its outputs and its gradients, with reference.py in the same dtype and in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from support.tolerance import assert_within_reference_error

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_op_matches(kernel: Op, reference: Op, inputs: Sequence[Tensor | None], eps: float = 1e-6) -> None:
    """Outputs and the gradients of every input; the float64 reference on the same values is the truth."""
    wide = [None if tensor is None else tensor.detach().double() for tensor in inputs]
    generator = torch.Generator().manual_seed(1)
    found, expected = _run(kernel, inputs, eps, generator), _run(reference, inputs, eps, generator)
    truth = _run(reference, wide, eps, generator)
    for name in truth:
        assert_within_reference_error(name, found[name], expected[name], truth[name])
        assert found[name].dtype == expected[name].dtype, name


def _run(
    op: Op, inputs: Sequence[Tensor | None], eps: float, generator: torch.Generator
) -> dict[str, Tensor]:
    generator.manual_seed(1)
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    outputs = op(*leaves, eps)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    # half precision holds these cotangents exactly, so that all three runs go back from the same values
    cotangents = [
        torch.randn(output.shape, generator=generator).to(inputs[0].device, torch.bfloat16).to(output.dtype)
        for output in outputs
    ]
    given = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(outputs, given, cotangents)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return results | {f"gradient {index}": grad for index, grad in enumerate(grads)}
