"""Rewards: what a video is scored by, and the one score a student is trained on. B videos of T frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rfengine.evaluation.optical_flow import moving_speed, optical_flow


class Reward(Protocol):
    """Named scores of every video by itself; higher is better."""

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """frames: [B, T, H, W, 3], uint8 or float from 0 to 1; B prompts. Every score is float32 [B]."""
        ...


class TrainedScore:
    """The one score of a reward that a student is trained on.

    score: the reward's name and that of its score, as "toy.motion". After a call, `parts` holds every score,
    float32 [B] each, by such names. Raises ValueError for scores that are missing, not one for each video, or
    not finite.
    """

    def __init__(self, reward: Reward, score: str) -> None:
        self.reward, self.score = reward, score
        self.parts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score, float32 [B] on the device of the frames."""
        if len(frames) != len(prompts):
            raise ValueError(
                f"there are {len(frames)} videos and {len(prompts)} prompts; give one prompt a video"
            )
        owner = self.score.split(".")[0]
        self.parts = {
            f"{owner}.{name}": _checked(f"{owner}.{name}", values, len(frames)).to(frames.device)
            for name, values in self.reward(frames, prompts).items()
        }
        if self.score not in self.parts:
            raise ValueError(
                f"no reward gives the score {self.score!r}; there are {', '.join(self.parts) or 'none'}"
            )
        return self.parts[self.score]


def _checked(name: str, values: Tensor, count: int) -> Tensor:
    if values.shape != (count,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} for {count} videos; a reward gives one score each"
        )
    values = values.detach().float()
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} is {values[bad[0]].item()} for video {bad[0]} of the batch; a score is finite"
        )
    return values


@dataclass(frozen=True, slots=True)
class MotionReward:
    """motion: how fast what moves in the video is, in heights of the picture per second; needs no weights.

    The flow (evaluation/optical_flow.py) is measured on locally normalised frames and trusted where blocks
    agree and the way back fits, so that drift of light and colour, pulses, noise and flicker are no motion.
    Of the speeds between neighbouring frames the middle 80% are averaged: a jump between two chunks is none.

    fps: frames a second. share: the fastest part of the picture that counts. highest: what moves faster earns
    no more, since a score without end is an invitation to shake the picture.
    """

    fps: float = 16.0
    share: float = 0.05
    highest: float = 2.0

    def __post_init__(self) -> None:
        if not (self.fps > 0 and self.highest > 0 and 0 < self.share <= 1):
            raise ValueError(
                f"fps is {self.fps}, highest {self.highest} and share {self.share}; use positive numbers, "
                "and a share up to 1"
            )

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Frames [B, T, H, W, 3], uint8 or float from 0 to 1, T at least 2; the prompts do not matter."""
        speeds = [self._speed(clip) for clip, _ in zip(frames, prompts, strict=True)]
        return {"motion": torch.stack(speeds) if speeds else frames.new_zeros(0, dtype=torch.float32)}

    def _speed(self, clip: Tensor) -> Tensor:
        speeds = moving_speed(optical_flow(clip), self.share).sort().values
        outside = len(speeds) // 10
        middle = speeds[outside : len(speeds) - outside].mean()
        return (middle * self.fps / clip.shape[1]).clamp(max=self.highest)
