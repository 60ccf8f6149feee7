"""One tile of a convolution as a matrix product without im2col: what the convolutions of the VAE share.

    sums[n, p] = sum over taps (dt, dh, dw) and channels c of W[n, tap, c] * x[t + dt, h_p + dh, w_p + dw, c]

Channels out are the rows of the product and the pixels of a block of BLOCK_H x BLOCK_W its columns, so that
the widest matrix instruction (64 x 256) runs along the pixels and 96 or 192 channels need no power of two
there. The halo is read once for every tap: from L2, where neighbouring tiles meet. Zero padding is a load
outside the frame.

Forms: `descriptor` copies [1, BLOCK_H, BLOCK_W, BLOCK_K] boxes of x by TMA, which fills what lies outside the
frame with zeros, and needs Hopper or later, 16 or 8 bits, starts and strides of 16 bytes and weights in
memory as [Cout, kt, kh, kw, Cin]; `pointer` loads through masks, on any GPU, with any strides, in any dtype.
"""

# T frames, H rows, W columns, C or K channels in, N channels out. A row of the product is a channel out.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rfengine.kernels.device import capability_of, count_processors, fits_descriptor

Form = Literal["descriptor", "pointer"]
KILO = 1024


@triton.jit
def place_of_program(parts, frames, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(part, frame, top, left): the parts of one block run together, then the frames of one block, whose
    halos in time overlap; so x comes from device memory about once."""
    rest = tl.program_id(0) // parts
    block = rest // frames
    across = tl.cdiv(width, BLOCK_W)
    return tl.program_id(0) % parts, rest % frames, block // across * BLOCK_H, block % across * BLOCK_W


@triton.jit
def accumulate(
    x, weight, tail_weight,
    frame, top, left, first, phase,
    height, width, channels_out,
    x_stride_t, x_stride_h, x_stride_w,
    weight_stride_a, weight_stride_b, weight_stride_n, weight_stride_k,
    weight_stride_t, weight_stride_h, weight_stride_w,
    DESCRIBED: tl.constexpr, CHANNELS: tl.constexpr,
    KERNEL_T: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 sums [ROWS, pixels] and, where TAIL, those of the TAIL rows that follow, from the same pixels.

    top, left: of the pixels of the first tap, and may lie outside the frame. first: the first channel out.
    """
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros([ROWS, PIXELS], tl.float32)
    tail_sums = tl.zeros([TAIL if TAIL else 16, PIXELS], tl.float32)
    if not DESCRIBED:
        pixel = tl.arange(0, PIXELS)
        k = tl.arange(0, BLOCK_K)
        n = first + tl.arange(0, ROWS)
        weight += phase // 2 * weight_stride_a + phase % 2 * weight_stride_b
        n_tail = first + ROWS + tl.arange(0, TAIL if TAIL else 16)
    for step in tl.range(KERNEL_T * KERNEL_H * KERNEL_W * CHUNKS):
        tap = step // CHUNKS
        channel = step % CHUNKS * BLOCK_K
        dt = tap // (KERNEL_H * KERNEL_W)
        dh = tap // KERNEL_W % KERNEL_H
        dw = tap % KERNEL_W
        if DESCRIBED:
            # past the last channel x is zero, so that what the weights have there does not count
            box = x.load([frame + dt, top + dh, left + dw, channel])
            columns = box.reshape(PIXELS, BLOCK_K).T
            row, start = phase * channels_out + first, tap * CHANNELS + channel
            sums = tl.dot(weight.load([row, start]), columns, sums, input_precision="ieee")
            if TAIL:
                tail = tail_weight.load([row + ROWS, start])
                tail_sums = tl.dot(tail, columns, tail_sums, input_precision="ieee")
        else:
            h, w = top + dh + pixel // BLOCK_W, left + dw + pixel % BLOCK_W
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            at = (frame + dt).to(tl.int64) * x_stride_t + h.to(tl.int64) * x_stride_h + w * x_stride_w
            c = channel + k
            columns = tl.load(
                x + at[None, :] + c[:, None], mask=inside[None, :] & (c < CHANNELS)[:, None], other=0.0
            )
            tap_start = weight + (dt * weight_stride_t + dh * weight_stride_h + dw * weight_stride_w)
            taps = tap_start + c[None, :] * weight_stride_k
            known = (c < CHANNELS)[None, :]
            rows = tl.load(
                taps + n[:, None] * weight_stride_n, mask=(n < channels_out)[:, None] & known, other=0.0
            )
            sums = tl.dot(rows, columns, sums, input_precision="ieee")
            if TAIL:
                rows = tl.load(
                    taps + n_tail[:, None] * weight_stride_n,
                    mask=(n_tail < channels_out)[:, None] & known, other=0.0,
                )  # fmt: skip
                tail_sums = tl.dot(rows, columns, tail_sums, input_precision="ieee")
    return sums, tail_sums


@triton.jit
def finish(sums, n, channels_out, scale, bias):
    """sums * scale + bias, both by row and both optional."""
    if scale is not None:
        sums *= tl.load(scale + n, mask=n < channels_out, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        sums += tl.load(bias + n, mask=n < channels_out, other=0.0).to(tl.float32)[:, None]
    return sums


@dataclass(frozen=True, slots=True)
class ConvolutionSize:
    """Pixels of the input, channels in and out, and phases of the output, 1 or 4."""

    frames: int
    height: int
    width: int
    channels: int
    channels_out: int
    phases: int = 1


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of one program and how they are cut in two powers of two; its block of pixels; its launch."""

    form: Form
    rows: int
    tail: int
    height: int
    width: int
    channels: int  # of one step
    warps: int
    stages: int

    @property
    def parameters(self) -> dict[str, int | bool]:
        return {
            "DESCRIBED": self.form == "descriptor", "ROWS": self.rows, "TAIL": self.tail,
            "BLOCK_H": self.height, "BLOCK_W": self.width, "BLOCK_K": self.channels,
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip

    def programs(self, size: ConvolutionSize) -> int:
        """Blocks that overhang the frame count whole."""
        blocks = triton.cdiv(size.height, self.height) * triton.cdiv(size.width, self.width)
        return size.phases * triton.cdiv(size.channels_out, self.rows + self.tail) * size.frames * blocks


def choose_form(x: Tensor, weight: Tensor, form: str | None) -> Form:
    """The form asked for, or that of the device, dtype and layout; weight as in `operands`. ValueError for an
    unknown form and for one that cannot read these tensors."""
    if form not in (None, *get_args(Form)):
        raise ValueError(f"form is {form!r}; it must be one of {get_args(Form)}, or None to choose")
    readable = fits_box(x, weight)
    if form == "descriptor" and not readable:
        raise ValueError(
            f"x has strides {x.stride()} and weight {weight.stride()}; the descriptor form needs 16-byte "
            "strides and starts, and weights in memory as [Cout, kt, kh, kw, Cin]"
        )
    # sm_120 has neither the shared memory nor the matrix instructions these tiles are made for; the
    # interpreter, which has no capability, is far faster in this form
    capability = capability_of(x.device)
    modern = capability is None or (capability in ((9, 0), (10, 0), (10, 3)) and x.dtype != torch.float32)
    return form or ("descriptor" if readable and modern else "pointer")


def fits_box(x: Tensor, weight: Tensor) -> bool:
    """Whether TMA can read both: boxes of x, and the weight as a matrix whose rows are channels out."""
    matrix = weight.movedim(3 if weight.ndim == 6 else 1, -1)
    rows_aligned = x.shape[3] * x.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    return fits_descriptor(x) and matrix.is_contiguous() and rows_aligned


def split_rows(channels_out: int, form: Form) -> list[tuple[int, int]]:
    """The ways to cut channels into rows + tail, powers of two, that pad least; the widest comes first.

    The smallest matrix instruction of Hopper has 64 rows. So 96 becomes 128 there: with the pixels as rows,
    96 would be 64 + 32 columns, but instructions of 64 x 64 and 64 x 32 ask shared memory for 128 and 192
    bytes a cycle where it has 128, one of 64 x 256 for 80 (computed), and Triton then holds the pixels in
    registers.
    """
    cuts = [(128, 64), (128, 0), (64, 32), (64, 0), (32, 0), (16, 0)]
    if form == "descriptor":
        cuts = [(128, 64), (128, 0), (64, 0)]
    padded = {cut: triton.cdiv(channels_out, sum(cut)) * sum(cut) for cut in cuts}
    return [cut for cut in cuts if padded[cut] == min(padded.values())]


def choose_channels(channels: int, item: int, widest: int) -> int:
    """Channels of one step: of the powers of two of 32 to `widest` bytes what pads least, then the widest."""
    sizes = [size for size in (128, 64, 32, 16) if 32 <= size * item <= widest]
    return min(sizes, key=lambda size: (triton.cdiv(channels, size) * size, -size))


def plan(x: Tensor, weight: Tensor, frames: int, form: str | None) -> tuple[Tile, int]:
    """Tile and number of programs of the convolution of x by weight (as in `operands`) to `frames` frames."""
    phases, channels_out = (4, weight.shape[2]) if weight.ndim == 6 else (1, weight.shape[0])
    size = ConvolutionSize(frames, *x.shape[1:], channels_out, phases)
    tile = fit_tile(choose_form(x, weight, form), x.element_size(), size, count_processors(x.device))
    return tile, tile.programs(size)


def fit_tile(form: Form, item: int, size: ConvolutionSize, processors: int) -> Tile:
    """The tile whose launch takes the fewest cycles; unmeasured on a GPU. item: bytes of an element.

    descriptor: the cycles of a step of 16 channels are those of the matrix unit, rows * pixels / 128, or
    those of L2, 32 bytes a cycle for rows + pixels (computed from the data sheet of an H100); times the
    waves. 8 warps are two groups of 64 rows, 192 x 256 sums are 192 registers a thread. As many stages as
    shared memory holds.
    """
    if form == "pointer":
        return _pointer_tile(item, size)
    block_k = choose_channels(size.channels, item, 128)

    def cost(tile: Tile) -> tuple[int, int]:
        rows, pixels = tile.rows + tile.tail, tile.height * tile.width
        cycles = max(rows * pixels // 128, rows + pixels)
        # equal costs: blocks twice as wide as high, whose rows are long and whose halo is small
        return triton.cdiv(tile.programs(size), processors) * cycles, abs(tile.width - 2 * tile.height)

    def tile_of(cut: tuple[int, int], block_h: int, block_w: int) -> Tile:
        step_bytes = (sum(cut) + block_h * block_w) * block_k * item
        stages = max(2, min(6, 225 * KILO // step_bytes))
        return Tile(form, *cut, block_h, block_w, block_k, warps=8, stages=stages)

    blocks = [(pixels // across, across) for pixels in (256, 128) for across in (8, 16, 32, 64)]
    cuts = split_rows(size.channels_out, form)
    return min((tile_of(cut, *block) for cut in cuts for block in blocks), key=cost)


def _pointer_tile(item: int, size: ConvolutionSize) -> Tile:
    """128 pixels and 8 warps: 96 sums a thread for 192 rows, two stages of 20 KB in 16 bits, which any GPU
    has. In float32, which has no matrix instructions of full precision, at most 64 rows: nothing spills."""
    cuts = split_rows(size.channels_out, "pointer")
    if item == 4:
        cuts = [cut for cut in cuts if sum(cut) <= 64] or [(64, 0)]
    across = min(16, triton.next_power_of_2(size.width))
    channels = choose_channels(size.channels, item, 64 if item < 4 else 128)
    return Tile("pointer", *cuts[0], 128 // across, across, channels, warps=8, stages=3 if item < 4 else 2)


def operands(x: Tensor, weight: Tensor, tile: Tile) -> tuple[TensorDescriptor | Tensor | int | None, ...]:
    """The arguments of `accumulate` that name the tensors, in two runs: x, weight, tail; then their strides.

    weight: [N, C, kt, kh, kw], or [2, 2, N, C, kh, kw] by phase.
    """
    by_phase = weight.ndim == 6
    a, b = weight.stride()[:2] if by_phase else (0, 0)
    n, k, *taps = weight.stride()[2:] if by_phase else weight.stride()
    taps = [0, *taps] if by_phase else taps
    strides = (*x.stride()[:3], a, b, n, k, *taps)
    if tile.form == "pointer":
        return (x, weight, None, *strides)
    rows = weight.shape[:3].numel() if by_phase else weight.shape[0]
    matrix = [rows, weight.numel() // rows]
    box = [1, tile.height, tile.width, tile.channels]
    described = TensorDescriptor(x, list(x.shape), list(x.stride()), box)
    first, tail = (
        TensorDescriptor(weight, matrix, [matrix[1], 1], [height, tile.channels]) if height else None
        for height in (tile.rows, tile.tail)
    )
    return (described, first, tail, *strides)
