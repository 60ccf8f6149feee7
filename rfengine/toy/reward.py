"""Exact rewards of the toy world, measured by its detectors on the frames alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.toy.captions import parse_caption
from rfengine.toy.detector import Detection, detect, matched, score
from rfengine.toy.world import SPEEDS, Scene, WorldConfig

_TOP_SPEED = max(SPEEDS.values())
_HIGHEST = 1.5  # of the top speed: what moves faster than anything in the world earns no more


@dataclass(frozen=True, slots=True)
class ToyReward:
    """Scores of videos of the toy world.

    motion: how fast the named objects move, 1 being the world's top speed and 1.5 the most that counts, 0
    where one of them is not there. agreement: the share of what the caption says that the detectors find.
    """

    world: WorldConfig = WorldConfig()

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Frames [B, T, H, W, 3], uint8 or float from 0 to 1, and B captions to [B] float32 each."""
        pairs = [
            (parse_caption(text), detect(clip, self.world))
            for clip, text in zip(frames.cpu(), prompts, strict=True)
        ]
        return {
            "motion": torch.tensor([named_motion(said, seen) for said, seen in pairs]),
            "agreement": torch.tensor([_agreement(said, seen) for said, seen in pairs]),
        }


def named_motion(said: Scene, detection: Detection) -> float:
    """The mean motion of the objects that a scene names, as ToyReward has it."""
    objects = matched(said, detection)
    if any(entry is None for entry in objects):
        return 0.0
    speeds = [min(_HIGHEST, entry.speed_value / _TOP_SPEED) for entry in objects]
    present = [float(entry.presence.float().mean()) for entry in objects]
    return sum(speed * there for speed, there in zip(speeds, present, strict=True)) / len(objects)


def _agreement(said: Scene, detection: Detection) -> float:
    count = [len(detection.objects) == len(said.objects)]
    right = [*count, *score(said, detection).values()]
    return sum(right) / len(right)
