"""Noise that tells what a caption leaves open: where a video begins, and the values that it does not say.

Were noise and video drawn apart, all that a few-step model could answer to pure noise is the mean of all that
is possible, and it would have to choose while it denoises. Pairs of noise and video may be drawn together as
long as each has its own law (arXiv 2304.14772). Here some coordinates of the noise, each standard normal
and independent of the others, tell what the video is: a place on a circle is the angle of two of them, whose
length stays; a value is the part of the normal law, as likely as the value, in which one of them lies. So
the noise by itself is as before, and a model learns to read from it what to draw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from rfengine.toy.backgrounds import PERIODS, PLAIN, strongest_cycles
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

PLACES = 3  # of a scene: x and y of its shape, and its view in the strongest wave of the background
VALUES = (
    "colour", "background", "motion", "direction", "speed", "shape", "size", "camera", "pan",
    "second colour", "second shape", "second size", "cycle",
)  # fmt: skip


def places(scene: Scene, config: WorldConfig) -> tuple[float, float, float]:
    """Where a scene begins, in turns: x and y of its start, and its view in cycles of the strongest wave of
    its background. In which of these cycles of a period it begins is one of VALUES: a model would hardly read
    seven waves from a single turn."""
    x, y = scene.start
    turns = x * config.scale / config.width, y * config.scale / config.height, _cycles(scene)
    return turns[0] % 1, turns[1] % 1, turns[2] % 1


def _cycles(scene: Scene) -> float:
    """The view of a scene in cycles of the strongest wave of its background."""
    name = scene.background or PLAIN
    return scene.view / PERIODS[name] * strongest_cycles(name)


def all_open(scene: Scene) -> Scene:
    """The scene with nothing said but how many shapes there are and whether the camera pans."""
    return opened(scene, random.Random(0), 1.0)


def told_values(scene: Scene, said: Scene, config: WorldConfig) -> list[tuple[float, float]]:
    """For each of VALUES of a scene of the world `config` of which a text says only what is in `said`: the
    part (from, to) of the range from 0 to 1 that stands for it, as long as it is likely, given what is said
    and the values before it in the law; NaN for what is said or not there. No text says the cycle."""
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
    cycles = strongest_cycles(scene.background or PLAIN)
    if cycles > 1:
        told["cycle"] = _part(str(int(_cycles(scene)) % cycles), dict.fromkeys(map(str, range(cycles)), 1.0))
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
    """The part of the range from 0 to 1 that a value has, when all have theirs in the order of the law."""
    total, before = sum(law.values()), 0.0
    for name, weight in law.items():
        if name == value:
            return before / total, (before + weight) / total
        before += weight
    raise ValueError(f"{value} is none of {', '.join(law)}")


def told_coordinates(parts: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal coordinates [B, VALUES] of parts [B, VALUES, 2], anywhere in each part; NaN stays."""
    low, high = parts.double().unbind(2)
    inside = torch.rand(low.shape, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    return torch.special.ndtri(low + (high - low) * inside).float()


def telling_noise(noise: Tensor, turns: Tensor, values: Tensor) -> Tensor:
    """The noise [B, C, F, h, w] of a first chunk, made to tell `turns` [B, PLACES], places of its scene, and
    the coordinates `values` [B, VALUES]; one that is NaN tells nothing, and stays as it is.

    The coordinates are means over a frame, at every channel, of the noise and of its changes in time. Raises
    ValueError where there are less than are told.
    """
    directions = _directions(noise.shape[1], noise.shape[2]).to(noise)
    cells = noise.shape[3] * noise.shape[4]
    found = cells**0.5 * noise.mean((3, 4)).flatten(1) @ directions.T
    pairs, others = found[:, : 2 * PLACES].unflatten(1, (PLACES, 2)), found[:, 2 * PLACES :]
    angles = 2 * math.pi * turns.to(noise)
    wanted = pairs.norm(dim=2, keepdim=True) * torch.stack([angles.cos(), angles.sin()], 2)
    values = torch.where(values.isnan(), others, values.to(noise))
    change = torch.cat([(wanted - pairs).flatten(1), values - others], dim=1) @ directions
    return noise + cells**-0.5 * change.unflatten(1, noise.shape[1:3])[..., None, None]


def _directions(channels: int, frames: int) -> Tensor:
    """Orthonormal [2 * PLACES + VALUES, channels * frames]: of all channels first the mean over time, then
    the cosines of ever faster changes."""
    count = 2 * PLACES + len(VALUES)
    if channels * frames < count:
        raise ValueError(
            f"noise has {channels} channels and {frames} frames; what it tells takes {count} coordinates, so "
            "use more channels or longer chunks"
        )
    place, wave = torch.arange(frames) + 0.5, torch.arange(frames)[:, None]
    cosines = torch.cos(math.pi / frames * wave * place)
    cosines = cosines / cosines.norm(dim=1, keepdim=True)
    basis = torch.einsum("tf,cd->tcdf", cosines, torch.eye(channels))
    return basis.reshape(channels * frames, channels * frames)[:count]
