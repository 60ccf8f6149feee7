"""The decoder of WanVAE as pure functions of static shapes, for export: tensors in, tensors out.

Two graphs serve a stream: one decodes the first chunk of a video, the steady one every later chunk. Both take
the same number of latent frames, so each chunk of a stream is one call. In the first graph the history is
zero, and latent 0 passes the temporal doublings without being part of the history of the latents after it.
Every layer is written in ONNX's operators on [1, C, frames, h, w]: the convolution of a frame has a kernel of
(1, 3, 3), so that no frame moves into the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfengine.models.vae import NORM_FLOOR, CausalConv, FrameAttention, ResidualBlock, Upsample, WanVAE

LATENTS, PIXELS = "latents", "pixels"
_LOOK_BACK = CausalConv.slot_frames


def state_input(slot: str) -> str:
    """Name of the input that holds a slot of DecoderState."""
    return f"state_{slot.replace('.', '_')}"


def state_output(slot: str) -> str:
    """Name of the output that holds a slot of DecoderState for the next call."""
    return f"next_{slot.replace('.', '_')}"


class DecoderGraph(nn.Module):
    """One call of WanVAE.decode on one video, without a state object; shares the weights of `vae`.

    first: the graph of the first chunk, which takes no state. latents: latent frames of a call.
    inputs, outputs: shapes and dtypes of forward's, by name, in order. A slot that a call leaves as it is
    (those of the temporal doublings in a first call of one latent) is no output; it stays zero.
    """

    def __init__(self, vae: WanVAE, latents: int, latent_height: int, latent_width: int, first: bool) -> None:
        """Raises ValueError for less than one latent."""
        super().__init__()
        if latents < 1:
            raise ValueError(f"latents is {latents}; a call decodes at least one latent frame")
        config = vae.config
        self.first = first
        self.dtype = vae.conv2.weight.dtype
        self.latents_shape = (1, config.z_dim, latents, latent_height, latent_width)
        slots = vae.decoder_state(1, latent_height, latent_width, self.dtype, "meta").tensors()
        self.slot_shapes = {name: tuple(slot.shape) for name, slot in slots.items()}
        self.layers = nn.ModuleList(_layers(vae))
        for name, values in (("shift", config.latents_mean), ("scale", config.latents_std)):
            statistic = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1, 1)
            self.register_buffer(name, statistic, persistent=False)
        self._written = list(self.slot_shapes)
        if first and latents == 1:
            self._written = [name for name in self._written if not name.endswith("time_conv")]
        frames = config.temporal_stride * (latents - 1) + (1 if first else config.temporal_stride)
        pixels = (1, 3, frames, *(side * config.spatial_stride for side in (latent_height, latent_width)))
        slots = {} if first else self.slot_shapes
        self.inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            LATENTS: (self.latents_shape, torch.float32),
            **{state_input(name): (shape, self.dtype) for name, shape in slots.items()},
        }
        self.outputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            PIXELS: (pixels, self.dtype),
            **{state_output(name): (self.slot_shapes[name], self.dtype) for name in self._written},
        }

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Uninitialised tensors of the shapes and dtypes that forward takes."""
        return tuple(torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in self.inputs.values())

    def forward(self, latents: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        """float32 latents [1, z, latents, h, w], normalised, and the slots -> pixels [1, 3, T, H, W] in the
        weights' dtype, not clamped, and the new slots."""
        history = _History({} if self.first else dict(zip(self.slot_shapes, slots, strict=True)))
        x = (latents * self.scale + self.shift).to(self.dtype)
        for layer in self.layers:
            x = layer(x, history)
        return (x, *(history.left[name] for name in self._written))


class _History:
    """The frames before a call by slot name (none in a first call), and those kept for the next call."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self.given = given
        self.left: dict[str, Tensor] = {}

    def in_front_of(self, slot: str, x: Tensor) -> Tensor:
        """[1, C, T, h, w] -> [1, C, 2 + T, h, w], whose last two frames are kept."""
        if slot in self.given:
            x = torch.cat([self.given[slot], x], dim=2)
        else:
            x = F.pad(x, (0, 0, 0, 0, _LOOK_BACK, 0))
        self.left[slot] = x[:, :, -_LOOK_BACK:]
        return x


class _Convolution(nn.Module):
    """A convolution of any rank as one over [1, C, T, h, w]; a named slot makes it causal in time."""

    def __init__(self, conv: nn.Conv3d | nn.Conv2d, slot: str = "") -> None:
        super().__init__()
        flat = conv.weight.ndim == 4
        self.weight = nn.Parameter(conv.weight.detach().unsqueeze(2) if flat else conv.weight.detach(), False)
        self.bias = nn.Parameter(conv.bias.detach(), False)
        self.padding = (0, *conv.padding[-2:])
        self.slot = slot

    def forward(self, x: Tensor, history: _History) -> Tensor:
        if self.slot:
            x = history.in_front_of(self.slot, x)
        return F.conv3d(x, self.weight, self.bias, padding=self.padding)


class _Norm(nn.Module):
    """ChannelNorm, then SiLU where `silu`, in float32 and rounded once: float16 cannot hold the sum."""

    def __init__(self, gamma: Tensor, silu: bool) -> None:
        super().__init__()
        gain = gamma.detach().float().flatten() * math.sqrt(gamma.numel())
        self.register_buffer("gain", gain.view(1, -1, 1, 1, 1))
        self.silu = silu

    def forward(self, x: Tensor, history: _History) -> Tensor:
        wide = x.float()
        norm = (wide * wide).sum(dim=1, keepdim=True).sqrt().clamp(min=NORM_FLOOR)
        wide = wide / norm * self.gain
        return (F.silu(wide) if self.silu else wide).to(x.dtype)


class _Residual(nn.Module):
    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        body = block.residual
        self.body = nn.ModuleList(
            [
                _Norm(body["0"].gamma, silu=True),
                _Convolution(body["2"], body["2"].slot),
                _Norm(body["3"].gamma, silu=True),
                _Convolution(body["6"], body["6"].slot),
            ]
        )
        self.shortcut = None if isinstance(block.shortcut, nn.Identity) else _Convolution(block.shortcut)

    def forward(self, x: Tensor, history: _History) -> Tensor:
        hidden = x
        for layer in self.body:
            hidden = layer(hidden, history)
        return hidden + (x if self.shortcut is None else self.shortcut(x, history))


class _Attention(nn.Module):
    def __init__(self, block: FrameAttention) -> None:
        super().__init__()
        self.norm = _Norm(block.norm.gamma, silu=False)
        self.to_qkv = _Convolution(block.to_qkv)
        self.proj = _Convolution(block.proj)

    def forward(self, x: Tensor, history: _History) -> Tensor:
        _, channels, frames, height, width = x.shape
        flat = self.to_qkv(self.norm(x, history), history).reshape(3, channels, frames, height * width)
        query, key, value = flat.permute(0, 2, 1, 3).unbind(0)  # each [T, C, h * w]
        # the query is scaled before the product: float16 could not hold an unscaled score
        scores = (query * channels**-0.5).transpose(1, 2) @ key
        attended = scores.softmax(dim=-1) @ value.transpose(1, 2)
        attended = attended.permute(2, 0, 1).reshape(1, channels, frames, height, width)
        return x + self.proj(attended, history)


class _Upsample(nn.Module):
    def __init__(self, block: Upsample) -> None:
        super().__init__()
        time = block.time_conv
        self.time_conv = None if time is None else _Convolution(time, time.slot)
        self.conv = _Convolution(block.resample[1])

    def forward(self, x: Tensor, history: _History) -> Tensor:
        if self.time_conv is not None:
            x = self._double(x, history)
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"), history)

    def _double(self, x: Tensor, history: _History) -> Tensor:
        if history.given:
            return self._interleave(self.time_conv(x, history))
        if x.shape[2] == 1:
            return x
        later = self._interleave(self.time_conv(x[:, :, 1:], history))
        return torch.cat([x[:, :, :1], later], dim=2)

    @staticmethod
    def _interleave(pairs: Tensor) -> Tensor:
        """Channels [even frame | odd frame] of each frame become two frames."""
        _, channels, frames, height, width = pairs.shape
        apart = pairs.reshape(2, channels // 2, frames, height, width)
        return apart.permute(1, 2, 0, 3, 4).reshape(1, channels // 2, 2 * frames, height, width)


def _layers(vae: WanVAE) -> Iterator[nn.Module]:
    """The decoder's layers in the order they run."""
    decoder, head = vae.decoder, vae.decoder.head
    yield _Convolution(vae.conv2)
    yield _Convolution(decoder.conv1, decoder.conv1.slot)
    forms = {ResidualBlock: _Residual, FrameAttention: _Attention, Upsample: _Upsample}
    for block in (*decoder.middle, *decoder.upsamples):
        yield forms[type(block)](block)
    yield _Norm(head["0"].gamma, silu=True)
    yield _Convolution(head["2"], head["2"].slot)
