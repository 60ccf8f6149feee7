"""The facts that a caption of the toy world states."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rfengine.toy.world import BACKGROUNDS, MOTIONS, PALETTE, RADII, SHAPES, SPEEDS

_OBJECT = re.compile(rf"a ({'|'.join(RADII)}) ({'|'.join(PALETTE)}) ({'|'.join(SHAPES)})")


_DIRECTIONS = {"to the left": "left", "to the right": "right", "upwards": "up", "downwards": "down"}


_BOUNCES = {"left and right": "right", "up and down": "down"}


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
