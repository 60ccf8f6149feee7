"""Re-phasing: rotated = rotate(raw), every key of the window turned to its slot's present time index.

    (a, b) = raw[.., 2j : 2j + 2];  rotated[.., 2j : 2j + 2] = (a cos - b sin, a sin + b cos)

raw, rotated [L, B, S, H, E], rotation [2, S, E / 2] float32 shared by layers, batch and heads. All layers and
slots in one launch. Products and sums are single float32 operations (no fused multiply-add), rounded once:
the result is that of the reference bit for bit. Bound: memory, 4 bytes and 3 FLOPs for each 16-bit element.
"""

# L layers, B batch, S tokens, H heads, E head dim. A row is one head of one token: S * H rows for each (l, b)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import rows_per_program


@triton.jit
def rotate_pairs(x, cos, sin, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rotate the interleaved pairs of x [ROWS, WIDTH] float32 by cos, sin [ROWS, WIDTH / 2]."""
    first, second = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    rotated = tl.join(first * cos - second * sin, first * sin + second * cos)
    return tl.reshape(rotated, (ROWS, WIDTH))


@triton.jit
def load_rotation(rotation, token, valid, num_tokens, E: tl.constexpr, WIDTH: tl.constexpr):
    """Cosines and sines [ROWS, WIDTH / 2] of rotation [2, num_tokens, E / 2] for token [ROWS, 1]."""
    pair = tl.arange(0, WIDTH // 2)[None, :]
    at = rotation + token * (E // 2) + pair
    mask = valid & (pair < E // 2)
    cos = tl.load(at, mask=mask, other=0.0)
    sin = tl.load(at + num_tokens.to(tl.int64) * (E // 2), mask=mask, other=0.0)
    return cos, sin


@triton.jit(do_not_specialize=["num_tokens"])
def _rephase_keys_kernel(
    raw, rotated, rotation,
    raw_l, raw_b, raw_s, raw_h,
    rotated_l, rotated_b, rotated_s, rotated_h,
    batch, num_tokens,
    H: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    layer, b = (tl.program_id(1) // batch).to(tl.int64), (tl.program_id(1) % batch).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // H, row % H
    column = tl.arange(0, WIDTH)[None, :]
    valid = token < num_tokens
    mask = valid & (column < E)
    source = raw + layer * raw_l + b * raw_b + token * raw_s + head * raw_h + column
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    cos, sin = load_rotation(rotation, token, valid, num_tokens, E, WIDTH)
    target = rotated + layer * rotated_l + b * rotated_b + token * rotated_s + head * rotated_h + column
    tl.store(target, rotate_pairs(x, cos, sin, ROWS, WIDTH).to(rotated.dtype.element_ty), mask=mask)


def check_layout(**tensors: Tensor | None) -> None:
    """ValueError unless the last axis of every tensor is contiguous: the kernels load 16 bytes along it."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(
                f"the last axis of {name} has stride {tensor.stride(-1)}; it must be 1, "
                "pass a contiguous tensor"
            )


def check_rotation(rotation: Tensor) -> None:
    if rotation.dtype != torch.float32 or not rotation.is_contiguous():
        raise ValueError(
            f"rotation is {rotation.dtype} with strides {rotation.stride()}; "
            "it must be float32 and contiguous, as rotary_table gives it"
        )


@torch.library.custom_op("rfengine::rephase_keys", mutates_args=["rotated"])
def rephase_keys(raw: Tensor, rotated: Tensor, rotation: Tensor) -> None:
    """Give every key the rotation of its new time index: rotated = rotate(raw), for all layers at once.

    raw: [L, B, S, H, E]; rotated: the same, overwritten; rotation: [2, S, E / 2], float32. The last axis of
    every tensor must be contiguous (ValueError); the other strides are free.
    """
    check_layout(raw=raw, rotated=rotated)
    check_rotation(rotation)
    layers, batch, tokens, heads, head_dim = raw.shape
    width = triton.next_power_of_2(head_dim)
    rows = rows_per_program(width)
    grid = (triton.cdiv(tokens * heads, rows), layers * batch)
    _rephase_keys_kernel[grid](
        raw, rotated, rotation, *raw.stride()[:4], *rotated.stride()[:4], batch, tokens,
        H=heads, E=head_dim, ROWS=rows, WIDTH=width, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
