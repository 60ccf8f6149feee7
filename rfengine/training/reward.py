"""Rewards: what a video is scored by, and the one score a student is trained on. B videos of T frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rfengine.evaluation.optical_flow import moving_speed, optical_flow


class Reward(Protocol):
    """Named scores of every video by itself; higher is better."""

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """frames: [B, T, H, W, 3], uint8 or float from 0 to 1; B prompts. Every score is float32 [B]."""
        ...


class Scored(NamedTuple):
    """total: [B], what is trained on. parts: [B] each, by "reward.score", without their weights."""

    total: Tensor
    parts: dict[str, Tensor]


class WeightedSum:
    """One score out of several: the sum of weights["reward.score"] times that score.

    `parts` holds the scores of the latest call, for a log. Scores without a weight are watched, and counted
    with 0. Raises ValueError for a weight that names no reward, for a reward that has no weight, and, when it
    is called, for a reward that gives another number of scores than there are videos, or NaN or an infinity.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        owners = {name: name.partition(".")[0] for name in weights}
        strangers = [name for name, owner in owners.items() if owner not in rewards or "." not in name]
        if strangers:
            raise ValueError(
                f"the weight {strangers[0]!r} names no score; use 'reward.score' with a reward out of "
                f"{', '.join(rewards) or 'none'}"
            )
        idle = [name for name in rewards if name not in owners.values()]
        if idle or not weights:
            raise ValueError(
                f"the reward {', '.join(idle) or 'sum'} has no weight; give it one or leave it out"
            )
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is {weight}; use a finite number")
        self.rewards, self.weights = dict(rewards), dict(weights)
        self.parts: dict[str, Tensor] = {}

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """The total, float32 [B] on the device of the frames."""
        return self.scores(frames, prompts).total

    def scores(self, frames: Tensor, prompts: Sequence[str]) -> Scored:
        if len(frames) != len(prompts):
            raise ValueError(
                f"there are {len(frames)} videos and {len(prompts)} prompts; give one prompt a video"
            )
        parts: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, reward in self.rewards.items():
                for score, values in reward(frames, prompts).items():
                    parts[f"{name}.{score}"] = _checked(f"{name}.{score}", values, len(frames)).to(
                        frames.device
                    )
        missing = [name for name in self.weights if name not in parts]
        if missing:
            raise ValueError(
                f"no reward gives the score {missing[0]!r}; there are {', '.join(parts) or 'none'}"
            )
        self.parts = parts
        weighted = [weight * parts[name] for name, weight in self.weights.items()]
        return Scored(torch.stack(weighted).sum(0), parts)


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
