"""Linear layers whose weights are int8 with a scale for each output: acc = y W^T, in float32.

    linear         acc * scale + bias
    linear_gelu    GELU of that, tanh form

y [..., K] in bf16, fp16 or fp32 (rows with one stride; others are copied), W int8 [N, K], scale [N], bias [N]
or None. A tile of W is widened to the dtype of y as it is read, which is exact: integers up to 127 have seven
bits. Rounded once, to the dtype of y. Tiles, their order and the two forms of loads are those of linear.py.

Bound: for the rows of a chunk tensor cores, 2 M N K FLOPs at the rate of 16 bits, as without int8: the weight
is read in half the bytes, and what that saves is memory and not time. No gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rfengine.kernels.device import contiguous_rows, fits_descriptor
from rfengine.kernels.linear import gelu, load_tile, place_of_tile
from rfengine.kernels.linear_tile import FLOAT32_TILE, Device, Tile, choose_tile, describe_device

# M rows (B batch * T tokens), N outputs, K inputs of a layer

MOST_STAGES = 3  # of loads: the widened tile of W takes shared memory as well


@triton.jit(do_not_specialize=["rows"])
def _linear_int8_kernel(
    y, weight, weight_scale, bias, out, y_stride, weight_stride, rows, columns,
    K: tl.constexpr, GELU: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place_of_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = load_tile(y, y_stride, row, k, rows, K, BLOCK_M, BLOCK_K, TMA)
        right = load_tile(weight, weight_stride, column, k, columns, K, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(left, right.to(left.dtype).T, acc, input_precision="ieee")
    at, here = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    inside = here < columns
    value = acc * tl.load(weight_scale + here, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + here, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GELU:
        value = gelu(value)
    target = out + at.to(tl.int64)[:, None] * columns + here[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=(at < rows)[:, None] & inside[None, :])


def tile_of(rows: int, columns: int, dtype: torch.dtype, device: Device) -> Tile:
    """choose_tile's, without a tail and with at most MOST_STAGES."""
    tile = choose_tile(rows, columns, dtype, device)
    if tile.tail:
        tile = Tile(128, 128, 0, 64, 8, MOST_STAGES, 0.92)
    return tile if tile is FLOAT32_TILE else replace(tile, stages=min(tile.stages, MOST_STAGES))


def _check(y: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    if weight.dtype != torch.int8 or y.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"weight is {weight.dtype} and x {y.dtype}; they must be int8, and float32, float16 or bfloat16"
        )
    outputs = weight.shape[:1]
    if weight.ndim != 2 or y.shape[-1:] != weight.shape[1:] or weight_scale.shape != outputs:
        raise ValueError(
            f"weight is {tuple(weight.shape)} and its scale {tuple(weight_scale.shape)} for rows of "
            f"{y.shape[-1]}; they must be [N, K] and [N]"
        )
    if bias is not None and bias.shape != outputs:
        raise ValueError(f"bias is {tuple(bias.shape)} for {weight.shape[0]} outputs; it must be [N]")
    for name, tensor in (("weight", weight), ("weight_scale", weight_scale), ("bias", bias)):
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} has stride {tensor.stride(-1)}; it must be contiguous")


def _multiply(y: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    _check(y, weight, weight_scale, bias)
    columns, inputs = weight.shape
    out = y.new_empty(*y.shape[:-1], columns)
    left = contiguous_rows(y.reshape(-1, inputs))
    rows = left.shape[0]
    if not out.numel():
        return out
    device = describe_device(y.device)
    tile = tile_of(rows, columns, y.dtype, device)
    readable = left.element_size() == 2 and fits_descriptor(left) and fits_descriptor(weight)
    tma, sources = device.capability >= (9, 0) and readable, (left, weight)
    if tma:
        blocks = ([size, tile.depth] for size in (tile.rows, tile.columns))
        sources = tuple(map(TensorDescriptor.from_tensor, sources, blocks))
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    _linear_int8_kernel[(tiles,)](
        *sources, weight_scale, bias, out, left.stride(0), weight.stride(0), rows, columns,
        K=inputs, GELU=gelu, TMA=tma, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=8,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@torch.library.custom_op("rfengine::linear_int8", mutates_args=())
def linear_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (weight * weight_scale)^T + bias, rounded once to the dtype of x.

    x: [..., K]; weight: int8 [N, K]; weight_scale: [N]; bias: [N] or None. Returns [..., N], contiguous.
    Raises ValueError for other dtypes and shapes.
    """
    return _multiply(x, weight, weight_scale, bias, gelu=False)


@torch.library.custom_op("rfengine::linear_gelu_int8", mutates_args=())
def linear_gelu_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """GELU, in its tanh form, of linear_int8, rounded once, after the GELU. Otherwise as linear_int8."""
    return _multiply(x, weight, weight_scale, bias, gelu=True)


@linear_int8.register_fake
@linear_gelu_int8.register_fake
def _(x, weight, weight_scale, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
