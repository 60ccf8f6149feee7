"""Exact rewards of the toy world, measured by its detectors on the frames alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.training.toy_detector import Detection, ObjectDetection, detect
from rfengine.training.toy_world import BACKGROUNDS, MOTIONS, PALETTE, RADII, SHAPES, SPEEDS, WorldConfig

_OBJECT = re.compile(rf"a ({'|'.join(RADII)}) ({'|'.join(PALETTE)}) ({'|'.join(SHAPES)})")
_DIRECTIONS = {"to the left": "left", "to the right": "right", "upwards": "up", "downwards": "down"}
_BOUNCES = {"left and right": "right", "up and down": "down"}
_TOP_SPEED = max(SPEEDS.values())
_HIGHEST = 1.5  # of the top speed: what moves faster than anything in the world earns no more


@dataclass(frozen=True, slots=True)
class CaptionFacts:
    """What a caption says; None where it says nothing, as an open caption about the speed."""

    objects: tuple[tuple[str, str, str], ...]  # size, colour, shape
    motion: str
    direction: str | None
    speed: str | None
    background: str


def parse_caption(text: str) -> CaptionFacts:
    """The facts of a caption of the toy world, open or not. Raises ValueError for any other text."""
    objects = tuple(_OBJECT.findall(text))
    motion = next((name for name in MOTIONS if f" {name}" in text), None)
    background = next((name for name in BACKGROUNDS if text.endswith(f"over a {name}")), None)
    if not objects or motion is None or background is None:
        raise ValueError(f"{text!r} is no caption of the toy world; use one that toy_world.caption gives")
    words = {"moving": _DIRECTIONS, "bouncing": _BOUNCES}.get(motion, {})
    direction = next((name for phrase, name in words.items() if phrase in text), None)
    speed = next((name for name in SPEEDS if f" {name}" in text), None)
    return CaptionFacts(objects, motion, direction, speed, background)


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
            "motion": torch.tensor([_motion(facts, seen) for facts, seen in pairs]),
            "agreement": torch.tensor([_agreement(facts, seen) for facts, seen in pairs]),
        }


def _named(facts: CaptionFacts, detection: Detection) -> list[ObjectDetection | None]:
    found = {entry.colour: entry for entry in detection.objects}
    return [found.get(colour) for _, colour, _ in facts.objects]


def _motion(facts: CaptionFacts, detection: Detection) -> float:
    objects = _named(facts, detection)
    if any(entry is None for entry in objects):
        return 0.0
    speeds = [min(_HIGHEST, entry.speed_value / _TOP_SPEED) for entry in objects]
    present = [float(entry.presence.float().mean()) for entry in objects]
    return sum(speed * there for speed, there in zip(speeds, present, strict=True)) / len(objects)


def _agreement(facts: CaptionFacts, detection: Detection) -> float:
    objects = _named(facts, detection)
    right = [facts.background == detection.background, len(detection.objects) == len(objects)]
    for (size, _, shape), entry in zip(facts.objects, objects, strict=True):
        seen = entry is not None
        right += [seen, seen and entry.size == size, seen and entry.shape == shape]
        right.append(seen and entry.motion == facts.motion)
        if facts.direction is not None:
            right.append(seen and entry.direction == facts.direction)
        if facts.speed is not None:
            right.append(seen and entry.speed == facts.speed)
    return sum(right) / len(right)
