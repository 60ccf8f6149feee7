"""The denoising of a video, row by row and piece after piece; latents are [1, C, F, h, w]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rfengine.diffusion_forcing.plan import Piece, VideoPlan
from rfengine.diffusion_forcing.schedule_matrix import Row
from rfengine.diffusion_forcing.unipc import TRAIN_TIMESTEPS, UniPCSolver
from rfengine.models.dit import TextKeysValues, WanDiT
from rfengine.models.window import window_flow

Draw = Callable[[int, int, int], Tensor]
"""Noise [1, C, frames, h, w], float32 on the model's device, of (piece, step, frames): step 0 is what a piece
begins as, step r + 1 what row r adds to its clean frames."""


@dataclass(frozen=True, slots=True)
class GuidedFlow:
    """The flow of a window, with classifier-free guidance: negative + scale * (positive - negative).

    negative: None is without. fps: as WanDiT.modulation takes it. block_frames: as window_flow takes it.
    """

    model: WanDiT
    positive: TextKeysValues
    negative: TextKeysValues | None
    scale: float
    fps: int
    block_frames: int | None

    def __call__(self, latents: Tensor, timesteps: Sequence[int]) -> Tensor:
        """The flow of `latents` in float32; timesteps: one for each latent frame."""
        shown = torch.tensor([list(timesteps)], dtype=torch.float64, device=latents.device)
        modulation = self.model.modulation(shown, self.fps)
        flow = window_flow(self.model, latents, modulation, self.positive, self.block_frames).float()
        if self.negative is None:
            return flow
        away = window_flow(self.model, latents, modulation, self.negative, self.block_frames).float()
        return away + self.scale * (flow - away)


@dataclass(frozen=True, slots=True)
class Conditions:
    """The clean frames that a video is given, as latents: at its start, and the one it ends on.

    addnoise: the timestep at which those at the start of every piece are shown, 0 for clean.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    addnoise: int = 0


def denoise_video(
    plan: VideoPlan,
    flow: Callable[[Tensor, Sequence[int]], Tensor],
    draw: Draw,
    conditions: Conditions,
    next_prefix: Callable[[Tensor], Tensor],
) -> Iterator[tuple[int, Row, Tensor]]:
    """Run every row of every piece: its piece's index, the row and the piece's latents, float32, which later
    rows change in place from row.finished on.

    next_prefix: the clean latents that follow from a whole piece's, for the beginning of the next; of those,
    and of conditions.start, what fills no whole block is cut from the end.
    """
    prefix = conditions.start
    for index, piece in enumerate(plan.pieces):
        latents = draw(index, 0, piece.sizes.frames)
        if prefix is not None:
            latents[:, :, : piece.sizes.ready_frames] = prefix[:, :, : piece.sizes.ready_frames]
        is_last = index + 1 == len(plan.pieces)
        end = conditions.end if is_last else None
        solver = UniPCSolver(plan.table, latents)
        for number, row in enumerate(piece.rows):
            shown, timesteps = _noised_prefix(
                latents[:, :, row.start : row.end], row, piece, conditions.addnoise,
                partial(draw, index, number + 1),
            )  # fmt: skip
            if end is not None:
                shown = torch.cat([shown, end], dim=2)
                timesteps = (*timesteps, *(0,) * end.shape[2])
            found = flow(shown, timesteps)
            first = row.moving[0] - row.start  # some frames move in every row, and they are neighbours
            solver.step(latents, found[:, :, first : first + len(row.moving)], row.moving, row.steps)
            yield index, row, latents
        if not is_last:
            prefix = next_prefix(latents)


def _noised_prefix(
    shown: Tensor, row: Row, piece: Piece, addnoise: int, draw: Callable[[int], Tensor]
) -> tuple[Tensor, tuple[int, ...]]:
    """The window and its timesteps, with noise on the clean frames at the beginning; the latents stay."""
    count = piece.sizes.ready_frames - row.start
    if not addnoise or count <= 0:
        return shown, row.timesteps
    share = addnoise / TRAIN_TIMESTEPS
    clean, rest = shown.split([count, shown.shape[2] - count], dim=2)
    noised = (1 - share) * clean + share * draw(count)
    return torch.cat([noised, rest], dim=2), ((addnoise,) * count + row.timesteps[count:])
