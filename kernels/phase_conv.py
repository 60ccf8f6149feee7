"""Nearest-2x upsampling and a 3x3 convolution as four 2x2 convolutions of the small frame, one for each
phase.

    out[t, 2i + a, 2j + b] = bias + sum over r, s of weight[a, b, :, :, r, s] @ x[t, i + a - 1 + r, j + b - 1
    + s]

x [T, H, W, Cin], out [T, 2H, 2W, Cout], zeros outside the frame; weights of reference.fold_upsample_weight.
One launch of the kernel of causal_conv3d.py for all phases, whose programs for one block of pixels run
together; each writes every other row and column of out. float32 sums, rounded once.

Bound: tensor cores, 8 Cin FLOPs an element of out in place of 18: 0.71 TFLOP instead of 1.59 for 192 -> 96
channels and 12 frames of 240 x 416, 0.71 ms at 989 TFLOP/s; and nothing is written at 2x but the result.
"""

# T frames, H rows, W columns of the small frame.

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.kernels.causal_conv3d import check_layout, launch


@torch.library.custom_op("rfengine::phase_conv", mutates_args=())
def _phase_conv(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None) -> Tensor:
    out = _allocate(x, weight)
    launch(x, weight, None, bias, out, form)
    return out


@_phase_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None) -> Tensor:
    return _allocate(x, weight)


def _allocate(x: Tensor, weight: Tensor) -> Tensor:
    frames, height, width, _ = x.shape
    return x.new_empty((frames, 2 * height, 2 * width, weight.shape[2]))


def phase_conv(x: Tensor, weight: Tensor, bias: Tensor | None, form: str | None = None) -> Tensor:
    """x [T, H, W, Cin], weight [2, 2, Cout, Cin, 2, 2] by phase, bias [Cout] -> [T, 2H, 2W, Cout].

    Strides of weight are free, fast in memory as [2, 2, Cout, 2, 2, Cin]; the channels of x must be
    contiguous (ValueError). form: "descriptor" or "pointer", chosen when None.
    """
    check_layout(x, weight)
    if weight.ndim != 6 or (*weight.shape[:2], *weight.shape[3:]) != (2, 2, x.shape[3], 2, 2):
        raise ValueError(
            f"weight is {tuple(weight.shape)} for x {tuple(x.shape)}; it must be [2, 2, Cout, Cin, 2, 2]"
        )
    return _phase_conv(x, weight, bias, form)
