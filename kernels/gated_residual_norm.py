"""Residual addition with the norm that reads it next: total = x + gate * y, normed = norm(total).

x, y [B, T, D] bf16, fp16 or fp32; gate [B or 1, F or 1, D], usually fp32, or None for 1. The norm is adaptive
(shift, scale [B or 1, F or 1, D]) or affine (weight, bias [D]). total is rounded to the dtype of x before it
is normalised. Bound: memory, 8 bytes for each element in bf16: x and y are read, total and normed written.
The kernels, forward and backward, are those of layer_norm.py.
"""

import torch
from torch import Tensor

from rfengine.kernels.adaptive_layer_norm import fake_fp8
from rfengine.kernels.layer_norm import Affine, Branch, layer_norm, layer_norm_backward

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
    if _recorded(x, y, gate, shift, scale):
        return _adaptive(x, y, gate, shift, scale, eps)
    return x, _adaptive_into(x, y, gate, shift, scale, eps)


def gated_residual_affine_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * y, its LayerNorm * weight + bias); writes x and raises as the adaptive one does."""
    if _recorded(x, y, gate, weight, bias):
        return _affine(x, y, gate, weight, bias, eps)
    return x, _affine_into(x, y, gate, weight, bias, eps)


def gated_residual_adaptive_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, values, row scales): the sum in x, which is overwritten, and its adaptive norm in FP8.

    values: float8_e4m3fn [B, T, D]; row scales: float32 [B, T, 1], as adaptive_layer_norm_fp8 makes them. No
    gradient.
    """
    return x, *_adaptive_fp8_into(x, y, gate, shift, scale, eps)


def gated_residual_affine_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, values, row scales) as gated_residual_adaptive_norm_fp8 returns them, of the affine norm."""
    return x, *_affine_fp8_into(x, y, gate, weight, bias, eps)


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _add_and_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, affine: Affine, eps: float
) -> tuple[Tensor, Tensor]:
    total = x.new_empty(x.shape)
    return total, layer_norm(x, affine, eps, Branch(y, gate, total))[0]


def _add_into_and_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, affine: Affine, eps: float, fp8: bool = False
) -> tuple[Tensor, Tensor | None]:
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.stride(-1) != 1 or overlaps:
        raise ValueError(
            f"x has strides {x.stride()} and receives the sum; its last axis must be contiguous and no two "
            "elements may share memory: pass x.contiguous()"
        )
    return layer_norm(x, affine, eps, Branch(y, gate, x), fp8)


@torch.library.custom_op("rfengine::gated_residual_adaptive_norm", mutates_args=())
def _adaptive(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _add_and_norm(x, y, gate, Affine(scale, shift, plus_one=True), eps)


@torch.library.custom_op("rfengine::gated_residual_affine_norm", mutates_args=())
def _affine(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _add_and_norm(x, y, gate, Affine(weight, bias, plus_one=False), eps)


@torch.library.custom_op("rfengine::gated_residual_adaptive_norm_into", mutates_args={"x"})
def _adaptive_into(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    return _add_into_and_norm(x, y, gate, Affine(scale, shift, plus_one=True), eps)[0]


@torch.library.custom_op("rfengine::gated_residual_affine_norm_into", mutates_args={"x"})
def _affine_into(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    return _add_into_and_norm(x, y, gate, Affine(weight, bias, plus_one=False), eps)[0]


@torch.library.custom_op("rfengine::gated_residual_adaptive_norm_fp8_into", mutates_args={"x"})
def _adaptive_fp8_into(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _add_into_and_norm(x, y, gate, Affine(scale, shift, plus_one=True), eps, fp8=True)


@torch.library.custom_op("rfengine::gated_residual_affine_norm_fp8_into", mutates_args={"x"})
def _affine_fp8_into(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _add_into_and_norm(x, y, gate, Affine(weight, bias, plus_one=False), eps, fp8=True)


def _save(ctx, inputs, output):
    _, y, gate, first, second, ctx.eps = inputs
    # y is read again only for the gradient of the gate
    ctx.save_for_backward(output[0], None if gate is None else y, gate, first, second)


def _gradients(saved, grad_total, grad_normed, eps, plus_one):
    """Gradients of x, y and gate, then of factor and offset."""
    total, y, gate, factor, offset = saved
    grad_x, grad_factor, grad_offset, *branch = layer_norm_backward(
        total, y, gate, factor, offset, grad_total, grad_normed, eps, plus_one
    )
    return (grad_x, *(branch or (grad_x, None)), grad_factor, grad_offset)


def _adaptive_backward(ctx, grad_total, grad_normed):
    # saved_tensors is read once: activation checkpointing allows no more
    total, y, gate, shift, scale = ctx.saved_tensors
    saved = (total, y, gate, scale, shift)
    *grads, grad_scale, grad_shift = _gradients(saved, grad_total, grad_normed, ctx.eps, True)
    return *grads, grad_shift, grad_scale, None


def _affine_backward(ctx, grad_total, grad_normed):
    return *_gradients(ctx.saved_tensors, grad_total, grad_normed, ctx.eps, False), None


for _op, _backward in ((_adaptive, _adaptive_backward), (_affine, _affine_backward)):
    _op.register_fake(lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)))
    _op.register_autograd(_backward, setup_context=_save)
for _op in (_adaptive_into, _affine_into):
    _op.register_fake(lambda x, *_: x.new_empty(x.shape))
for _op in (_adaptive_fp8_into, _affine_fp8_into):
    _op.register_fake(lambda x, *_: fake_fp8(x))
