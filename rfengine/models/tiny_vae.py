"""Tiny decoder of video latents (TAEHV): convolutions over single frames, one frame of memory.

About a twenty-fifth of the work of the full decoder, at a lower quality. Sub-modules have the names of the
published weights (taew2_1), which number every layer, also those without parameters. Activations are
[B, T, H, W, C], contiguous, so that a convolution sees channels-last frames and nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rfengine.config import TinyVAEConfig
from rfengine.models.decoder import CausalState, check_state
from rfengine.models.vae import RGB_CHANNELS
from rfengine.ops import REFERENCE_OPS, Ops

_SOFT_LIMIT = 3.0  # of the latents: tanh(x / 3) * 3


class TinyDecoderState(CausalState):
    """State of TinyVAE.decode; TinyVAE.decoder_state makes one. A slot is the last input frame [B, H, W, C]
    of a memory block."""


class MemoryBlock(nn.Module):
    """Residual block that sees each frame and the one before it: the input of this block, not its output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.slot = ""  # path inside the decoder
        self.conv = nn.ModuleDict(
            {
                "0": nn.Conv2d(2 * channels, channels, 3, padding=1),
                "2": nn.Conv2d(channels, channels, 3, padding=1),
                "4": nn.Conv2d(channels, channels, 3, padding=1),
            }
        )

    def forward(self, x: Tensor, state: TinyDecoderState | None) -> Tensor:
        """[B, T, H, W, C] -> the same; the last frame goes into the state's slot, in place."""
        pair = x.new_empty(*x.shape[:-1], 2 * self.channels)
        previous = pair[..., self.channels :]
        pair[..., : self.channels] = x
        previous[:, 1:] = x[:, :-1]
        if state is None:
            previous[:, 0] = 0
        else:
            slot = state.slots[self.slot]
            previous[:, 0] = slot
            slot.copy_(x[:, -1].detach())
        hidden = torch.relu_(_convolve(self.conv["0"], pair))
        hidden = torch.relu_(_convolve(self.conv["2"], hidden))
        return torch.relu_(_convolve(self.conv["4"], hidden) + x)


class TemporalGrow(nn.Module):
    """One frame becomes `factor` frames, each a product of its channels; then height and width double.

    The published order is the opposite; the result is the same, since the product is within a pixel.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> [B, T * factor, 2H, 2W, C]"""
        batch, frames, height, width, channels = x.shape
        grown = _convolve(self.conv, x).unflatten(-1, (self.factor, channels)).movedim(4, 2)
        doubled = grown[:, :, :, :, None, :, None].expand(-1, -1, -1, -1, 2, -1, 2, -1)
        return doubled.reshape(batch, frames * self.factor, 2 * height, 2 * width, channels)


class TinyVAE(nn.Module):
    """The tiny decoder, a FrameDecoder: faster and of lower quality than the full one.

    Without a state the latents are a whole video from its start, nothing is kept and gradients flow. With a
    state they continue the video that it has seen, and the state is updated in place, outside the autograd
    graph. capturable_frames: the latents of the last call.
    """

    def __init__(self, config: TinyVAEConfig, ops: Ops = REFERENCE_OPS) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.capturable_frames = 0
        widths = config.widths
        layers: dict[str, nn.Module] = {"1": nn.Conv2d(config.z_dim, widths[0], 3, padding=1)}
        index = 3  # 0 limits the latents, 2 is a ReLU
        for channels, next_channels, factor in zip(widths, widths[1:], config.time_factors, strict=False):
            for _ in range(config.memory_blocks):
                layers[str(index)] = block = MemoryBlock(channels)
                block.slot = str(index)
                index += 1
            layers[str(index + 1)] = TemporalGrow(channels, factor)  # `index` itself doubles the size
            layers[str(index + 2)] = nn.Conv2d(channels, next_channels, 3, padding=1, bias=False)
            index += 3
        layers[str(index + 1)] = nn.Conv2d(widths[-1], RGB_CHANNELS, 3, padding=1)
        self.decoder = nn.ModuleDict(layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder["1"].weight.dtype

    def decode(self, latents: Tensor, state: TinyDecoderState | None = None) -> Tensor:
        """Pixels [B, 3, T, H, W] around [-1, 1], not clamped, of normalised latents [B, z, F, h, w].

        The first latent of a video is one pixel frame, each later one config.temporal_stride. Updates
        `state` in place. Raises ValueError for latents of another layout and for a state of another size.
        """
        self._check(latents, state)
        limited = torch.tanh(latents.float() / _SOFT_LIMIT) * _SOFT_LIMIT
        x = limited.to(self.dtype).permute(0, 2, 3, 4, 1).contiguous()
        first, *body, last = self.decoder.values()
        x = torch.relu_(_convolve(first, x))
        for layer in body:
            if isinstance(layer, MemoryBlock):
                x = layer(x, state)
            else:
                x = layer(x) if isinstance(layer, TemporalGrow) else _convolve(layer, x)
        pixels = (_convolve(last, torch.relu_(x)) * 2 - 1).permute(0, 4, 1, 2, 3)
        if state is None or state.frames == 0:
            pixels = pixels[:, :, self.config.temporal_stride - 1 :]
        if state is not None:
            state.frames += latents.shape[2]
            self.capturable_frames = latents.shape[2]
        return pixels

    def decode_frames(self, latents: Tensor, state: TinyDecoderState | None) -> Tensor:
        """decode of one video as RGB bytes, uint8 [T, H, W, 3]; ValueError for more than one video."""
        if latents.shape[0] != 1:
            raise ValueError(f"latents are {tuple(latents.shape)}; frames are packed of one video at a time")
        return self.ops.frame_pack(self.decode(latents, state)[0].contiguous())  # kernels pack rows of planes

    def decoder_state(
        self, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> TinyDecoderState:
        """A fresh state for `batch` videos of height x width latents; also lays the weights out in memory as
        the activations are."""
        shapes = self._slot_shapes(batch, height, width)
        with torch.inference_mode(False):  # such a state serves calls inside and outside of inference mode
            self.to(memory_format=torch.channels_last)
            return TinyDecoderState(
                {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
            )

    def _slot_shapes(self, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """The shape of each memory block's slot by path, in execution order."""
        shapes = {}
        for layer in self.decoder.values():
            if isinstance(layer, MemoryBlock):
                shapes[layer.slot] = (batch, height, width, layer.channels)
            elif isinstance(layer, TemporalGrow):
                height, width = 2 * height, 2 * width
        return shapes

    def _check(self, latents: Tensor, state: TinyDecoderState | None) -> None:
        channels = self.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] < 1:
            raise ValueError(
                f"latents are {tuple(latents.shape)}; give [batch, {channels}, frames, height, width] "
                "with at least one frame"
            )
        if state is not None:
            shapes = self._slot_shapes(latents.shape[0], *latents.shape[3:])
            check_state(state, TinyDecoderState, shapes, self.decoder["1"].weight)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of every frame: [B, T, H, W, C] -> [B, T, H, W, C_out], channels-last in memory."""
    frames = conv(x.flatten(0, 1).permute(0, 3, 1, 2))
    return frames.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
