"""What every frame is like as a whole: light, colour, sharpness. Drift and flicker are read off these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.evaluation.video_frames import Frames, as_frames, gathered, picture_batches

_LUMA = (0.299, 0.587, 0.114)  # BT.601
_CLIPPED = (2.5 / 255, 252.5 / 255)  # at or beyond these a value says no more than that it is an end
_FLOOR = 0.5 / 255  # of contrast and detail: below half a step of 8 bits there is none


@dataclass(frozen=True, slots=True)
class FrameSignals:
    """One value a frame, float32.

    luma, contrast [T]: mean and deviation of the brightness, from 0 to 1. colour [T, 4]: means and deviations
    of both chroma axes. sharpness [T]: log2 of the deviation of the Laplacian over that of the brightness, so
    that it does not follow exposure. clipped [T]: the share of values at either end of the range.
    """

    luma: Tensor
    contrast: Tensor
    colour: Tensor
    sharpness: Tensor
    clipped: Tensor


def luma_and_chroma(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness [B, H, W] from 0 to 1 and chroma [B, 2, H, W] from -0.5 to 0.5 of pictures [B, 3, H, W]."""
    weights = pictures.new_tensor(_LUMA)
    luma = torch.einsum("bchw,c->bhw", pictures, weights)
    chroma = torch.stack((pictures[:, 2], pictures[:, 0]), dim=1).sub_(luma[:, None])
    chroma /= (2 * (1 - weights[[2, 0]]))[:, None, None]
    return luma, chroma


def frame_signals(video: Tensor | Frames) -> FrameSignals:
    """The signals of frames, uint8 [T, H, W, 3] where they are a tensor, at full size."""
    video = as_frames(video)
    columns = gathered(map(_picture_signals, picture_batches(video)), video.count).T.contiguous()
    return FrameSignals(columns[0], columns[1], columns[2:6].T.contiguous(), columns[6], columns[7])


def _picture_signals(pictures: Tensor) -> Tensor:
    """The fields of FrameSignals of one batch, side by side: [B, 8]."""
    clipped = _clipped_share(pictures)
    luma, chroma = luma_and_chroma(pictures)
    colour = torch.cat((chroma.mean((2, 3)), chroma.std((2, 3), correction=0)), dim=1)
    del chroma  # large frames fill the memory
    contrast = luma.std((1, 2), correction=0)
    sharpness = torch.log2((_detail(luma) + _FLOOR) / (contrast + _FLOOR))
    alone = [column[:, None] for column in (luma.mean((1, 2)), contrast, sharpness, clipped)]
    return torch.cat((*alone[:2], colour, *alone[2:]), dim=1)


def _clipped_share(pictures: Tensor) -> Tensor:
    ends = (pictures < _CLIPPED[0]).logical_or_(pictures > _CLIPPED[1])
    return ends.float().mean((1, 2, 3))


def _detail(luma: Tensor) -> Tensor:
    """The deviation of the Laplacian, [B]; 0 for pictures too small to have one."""
    if min(luma.shape[1:]) < 3:
        return luma.new_zeros(len(luma))
    middle = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1]
    around.add_(luma[:, 1:-1, :-2]).add_(luma[:, 1:-1, 2:]).div_(4)
    return around.neg_().add_(middle).square_().mean((1, 2)).sqrt()
