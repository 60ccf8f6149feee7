"""Layers of StreamingDecoder on channels-last frames [T, H, W, C], and the context of one call.

The layer before a temporal convolution writes into the convolution's halo buffer [T + 2, H, W, C], which
begins with the two frames before the chunk: nothing is padded, concatenated or copied to another layout. A
sum (of a convolution, its bias and the residual) is left to the op that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfengine.models.vae import NORM_FLOOR, CausalConv, ChannelNorm, FrameAttention, ResidualBlock, Upsample
from rfengine.ops import Ops
from rfengine.ops.reference import LARGEST_E4M3, channel_fp8, fold_upsample_weight

HISTORY = CausalConv.slot_frames


@dataclass(slots=True)
class Pending:
    """The activation x + bias + residual, [T, H, W, C], whose sum the next op forms."""

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def taken(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, bias and residual, once: whoever still has this keeps none of them in memory."""
        terms = self.x, self.bias, self.residual
        del self.x, self.residual
        return terms

    def total(self, out: Tensor | None = None) -> Tensor:
        """The sum, in `out` or else in x, once."""
        x, bias, residual = self.taken()
        if bias is not None:
            x = x.add_(bias)
        if residual is not None:
            return torch.add(x, residual, out=x if out is None else out)
        return x if out is None else out.copy_(x)

    def frames(self, start: int, stop: int | None = None) -> Pending:
        """Some of the frames, as views."""
        residual = None if self.residual is None else self.residual[start:stop]
        return Pending(self.x[start:stop], self.bias, residual)


@dataclass(frozen=True, slots=True)
class Convolution:
    """Weights of a temporal convolution, channels last; its slot; `rate`: frames per latent at its input.

    `of` gives the module's own weight that layout too: there is one copy of it, whichever decoder runs.
    Where the weight is float8_e4m3fn, so is its halo, in units of `unit`, and the sums are multiplied by
    `scale` [Cout]. A slot holds the frames themselves, whatever the unit.
    """

    slot: str
    weight: Tensor
    bias: Tensor
    rate: int
    unit: float = 1.0
    scale: Tensor | None = None

    @classmethod
    def of(cls, module: CausalConv, rate: int) -> Convolution:
        with torch.inference_mode(False):  # the module may be trained later
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last_3d)
            module.weight.data = weight
        return cls(module.slot, weight, module.bias.detach(), rate)

    @classmethod
    def fp8_of(cls, module: CausalConv, rate: int, gamma: Tensor) -> Convolution:
        """The same in e4m3, for an input from the norm of `gamma` and a SiLU."""
        values, scale = channel_fp8(module.weight.detach())
        unit = activation_unit(gamma)
        weight = values.contiguous(memory_format=torch.channels_last_3d)
        return cls(module.slot, weight, module.bias.detach(), rate, unit, scale * unit)


def activation_unit(gamma: Tensor) -> float:
    """The e4m3 unit for the output of the norm of `gamma` [C] and a SiLU, in which nothing saturates.

    A channel over the L2 norm is at most 1, so its norm is at most sqrt(C) * max |gamma| and its SiLU is no
    larger. e4m3 is a floating-point format, so unused range costs no precision, only the smallest values. A
    power of two, so that its product with e4m3 values is exact in 16 bits (in float16 from 2^-15 on) and a
    slot returns the values that were kept. 1 on the meta device, which has no values.
    """
    if gamma.is_meta:
        return 1.0
    bound = gamma.numel() ** 0.5 * gamma.abs().max().item()
    return 2.0 ** math.ceil(math.log2(bound / LARGEST_E4M3)) if bound > 0 else 1.0


@dataclass(frozen=True, slots=True)
class DecoderCall:
    """One call: the ops, the slots of the stream, the buffers of the decoder, the number of latents.

    fresh: the stream has seen no latent. On cuDNN, where a bias is a separate pass, the next op adds it.
    """

    ops: Ops
    slots: dict[str, Tensor]
    halos: dict[tuple[int | torch.dtype, ...], Tensor]
    latent_frames: int
    fresh: bool

    def halo(self, convolution: Convolution, x: Tensor) -> Tensor:
        """The input buffer of a convolution for frames like x: its past in front, the rest to be filled."""
        frames, *size = x.shape
        dtype = convolution.weight.dtype
        key = (self.latent_frames, *size, dtype)
        if key not in self.halos:
            # for the frames of a later call: a video's first call has fewer from as many latents
            shape = (self.latent_frames * convolution.rate + HISTORY, *size)
            with torch.inference_mode(False):
                self.halos[key] = torch.zeros(shape, dtype=dtype, device=x.device)
        halo = self.halos[key][: frames + HISTORY]
        past = _slot_frames(self.slots[convolution.slot])
        halo[:HISTORY].copy_(past if convolution.scale is None else past / convolution.unit)
        return halo

    def keep(self, convolution: Convolution, halo: Tensor) -> None:
        """The last two frames of a filled halo go into the slot."""
        kept = _slot_frames(self.slots[convolution.slot]).copy_(halo[-HISTORY:])
        if convolution.scale is not None:
            kept.mul_(convolution.unit)

    def convolve(self, convolution: Convolution, halo: Tensor) -> Pending:
        """The convolution of a filled halo, whose last frames are kept."""
        self.keep(convolution, halo)
        weight, bias, scale = convolution.weight, convolution.bias, convolution.scale
        if scale is not None:
            out = bias.new_empty(halo.shape[0] - HISTORY, *halo.shape[1:3], weight.shape[0])
            return Pending(self.ops.causal_conv3d_fp8(halo, weight, scale, bias, out))
        now, later = bias_by(self.ops.backend_of("causal_conv3d", halo, weight), bias)
        return Pending(self.ops.causal_conv3d(halo, weight, now), later)

    def norm_silu(self, pending: Pending, gamma: Tensor, convolution: Convolution) -> tuple[Tensor, Tensor]:
        """The sum that `pending` stands for, and the halo of `convolution` with its norm and SiLU."""
        halo = self.halo(convolution, pending.x)
        return self.ops.channel_norm_silu(*pending.taken(), gamma, halo[HISTORY:], convolution.unit), halo


Layer = Callable[[Pending, DecoderCall], Pending]


class Residual:
    """norm, SiLU, convolution, norm, SiLU, convolution, plus the input or a projection of it.

    fp8: convolutions with as many output as input channels multiply in e4m3.
    """

    def __init__(self, block: ResidualBlock, rate: int, fp8: bool = False) -> None:
        self.gammas = gamma_of(block.residual["0"]), gamma_of(block.residual["3"])
        self.first, self.second = (
            Convolution.fp8_of(module, rate, gamma)
            if fp8 and module.in_channels == module.out_channels
            else Convolution.of(module, rate)
            for module, gamma in zip((block.residual["2"], block.residual["6"]), self.gammas, strict=True)
        )
        self.shortcut = matrix_of(block.shortcut) if isinstance(block.shortcut, nn.Conv3d) else None

    def __call__(self, pending: Pending, call: DecoderCall) -> Pending:
        total, halo = call.norm_silu(pending, self.gammas[0], self.first)
        hidden = call.convolve(self.first, halo)
        residual = total if self.shortcut is None else F.linear(total, *self.shortcut)
        halo = call.norm_silu(hidden, self.gammas[1], self.second)[1]  # and what it came of goes
        pending = call.convolve(self.second, halo)
        pending.residual = residual
        return pending


class Attention:
    """Attention inside each frame; its input is the residual."""

    def __init__(self, block: FrameAttention) -> None:
        self.gamma = gamma_of(block.norm)
        self.to_qkv, self.proj = matrix_of(block.to_qkv), matrix_of(block.proj)

    def __call__(self, pending: Pending, call: DecoderCall) -> Pending:
        total = pending.total()
        _, height, width, channels = total.shape
        normed = F.rms_norm(total, (channels,), self.gamma, NORM_FLOOR**2 / channels)
        query, key, value = F.linear(normed.flatten(1, 2), *self.to_qkv).chunk(3, dim=-1)
        attended = F.linear(call.ops.frame_attention(query, key, value), *self.proj)
        return Pending(attended.unflatten(1, (height, width)), residual=total)


class TimeDoubling:
    """Two frames for each, except the first of a video, which passes and is in no later frame's history.

    The first half of the weight makes even frames, the second odd ones; each half writes its own.
    """

    def __init__(self, convolution: Convolution) -> None:
        self.convolution = convolution
        self.halves = tuple(zip(convolution.weight.chunk(2), convolution.bias.chunk(2), strict=True))

    def __call__(self, pending: Pending, call: DecoderCall) -> Pending:
        passing = 1 if call.fresh else 0
        frames, *size = pending.x.shape
        doubling = frames - passing
        if not doubling:
            return pending
        doubled = pending.x.new_empty(passing + 2 * doubling, *size)
        halo = call.halo(self.convolution, pending.x[passing:])
        if passing:
            pending.frames(0, passing).total(doubled[:passing])
        pending.frames(passing).total(halo[HISTORY:])
        call.keep(self.convolution, halo)
        pairs = doubled[passing:].unflatten(0, (doubling, 2))
        for place, (weight, bias) in enumerate(self.halves):
            call.ops.causal_conv3d(halo, weight, bias, pairs[:, place])
        return Pending(doubled)


class SizeDoubling:
    """Nearest-2x and the 3 x 3 convolution after it, as 2 x 2 phases."""

    def __init__(self, block: Upsample) -> None:
        convolution = block.resample[1]
        self.weight = fold_upsample_weight(convolution.weight.detach())
        self.bias = convolution.bias.detach()

    def __call__(self, pending: Pending, call: DecoderCall) -> Pending:
        total = pending.total()
        now, later = bias_by(call.ops.backend_of("phase_conv", total, self.weight), self.bias)
        return Pending(call.ops.phase_conv(total, self.weight, now), later)


def bias_by(backend: str, bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The bias for the convolution itself and the bias for the next op; one of them is None."""
    return (None, bias) if backend == "cudnn" else (bias, None)


def matrix_of(module: nn.Conv2d | nn.Conv3d) -> tuple[Tensor, Tensor]:
    """Weight [C_out, C] and bias of a 1 x 1 convolution."""
    return module.weight.detach().flatten(1), module.bias.detach()


def gamma_of(norm: ChannelNorm) -> Tensor:
    return norm.gamma.detach().flatten()


def _slot_frames(slot: Tensor) -> Tensor:
    """[1, C, 2, h, w] -> [2, h, w, C], a view; the channels of a slot are already last in memory."""
    return slot[0].permute(1, 2, 3, 0)
