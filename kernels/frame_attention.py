"""Attention of the VAE's middle block inside each frame: softmax(q k^T / sqrt(C)) v, one head of up to 512.

Online softmax in base 2, with c = log2(e) / sqrt(C); every tile of keys does
    s = q k^T;  m' = max(m, c max(s));  p = 2^(c s - m');  l = 2^(m - m') l + sum(p);
    acc = 2^(m - m') acc + p v;         at the end out = acc / l.
q, k, v [T, N, C], views of one [T, N, 3C]; out [T, N, C]. C is cut into HEAD + TAIL, powers of two (384 is
256 + 128), so that no quarter of a product is wasted; both products are sums of two.

Bound: tensor cores, 4 T N^2 C FLOPs: 0.18 TFLOP for 3 frames of 6,240 positions and C = 384, 0.18 ms at 989
TFLOP/s, against 57 MB in and out. Rounding: logits, softmax and sums are float32, p is rounded to the dtype
of v before the second product. Forms as in convolution_tile.py: `descriptor` (TMA, Hopper and later) and
`pointer`.
"""

# T frames, N positions of a frame, C channels.

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rfengine.kernels.convolution_tile import Form
from rfengine.kernels.device import capability_of, fits_descriptor

LOG2_E = 1.4426950408889634
LARGEST_HEAD = 512


@triton.jit
def _frame_attention_kernel(
    q, k, v, q_tail, k_tail, v_tail, out,
    q_stride_t, q_stride_n, k_stride_t, k_stride_n, v_stride_t, v_stride_n, out_stride_t, out_stride_n,
    positions, scale,
    DESCRIBED: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one frame. Without a TAIL its tensors are not used."""
    frame, row = tl.program_id(1), tl.program_id(0) * BLOCK_M
    if DESCRIBED:
        queries = q.load([frame, row, 0]).reshape(BLOCK_M, HEAD)
        if TAIL:
            tail_queries = q_tail.load([frame, row, HEAD]).reshape(BLOCK_M, TAIL)
    else:
        wide = frame.to(tl.int64)
        q, k, v = q + wide * q_stride_t, k + wide * k_stride_t, v + wide * v_stride_t
        queries = _rows(q, q_stride_n, row, positions, 0, CHANNELS, BLOCK_M, HEAD)
        if TAIL:
            tail_queries = _rows(q, q_stride_n, row, positions, HEAD, CHANNELS, BLOCK_M, TAIL)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, HEAD], tl.float32)
    tail_sums = tl.zeros([BLOCK_M, TAIL if TAIL else 16], tl.float32)
    for start in tl.range(0, positions, BLOCK_N):
        if DESCRIBED:
            keys = k.load([frame, start, 0]).reshape(BLOCK_N, HEAD)
        else:
            keys = _rows(k, k_stride_n, start, positions, 0, CHANNELS, BLOCK_N, HEAD)
        logits = tl.dot(queries, keys.T, input_precision="ieee")
        if TAIL:
            if DESCRIBED:
                tail_keys = k_tail.load([frame, start, HEAD]).reshape(BLOCK_N, TAIL)
            else:
                tail_keys = _rows(k, k_stride_n, start, positions, HEAD, CHANNELS, BLOCK_N, TAIL)
            logits = tl.dot(tail_queries, tail_keys.T, logits, input_precision="ieee")
        # the first tile has a key, so the maximum is finite from then on
        logits = tl.where(start + tl.arange(0, BLOCK_N)[None, :] < positions, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 1)
        maximum = new_maximum
        if DESCRIBED:
            values = v.load([frame, start, 0]).reshape(BLOCK_N, HEAD)
        else:
            values = _rows(v, v_stride_n, start, positions, 0, CHANNELS, BLOCK_N, HEAD)
        weights = weights.to(values.dtype)
        sums = tl.dot(weights, values, sums * decay[:, None], input_precision="ieee")
        if TAIL:
            if DESCRIBED:
                tail_values = v_tail.load([frame, start, HEAD]).reshape(BLOCK_N, TAIL)
            else:
                tail_values = _rows(v, v_stride_n, start, positions, HEAD, CHANNELS, BLOCK_N, TAIL)
            tail_sums = tl.dot(weights, tail_values, tail_sums * decay[:, None], input_precision="ieee")

    out += frame.to(tl.int64) * out_stride_t
    # the tail first: in the other order Triton 3.6 keeps more alive than there are registers
    if TAIL:
        tail_sums = tail_sums / total[:, None]
        _store_rows(out, out_stride_n, row, positions, HEAD, CHANNELS, tail_sums, BLOCK_M, TAIL)
    _store_rows(out, out_stride_n, row, positions, 0, CHANNELS, sums / total[:, None], BLOCK_M, HEAD)


@triton.jit
def _place(start, stride, row, rows, first, CHANNELS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of COUNT rows from `row` on and WIDTH channels from `first` on, and which of them exist."""
    n = row + tl.arange(0, COUNT)
    c = first + tl.arange(0, WIDTH)
    return start + n.to(tl.int64)[:, None] * stride + c[None, :], (n < rows)[:, None] & (c < CHANNELS)[
        None, :
    ]


@triton.jit
def _rows(start, stride, row, rows, first, CHANNELS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = _place(start, stride, row, rows, first, CHANNELS, COUNT, WIDTH)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store_rows(
    start, stride, row, rows, first, CHANNELS: tl.constexpr, values, COUNT: tl.constexpr, WIDTH: tl.constexpr
):
    at, inside = _place(start, stride, row, rows, first, CHANNELS, COUNT, WIDTH)
    tl.store(at, values.to(start.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Launch:
    block_m: int
    block_n: int
    warps: int
    stages: int


def split_channels(channels: int) -> tuple[int, int]:
    """HEAD, the largest power of two in `channels`, and TAIL, the power of two that holds the rest, or 0."""
    head = 1 << (channels.bit_length() - 1)
    rest = channels - head
    return head, max(triton.next_power_of_2(rest), 16) if rest else 0


def choose_launch(form: Form, dtype: torch.dtype, channels: int) -> Launch:
    """Tiles and launch; unmeasured on a GPU.

    descriptor: 128 rows of two warp groups, 192 sums a thread at 384 channels, 64 rows above that; 32 keys,
    so that q (96 KB) and two stages of keys and values (48 KB each) fit. pointer: half of the rows, one stage
    of keys and values, for the 99 KB of small GPUs; in float32 16 rows.
    """
    if dtype == torch.float32:
        return Launch(16, 16, 8, 1)
    if form == "pointer":
        return Launch(32 if channels > 256 else 64, 32, 4, 1)
    return Launch(128 if channels <= 384 else 64, 32, 8, 2)


def choose_form(q: Tensor, k: Tensor, v: Tensor, form: str | None) -> Form:
    if form not in (None, *get_args(Form)):
        raise ValueError(f"form is {form!r}; it must be one of {get_args(Form)}, or None to choose")
    readable = all(map(fits_descriptor, (q, k, v)))
    if form == "descriptor" and not readable:
        raise ValueError(
            "the descriptor form needs q, k and v with 16-byte starts and strides: call contiguous()"
        )
    modern = capability_of(q.device) in (None, (9, 0), (10, 0), (10, 3)) and q.dtype != torch.float32
    return form or ("descriptor" if readable and modern else "pointer")


@torch.library.custom_op("rfengine::frame_attention", mutates_args=())
def _frame_attention(q: Tensor, k: Tensor, v: Tensor, form: str | None) -> Tensor:
    frames, positions, channels = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    chosen = choose_form(q, k, v, form)
    head, tail = split_channels(channels)
    launch = choose_launch(chosen, q.dtype, channels)
    operands = [q, k, v, None, None, None]
    if chosen == "descriptor":
        blocks = (launch.block_m, launch.block_n, launch.block_n)
        operands = [
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, block, width])
            if width
            else None
            for width in (head, tail)
            for tensor, block in zip((q, k, v), blocks, strict=True)
        ]
    strides = [stride for tensor in (q, k, v, out) for stride in tensor.stride()[:2]]
    _frame_attention_kernel[(triton.cdiv(positions, launch.block_m), frames)](
        *operands, out, *strides, positions, channels**-0.5 * LOG2_E,
        DESCRIBED=chosen == "descriptor", CHANNELS=channels, HEAD=head, TAIL=tail,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


@_frame_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, form: str | None) -> Tensor:
    return q.new_empty(q.shape)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, form: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v inside each frame, one head; q, k, v [T, N, C] -> [T, N, C] contiguous.

    C is a multiple of 16 up to 512, contiguous (ValueError); the other strides are free. form: "descriptor"
    or "pointer", chosen when None.
    """
    channels = q.shape[-1]
    if channels % 16 or not 16 <= channels <= LARGEST_HEAD:
        raise ValueError(
            f"q has {channels} channels; they must be a multiple of 16 of at most {LARGEST_HEAD}"
        )
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q is {q.dtype}; the kernel serves bfloat16, float16 and float32: cast it")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; q, k and v "
                f"must be {q.dtype} {tuple(q.shape)} with contiguous channels"
            )
    return _frame_attention(q, k, v, form)
