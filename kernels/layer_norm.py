"""LayerNorm of rows held in registers, with everything the transformer puts around it, forward and backward.

    total  = x + gate * y                        only with a branch y; gate is 1 when there is none
    normed = (total - mean) / sqrt(var + eps) * m + offset          m = factor, or 1 + factor
    dtotal = grad_total + rstd * (g - mean(g) - n * mean(g * n))    g = grad_normed * m, n the normalised row
    dx = dtotal,  dy = dtotal * gate,  dgate = sum dtotal * y,  dfactor = sum grad_normed * n,
    doffset = sum grad_normed; the sums run over the tokens that share a row of the table

A program holds a whole row in float32, so mean and centred variance are two passes over registers and every
tensor is read once and written once. Bound: memory. Bytes for each element in bf16: 4 for a norm (2 + 1 with
FP8 output), 8 with a branch, 6 and 12 backward. The tables are float32 and stay in cache.

The ops without a branch are here, those with one in gated_residual_norm.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import contiguous_rows, row_launch, rows_per_sum
from rfengine.kernels.e4m3 import row_fp8_of

# B batch, F latent frames, T tokens, D model dim; a table is [B or 1, F or 1, D], or [D] for all tokens


@dataclass(frozen=True, slots=True)
class Affine:
    """What follows the normalisation: rows * factor + offset, or rows * (1 + factor) + offset."""

    factor: Tensor
    offset: Tensor
    plus_one: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """What is added before the normalisation: gate * y, and where the sum is written (x is allowed)."""

    y: Tensor
    gate: Tensor | None
    total: Tensor


@triton.jit
def _layer_norm_kernel(
    x, y, gate, factor, offset, total, normed, row_scale,
    x_stride_b, x_stride_t, y_stride_b, y_stride_t, total_stride_b, total_stride_t,
    gate_stride_b, gate_stride_f, factor_stride_b, factor_stride_f, offset_stride_b, offset_stride_f,
    tokens, frame_tokens, dim, eps,
    PLUS_ONE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    frame = (tl.program_id(0) // frame_tokens).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < dim

    row = tl.load(x + batch * x_stride_b + token * x_stride_t + column, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        branch = tl.load(y + batch * y_stride_b + token * y_stride_t + column, mask=inside, other=0.0)
        branch = branch.to(tl.float32)
        if gate is not None:
            gate_row = gate + batch * gate_stride_b + frame * gate_stride_f
            branch *= tl.load(gate_row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (row + branch).to(total.dtype.element_ty)
        # this program alone reads and writes the row, so total may be x
        tl.store(total + batch * total_stride_b + token * total_stride_t + column, rounded, mask=inside)
        row = rounded.to(tl.float32)

    mean = tl.sum(row, 0) / dim
    centred = tl.where(inside, row - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
    factor_row = factor + batch * factor_stride_b + frame * factor_stride_f
    multiplier = tl.load(factor_row + column, mask=inside, other=0.0).to(tl.float32)
    if PLUS_ONE:
        multiplier += 1.0
    offset_row = offset + batch * offset_stride_b + frame * offset_stride_f
    result = centred * rstd * multiplier + tl.load(offset_row + column, mask=inside, other=0.0).to(tl.float32)

    out = batch * tokens + token
    rounded = result.to(x.dtype.element_ty)
    if row_scale is not None:
        values, scale = row_fp8_of(rounded.to(tl.float32), 0)
        tl.store(row_scale + out, scale)
        tl.store(normed + out * dim + column, values, mask=inside)
    else:
        tl.store(normed + out * dim + column, rounded, mask=inside)


@triton.jit
def _layer_norm_backward_kernel(
    total, y, gate, factor, grad_total, grad_normed, grad_x, grad_y, partials,
    total_stride_b, total_stride_t, y_stride_b, y_stride_t,
    gate_stride_b, gate_stride_f, factor_stride_b, factor_stride_f,
    grad_total_stride_b, grad_total_stride_t, grad_normed_stride_b, grad_normed_stride_t,
    frame_tokens, chunk_tokens, dim, eps,
    PLUS_ONE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, frame, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    frames, chunks = tl.num_programs(1), tl.num_programs(0)
    column = tl.arange(0, BLOCK_D)
    inside = column < dim

    factor_row = factor + batch * factor_stride_b + frame * factor_stride_f
    if gate is not None:
        gate_row = gate + batch * gate_stride_b + frame * gate_stride_f
        grad_gate = tl.zeros((BLOCK_D,), tl.float32)
    grad_factor = tl.zeros((BLOCK_D,), tl.float32)
    grad_offset = tl.zeros((BLOCK_D,), tl.float32)

    first = chunk * chunk_tokens
    for index in range(first, tl.minimum(first + chunk_tokens, frame_tokens)):
        token = frame * frame_tokens + index
        row = tl.load(
            total + batch * total_stride_b + token * total_stride_t + column, mask=inside, other=0.0
        )
        row = row.to(tl.float32)
        grad_row = grad_normed + batch * grad_normed_stride_b + token * grad_normed_stride_t
        grad = tl.load(grad_row + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(row, 0) / dim
        centred = tl.where(inside, row - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
        normalised = centred * rstd
        grad_factor += grad * normalised
        grad_offset += grad
        # the table rows are read again for every token, from cache: the sums need the registers
        multiplier = tl.load(factor_row + column, mask=inside, other=0.0).to(tl.float32)
        if PLUS_ONE:
            multiplier += 1.0
        grad *= multiplier
        through = (grad - tl.sum(grad, 0) / dim - normalised * (tl.sum(grad * normalised, 0) / dim)) * rstd
        out = ((batch * frames + frame) * frame_tokens + index) * dim + column
        if grad_total is not None:
            sum_row = grad_total + batch * grad_total_stride_b + token * grad_total_stride_t
            through += tl.load(sum_row + column, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            y_row = y + batch * y_stride_b + token * y_stride_t
            grad_gate += through * tl.load(y_row + column, mask=inside, other=0.0).to(tl.float32)
            gate_value = tl.load(gate_row + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_y + out, (through * gate_value).to(grad_y.dtype.element_ty), mask=inside)
        tl.store(grad_x + out, through.to(grad_x.dtype.element_ty), mask=inside)

    # partials: [2 or 3, B, F, chunks, D]; summed outside in a fixed order, so no atomics
    tables = tl.num_programs(2).to(tl.int64) * frames * chunks * dim
    part = partials + ((batch * frames + frame) * chunks + chunk) * dim + column
    tl.store(part, grad_factor, mask=inside)
    tl.store(part + tables, grad_offset, mask=inside)
    if gate is not None:
        tl.store(part + 2 * tables, grad_gate, mask=inside)


def check_dtype(x: Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x is {x.dtype}; the norm kernels serve bfloat16, float16 and float32: cast it")


def launch_layer_norm(
    x: Tensor, affine: Affine, eps: float, branch: Branch | None = None, fp8: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel on x [B, T, D]; writes branch.total when there is a branch.

    Returns the normed rows [B, T, D], and with fp8 (which makes them e4m3) their scales [B, T, 1]. Inputs
    whose last axis is not contiguous are copied. Raises ValueError for a dtype that is not served and for
    tables that disagree in F.
    """
    check_dtype(x)
    batch, tokens, dim = x.shape
    y, gate, total = (branch.y, branch.gate, branch.total) if branch else (None, None, None)
    frames = _frames(gate, affine.factor, affine.offset)
    block, num_warps = row_launch(dim)
    normed = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    row_scale = x.new_empty((batch, tokens, 1), dtype=torch.float32) if fp8 else None
    x, y = contiguous_rows(x), None if y is None else contiguous_rows(y)
    gate, factor, offset = (_table(table) for table in (gate, affine.factor, affine.offset))
    strides = [*_row_strides(x), *_row_strides(y), *_row_strides(total)]
    strides += [*_table_strides(gate), *_table_strides(factor), *_table_strides(offset)]
    _layer_norm_kernel[(tokens, batch)](
        x, y, gate, factor, offset, total, normed, row_scale, *strides, tokens, tokens // frames, dim, eps,
        PLUS_ONE=affine.plus_one, BLOCK_D=block, num_warps=num_warps,
    )  # fmt: skip
    return normed, row_scale


@torch.library.custom_op("rfengine::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    total: Tensor, y: Tensor | None, gate: Tensor | None, factor: Tensor, offset: Tensor,
    grad_total: Tensor | None, grad_normed: Tensor, eps: float, plus_one: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, factor and offset, then of y and gate when there is a gate.

    Without a gate y is not needed and its gradient is that of x; without a branch grad_total is None as well.
    The gradients are formed in float32 and rounded once, where autograd of the reference rounds at every op.
    """
    batch, tokens, dim = total.shape
    frames = _frames(gate, factor, offset)
    chunk_tokens = rows_per_sum(batch * tokens)
    chunks = triton.cdiv(tokens // frames, chunk_tokens)
    block, num_warps = row_launch(dim)
    grad_x = total.new_empty(total.shape)
    grad_y = None if gate is None else total.new_empty(total.shape)
    shape = (2 if gate is None else 3, batch, frames, chunks, dim)
    partials = total.new_empty(shape, dtype=torch.float32)
    total, grad_normed = contiguous_rows(total), contiguous_rows(grad_normed)
    y, grad_total = (None if rows is None else contiguous_rows(rows) for rows in (y, grad_total))
    gate_table, factor_table = _table(gate), _table(factor)
    strides = [*_row_strides(total), *_row_strides(y), *_table_strides(gate_table)]
    strides += [*_table_strides(factor_table), *_row_strides(grad_total), *_row_strides(grad_normed)]
    _layer_norm_backward_kernel[(chunks, frames, batch)](
        total, y, gate_table, factor_table, grad_total, grad_normed, grad_x, grad_y, partials, *strides,
        tokens // frames, chunk_tokens, dim, eps, PLUS_ONE=plus_one, BLOCK_D=block, num_warps=num_warps,
    )  # fmt: skip
    grads = [grad_x, _sum_as(partials[0], factor), _sum_as(partials[1], offset)]
    return grads if gate is None else [*grads, grad_y, _sum_as(partials[2], gate)]


@layer_norm_backward.register_fake
def _(total, y, gate, factor, offset, grad_total, grad_normed, eps, plus_one):
    like = [total, factor, offset, *([] if gate is None else [total, gate])]
    return [tensor.new_empty(tensor.shape) for tensor in like]


@torch.library.custom_op("rfengine::layer_norm", mutates_args=())
def layer_norm_op(x: Tensor, factor: Tensor, offset: Tensor, eps: float, plus_one: bool) -> Tensor:
    return launch_layer_norm(x, Affine(factor, offset, plus_one), eps)[0]


@torch.library.custom_op("rfengine::layer_norm_fp8", mutates_args=())
def layer_norm_fp8_op(
    x: Tensor, factor: Tensor, offset: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    return launch_layer_norm(x, Affine(factor, offset, plus_one), eps, fp8=True)


def fake_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty e4m3 values [B, T, D] and row scales [B, T, 1], as an FP8 norm of x returns them."""
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _save(ctx, inputs, output):
    x, factor, offset, ctx.eps, ctx.plus_one = inputs
    ctx.save_for_backward(x, factor, offset)


def _backward(ctx, grad):
    x, factor, offset = ctx.saved_tensors
    grads = layer_norm_backward(x, None, None, factor, offset, None, grad, ctx.eps, ctx.plus_one)
    return *grads, None, None


layer_norm_op.register_fake(lambda x, *_: x.new_empty(x.shape))
layer_norm_op.register_autograd(_backward, setup_context=_save)
layer_norm_fp8_op.register_fake(lambda x, *_: fake_fp8(x))


def adaptive_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in float32, rounded once to the dtype of x; differentiable.

    x [B, T, D]; shift, scale [B or 1, F or 1, D], one row for each latent frame. Gradients are rounded once
    as well. Raises ValueError for a dtype of x that is not served and for shift and scale that disagree in F.
    """
    return layer_norm_op(x, scale, shift, eps, True)


def affine_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias, rounded and refused as in adaptive_layer_norm. weight, bias: [D]."""
    return layer_norm_op(x, weight, bias, eps, False)


def adaptive_layer_norm_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """adaptive_layer_norm, rounded to the dtype of x, then to e4m3 with one scale for each row.

    Returns values [B, T, D] in float8_e4m3fn and row scales [B, T, 1] in float32: amax / 448, or 1 where that
    is below 2^-126; values * scale is the norm. No gradient.
    """
    return layer_norm_fp8_op(x, scale, shift, eps, True)


def _frames(*tables: Tensor | None) -> int:
    """Rows of the tables for each sample: their common F, or 1."""
    counts = {table.shape[1] for table in tables if table is not None and table.ndim == 3} - {1}
    if len(counts) > 1:
        raise ValueError(
            f"the tables have {sorted(counts)} rows; give every table one row, or one for each latent frame"
        )
    return counts.pop() if counts else 1


def _table(table: Tensor | None) -> Tensor | None:
    if table is None:
        return None
    return contiguous_rows(table if table.ndim == 3 else table[None, None])


def _row_strides(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else (rows.stride(0), rows.stride(1))


def _table_strides(table: Tensor | None) -> tuple[int, int]:
    """Strides of the batch and frame axes: 0 for an axis of one row, which then serves all."""
    if table is None:
        return 0, 0
    return tuple(0 if table.shape[axis] == 1 else table.stride(axis) for axis in (0, 1))


def _sum_as(partial: Tensor, table: Tensor) -> Tensor:
    """Partial sums [B, F, chunks, D] added up to the shape of the table, in its dtype."""
    rows = table.shape[:2] if table.ndim == 3 else (1, 1)
    shared = [axis for axis in (0, 1) if rows[axis] == 1]
    return partial.sum([*shared, 2]).reshape(table.shape).to(table.dtype)
