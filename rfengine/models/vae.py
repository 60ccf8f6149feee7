"""Causal video VAE of Wan2.1 with explicit streaming state.

Every temporal convolution looks back at most two frames, so a stream keeps its last two input frames. Zeros
stand for the frames before the video, which makes the ordinary convolution the same at the start and later;
only the temporal up- and downsampling treat the very first frame apart. A call therefore takes any number of
frames in one pass. Sub-modules are registered in the order they run and have the published parameter names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfengine.config import VAEConfig
from rfengine.models.decoder import CausalState, check_state
from rfengine.ops import reference

RGB_CHANNELS = 3
NORM_FLOOR = 1e-12  # smallest L2 norm over channels that is divided by


class EncoderState(CausalState):
    """State of WanVAE.encode, with slots [B, C, frames, h, w]; WanVAE.encoder_state makes one."""


class DecoderState(CausalState):
    """State of WanVAE.decode, with slots [B, C, 2, h, w]; WanVAE.decoder_state makes one."""


class ChannelNorm(nn.Module):
    """x / max(L2 norm over channels, 1e-12) * sqrt(C) * gamma, over axis 1."""

    def __init__(self, channels: int, trailing_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * trailing_axes))

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        gamma = self.gamma.flatten().to(x.dtype)
        return F.rms_norm(x.movedim(1, -1), (channels,), gamma, NORM_FLOOR**2 / channels).movedim(-1, 1)


class CausalConv(nn.Conv3d):
    """Convolution over time, height and width that looks back two frames; zeros stand before the video."""

    slot_frames = 2

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.slot = ""  # path inside the encoder or decoder

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """[B, C, T, h, w] -> [B, C_out, T, h, w]; the last two frames go into the state's slot, in place."""
        if state is None:
            return _convolve(self, F.pad(x, (0, 0, 0, 0, self.slot_frames, 0)))
        slot = state.slots[self.slot]
        x = torch.cat([slot, x], dim=2)
        slot.copy_(x[:, :, -self.slot_frames :].detach())
        return _convolve(self, x)


class StridedTimeConv(nn.Conv3d):
    """Halves the frame rate after the first frame of the video, which passes as it is."""

    slot_frames = 1

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), stride=(2, 1, 1))
        self.slot = ""

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """[B, C, 1 + 2k, h, w] -> [B, C, 1 + k, h, w] at the start of a video, [B, C, 2k, ...] -> k later."""
        fresh = state is None or state.frames == 0
        if not fresh:
            x = torch.cat([state.slots[self.slot], x], dim=2)
        if state is not None:
            state.slots[self.slot].copy_(x[:, :, -1:].detach())
        if not fresh:
            return _convolve(self, x)
        return torch.cat([x[:, :, :1], _convolve(self, x)], dim=2) if x.shape[2] > 1 else x


class DoublingTimeConv(CausalConv):
    """Doubles the frame rate after the first frame of the video, which passes as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """[B, C, 1 + k, h, w] -> [B, C, 1 + 2k, h, w] at the start of a video, [B, C, k, ...] -> 2k later."""
        if state is not None and state.frames > 0:
            return self._double(x, state)
        if x.shape[2] == 1:
            return x
        # the first frame is not part of any later frame's history: those start from zeros
        return torch.cat([x[:, :, :1], self._double(x[:, :, 1:], state)], dim=2)

    def _double(self, x: Tensor, state: CausalState | None) -> Tensor:
        """Output channels are [even frame | odd frame]; interleave them in time."""
        pairs = super().forward(x, state).unflatten(1, (2, -1))
        return pairs.permute(0, 3, 1, 4, 5, 2).flatten(1, 2).permute(0, 4, 1, 2, 3)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(in_channels, 3),
                "2": CausalConv(in_channels, out_channels),
                "3": ChannelNorm(out_channels, 3),
                "6": CausalConv(out_channels, out_channels),
            }
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        hidden = self.residual["2"](F.silu(self.residual["0"](x)), state)
        hidden = self.residual["6"](F.silu(self.residual["3"](hidden)), state)
        return hidden + self.shortcut(x)


class FrameAttention(nn.Module):
    """Self-attention inside each frame, one head, no positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        qkv = self.to_qkv(self.norm(_frames_as_batch(x)))  # [frames, 3C, h, w]
        query, key, value = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=3)
        attended = F.scaled_dot_product_attention(query, key, value).squeeze(1).transpose(1, 2)
        return x + _batch_as_frames(self.proj(attended.unflatten(2, x.shape[3:])), x.shape[0])


class Upsample(nn.Module):
    """Doubles the frame rate where `temporal`, then height and width, and halves the channels."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.time_conv = DoublingTimeConv(channels) if temporal else None
        self.resample = nn.Sequential(
            nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(channels, channels // 2, 3, 1, 1)
        )

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        if self.time_conv is not None:
            x = self.time_conv(x, state)
        return _batch_as_frames(self.resample(_frames_as_batch(x)), x.shape[0])


class Downsample(nn.Module):
    """Halves height and width, then the frame rate where `temporal`; the channels stay."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, 2))
        self.time_conv = StridedTimeConv(channels) if temporal else None

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        x = _batch_as_frames(self.resample(_frames_as_batch(x)), x.shape[0])
        return x if self.time_conv is None else self.time_conv(x, state)


class Encoder(nn.Module):
    """Pixels [B, 3, T, H, W] -> moments [B, 2z, F, h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in config.dim_mult]
        self.conv1 = CausalConv(RGB_CHANNELS, config.base_dim)
        self.downsamples = nn.ModuleList()
        channels = config.base_dim
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(channels, width))
                channels = width
            if level < len(widths) - 1:
                self.downsamples.append(Downsample(channels, config.temporal_downsample[level]))
        self.middle = _middle(channels)
        self.head = _head(channels, 2 * config.z_dim)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        x = self.conv1(x, state)
        for block in (*self.downsamples, *self.middle):
            x = block(x, state)
        return self.head["2"](F.silu(self.head["0"](x)), state)


class Decoder(nn.Module):
    """Latents [B, z, F, h, w] -> pixels [B, 3, T, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in reversed(config.dim_mult)]
        temporal_upsample = config.temporal_downsample[::-1]
        channels = widths[0]
        self.conv1 = CausalConv(config.z_dim, channels)
        self.middle = _middle(channels)
        self.upsamples = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(channels, width))
                channels = width
            if level < len(widths) - 1:
                self.upsamples.append(Upsample(channels, temporal_upsample[level]))
                channels //= 2
        self.head = _head(channels, RGB_CHANNELS)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        x = self.conv1(x, state)
        for block in (*self.middle, *self.upsamples):
            x = block(x, state)
        return self.head["2"](F.silu(self.head["0"](x)), state)


class WanVAE(nn.Module):
    """Encoder and decoder of a causal video VAE, for whole clips and streams alike.

    Without a state the input is a whole clip from its start, nothing is kept and gradients flow. With a state
    the input continues the video that it has seen, and the state is updated in place, outside the autograd
    graph. The encoder and the decoder may differ in dtype; inputs are cast to that of the half they enter.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        for half in (self.encoder, self.decoder):
            for name, module in half.named_modules():
                if isinstance(module, CausalConv | StridedTimeConv):
                    module.slot = name
        self._statistics_on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def decoder_dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights and of its states."""
        return self.conv2.weight.dtype

    def set_decoder_dtype(self, dtype: torch.dtype) -> None:
        """Cast the weights of the decoder alone, in place."""
        for half in (self.conv2, self.decoder):
            half.to(dtype)

    def encode(self, pixels: Tensor, state: EncoderState | None = None) -> Tensor:
        """Normalised latent means [B, z, F, h, w] of pixels [B, 3, T, H, W] in [-1, 1].

        T is 1 + 4k at the start of a video and 4k later (4 being config.temporal_stride); H and W are
        multiples of config.spatial_stride. Updates `state` in place. Raises ValueError for pixels of another
        size and for a state of another size.
        """
        mean, _ = self.encode_moments(pixels, state)
        shift, scale = self._statistics(mean.device)
        return ((mean.float() - shift) / scale).to(mean.dtype)

    @torch.no_grad()
    def encode_in_groups(self, pixels: Tensor, latent_frames: int = 3) -> Tensor:
        """encode of a whole clip, `latent_frames` at a time, with the memory of one group and no gradients.

        pixels: as at the start of a video, on any device; each group is moved to the weights' device. Weights
        in float32 multiply in float32, not in TF32: what is lost here is lost in all that follows.
        """
        if latent_frames < 1:
            raise ValueError(f"latent_frames is {latent_frames}; a group has at least one latent frame")
        self._check_pixels(pixels, None)
        side, group = self.config.spatial_stride, latent_frames * self.config.temporal_stride
        sizes, weight = [size // side for size in pixels.shape[3:]], self.conv1.weight
        state = self.encoder_state(pixels.shape[0], *sizes, weight.dtype, weight.device)
        start = group - self.config.temporal_stride + 1  # the first latent frame is one pixel frame
        groups = [pixels[:, :, :start], *pixels[:, :, start:].split(group, dim=2)]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            latents = [self.encode(part.to(weight), state) for part in groups if part.shape[2]]
        return torch.cat(latents, dim=2)

    def encode_moments(self, pixels: Tensor, state: EncoderState | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, each [B, z, F, h, w], not normalised; otherwise as encode."""
        latent_frames = self._check_pixels(pixels, state)
        moments = self.conv1(self.encoder(_channels_last(pixels.to(self.conv1.weight.dtype)), state))
        if state is not None:
            state.frames += latent_frames
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: Tensor, state: DecoderState | None = None) -> Tensor:
        """Pixels [B, 3, T, H, W], not clamped, of normalised latents [B, z, F, h, w].

        The first latent of a video is one pixel frame, each later one config.temporal_stride. Updates
        `state` in place. Raises ValueError for latents of another layout and for a state of another size.
        """
        channels = self.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] < 1:
            raise ValueError(
                f"latents are {tuple(latents.shape)}; give [batch, {channels}, frames, height, width] "
                "with at least one frame"
            )
        if state is not None:
            shapes = slot_shapes(self.decoder, latents.shape[0], *latents.shape[3:])
            check_state(state, DecoderState, shapes, self.conv2.weight)
        shift, scale = self._statistics(latents.device)
        hidden = (latents.float() * scale + shift).to(self.conv2.weight.dtype)
        pixels = self.decoder(_channels_last(self.conv2(hidden)), state)
        if state is not None:
            state.frames += latents.shape[2]
        return pixels

    def decode_frames(self, latents: Tensor, state: DecoderState | None = None) -> Tensor:
        """decode of one video as RGB bytes, uint8 [T, H, W, 3]."""
        if latents.shape[0] != 1:
            raise ValueError(f"latents are {tuple(latents.shape)}; frames are packed one video at a time")
        return reference.frame_pack(self.decode(latents, state)[0])

    def encoder_state(
        self, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> EncoderState:
        """A fresh state for encoding `batch` videos of height x width latents."""
        stride = self.config.spatial_stride
        shapes = slot_shapes(self.encoder, batch, height * stride, width * stride)
        return EncoderState(_zero_slots(shapes, dtype, device))

    def decoder_state(
        self, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> DecoderState:
        """A fresh state for decoding `batch` videos of height x width latents."""
        shapes = slot_shapes(self.decoder, batch, height, width)
        return DecoderState(_zero_slots(shapes, dtype, device))

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, always float32; made once per device."""
        if device not in self._statistics_on:
            with torch.inference_mode(False):  # a later training step may use them too
                self._statistics_on[device] = tuple(
                    torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)
                    for values in (self.config.latents_mean, self.config.latents_std)
                )
        return self._statistics_on[device]

    def _check_pixels(self, pixels: Tensor, state: EncoderState | None) -> int:
        """The number of latent frames of `pixels`."""
        side, stride = self.config.spatial_stride, self.config.temporal_stride
        if (
            pixels.ndim != 5
            or pixels.shape[1] != RGB_CHANNELS
            or any(size % side for size in pixels.shape[3:])
        ):
            raise ValueError(
                f"pixels are {tuple(pixels.shape)}; give [batch, {RGB_CHANNELS}, frames, height, width] "
                f"with height and width multiples of {side}"
            )
        first = 1 if state is None or state.frames == 0 else 0
        frames = pixels.shape[2]
        if frames < 1 or (frames - first) % stride:
            place = "at the start of a video" if first else "after the start of a video"
            wanted = f"1 + a multiple of {stride}" if first else f"a multiple of {stride}"
            raise ValueError(f"pixels have {frames} frames; {place} give {wanted}")
        if state is not None:
            shapes = slot_shapes(self.encoder, pixels.shape[0], *pixels.shape[3:])
            check_state(state, EncoderState, shapes, self.conv1.weight)
        return first + (frames - first) // stride


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels)]
    )


def _head(channels: int, out_channels: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelNorm(channels, 3), "2": CausalConv(channels, out_channels)})


def slot_shapes(half: nn.Module, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """The slot shape of each temporal convolution by name, in execution order, at an input of this size."""
    shapes = {}
    for name, module in half.named_modules():
        if isinstance(module, CausalConv | StridedTimeConv):
            shapes[name] = (batch, module.in_channels, module.slot_frames, height, width)
        elif isinstance(module, nn.UpsamplingNearest2d):
            height, width = 2 * height, 2 * width
        elif isinstance(module, nn.ZeroPad2d):
            height, width = height // 2, width // 2
    return shapes


def _zero_slots(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # such a state serves calls inside and outside of inference mode
        return {
            name: _channels_last(torch.zeros(shape, dtype=dtype, device=device))
            for name, shape in shapes.items()
        }


def _convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """The convolution; on a CPU torch would run a small float32 batch of one far slower than oneDNN does."""
    plain = x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(
            x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
        )
    return nn.Conv3d.forward(conv, x)


def _channels_last(x: Tensor) -> Tensor:
    """The memory layout of every layer, which the norm over channels and oneDNN need."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def _frames_as_batch(x: Tensor) -> Tensor:
    """[B, C, T, h, w] -> [B * T, C, h, w]"""
    return x.transpose(1, 2).flatten(0, 1)


def _batch_as_frames(x: Tensor, batch: int) -> Tensor:
    """[B * T, C, h, w] -> [B, C, T, h, w]"""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
