"""FrameDecoder: what a stream needs of whatever turns latents into frames, and of its state."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class FrameDecoderState(Protocol):
    """What a decoder remembers of one video. It has a fixed size, and a decoder changes it in place."""

    frames: int  # latent frames seen

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name, not copied."""

    def load(self, tensors: dict[str, Tensor], frames: int) -> None:
        """Copy saved tensors in, in place; raises ValueError where names or shapes do not fit."""

    def clone(self) -> FrameDecoderState:
        """An independent copy."""


class FrameDecoder(Protocol):
    """Decodes the latents of a video, chunk by chunk: WanVAE, StreamingDecoder, TinyVAE, TensorRTDecoder.

    The first latent of a video gives one frame and each later one VAEConfig.temporal_stride. A decoder whose
    calls are the same work for every chunk of `capturable_frames` latents after the first, on tensors that
    stay where they are, may carry that number; such a call is then replayed as a CUDA graph.
    """

    def decoder_state(
        self,
        batch: int,
        latent_height: int,
        latent_width: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> FrameDecoderState:
        """A fresh state for `batch` videos of latent_height x latent_width latents."""

    def decode(self, latents: Tensor, state: FrameDecoderState) -> Tensor:
        """Pixels [B, 3, T, H, W], not clamped, of normalised latents [B, z, F, h, w]; updates `state`."""

    def decode_frames(self, latents: Tensor, state: FrameDecoderState) -> Tensor:
        """RGB frames uint8 [T, H, W, 3] of one video, latents [1, z, F, h, w], on their device; updates
        `state`."""


@torch.no_grad()
def reset_state(state: FrameDecoderState) -> None:
    """Put a state back to the start of a video, in place: what reads its tensors need not be made anew."""
    tensors = state.tensors()
    for tensor in tensors.values():
        tensor.zero_()
    state.load(tensors, 0)
