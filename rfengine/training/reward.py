"""Rewards: what a video is scored by, and the one score a student is trained on. B videos of T frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.evaluation.optical_flow import moving_speed, optical_flow

# of frames [B, T, H, W, 3], uint8 or float from 0 to 1, and B prompts: named scores, float32 [B], of every
# video by itself; higher is better
Reward = Callable[[Tensor, Sequence[str]], dict[str, Tensor]]
_FASTEST = 0.05  # the part of the picture that counts as what moves
_HIGHEST = 2.0  # heights a second; a score without end is an invitation to shake the picture


@dataclass(frozen=True, slots=True)
class TrainedScore:
    """The one score of a reward that a student is trained on, by the reward's name and its own: "toy.motion".

    held_out: the score that must not fall while this one rises, "" where there is none.
    """

    reward: Reward
    name: str
    held_out: str = ""

    @torch.no_grad()
    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The score, and all scores by such names, float32 [B] each on the device of the frames.

        Raises ValueError for scores that are not finite.
        """
        owner, parts = self.name.split(".")[0], {}
        for name, values in self.reward(frames, prompts).items():
            if bad := (~values.isfinite()).nonzero().flatten().tolist():
                raise ValueError(
                    f"{owner}.{name} is {values[bad[0]].item()} for video {bad[0]} of the batch; a score is "
                    "finite"
                )
            parts[f"{owner}.{name}"] = values.detach().float().to(frames.device)
        return parts[self.name], parts


def motion_reward(frames: Tensor, prompts: Sequence[str], fps: float = 16.0) -> dict[str, Tensor]:
    """motion: how fast what moves in the video is, in heights of the picture per second; needs no weights.

    frames: [B, T, H, W, 3], uint8 or float from 0 to 1, T at least 2; the prompts do not matter.
    The flow (evaluation/optical_flow.py) is measured on locally normalised frames and trusted where blocks
    agree and the way back fits, so that drift of light and colour, pulses, noise and flicker are no motion.
    Of the speeds between neighbouring frames the middle 80% are averaged: a jump between two chunks is none.
    """
    scores = frames.new_zeros(len(frames), dtype=torch.float32)
    for row, clip in enumerate(frames):
        speeds = moving_speed(optical_flow(clip), _FASTEST).sort().values
        outside = len(speeds) // 10
        middle = speeds[outside : len(speeds) - outside].mean()
        scores[row] = (middle * fps / clip.shape[1]).clamp(max=_HIGHEST)
    return {"motion": scores}
