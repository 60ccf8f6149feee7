"""Linear layers in e4m3 with the scales in the epilogue: acc = x W^T of 8-bit values, in float32.

    linear             acc * row_scale * weight_scale + bias
    linear_gelu        GELU of that, tanh form
    linear_gelu_rows   the same in e4m3: divided by the row's scale, row_scale * reach[0] + reach[1], which
                       is known beforehand, so that the next product's operand is written once, in one byte
    linear_heads       x in 16 or 32 bits; each of `heads` equal parts of a row is rounded by row_fp8 as it
                       is read

x [..., K] (rows with one stride; others are copied), W e4m3 [N, K], weight_scale float32 [N], bias [N],
row_scale float32 [..., G], one for each of G equal parts of a row. Rounded once, to the dtype of bias or to
e4m3. Where a row has one scale, the tensor core adds up all K products (on Hopper with about 14 bits behind
the leading one). Where it has G, each part is a sum of its own that is scaled and added in float32
registers.

  descriptor   sm_90 and above, rows at multiples of 16 bytes: TMA loads; descriptors are made on the host
  pointer      sm_89, and any other strides: masked loads

Bound: tensor cores, 2 M N K FLOPs at the rate of FP8; x is read N / 256 times and W M / 128 times, mostly
from L2. A part of 128 values is one step of 128 bytes. No gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rfengine.kernels.device import FP8_CAPABILITY, contiguous_rows, fits_descriptor
from rfengine.kernels.e4m3 import hidden_unit, row_fp8_of
from rfengine.kernels.linear import gelu, load_tile, place_of_tile
from rfengine.kernels.linear_tile import Device, Tile, choose_tile, describe_device

# M rows (B batch * T tokens), N outputs, K inputs of a layer, G parts of a row

E4M3 = torch.float8_e4m3fn
DEPTH = 128  # bytes of a row of a tile, and the most values of it


@triton.jit
def _parts(
    x, row_scale, weight, x_stride, weight_stride, row, column, rows, columns,
    K: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The product [BLOCK_M, BLOCK_N] of rows with PARTS scales each. ROUNDS: x is not e4m3 yet, and a part
    is no wider than BLOCK_K."""
    WIDTH: tl.constexpr = K // PARTS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at = row + tl.arange(0, BLOCK_M)
    for part in range(0, PARTS):
        start = part * WIDTH
        stop = start + WIDTH
        if WIDTH <= BLOCK_K:  # one step, so that the loop over parts is the one that is pipelined
            left = load_tile(x, x_stride, row, start, rows, stop, BLOCK_M, BLOCK_K, TMA)
            right = load_tile(weight, weight_stride, column, start, columns, stop, BLOCK_N, BLOCK_K, TMA)
            if ROUNDS:
                left, scale = row_fp8_of(left.to(tl.float32), 1)
            else:
                scale = tl.load(row_scale + at.to(tl.int64) * PARTS + part, mask=at < rows, other=0.0)
            sums = tl.dot(left, right.T)
        else:
            scale = tl.load(row_scale + at.to(tl.int64) * PARTS + part, mask=at < rows, other=0.0)
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(start, stop, BLOCK_K):
                left = load_tile(x, x_stride, row, k, rows, stop, BLOCK_M, BLOCK_K, TMA)
                right = load_tile(weight, weight_stride, column, k, columns, stop, BLOCK_N, BLOCK_K, TMA)
                sums = tl.dot(left, right.T, sums)
        acc += sums * scale[:, None]
    return acc


@triton.jit
def _finish(acc, scale, weight_scale, bias, inverse, out, at, column, rows, columns, GELU: tl.constexpr):
    """The epilogue of acc, the tile of sums at (at, column), and its store; 64 columns at a time where it
    has GELU, whose registers would otherwise overrun beside those of acc."""
    if GELU and acc.shape[1] > 64:
        half: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1)))
        _finish(left, scale, weight_scale, bias, inverse, out, at, column, rows, columns, GELU)
        _finish(right, scale, weight_scale, bias, inverse, out, at, column + half, rows, columns, GELU)
    else:
        here = column + tl.arange(0, acc.shape[1])
        inside = here < columns
        factor = scale[:, None] * tl.load(weight_scale + here, mask=inside, other=0.0)[None, :]
        value = acc * factor + tl.load(bias + here, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GELU:
            value = gelu(value)
        if inverse is not None:
            value *= inverse[:, None]
        target = out + at.to(tl.int64)[:, None] * columns + here[None, :]
        tl.store(target, value.to(out.dtype.element_ty), mask=(at < rows)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def _linear_fp8_kernel(
    x, row_scale, weight, weight_scale, bias, reach, out, out_scale, x_stride, weight_stride, rows, columns,
    K: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr, GELU: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place_of_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP)
    at = row + tl.arange(0, BLOCK_M)
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if PARTS == 1 and not ROUNDS:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            left = load_tile(x, x_stride, row, k, rows, K, BLOCK_M, BLOCK_K, TMA)
            right = load_tile(weight, weight_stride, column, k, columns, K, BLOCK_N, BLOCK_K, TMA)
            acc = tl.dot(left, right.T, acc)
        scale = tl.load(row_scale + at, mask=at < rows, other=0.0)
    else:
        acc = _parts(
            x, row_scale, weight, x_stride, weight_stride, row, column, rows, columns,
            K, PARTS, ROUNDS, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip
    inverse = None
    if reach is not None:
        unit = hidden_unit(scale, reach)
        if column == 0:
            tl.store(out_scale + at, unit, mask=at < rows)
        inverse = 1.0 / unit
    _finish(acc, scale, weight_scale, bias, inverse, out, at, column, rows, columns, GELU)


@dataclass(frozen=True, slots=True)
class Rows:
    """The left operand: rows [M, K], their scales [M, G] (None where they are rounded as they are read),
    and G."""

    values: Tensor
    scale: Tensor | None
    parts: int


def _check(rows: Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor, device: Device) -> None:
    if (0, 0) < device.capability < FP8_CAPABILITY:
        raise ValueError(
            f"the GPU is sm_{device.capability[0]}{device.capability[1]} and FP8 products need sm_89 or "
            "later; use precision 'bf16'"
        )
    rounded = E4M3 if rows.scale is not None else bias.dtype
    if weight.dtype != E4M3 or rows.values.dtype != rounded:
        raise ValueError(
            f"x is {rows.values.dtype} and weight {weight.dtype}; they must be {rounded} and {E4M3}"
        )
    columns, inputs = weight.shape
    sizes = rows.values.shape[1], weight_scale.shape[0], bias.shape[0]
    if sizes != (inputs, columns, columns) or inputs % rows.parts:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, its scale {tuple(weight_scale.shape)} and bias "
            f"{tuple(bias.shape)} for rows of {sizes[0]} in {rows.parts} parts; they must be [N, K], [N] and "
            "[N], and K a multiple of the parts"
        )
    for name, tensor in (("weight", weight), ("weight_scale", weight_scale), ("bias", bias)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} has stride {tensor.stride(-1)}; it must be contiguous")


def tile_of(
    rows: int, columns: int, device: Device, width: int, parted: bool, rounds: bool, gelu: bool
) -> Tile:
    """The tile for parts of `width` inputs. A second sum, that of a part, leaves registers for 128 columns,
    and so does sm_100 without a GELU, where 256 columns are stored in one piece and spill. Rows that are not
    rounded yet have two bytes."""
    one_piece = device.capability[0] == 10 and not gelu
    depth = max(32, min(DEPTH, triton.next_power_of_2(width)))
    tile = choose_tile(rows, columns, torch.float16, device)
    if tile.tail or ((parted or one_piece) and tile.columns > 128):
        tile = Tile(128, 128, 0, 64, 8, 3, 0.92)
    stage_bytes = (tile.rows * (2 if rounds else 1) + tile.columns) * depth
    return replace(tile, depth=depth, stages=max(1, min(tile.stages, device.shared_bytes // stage_bytes)))


def _multiply(
    rows: Rows,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    gelu: bool = False,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The product [M, N] with its epilogue, and with reach the scales [M, 1] of its e4m3 rows."""
    device = describe_device(weight.device)
    _check(rows, weight, weight_scale, bias, device)
    columns, inputs = weight.shape
    left = contiguous_rows(rows.values)
    count = left.shape[0]
    out = left.new_empty((count, columns), dtype=bias.dtype if reach is None else E4M3)
    out_scale = None if reach is None else left.new_empty((count, 1), dtype=torch.float32)
    if not out.numel():
        return out, out_scale
    rounds, width = rows.scale is None, inputs // rows.parts
    parted = rounds or rows.parts > 1
    readable = fits_descriptor(left) and fits_descriptor(weight)
    tile = tile_of(count, columns, device, width, parted, rounds, gelu)
    # a step may not reach into the next part
    tma = device.capability >= (9, 0) and readable and (not parted or width % tile.depth == 0)
    if rounds and width > tile.depth:
        raise ValueError(
            f"a head has {width} inputs; the product rounds heads of at most {DEPTH} as it reads them"
        )
    sources = (left, weight)
    if tma:
        blocks = ([size, tile.depth] for size in (tile.rows, tile.columns))
        sources = tuple(map(TensorDescriptor.from_tensor, sources, blocks))
    scale = None if rows.scale is None else rows.scale.reshape(count, rows.parts).contiguous()
    tiles = triton.cdiv(count, tile.rows) * triton.cdiv(columns, tile.columns)
    _linear_fp8_kernel[(tiles,)](
        sources[0], scale, sources[1], weight_scale, bias, reach, out, out_scale,
        left.stride(0), weight.stride(0), count, columns,
        K=inputs, PARTS=rows.parts, ROUNDS=rounds, GELU=gelu, TMA=tma,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=8,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, out_scale


def _rows(x: Tensor, row_scale: Tensor | None, parts: int) -> Rows:
    return Rows(x.reshape(-1, x.shape[-1]), row_scale, parts)


@torch.library.custom_op("rfengine::linear_fp8", mutates_args=())
def linear_fp8(x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """(x * row_scale) (weight * weight_scale)^T + bias, rounded once to the dtype of bias.

    x: e4m3 [..., K]; row_scale: float32 [..., G]; weight: e4m3 [N, K]; weight_scale: float32 [N]; bias:
    [N]. Returns [..., N], contiguous. Raises ValueError for other dtypes, shapes and GPUs without FP8.
    """
    rows = _rows(x, row_scale, row_scale.shape[-1])
    return _multiply(rows, weight, weight_scale, bias)[0].view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("rfengine::linear_gelu_fp8", mutates_args=())
def linear_gelu_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """GELU, in its tanh form, of linear_fp8, rounded once, after the GELU. Otherwise as linear_fp8."""
    rows = _rows(x, row_scale, row_scale.shape[-1])
    return _multiply(rows, weight, weight_scale, bias, gelu=True)[0].view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("rfengine::linear_gelu_rows_fp8", mutates_args=())
def linear_gelu_rows_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """linear_gelu_fp8 in e4m3: (values [..., N], scale [..., 1]), scale = row_scale * reach[0] + reach[1].

    row_scale: float32 [..., 1]; reach: float32 [2], in which nothing saturates
    (reference_fp8.product_reach).
    """
    values, scale = _multiply(_rows(x, row_scale, 1), weight, weight_scale, bias, True, reach)
    return values.view(*x.shape[:-1], weight.shape[0]), scale.view(*x.shape[:-1], 1)


@torch.library.custom_op("rfengine::linear_heads_fp8", mutates_args=())
def linear_heads_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, heads: int) -> Tensor:
    """linear_fp8 of x [..., K] in the dtype of bias, whose `heads` equal parts of a row are rounded as they
    are read, each with a scale of its own (row_fp8). Raises ValueError for parts of more than 128
    values."""
    rows = _rows(x, None, heads)
    return _multiply(rows, weight, weight_scale, bias)[0].view(*x.shape[:-1], weight.shape[0])


@linear_fp8.register_fake
@linear_gelu_fp8.register_fake
def _(x, row_scale, weight, weight_scale, bias):
    return bias.new_empty(*x.shape[:-1], weight.shape[0])


@linear_gelu_rows_fp8.register_fake
def _(x, row_scale, weight, weight_scale, bias, reach):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), row_scale.new_empty(*x.shape[:-1], 1)


@linear_heads_fp8.register_fake
def _(x, weight, weight_scale, bias, heads):
    return bias.new_empty(*x.shape[:-1], weight.shape[0])
