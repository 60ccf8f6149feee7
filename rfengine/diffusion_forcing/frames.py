"""PieceDecoder: latents that are clean to RGB frames, as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfengine.grid import LatentGrid
from rfengine.models.decoder import FrameDecoder, FrameDecoderState
from rfengine.ops import reference

if TYPE_CHECKING:
    from numpy import ndarray


class PieceDecoder:
    """Decodes the pieces of a video, a group of latent frames at a time.

    group: latent frames of a call; fewer are left waiting until the end of a piece. kept: pixel frames at the
    end of what was decoded that `tail` holds, float32 [1, 3, <= kept, H, W] in [-1, 1]; 0 keeps none.
    """

    def __init__(self, decoder: FrameDecoder, grid: LatentGrid, place: Tensor, group: int, kept: int) -> None:
        """place: any tensor of the decoder's dtype and device."""
        self.tail: Tensor | None = None
        self._decoder, self._grid, self._place = decoder, grid, place
        self._group, self._kept = group, kept
        self._state = self._fresh_state()
        self._next = 0  # latent frame of the piece
        self._dropped = 0  # pixel frames that are still to be left out

    def _fresh_state(self) -> FrameDecoderState:
        sizes = (self._grid.latent_height, self._grid.latent_width)
        return self._decoder.decoder_state(1, *sizes, self._place.dtype, self._place.device)

    def continue_at(self, latent_frame: int) -> None:
        """Begin a piece whose first latent frames, up to `latent_frame`, are those decoded last."""
        self._next = latent_frame

    def restart(self, dropped: int) -> None:
        """Begin a piece as a video of its own, without its first `dropped` pixel frames."""
        self._state, self._next, self._dropped, self.tail = self._fresh_state(), 0, dropped, None

    def decode(self, latents: Tensor, clean: int, is_whole: bool) -> ndarray:
        """Frames, uint8 [T, H, W, 3], of those latents of a piece [1, z, F, h, w] that were not decoded yet.

        clean: how many of them are, from the start. is_whole: none will follow in this piece. Raises
        RuntimeError for latents that are not finite.
        """
        import numpy

        count = max(0, clean - self._next)  # what is made anew of an overlap was decoded before
        if not is_whole:
            count -= count % self._group
        waiting = latents[:, :, self._next : self._next + count]
        if not bool(torch.isfinite(waiting).all()):
            raise RuntimeError(
                f"latent frames {self._next} to {self._next + count} of a piece are not finite; use a wider "
                "dtype or other weights"
            )
        self._next += count
        frames = [numpy.zeros((0, self._grid.height, self._grid.width, 3), numpy.uint8)]
        frames += [self._decode(group) for group in waiting.split(self._group, dim=2) if count]
        made = numpy.concatenate(frames)
        dropped = min(self._dropped, len(made))
        self._dropped -= dropped
        return made[dropped:]

    def _decode(self, latents: Tensor) -> ndarray:
        latents = latents.to(self._place)
        if not self._kept:
            return self._decoder.decode_frames(latents, self._state).cpu().numpy()
        pixels = self._decoder.decode(latents, self._state).float().clamp(-1, 1)
        held = pixels if self.tail is None else torch.cat([self.tail, pixels], dim=2)
        self.tail = held[:, :, -self._kept :].clone()
        return reference.frame_pack(pixels[0]).cpu().numpy()
