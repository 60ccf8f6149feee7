"""StreamingDecoder: the decoder of WanVAE on fused channels-last ops, one video at a time."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.models.decoder import check_state
from rfengine.models.streaming_layers import (
    HISTORY,
    Attention,
    Convolution,
    DecoderCall,
    Layer,
    Residual,
    SizeDoubling,
    TimeDoubling,
    gamma_of,
    matrix_of,
)
from rfengine.models.vae import DecoderState, FrameAttention, ResidualBlock, Upsample, WanVAE, slot_shapes
from rfengine.ops import Ops
from rfengine.runtime_config import VAEPrecision


class StreamingDecoder:
    """A FrameDecoder of one video, with the weights that a WanVAE has when this is made.

    Output equals WanVAE.decode up to rounding; states and their snapshots are those of the WanVAE. A stream
    keeps only the two past frames of each temporal convolution. The halo buffers belong to the decoder: one
    of each size for each number of latents in a call, made by the first such call, kept, and used by one
    convolution at a time. At 832x480 in bf16 and three latents that is 1.9 GB for each stream and 1.9 GB
    once; a buffer for each convolution would take 12 GB for each stream. The price is 3.8 GB more of copies
    per chunk. Calls on one decoder must therefore not overlap, whichever stream they are for.

    `run` reads nothing on the host. For a state that has seen a latent, calls with the same number of latents
    do the same work at the same addresses, so after one such call it can be captured in a CUDA graph.
    capturable_frames: the latents of the last call.

    It runs in the dtype of those weights. precision "fp8": the large residual convolutions multiply in e4m3:
    those of 3x3x3 after the first doubling of the size with as many output as input channels, 17 in the
    published decoder. The norm before them writes e4m3 into the halo, in a fixed unit (activation_unit);
    weights have a scale by channel.
    """

    def __init__(self, vae: WanVAE, ops: Ops, precision: VAEPrecision = "default") -> None:
        self.config = vae.config
        self.capturable_frames = 0
        self._vae = vae
        self._ops = ops
        self._halos: dict[tuple[int | torch.dtype, ...], Tensor] = {}
        self._first_matrix, self._first_offset = _denormalising_matrix(vae)
        decoder, rate, is_large = vae.decoder, 1, False
        self._first = Convolution.of(decoder.conv1, rate)
        self._layers: list[Layer] = []
        for block in (*decoder.middle, *decoder.upsamples):
            if isinstance(block, ResidualBlock):
                self._layers.append(Residual(block, rate, fp8=is_large and precision == "fp8"))
            elif isinstance(block, FrameAttention):
                self._layers.append(Attention(block))
            elif isinstance(block, Upsample):
                if block.time_conv is not None:
                    self._layers.append(TimeDoubling(Convolution.of(block.time_conv, rate)))
                    rate *= 2
                self._layers.append(SizeDoubling(block))
                is_large = True
        self._last_gamma = gamma_of(decoder.head["0"])
        self._last = Convolution.of(decoder.head["2"], rate)

    def on(self, ops: Ops) -> StreamingDecoder:
        """A decoder with the same weights on other ops, with buffers of its own."""
        other = copy.copy(self)
        other._ops, other._halos, other.capturable_frames = ops, {}, 0
        return other

    @property
    def halo_bytes(self) -> int:
        """Bytes of the halo buffers so far; all streams share them."""
        return sum(halo.nbytes for halo in self._halos.values())

    @property
    def fp8_slots(self) -> tuple[str, ...]:
        """The slots of the convolutions that multiply in e4m3, in the order they run."""
        blocks = (layer for layer in self._layers if isinstance(layer, Residual))
        every = (convolution for block in blocks for convolution in (block.first, block.second))
        return tuple(convolution.slot for convolution in every if convolution.scale is not None)

    def decoder_state(
        self, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> DecoderState:
        """A fresh state, as WanVAE.decoder_state makes it; batch must be 1 (ValueError)."""
        if batch != 1:
            raise ValueError(f"batch is {batch}; this decoder takes one video, WanVAE.decode takes several")
        return self._vae.decoder_state(batch, height, width, dtype, device)

    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        """Pixels [1, 3, T, H, W], not clamped, of normalised latents [1, z, F, h, w].

        The first latent of a video is one pixel frame, each later one config.temporal_stride. Updates
        `state` in place. Raises ValueError, before anything changes, for latents of another layout or size,
        for a state of another model, size, dtype or device, and for latents on a CPU that are not finite (on
        a GPU the host would have to wait, so the caller checks them with the frames).
        """
        return self._counted(latents, state, packed=False)

    def decode_frames(self, latents: Tensor, state: DecoderState) -> Tensor:
        """decode as RGB bytes on the device, uint8 [T, H, W, 3]."""
        return self._counted(latents, state, packed=True)

    def _counted(self, latents: Tensor, state: DecoderState, packed: bool) -> Tensor:
        self.check(latents, state)
        frames = self.run(latents, state, packed)
        state.frames += latents.shape[2]
        self.capturable_frames = latents.shape[2]
        return frames

    @torch.no_grad()
    def run(self, latents: Tensor, state: DecoderState, packed: bool) -> Tensor:
        """decode_frames where `packed`, else decode, without the check and without counting frames."""
        call = DecoderCall(self._ops, state.slots, self._halos, latents.shape[2], state.frames == 0)
        hidden = F.linear(latents[0].permute(1, 2, 3, 0).float(), self._first_matrix, self._first_offset).to(
            self._first.weight.dtype
        )
        halo = call.halo(self._first, hidden)
        halo[HISTORY:].copy_(hidden)
        pending = call.convolve(self._first, halo)
        for layer in self._layers:
            pending = layer(pending, call)
        halo = call.norm_silu(pending, self._last_gamma, self._last)[1]
        call.keep(self._last, halo)
        weight, bias = self._last.weight, self._last.bias
        if packed:
            return self._ops.conv_frame_pack(halo, weight, bias)
        return self._ops.causal_conv3d(halo, weight, bias).permute(3, 0, 1, 2).unsqueeze(0)

    def check(self, latents: Tensor, state: DecoderState) -> None:
        """Raise ValueError for what decode refuses."""
        channels = self.config.z_dim
        if latents.ndim != 5 or tuple(latents.shape[:2]) != (1, channels) or not latents.shape[2]:
            raise ValueError(
                f"latents are {tuple(latents.shape)}; give [1, {channels}, frames, height, width] "
                "with at least one frame"
            )
        shapes = slot_shapes(self._vae.decoder, 1, *latents.shape[3:])
        check_state(state, DecoderState, shapes, self._first.weight)
        if latents.is_cpu and not torch.isfinite(latents).all():
            raise ValueError("the latents are not finite; nothing was decoded and the state is as it was")


def _denormalising_matrix(vae: WanVAE) -> tuple[Tensor, Tensor]:
    """conv2 of the denormalised latents as a matrix [z, z] and an offset [z], float32."""
    weight, bias = (tensor.float() for tensor in matrix_of(vae.conv2))
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=weight.device)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return weight * std, weight @ mean + bias
