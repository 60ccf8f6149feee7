"""FrameDecoder: what a stream needs of a decoder and of its state; CausalState, which most decoders have."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class FrameDecoderState(Protocol):
    """State of a decoder for one video, of a fixed size; the decoder updates it in place."""

    frames: int  # latent frames seen

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name, not copied."""

    def load(self, tensors: dict[str, Tensor], frames: int) -> None:
        """Copy saved tensors in, in place; raises ValueError where names or shapes do not fit."""


class CausalState:
    """State of a causal convolutional network for one video: the last input frames of its temporal layers.

    `slots` maps the path of a layer, in execution order, to its frames; they are allocated once, zero at the
    start, and updated in place. `frames` counts the latent frames seen.
    """

    def __init__(self, slots: dict[str, Tensor], frames: int = 0) -> None:
        self.slots = slots
        self.frames = frames

    def tensors(self) -> dict[str, Tensor]:
        """The live slots by name; the next call overwrites them."""
        return dict(self.slots)

    def load(self, tensors: dict[str, Tensor], frames: int) -> None:
        """Copy a snapshot into the slots, in place; ValueError where names or shapes differ."""
        if type(frames) is not int or frames < 0:
            raise ValueError(f"frames is {frames}; a state has seen 0 latent frames or more")
        if tensors.keys() != self.slots.keys():
            other = sorted(tensors.keys() ^ self.slots.keys())
            raise ValueError(
                f"{len(other)} slot names differ, such as {other[0]!r}; load a snapshot of the same VAE"
            )
        for name, tensor in tensors.items():
            given, held = tuple(tensor.shape), tuple(self.slots[name].shape)
            if given != held:
                raise ValueError(
                    f"slot {name!r} is {given} in the snapshot and {held} in the state; "
                    "load a snapshot of the same VAE, batch and resolution"
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.slots[name].copy_(tensor)
        self.frames = frames


class FrameDecoder(Protocol):
    """Decodes the latents of a video, chunk by chunk: WanVAE, StreamingDecoder, TinyVAE, TensorRTDecoder.

    The first latent of a video is one frame and each later one VAEConfig.temporal_stride. A decoder may
    have `capturable_frames`: a call with that many latents, after a video's first call, does the same work on
    the same tensors every time, so it is replayed as a CUDA graph.
    """

    def decoder_state(
        self, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> FrameDecoderState:
        """A fresh state for `batch` videos of height x width latents."""

    def decode(self, latents: Tensor, state: FrameDecoderState) -> Tensor:
        """Pixels [B, 3, T, H, W], not clamped, of normalised latents [B, z, F, h, w]; updates `state`."""

    def decode_frames(self, latents: Tensor, state: FrameDecoderState) -> Tensor:
        """RGB frames uint8 [T, H, W, 3] of one video, latents [1, z, F, h, w], on their device; updates
        `state`."""


@torch.no_grad()
def reset_state(state: FrameDecoderState) -> None:
    """Reset to the start of a video in place, so captured graphs that use these tensors stay valid."""
    tensors = state.tensors()
    for tensor in tensors.values():
        tensor.zero_()
    state.load(tensors, 0)


def check_state(
    state: CausalState, kind: type[CausalState], shapes: dict[str, tuple[int, ...]], weight: Tensor
) -> None:
    """Raises ValueError unless `state` is of `kind`, and its slots have `shapes` and the dtype and device of
    `weight`."""
    if not isinstance(state, kind):
        raise ValueError(f"state is a {type(state).__name__}; this call needs a {kind.__name__}")
    held = {name: (tuple(slot.shape), slot.dtype, slot.device) for name, slot in state.slots.items()}
    asked = {name: (shape, weight.dtype, weight.device) for name, shape in shapes.items()}
    if held != asked:
        name = next(name for name in (*asked, *held) if held.get(name) != asked.get(name))
        found, wanted = (
            "{} {} on {}".format(*slots[name]) if name in slots else None for slots in (held, asked)
        )
        raise ValueError(
            f"slot {name!r} of the state is {found}, the input and the weights ask for {wanted}; "
            "make the state for this model, batch, size, dtype and device"
        )
