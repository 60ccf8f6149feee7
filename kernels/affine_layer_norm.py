"""LayerNorm with affine parameters: normed = LayerNorm(x) * weight + bias, one read and one write of x.

x [B, T, D] bf16, fp16 or fp32; weight, bias [D] in any of these. Bound: memory, 4 bytes for each element of x
in bf16. The kernels, forward and backward, are those of layer_norm.py.
"""

import torch
from torch import Tensor

from rfengine.kernels.layer_norm import Affine, layer_norm, layer_norm_backward

# B batch, T tokens, D model dim


@torch.library.custom_op("rfengine::affine_layer_norm", mutates_args=())
def affine_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias in float32, rounded once to the dtype of x; differentiable.

    The gradients are rounded once as well. Raises ValueError for other dtypes of x.
    """
    return layer_norm(x, Affine(weight, bias, plus_one=False), eps)[0]


@affine_layer_norm.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    grads = layer_norm_backward(x, None, None, weight, bias, None, grad, ctx.eps, False)
    return *grads, None


affine_layer_norm.register_autograd(_backward, setup_context=_save)
