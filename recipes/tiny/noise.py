"""Noise that tells what a caption leaves open: where a video begins, and the values that it does not say.

Were noise and video drawn apart, all that a few-step model could answer to pure noise is the mean of all that
is possible, and it would have to choose while it denoises. Pairs of noise and video may be drawn together as
long as each has its own law (arXiv 2304.14772). Here the angles of some pairs of coordinates of the noise, in
turns, tell what the video is, and their lengths stay: an angle is a place on a circle, or lies in the part of
the circle, as large as the value is likely, that stands for a value. As all places and all angles are equally
likely, the noise by itself is standard normal as before, and a model learns to read from it what to draw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from rfengine.toy.backgrounds import PERIODS, PLAIN
from rfengine.toy.captions import opened
from rfengine.toy.world import (
    MOTION_DIRECTIONS,
    MOTIONS,
    PALETTE,
    PANS,
    RADII,
    SHAPES,
    SPEEDS,
    Scene,
    WorldConfig,
)

PLACES = 3  # of a scene: x and y of its shape, and its view of the background
VALUES = (
    "second size", "colour", "background", "motion", "direction", "speed", "shape", "size", "camera", "pan",
    "second colour", "second shape",
)  # fmt: skip  # in the order of their coordinates; both of a pair are small, so no second size is told
_PATTERNS = 4  # of signs in two by two cells, which are a patch of the model


def places(scene: Scene, config: WorldConfig) -> tuple[float, float, float]:
    """Where a scene begins, in turns: x and y of its start, and its view in periods of its background."""
    x, y = scene.start
    period = PERIODS[scene.background or PLAIN]
    return x * config.scale / config.width % 1, y * config.scale / config.height % 1, scene.view / period % 1


def all_open(scene: Scene) -> Scene:
    """The scene with nothing said but how many shapes there are and whether the camera pans."""
    return opened(scene, random.Random(0), 1.0)


def told_values(scene: Scene, said: Scene, config: WorldConfig) -> list[tuple[float, float]]:
    """For each of VALUES of a scene of the world `config` of which a text says only what is in `said`: the
    part of the circle (from, to), in turns, that stands for it, as large as it is likely, given what is said
    and the values before it in the law; NaN for what is said or not there."""
    told = {name: (math.nan, math.nan) for name in VALUES}
    motion, pair = scene.motion or "", len(scene.objects) == 2
    if said.motion is None:
        told["motion"] = _part(motion, _motion_law(said, config))
    if said.direction is None and scene.direction is not None:
        told["direction"] = _part(scene.direction, dict.fromkeys(MOTION_DIRECTIONS[motion], 1.0))
    if said.speed is None:
        told["speed"] = _part(scene.speed, dict.fromkeys(SPEEDS, 1.0))
    if said.background is None:
        told["background"] = _part(scene.background, _background_law(scene.camera == "still", config))
    if scene.camera != "still":
        if said.camera != scene.camera:
            told["camera"] = _part(scene.camera, {"left": 1.0, "right": 1.0})
        if said.pan is None:
            told["pan"] = _part(scene.pan, dict.fromkeys(PANS, 1.0))
    taken = {entry.colour for entry in said.objects}
    for prefix, entry, known in zip(("", "second "), scene.objects, said.objects, strict=False):
        if known.colour is None:
            law = {name: float(name not in taken) for name in PALETTE}
            told[f"{prefix}colour"] = _part(entry.colour, law)
            taken = taken | {entry.colour}
        if known.shape is None:
            law = {name: float(motion != "turning" or name != "circle") for name in SHAPES}
            told[f"{prefix}shape"] = _part(entry.shape, law)
        if known.size is None and not pair:  # both of a pair are small
            told[f"{prefix}size"] = _part(entry.size, dict.fromkeys(RADII, 1.0))
    return [told[name] for name in VALUES]


def _motion_law(said: Scene, config: WorldConfig) -> dict[str, float]:
    """How likely each motion is for a scene with the objects of `said`."""
    law = dict(zip(MOTIONS, config.motion_weights, strict=True))
    if len(said.objects) == 2:
        return {name: float(name == "moving") for name in MOTIONS}
    law["moving"] *= 1 - config.pair_share
    shape = said.objects[0].shape
    if shape is not None:  # a turning shape is one of two, any other one of three
        law["turning"] *= 0.0 if shape == "circle" else 1.5
    return law


def _background_law(still: bool, config: WorldConfig) -> dict[str, float]:
    """How likely each background is behind a camera that stands still or pans; over a plain one it stands."""
    pans = {name: 0.0 if name == PLAIN else config.pan_share for name in config.backgrounds}
    return {name: 1 - share for name, share in pans.items()} if still else pans


def _part(value: str | None, law: Mapping[str, float]) -> tuple[float, float]:
    """The part of the circle that a value has, in turns, when all have theirs in the order of the law."""
    total, before = sum(law.values()), 0.0
    for name, weight in law.items():
        if name == value:
            return before / total, (before + weight) / total
        before += weight
    raise ValueError(f"{value} is none of {', '.join(law)}")


def told_turns(parts: Tensor, generator: torch.Generator) -> Tensor:
    """Angles [B, VALUES] in turns, anywhere in each of the parts [B, VALUES, 2]; NaN stays."""
    low, high = parts.unbind(2)
    return low + (high - low) * torch.rand(low.shape, generator=generator)


def telling_noise(noise: Tensor, begins: Tensor, values: Tensor) -> Tensor:
    """The noise [B, C, F, h, w] of a first chunk, made to tell the angles `begins` [B, PLACES], its places,
    and `values` [B, VALUES], all in turns; one that is NaN tells nothing, and its coordinates stay.

    The coordinates are sums over all frames and cells of every channel, with the signs of one of four
    patterns in two by two cells. Raises ValueError where there are less than are told.
    """
    turns = torch.cat([begins, values], 1).to(noise)
    count, (height, width) = turns.shape[1], noise.shape[3:]
    if 2 * count > _PATTERNS * noise.shape[1] or height % 2 or width % 2:
        raise ValueError(
            f"noise has {noise.shape[1]} channels of {height}x{width} cells; what it tells takes "
            f"{2 * count} coordinates, {_PATTERNS} of a channel, so use more channels and even sizes"
        )
    signs = _signs(height, width).to(noise) * (noise.shape[2] * height * width) ** -0.5
    coordinates = torch.einsum("bcfhw,phw->bpc", noise, signs).flatten(1)
    found = coordinates[:, : 2 * count].unflatten(1, (count, 2))
    angles = 2 * math.pi * turns
    wanted = found.norm(dim=2, keepdim=True) * torch.stack([angles.cos(), angles.sin()], 2)
    change = torch.zeros_like(coordinates)
    change[:, : 2 * count] = torch.where(turns.isnan()[..., None], 0.0, wanted - found).flatten(1)
    change = change.unflatten(1, (_PATTERNS, -1))
    return noise + torch.einsum("bpc,phw->bchw", change, signs)[:, :, None]


def _signs(height: int, width: int) -> Tensor:
    """The patterns [_PATTERNS, height, width]: all 1, and -1 in odd columns, in odd rows and in either."""
    rows, columns = (1 - 2 * (torch.arange(size) % 2) for size in (height, width))
    rows = torch.stack([rows.abs(), rows.abs(), rows, rows])
    columns = torch.stack([columns.abs(), columns, columns.abs(), columns])
    return rows[:, :, None] * columns[:, None, :]
