"""Adaptive LayerNorm: normed = LayerNorm(x) * (1 + scale) + shift, one read and one write of x.

x [B, T, D] bf16, fp16 or fp32; shift, scale [B or 1, F or 1, D], usually fp32: one row for each latent frame,
strided views of the model's table. Bound: memory, 4 bytes for each element of x in bf16, 3 with FP8 output.
The kernels, forward and backward, are those of layer_norm.py.
"""

import torch
from torch import Tensor

from rfengine.kernels.layer_norm import Affine, layer_norm, layer_norm_backward

# B batch, F latent frames, T tokens, D model dim


@torch.library.custom_op("rfengine::adaptive_layer_norm", mutates_args=())
def adaptive_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in float32, rounded once to the dtype of x; differentiable.

    The gradient of x is rounded once as well. Raises ValueError for other dtypes of x and for shift and scale
    that disagree in F.
    """
    return layer_norm(x, Affine(scale, shift, plus_one=True), eps)[0]


@adaptive_layer_norm.register_fake
def _(x, shift, scale, eps):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, shift, scale, ctx.eps = inputs
    ctx.save_for_backward(x, shift, scale)


def _backward(ctx, grad):
    x, shift, scale = ctx.saved_tensors
    grad_x, grad_scale, grad_shift = layer_norm_backward(
        x, None, None, scale, shift, None, grad, ctx.eps, True
    )
    return grad_x, grad_shift, grad_scale, None


adaptive_layer_norm.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("rfengine::adaptive_layer_norm_fp8", mutates_args=())
def adaptive_layer_norm_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """adaptive_layer_norm, rounded to the dtype of x, then to e4m3 with one scale for each row.

    Returns values [B, T, D] in float8_e4m3fn and row scales [B, T, 1] in float32: amax / 448, or 1 where that
    is zero; values * scale is the norm. No gradient.
    """
    return layer_norm(x, Affine(scale, shift, plus_one=True), eps, fp8=True)


@adaptive_layer_norm_fp8.register_fake
def _(x, shift, scale, eps):
    return fake_fp8(x)


def fake_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty e4m3 values [B, T, D] and row scales [B, T, 1], as an FP8 norm of x returns them."""
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
