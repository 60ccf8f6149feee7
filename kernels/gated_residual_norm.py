"""Residual addition with the norm that reads it next: total = x + gate * y, normed = norm(total).

x, y [B, T, D] bf16, fp16 or fp32; gate [B or 1, F or 1, D], usually fp32, or None for 1. The norm is adaptive
(shift, scale [B or 1, F or 1, D]) or affine (weight, bias [D]). total is rounded to the dtype of x before it
is normalised. Bound: memory, 8 bytes for each element in bf16: x and y are read, total and normed written.
The kernels, forward and backward, are those of layer_norm.py.
"""

import torch
from torch import Tensor

from rfengine.kernels.layer_norm import Affine, Branch, fake_fp8, launch_layer_norm, layer_norm_backward

# B batch, F latent frames, T tokens, D model dim


def gated_residual_adaptive_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * y, its LayerNorm * (1 + scale) + shift).

    The sum is written into x when autograd does not record this call, and x is returned; otherwise the sum is
    a new tensor. Activation checkpointing therefore has to be the kind that records its first pass
    (use_reentrant=False). Raises ValueError for other dtypes, for tables that disagree in F and for an x that
    cannot be written.
    """
    return _add_and_norm(x, y, gate, scale, shift, eps, True)


def gated_residual_affine_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * y, its LayerNorm * weight + bias); writes x and raises as the adaptive one does."""
    return _add_and_norm(x, y, gate, weight, bias, eps, False)


def gated_residual_adaptive_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, values, row scales): the sum in x, which is overwritten, and its adaptive norm in FP8.

    values: float8_e4m3fn [B, T, D]; row scales: float32 [B, T, 1], as adaptive_layer_norm_fp8 makes them. No
    gradient.
    """
    return x, *add_into_and_norm_fp8_op(x, y, gate, scale, shift, eps, True)


def gated_residual_affine_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, values, row scales) as gated_residual_adaptive_norm_fp8 returns them, of the affine norm."""
    return x, *add_into_and_norm_fp8_op(x, y, gate, weight, bias, eps, False)


def _add_and_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    inputs = (x, y, gate, factor, offset)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return add_and_norm_op(*inputs, eps, plus_one)
    return x, add_into_and_norm_op(*inputs, eps, plus_one)


@torch.library.custom_op("rfengine::add_and_norm", mutates_args=())
def add_and_norm_op(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    total = x.new_empty(x.shape)
    return total, launch_layer_norm(x, Affine(factor, offset, plus_one), eps, Branch(y, gate, total))[0]


@torch.library.custom_op("rfengine::add_into_and_norm", mutates_args={"x"})
def add_into_and_norm_op(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float, plus_one: bool
) -> Tensor:
    _check_writable(x)
    return launch_layer_norm(x, Affine(factor, offset, plus_one), eps, Branch(y, gate, x))[0]


@torch.library.custom_op("rfengine::add_into_and_norm_fp8", mutates_args={"x"})
def add_into_and_norm_fp8_op(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    _check_writable(x)
    return launch_layer_norm(x, Affine(factor, offset, plus_one), eps, Branch(y, gate, x), fp8=True)


def _check_writable(x: Tensor) -> None:
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.stride(-1) != 1 or overlaps:
        raise ValueError(
            f"x has strides {x.stride()} and receives the sum; its last axis must be contiguous and no two "
            "elements may share memory: pass x.contiguous()"
        )


def _save(ctx, inputs, output):
    _, y, gate, factor, offset, ctx.eps, ctx.plus_one = inputs
    # y is read again only for the gradient of the gate
    ctx.save_for_backward(output[0], None if gate is None else y, gate, factor, offset)


def _backward(ctx, grad_total, grad_normed):
    grad_x, grad_factor, grad_offset, *branch = layer_norm_backward(
        *ctx.saved_tensors, grad_total, grad_normed, ctx.eps, ctx.plus_one
    )
    return grad_x, *(branch or (grad_x, None)), grad_factor, grad_offset, None, None


add_and_norm_op.register_fake(lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)))
add_and_norm_op.register_autograd(_backward, setup_context=_save)
add_into_and_norm_op.register_fake(lambda x, *_: x.new_empty(x.shape))
add_into_and_norm_fp8_op.register_fake(lambda x, *_: fake_fp8(x))
