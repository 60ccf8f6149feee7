"""RMS norm: normed = round(x / sqrt(mean(x^2) + eps)) * weight, one read and one write of x.

x [..., T, D] bf16, fp16 or fp32; weight [D] in any of these. round() is to the dtype of x, before the weight,
as the published model has it. A program holds a row in registers. Bound: memory, 4 bytes for each element of
x in bf16; backward 6. With r = 1 / sqrt(mean(x^2) + eps), n = x * r and g = grad * weight:
    dx = r * (g - n * mean(g * n)),  dweight = sum over all tokens of grad * round(n)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import contiguous_rows, row_launch, rows_per_sum
from rfengine.kernels.layer_norm import check_dtype

# B batch, T tokens, D normalised axis; leading axes beyond [B, T, D] are folded into B


@triton.jit
def _rms_norm_kernel(
    x, weight, normed, mean_squares, x_stride_b, x_stride_t, tokens, dim, eps, BLOCK_D: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < dim
    row = tl.load(x + batch * x_stride_b + token * x_stride_t + column, mask=inside, other=0.0).to(tl.float32)
    if mean_squares is None:
        mean = tl.sum(row * row, 0) / dim
    else:
        mean = tl.load(mean_squares + batch * tokens + token)
    rounded = (row * tl.rsqrt(mean + eps)).to(x.dtype.element_ty)
    result = rounded.to(tl.float32) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    out = (batch * tokens + token) * dim + column
    tl.store(normed + out, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    x, weight, grad_normed, grad_x, partials,
    x_stride_b, x_stride_t, grad_normed_stride_b, grad_normed_stride_t,
    tokens, chunk_tokens, dim, eps, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < dim
    multiplier = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_D,), tl.float32)
    first = chunk * chunk_tokens
    for token in range(first, tl.minimum(first + chunk_tokens, tokens)):
        row = tl.load(x + batch * x_stride_b + token * x_stride_t + column, mask=inside, other=0.0)
        row = row.to(tl.float32)
        grad_row = grad_normed + batch * grad_normed_stride_b + token * grad_normed_stride_t
        grad = tl.load(grad_row + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(row * row, 0) / dim + eps)
        normalised = row * rstd
        grad_weight += grad * normalised.to(x.dtype.element_ty).to(tl.float32)
        grad *= multiplier
        through = (grad - normalised * (tl.sum(grad * normalised, 0) / dim)) * rstd
        out = (batch * tokens + token) * dim + column
        tl.store(grad_x + out, through.to(grad_x.dtype.element_ty), mask=inside)
    part = partials + (batch * tl.num_programs(0) + chunk) * dim + column
    tl.store(part, grad_weight, mask=inside)


@torch.library.custom_op("rfengine::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, mean_squares: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, rounded to the dtype of x, then times weight.

    mean_squares: mean(x^2) of the rows of which x has a part, float32 [...], contiguous; not differentiable.
    Else differentiable; the gradients are rounded once. An x whose leading axes do not fold, or whose last
    axis is not contiguous, is copied. Raises ValueError for other dtypes of x.
    """
    check_dtype(x)
    rows = _as_rows(x)
    batch, tokens, dim = rows.shape
    normed = x.new_empty(x.shape)
    block, num_warps = row_launch(dim)
    _rms_norm_kernel[(tokens, batch)](
        rows, weight.contiguous(), normed, mean_squares, rows.stride(0), rows.stride(1), tokens, dim, eps,
        BLOCK_D=block, num_warps=num_warps,
    )  # fmt: skip
    return normed


@rms_norm.register_fake
def _(x, weight, eps, mean_squares=None):
    return x.new_empty(x.shape)


@torch.library.custom_op("rfengine::rms_norm_backward", mutates_args=())
def rms_norm_backward(x: Tensor, weight: Tensor, grad_normed: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weight; the latter in two stages, without atomics."""
    rows, grad_rows = _as_rows(x), _as_rows(grad_normed)
    batch, tokens, dim = rows.shape
    chunk_tokens = rows_per_sum(batch * tokens)
    chunks = triton.cdiv(tokens, chunk_tokens)
    grad_x = x.new_empty(x.shape)
    partials = x.new_empty((batch, chunks, dim), dtype=torch.float32)
    block, num_warps = row_launch(dim)
    _rms_norm_backward_kernel[(chunks, batch)](
        rows, weight.contiguous(), grad_rows, grad_x, partials, rows.stride(0), rows.stride(1),
        grad_rows.stride(0), grad_rows.stride(1), tokens, chunk_tokens, dim, eps,
        BLOCK_D=block, num_warps=num_warps,
    )  # fmt: skip
    return grad_x, partials.sum((0, 1)).to(weight.dtype)


@rms_norm_backward.register_fake
def _(x, weight, grad_normed, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, ctx.eps, mean_squares = inputs
    if mean_squares is not None and any(ctx.needs_input_grad):
        raise ValueError("mean_squares are given and a gradient is asked for; give whole rows for it")
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    return *rms_norm_backward(*ctx.saved_tensors, grad, ctx.eps), None, None


rms_norm.register_autograd(_backward, setup_context=_save)


def _as_rows(x: Tensor) -> Tensor:
    """[..., D] as [B, T, D] with a contiguous last axis; a view where the strides allow it."""
    return contiguous_rows(x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3))
