"""Linear layers with what follows them in the epilogue of one product: acc = y W^T, in float32.

    linear         acc + bias
    linear_gelu    GELU(acc + bias), tanh form: v / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3)
    gated_linear   x + gate * (acc + bias)

y [..., K] (rows with one stride between them; others are copied), W [N, K], bias [N], x [B, T, N], gate [B or
1, F or 1, N], usually float32, or None for 1. bf16, fp16 or fp32. Rounded once, to the dtype of y or x, where
reference.py rounds the product too. One program for each tile of the output, in groups of 8 tiles of rows,
so that a group's part of y and W stays in L2.

  descriptor   sm_90 and above, 16 bits, rows at multiples of 16 bytes: TMA loads, WGMMA. The descriptors are
               made on the host and travel with the launch: nothing is set up in the kernel
  pointer      everywhere else: masked loads

In the descriptor form, where the count of waves says so (count_whole_tiles), the tiles of the last,
incomplete wave are cut along K: each multiprocessor sums an equal share of their steps, which lie in two
tiles at most, into float32 parts, and a second kernel adds up the parts of a tile, in the order of K, before
its epilogue. Without atomics: a run repeats bit for bit.

Bound: tensor cores, 2 M N K FLOPs; y is read N / 256 times and W M / 128 times, mostly from L2. The residual
and the gate add 2 bytes (x) an element of the output, which is the pass over x that the norm after it saves.
Parts are written and read once, mostly in L2: 29 MB each way for N = 1536, K = 8960 and 4680 rows, whose 222
tiles then take 1.68 waves of 132 in place of 2 (computed; unmeasured).

Backward: dy = g W, dW = g^T y, db = sum of g as plain matrix products, after g has gone back through GELU or
gate with acc formed again. Training runs the reference unless this backend is asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rfengine.kernels.device import contiguous_rows, fits_descriptor
from rfengine.kernels.linear_tile import Tile, choose_tile, count_whole_tiles, describe_device

# M rows (B batch * T tokens), N outputs, K inputs of a layer; F latent frames. A tile of the output has
# BLOCK_M rows and BLOCK_N + TAIL columns: 128 + 64 make the 192 that no power of two gives. A step of a tile
# has BLOCK_K of its inputs; a share has the steps of one multiprocessor; a part is its sum of one tile

GELU_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)


@triton.jit
def load_tile(
    source, stride, row, k, rows, stop, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """Tile [ROWS, BLOCK_K] of a matrix from (row, k) on; zeros from row `rows` or column `stop` on."""
    if TMA:
        tile = source.load([row, k])
    else:
        at = row + tl.arange(0, ROWS)
        column = k + tl.arange(0, BLOCK_K)
        mask = (at < rows)[:, None] & (column < stop)[None, :]
        tile = tl.load(source + at.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def gelu(value):
    """In its tanh form: v / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3)."""
    inner = GELU_SCALE * (value + 0.044715 * value * value * value)
    return value / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def _finish(
    acc, bias, out, residual, gate, row, column, rows, columns, tokens, frame_tokens,
    residual_b, residual_t, gate_b, gate_f,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, ONE_GATE: tl.constexpr,
):  # fmt: skip
    """The epilogue of acc, the tile of the product at (row, column), and its store; 64 columns at a time
    where it reads a residual, whose registers would otherwise overrun beside those of acc."""
    if RESIDUAL and acc.shape[1] > 64:
        half: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1)))
        _finish(
            left, bias, out, residual, gate, row, column, rows, columns, tokens, frame_tokens,
            residual_b, residual_t, gate_b, gate_f, GELU, RESIDUAL, GATE, ONE_GATE,
        )  # fmt: skip
        _finish(
            right, bias, out, residual, gate, row, column + half, rows, columns, tokens, frame_tokens,
            residual_b, residual_t, gate_b, gate_f, GELU, RESIDUAL, GATE, ONE_GATE,
        )  # fmt: skip
    else:
        at = row + tl.arange(0, acc.shape[0])
        columns_here = column + tl.arange(0, acc.shape[1])
        inside = columns_here < columns
        mask = (at < rows)[:, None] & inside[None, :]
        value = acc + tl.load(bias + columns_here, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GELU:
            value = gelu(value)
        if RESIDUAL:
            batch, token = at // tokens, at % tokens
            if ONE_GATE:
                value *= tl.load(gate + columns_here, mask=inside, other=0.0).to(tl.float32)[None, :]
            elif GATE:
                start = gate + batch.to(tl.int64) * gate_b + (token // frame_tokens).to(tl.int64) * gate_f
                gates = tl.load(start[:, None] + columns_here[None, :], mask=mask, other=0.0)
                value *= gates.to(tl.float32)
            start = residual + batch.to(tl.int64) * residual_b + token.to(tl.int64) * residual_t
            value += tl.load(start[:, None] + columns_here[None, :], mask=mask, other=0.0).to(tl.float32)
        target = out + at.to(tl.int64)[:, None] * columns + columns_here[None, :]
        tl.store(target, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def place_of_tile(tile, rows, columns, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a tile's first element; GROUP tiles of rows run together."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, WIDTH)
    group = tile // (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile % (GROUP * column_tiles)
    return (group * GROUP + within % group_rows) * BLOCK_M, within // group_rows * WIDTH


@triton.jit(do_not_specialize=["rows", "tokens", "frame_tokens"])
def _linear_kernel(
    y, weight, tail_weight, bias, out, residual, gate,
    y_stride, weight_stride, residual_b, residual_t, gate_b, gate_f,
    rows, columns, tokens, frame_tokens,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, ONE_GATE: tl.constexpr,
):  # fmt: skip
    row, column = place_of_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N + TAIL, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TAIL:
        tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = load_tile(y, y_stride, row, k, rows, K, BLOCK_M, BLOCK_K, TMA)
        right = load_tile(weight, weight_stride, column, k, columns, K, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(left, right.T, acc, input_precision="ieee")
        if TAIL:
            right = load_tile(tail_weight, weight_stride, column + BLOCK_N, k, columns, K, TAIL, BLOCK_K, TMA)
            tail = tl.dot(left, right.T, tail, input_precision="ieee")
    _finish(
        acc, bias, out, residual, gate, row, column, rows, columns, tokens, frame_tokens,
        residual_b, residual_t, gate_b, gate_f, GELU, RESIDUAL, GATE, ONE_GATE,
    )  # fmt: skip
    if TAIL:
        _finish(
            tail, bias, out, residual, gate, row, column + BLOCK_N, rows, columns, tokens, frame_tokens,
            residual_b, residual_t, gate_b, gate_f, GELU, RESIDUAL, GATE, ONE_GATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens", "frame_tokens", "tiles", "whole", "shares"])
def _cut_linear_kernel(
    y, weight, bias, out, residual, gate, parts,
    residual_b, residual_t, gate_b, gate_f,
    rows, columns, tokens, frame_tokens, tiles, whole, shares,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, ONE_GATE: tl.constexpr,
):  # fmt: skip
    """A program for each of the first `whole` tiles, then one for each share of the others' steps."""
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    share = program - whole
    cut_steps = (tiles - whole) * STEPS
    first = tl.where(share < 0, program * STEPS, whole * STEPS + share * cut_steps // shares)
    stop = tl.where(share < 0, (program + 1) * STEPS, whole * STEPS + (share + 1) * cut_steps // shares)
    for tile in range(first // STEPS, tl.cdiv(stop, STEPS)):
        row, column = place_of_tile(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        start = tl.maximum(first - tile * STEPS, 0) * BLOCK_K
        end = tl.minimum(stop - tile * STEPS, STEPS) * BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(start, end, BLOCK_K):
            acc = tl.dot(y.load([row, k]), weight.load([column, k]).T, acc, input_precision="ieee")
        if share < 0:
            _finish(
                acc, bias, out, residual, gate, row, column, rows, columns, tokens, frame_tokens,
                residual_b, residual_t, gate_b, gate_f, GELU, RESIDUAL, GATE, ONE_GATE,
            )  # fmt: skip
        else:
            part = 2 * share + tile - first // STEPS
            at = (part * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64) * BLOCK_N
            tl.store(parts + at[:, None] + tl.arange(0, BLOCK_N)[None, :], acc)


@triton.jit(do_not_specialize=["rows", "tokens", "frame_tokens", "whole", "shares"])
def _add_linear_parts_kernel(
    bias, out, residual, gate, parts,
    residual_b, residual_t, gate_b, gate_f,
    rows, columns, tokens, frame_tokens, whole, shares,
    STEPS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, ONE_GATE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one cut tile: the sum of its parts, then the epilogue."""
    cut = tl.program_id(1)
    cut_steps = tl.num_programs(1) * STEPS
    row, column = place_of_tile(whole + cut, rows, columns, BLOCK_M, BLOCK_N, GROUP)
    within = tl.program_id(0) * ROWS
    # share s begins at step s * cut_steps // shares: these hold the first step of the tile and the last
    first = ((cut * STEPS + 1) * shares - 1) // cut_steps
    last = ((cut + 1) * STEPS * shares - 1) // cut_steps
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for share in range(first, last + 1):
        part = 2 * share + cut - share * cut_steps // shares // STEPS
        at = (part * BLOCK_M + within + tl.arange(0, ROWS)).to(tl.int64) * BLOCK_N
        acc += tl.load(parts + at[:, None] + tl.arange(0, BLOCK_N)[None, :])
    _finish(
        acc, bias, out, residual, gate, row + within, column, rows, columns, tokens, frame_tokens,
        residual_b, residual_t, gate_b, gate_f, GELU, RESIDUAL, GATE, ONE_GATE,
    )  # fmt: skip


def _check(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor | None, gate: Tensor | None) -> None:
    dtypes = {tensor.dtype for tensor in (y, weight, bias, x) if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        raise ValueError(f"the dtypes are {dtypes}; all must be one of float32, float16, bfloat16")
    if weight.ndim != 2 or y.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weight is {tuple(weight.shape)} and bias {tuple(bias.shape)} for rows of {y.shape[-1]}; "
            "they must be [N, K] and [N]"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("x", x), ("gate", gate)):
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} has stride {tensor.stride(-1)}; it must be contiguous")


def _multiply(
    y: Tensor, weight: Tensor, bias: Tensor, gelu: bool, x: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """The product with its epilogue; a y whose rows have no single stride is copied."""
    _check(y, weight, bias, x, gate)
    columns, inputs = weight.shape
    out = y.new_empty(*y.shape[:-1], columns)
    left = contiguous_rows(y.reshape(-1, inputs))
    rows = left.shape[0]
    if not out.numel():
        return out
    device = describe_device(y.device)
    tile = choose_tile(rows, columns, y.dtype, device)
    sources = (left, weight, weight)
    readable = left.element_size() == 2 and fits_descriptor(left) and fits_descriptor(weight)
    tma = device.capability >= (9, 0) and readable
    if tma:
        blocks = ([size, tile.depth] for size in (tile.rows, tile.columns, tile.tail or tile.columns))
        sources = tuple(map(TensorDescriptor.from_tensor, sources, blocks))
    tokens = rows if x is None else x.shape[1]
    frame_tokens, gate_strides = tokens, [0, 0]
    if gate is not None:
        frame_tokens = tokens // gate.shape[1]
        gate_strides = [0 if gate.shape[axis] == 1 else gate.stride(axis) for axis in (0, 1)]
    residual_strides = (0, 0) if x is None else x.stride()[:2]
    tensors = (bias, out, out if x is None else x, bias if gate is None else gate)
    numbers = (*residual_strides, *gate_strides, rows, columns, tokens, frame_tokens)
    options = {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "GROUP": 8, "GELU": gelu, "RESIDUAL": x is not None,
        "GATE": gate is not None, "ONE_GATE": gate is not None and not any(gate_strides),
    }  # fmt: skip
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns + tile.tail)
    whole = count_whole_tiles(tile, tiles, inputs, device) if tma else tiles
    if whole < tiles:
        _multiply_cut(tile, sources[:2], tensors, numbers, options, tiles, whole, device.processors)
        return out
    _linear_kernel[(tiles,)](
        *sources, *tensors, left.stride(0), weight.stride(0), *numbers,
        K=inputs, TAIL=tile.tail, BLOCK_K=tile.depth, TMA=tma, **options,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _multiply_cut(
    tile: Tile,
    sources: tuple[TensorDescriptor, TensorDescriptor],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    options: dict[str, int | bool],
    tiles: int,
    whole: int,
    shares: int,
) -> None:
    """_multiply where only the first `whole` tiles have a program each and the others are cut into shares."""
    inputs = sources[0].shape[1]
    parts = tensors[0].new_empty((2 * shares, tile.rows, tile.columns), dtype=torch.float32)
    _cut_linear_kernel[(whole + shares,)](
        *sources, *tensors, parts, *numbers, tiles, whole, shares, K=inputs, BLOCK_K=tile.depth, **options,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    part_rows = 16
    _add_linear_parts_kernel[(tile.rows // part_rows, tiles - whole)](
        *tensors, parts, *numbers, whole, shares,
        STEPS=triton.cdiv(inputs, tile.depth), ROWS=part_rows, **options, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("rfengine::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, rounded once. x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N], contiguous.

    x is copied where its rows have no single stride. Differentiable. Raises ValueError for mixed or other
    dtypes and for a weight or bias whose last axis is not contiguous.
    """
    return _multiply(x, weight, bias, gelu=False)


@torch.library.custom_op("rfengine::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, in its tanh form, of x W^T + b, rounded once, after the GELU. Otherwise as linear."""
    return _multiply(x, weight, bias, gelu=True)


@torch.library.custom_op("rfengine::gated_linear", mutates_args=())
def gated_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * (y W^T + b), rounded once; a new tensor. Otherwise as linear.

    x: [B, T, N]; y: [B, T, K]; gate: [B or 1, F or 1, N] or None for 1, its last axis contiguous.
    """
    return _multiply(y, weight, bias, False, x, gate)


@linear.register_fake
@linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@gated_linear.register_fake
def _(x, y, weight, bias, gate):
    return x.new_empty(x.shape)


def _gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _gated(x, y, weight, bias, gate):
    branch = F.linear(y, weight, bias)
    if gate is None:
        return x + branch
    tokens = x.shape[1] // gate.shape[1]
    return (x + branch * gate.repeat_interleave(tokens, dim=1)).to(x.dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of(plain: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradients of `plain`, which is run again on the saved inputs."""

    def backward(ctx, grad):
        saved = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(saved, ctx.needs_input_grad, strict=True)
            ]
            out = plain(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        return tuple(None if leaf is None or not leaf.requires_grad else next(grads) for leaf in leaves)

    return backward


linear.register_autograd(_backward_of(F.linear), setup_context=_save)
linear_gelu.register_autograd(_backward_of(_gelu), setup_context=_save)
gated_linear.register_autograd(_backward_of(_gated), setup_context=_save)
