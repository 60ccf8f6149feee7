"""The last convolution of the VAE and the packing of its pixels to RGB bytes, in one kernel.

    rgb[t, h, w, n] = bias[n] + sum of W[n, c, i, j, k] * x[t + i, h + j - 1, w + k - 1, c] over i, j, k, c
    bytes: as frame_pack.py makes them of the float32 rgb, which is never stored

x [T + 2, H, W, C] normed and activated, weight [3, C, 3, 3, 3], bytes [T, H, W, 3].

A program goes down a band of rows, BLOCK_W pixels wide, and reads of each row of x the same pixels of all
frames that FRAMES frames of bytes need. A row of x belongs to three rows of bytes, whose sums stand in the
three slots of a ring, and a frame of x to three frames of bytes: so the rows of the product are (frame, slot,
channel), 54 of the 64 of a matrix instruction for six frames. The sums never move. The ring does: what its
slots are multiplied by depends on the row of x alone, so the weights are laid out once for each of the three
positions of the ring. A row of bytes that has all its taps is stored from its slot, which is then set to
zero. The shift along a row is in the loads.

Bound: memory, 2 C bytes read and 3 written a pixel, 1.1 GB for 96 channels of 12 frames at 832 x 480, 0.33 ms
at 3.35 TB/s. From L2 come 4.3 readings of x, three shifts of eight frames for six with the halo of the bands,
and 4 KB of weights with every 16 KB of x: 5.1 GB, 0.9 ms at 5.5 TB/s (computed, unmeasured). 0.31 TFLOP of
products, 0.31 ms, run beside it.
"""

# T frames, H rows, W columns of pixels, C channels. A group: the frames of bytes of one program

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rfengine.kernels.causal_conv3d import KERNELS, check_layout
from rfengine.kernels.convolution_tile import KILO, Form, choose_channels, choose_form
from rfengine.kernels.device import count_processors
from rfengine.kernels.frame_pack import round_to_byte

ROWS = 64  # of the product: those of the smallest matrix instruction of Hopper
LAID_OUT_CHANNELS = 128  # by one program


@triton.jit
def _lay_out_weights_kernel(
    weight, laid_out, stride_n, stride_k, stride_t, stride_h, stride_w,
    CHANNELS: tl.constexpr, KERNEL_T: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the rows of the product are multiplied by at one tap and position of the ring; 0 for no tap.

    laid_out: [KERNEL_H positions, FRAMES + KERNEL_T - 1 frames of x, KERNEL_W, ROWS, CHANNELS].
    """
    place = tl.program_id(0)
    k = place % KERNEL_W
    frame = place // KERNEL_W % (FRAMES + KERNEL_T - 1)
    position = place // KERNEL_W // (FRAMES + KERNEL_T - 1)
    row = tl.arange(0, ROWS)
    n, slot, i = row % 3, row // 3 % KERNEL_H, frame - row // (3 * KERNEL_H)
    j = (position + KERNEL_H - slot) % KERNEL_H
    taken = (i >= 0) & (i < KERNEL_T) & (row < 3 * KERNEL_H * FRAMES)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = (channel < CHANNELS)[None, :]
    at = weight + n * stride_n + i * stride_t + j * stride_h + k * stride_w
    values = tl.load(at[:, None] + channel[None, :] * stride_k, mask=taken[:, None] & known, other=0.0)
    to = laid_out + (place * ROWS + row) * CHANNELS
    tl.store(to[:, None] + channel[None, :], values, mask=known)


@triton.jit
def _conv_frame_pack_kernel(
    x, weight, x_stride_t, x_stride_h, x_stride_w, bias, packed, frames, height, width, band,
    CHANNELS: tl.constexpr, KERNEL_T: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DESCRIBED: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = (FRAMES + KERNEL_T - 1) * KERNEL_W
    groups = tl.cdiv(frames, FRAMES)
    first = tl.program_id(0) % groups * FRAMES
    place = tl.program_id(0) // groups
    across = tl.cdiv(width, BLOCK_W)
    left, top = place % across * BLOCK_W, place // across * band
    row = tl.arange(0, ROWS)
    n, slot, frame = row % 3, row // 3 % KERNEL_H, first + row // (3 * KERNEL_H)
    is_used = row < 3 * KERNEL_H * FRAMES
    pixel = tl.arange(0, BLOCK_W)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([ROWS, BLOCK_W], tl.float32)
    offset = tl.load(bias + n).to(tl.float32) if bias is not None else tl.zeros([ROWS], tl.float32)
    for line in range(tl.minimum(band, height - top) + KERNEL_H - 1):
        h = top + line - KERNEL_H // 2  # of x, which may lie outside the frame
        position = (top + line) % KERNEL_H
        for step in tl.range(TAPS * CHUNKS):
            tap, channel = step // CHUNKS, step % CHUNKS * BLOCK_K
            t, start = first + tap // KERNEL_W, left + tap % KERNEL_W - KERNEL_W // 2
            weight_row = (position * TAPS + tap) * ROWS
            if DESCRIBED:
                # past the last channel x is zero, so that what the weights have there does not count
                columns = x.load([t, h, start, channel]).reshape(BLOCK_W, BLOCK_K).T
                rows = weight.load([weight_row, channel])
            else:
                w, c = start + pixel, channel + k
                rows_of_x = tl.where(t < frames + KERNEL_T - 1, height, 0)  # none behind the last frame
                h_of = h + tl.zeros([BLOCK_W], tl.int32)
                inside = (h_of >= 0) & (h_of < rows_of_x) & (w >= 0) & (w < width)
                at = x + t.to(tl.int64) * x_stride_t + h_of.to(tl.int64) * x_stride_h + w * x_stride_w
                known = c < CHANNELS
                columns = tl.load(at[None, :] + c[:, None], mask=inside[None, :] & known[:, None], other=0.0)
                rows = tl.load(
                    weight + (weight_row + row)[:, None] * CHANNELS + c[None, :], mask=known[None, :],
                    other=0.0,
                )  # fmt: skip
            sums = tl.dot(rows, columns, sums, input_precision="ieee")
        done = top + line - (KERNEL_H - 1)  # the row of bytes that has all its taps
        is_done = slot == (done + KERNEL_H) % KERNEL_H
        rgb = tl.minimum(tl.maximum(sums + offset[:, None], -1.0), 1.0)
        to = packed + (frame.to(tl.int64) * height + done) * width * 3 + n
        is_stored = is_used & is_done & (frame < tl.where(done < top, 0, frames))
        mask = is_stored[:, None] & (left + pixel < width)[None, :]
        tl.store(to[:, None] + (left + pixel)[None, :] * 3, round_to_byte((rgb + 1.0) * 127.5), mask=mask)
        sums = tl.where(is_done[:, None], 0.0, sums)


@dataclass(frozen=True, slots=True)
class Band:
    """Frames of bytes, rows and columns of one program; channels of one step; stages of the loop."""

    frames: int
    height: int
    width: int
    channels: int
    stages: int

    def programs(self, frames: int, height: int, width: int) -> int:
        return (
            triton.cdiv(frames, self.frames)
            * triton.cdiv(height, self.height)
            * triton.cdiv(width, self.width)
        )


def choose_band(
    form: Form, item: int, size: tuple[int, int, int, int], kernel: tuple[int, int, int], processors: int
) -> Band:
    """The band whose launch asks least of L2, by count of waves and bytes; unmeasured on a GPU.

    item: bytes of an element. size: frames, height and width of the bytes, and channels.
    """
    frames, height, width, channels = size
    most = ROWS // (3 * kernel[1])
    together = triton.cdiv(frames, triton.cdiv(frames, most))  # as evenly as the groups can be
    block_k = choose_channels(channels, item, 128 if form == "descriptor" else 64)
    widths = (256, 128, 64) if form == "descriptor" else (128,) if item < 4 else (64,)
    bands = []
    for block_w in (each for each in widths if each == min(widths) or each // 2 < width):
        stages = max(2, min(6, 225 * KILO // ((ROWS + block_w) * block_k * item)))
        strips = triton.cdiv(frames, together) * triton.cdiv(width, block_w)
        for waves in range(1, 5):
            down = max(1, waves * processors // strips)
            bands.append(Band(together, triton.cdiv(height, down), block_w, block_k, stages))

    def cost(band: Band) -> int:
        waves = triton.cdiv(band.programs(frames, height, width), processors)
        return waves * (band.height + kernel[1] - 1) * (ROWS + band.width)

    return min(bands, key=cost)


def _check(x: Tensor, weight: Tensor) -> None:
    check_layout(x, weight)
    served = weight.ndim == 5 and weight.shape[:2] == (3, x.shape[3]) and tuple(weight.shape[2:]) in KERNELS
    if not served or x.shape[0] < weight.shape[2]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; give x [T + kt - 1, H, W, C] and a "
            f"weight [3, C, kt, kh, kw] of {', '.join('x'.join(map(str, kernel)) for kernel in KERNELS)} taps"
        )


def _allocate(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0] - weight.shape[2] + 1, *x.shape[1:3], 3), dtype=torch.uint8)


def _lay_out_weights(weight: Tensor, frames: int) -> Tensor:
    """The weights by position of the ring and tap, a matrix of ROWS rows for each."""
    channels, *kernel = weight.shape[1:]
    places = kernel[1] * (frames + kernel[0] - 1) * kernel[2]
    laid_out = weight.new_empty((places * ROWS, channels))
    _lay_out_weights_kernel[(places, triton.cdiv(channels, LAID_OUT_CHANNELS))](
        weight, laid_out, *weight.stride(), CHANNELS=channels,
        KERNEL_T=kernel[0], KERNEL_H=kernel[1], KERNEL_W=kernel[2],
        FRAMES=frames, ROWS=ROWS, BLOCK=LAID_OUT_CHANNELS,
    )  # fmt: skip
    return laid_out


@torch.library.custom_op("rfengine::conv_frame_pack", mutates_args=())
def _conv_frame_pack(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None) -> Tensor:
    packed, kernel = _allocate(x, weight), tuple(weight.shape[2:])
    frames, height, width, _ = packed.shape
    form = choose_form(x, weight, form)
    size = (frames, height, width, x.shape[3])
    band = choose_band(form, x.element_size(), size, kernel, count_processors(x.device))
    pixels, rows = x, _lay_out_weights(weight, band.frames)
    if form == "descriptor":
        box = [1, 1, band.width, band.channels]
        pixels = TensorDescriptor(x, list(x.shape), list(x.stride()), box)
        rows = TensorDescriptor.from_tensor(rows, [ROWS, band.channels])
    _conv_frame_pack_kernel[(band.programs(frames, height, width),)](
        pixels, rows, *x.stride()[:3], bias, packed, frames, height, width, band.height,
        CHANNELS=x.shape[3], KERNEL_T=kernel[0], KERNEL_H=kernel[1], KERNEL_W=kernel[2],
        DESCRIBED=form == "descriptor", FRAMES=band.frames, ROWS=ROWS,
        BLOCK_W=band.width, BLOCK_K=band.channels, num_warps=8, num_stages=band.stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return packed


@_conv_frame_pack.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None) -> Tensor:
    return _allocate(x, weight)


def conv_frame_pack(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None = None) -> Tensor:
    """frame_pack of causal_conv3d, whose float32 sum is not rounded in between: uint8 [T, H, W, 3].

    x: [T + kt - 1, H, W, C], contiguous channels (ValueError), normed and activated; weight: [3, C, kt, kh,
    kw] of the taps that causal_conv3d has (ValueError); bias: [3]. form: "descriptor" or "pointer", chosen
    when None.
    """
    _check(x, weight)
    return _conv_frame_pack(x, weight, bias, form)
