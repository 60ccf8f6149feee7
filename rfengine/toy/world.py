"""A procedural world of moving shapes whose captions and ground truth are exact.

A scene is one shape (or two that move together) over a grey background. Positions wrap around the borders, so
a shape that moves left keeps moving left in an endless video, and any part of that video can be drawn on its
own. Pixels count from the top left; positions are (x, y) in pixels, speeds in pixels a frame, angles in
radians.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "held_out", "all"]

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.72, 0.18),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.75, 0.15, 0.85),
}
SHAPES = ("circle", "square", "triangle")
RADII: dict[str, float] = {"small": 12.0, "large": 18.0}  # pixels, when the shorter side of the video has 64
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, float] = {"slowly": 1.0, "fast": 2.0}  # pixels a frame, at 64 pixels
BACKGROUNDS = ("grey wall", "checkered floor", "striped wall", "dotted wall")
MOTIONS = ("moving", "bouncing", "turning", "growing")

_DIRECTION_WORDS: dict[str, dict[str, str]] = {  # of the motions that have a direction
    "moving": {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"},
    "bouncing": {"right": "left and right", "down": "up and down"},
}
_OBJECT = re.compile(rf"a ({'|'.join(RADII)}) ({'|'.join(PALETTE)}) ({'|'.join(SHAPES)})")
_SQUARE_SIDE = 0.886  # half side over radius: the square of the same area as the circle
_TRIANGLE_RADIUS = 1.3  # circumradius over radius
_BOUNCE_REACH = 8.0  # pixels from the middle to either turning point, at 64 pixels
_PAIR_OFFSET = 16.0  # pixels from the middle to either shape of a pair, across their motion, at 64 pixels
START_JITTER = 3.0  # pixels, at 64 pixels
TURN_DEGREES = 3.0  # a frame, turning slowly
PULSE = 0.3  # part of the radius that growing adds at most
PULSE_FRAMES = 48.0  # frames from one largest size to the next, growing slowly
_DARK, _LIGHT = 0.38, 0.62


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Size of the videos and how often each kind of scene is drawn.

    `motion_weights` belongs to MOTIONS in order; `pair_share` is the part of the moving scenes that has two
    shapes.
    """

    height: int = 64
    width: int = 64
    motion_weights: tuple[float, ...] = (0.85, 0.05, 0.05, 0.05)
    pair_share: float = 0.08

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ValueError(f"{name} is {getattr(self, name)}; use a positive multiple of 16")
        if (
            len(self.motion_weights) != len(MOTIONS)
            or min(self.motion_weights) < 0
            or not sum(self.motion_weights)
        ):
            raise ValueError(
                f"motion_weights is {self.motion_weights}; give one weight >= 0 for each of {MOTIONS}"
            )
        if not 0 <= self.pair_share <= 1:
            raise ValueError(f"pair_share is {self.pair_share}; use a share from 0 to 1")

    @property
    def scale(self) -> float:
        """Pixels of this world per pixel of the 64-pixel world."""
        return min(self.height, self.width) / 64


DEFAULT_WORLD = WorldConfig()


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape: names of PALETTE, SHAPES and RADII."""

    colour: str
    shape: str
    size: str

    def __post_init__(self) -> None:
        for name, known in (("colour", PALETTE), ("shape", SHAPES), ("size", RADII)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Scene:
    """What a video shows, from its first frame to any later one.

    `direction` is None for turning and growing; a bouncing shape starts towards it and comes back. `speed` is
    None where an open caption leaves it open; such a scene cannot be drawn. `start` is the offset (x, y) of
    the first position from the middle, in pixels of the 64-pixel world. Only it is not said by the caption.
    """

    objects: tuple[SceneObject, ...]
    motion: str
    speed: str | None
    direction: str | None
    background: str
    start: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name, known in (("motion", MOTIONS), ("speed", (*SPEEDS, None)), ("background", BACKGROUNDS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(str, known))}"
                )
        allowed = tuple(_DIRECTION_WORDS.get(self.motion, (None,)))
        if self.direction not in allowed:
            raise ValueError(f"direction is {self.direction!r}; a {self.motion} shape has one of {allowed}")
        if len(self.objects) not in (1, 2) or (len(self.objects) == 2 and self.motion != "moving"):
            raise ValueError(
                f"{len(self.objects)} objects are {self.motion}; use one, or two that are moving"
            )
        if len({entry.colour for entry in self.objects}) != len(self.objects):
            raise ValueError("both objects have one colour; give each its own, which distinguishes them")


@dataclass(frozen=True, slots=True)
class ObjectTrack:
    """Ground truth of one object over T frames, in pixels of the drawn video."""

    position: Tensor  # [T, 2], x in [0, width), y in [0, height)
    radius: Tensor  # [T]
    angle: Tensor  # [T], clockwise


def caption(scene: Scene) -> str:
    """The sentence that describes the scene; equal sentences mean scenes that differ in `start` alone."""
    subject = " and ".join(f"a {entry.size} {entry.colour} {entry.shape}" for entry in scene.objects)
    words = ["growing and shrinking" if scene.motion == "growing" else scene.motion]
    if scene.speed is not None:
        words.append(scene.speed)
    if scene.direction is not None:
        words.append(_DIRECTION_WORDS[scene.motion][scene.direction])
    return f"{subject} {' '.join(words)} over a {scene.background}"


def open_caption(scene: Scene) -> str:
    """The caption without its speed: slow and fast videos are equally likely under it."""
    return caption(dataclasses.replace(scene, speed=None))


def parse_caption(text: str) -> Scene:
    """The scene of a caption, open or not, from the middle. Raises ValueError for any other text."""
    objects = tuple(SceneObject(colour, shape, size) for size, colour, shape in _OBJECT.findall(text))
    motion = next((name for name in MOTIONS if f" {name}" in text), "")
    background = next((name for name in BACKGROUNDS if text.endswith(f"over a {name}")), "")
    words = _DIRECTION_WORDS.get(motion, {})
    direction = next((name for name, phrase in words.items() if phrase in text), None)
    speed = next((name for name in SPEEDS if f" {name}" in text), None)
    try:
        return Scene(objects, motion, speed, direction, background)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no caption of the toy world; use one that toy.world.caption returns"
        ) from error


def is_held_out(scene: Scene) -> bool:
    """Whether the caption belongs to the tenth that training never sees; stable across processes."""
    return hashlib.sha256(caption(scene).encode()).digest()[0] % 10 == 0


def sample_scenes(
    count: int, seed: int, config: WorldConfig = DEFAULT_WORLD, split: Split = "all"
) -> list[Scene]:
    """Draw `count` scenes; the same arguments give the same scenes."""
    generator = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = _sample_scene(generator, config)
        if split == "all" or is_held_out(scene) == (split == "held_out"):
            scenes.append(scene)
    return scenes


def _sample_scene(generator: random.Random, config: WorldConfig) -> Scene:
    motion = generator.choices(MOTIONS, config.motion_weights)[0]
    count = 2 if motion == "moving" and generator.random() < config.pair_share else 1
    colours = generator.sample(list(PALETTE), count)
    shapes = [shape for shape in SHAPES if motion != "turning" or shape != "circle"]
    sizes = ["small"] if count == 2 else list(RADII)
    directions = list(_DIRECTION_WORDS.get(motion, (None,)))
    return Scene(
        objects=tuple(
            SceneObject(colour, generator.choice(shapes), generator.choice(sizes)) for colour in colours
        ),
        motion=motion,
        speed=generator.choice(list(SPEEDS)),
        direction=generator.choice(directions),
        background=generator.choice(BACKGROUNDS),
        start=(
            generator.uniform(-START_JITTER, START_JITTER),
            generator.uniform(-START_JITTER, START_JITTER),
        ),
    )


def ground_truth(
    scene: Scene, frames: int, start_frame: int = 0, config: WorldConfig = DEFAULT_WORLD
) -> tuple[ObjectTrack, ...]:
    """The true track of every object over frames `start_frame` .. `start_frame + frames - 1`."""
    if frames < 1 or start_frame < 0:
        raise ValueError(
            f"frames is {frames} and start_frame {start_frame}; draw at least one frame, from 0 on"
        )
    time = torch.arange(start_frame, start_frame + frames, dtype=torch.float64)
    speed = SPEEDS[scene.speed]
    along = torch.tensor(DIRECTIONS.get(scene.direction or "", (0, 0)), dtype=torch.float64)
    travelled = speed * time
    if scene.motion == "bouncing":
        phase = (travelled / _BOUNCE_REACH + 1) % 4
        travelled = _BOUNCE_REACH * (torch.minimum(phase, 4 - phase) - 1)
    angle = time * math.radians(TURN_DEGREES * speed) if scene.motion == "turning" else torch.zeros_like(time)
    pulse = (
        1 + PULSE * torch.sin(2 * math.pi * speed * time / PULSE_FRAMES) if scene.motion == "growing" else 1.0
    )
    middle = torch.tensor((config.width, config.height), dtype=torch.float64) / 2
    offset = torch.tensor(scene.start, dtype=torch.float64)
    across = along.flip(0).abs() * _PAIR_OFFSET
    extent = torch.tensor((config.width, config.height), dtype=torch.float64)
    tracks = []
    for index, entry in enumerate(scene.objects):
        aside = across * (2 * index - 1) if len(scene.objects) == 2 else torch.zeros(2, dtype=torch.float64)
        moved = offset + aside + travelled[:, None] * along
        radius = RADII[entry.size] * config.scale * pulse * torch.ones_like(time)
        tracks.append(ObjectTrack((middle + config.scale * moved) % extent, radius, angle))
    return tuple(tracks)


def render(scene: Scene, frames: int, start_frame: int = 0, config: WorldConfig = DEFAULT_WORLD) -> Tensor:
    """Draw the frames of `ground_truth`, anti-aliased: float32 [T, H, W, 3] from 0 to 1."""
    pixels = background_image(scene.background, config).expand(frames, -1, -1, -1)
    tracks = ground_truth(scene, frames, start_frame, config)
    for entry, track in reversed(list(zip(scene.objects, tracks, strict=True))):
        coverage = shape_coverage(entry.shape, track, config)[..., None]
        pixels = torch.lerp(pixels, torch.tensor(PALETTE[entry.colour]).expand_as(pixels), coverage)
    return pixels.contiguous()


def shape_coverage(shape: str, track: ObjectTrack, config: WorldConfig) -> Tensor:
    """The part of every pixel that the shape covers: float32 [T, H, W] from 0 to 1."""
    position = track.position.float()
    x = _wrapped_distance(torch.arange(config.width) + 0.5, position[:, 0], config.width)[:, None, :]
    y = _wrapped_distance(torch.arange(config.height) + 0.5, position[:, 1], config.height)[:, :, None]
    if bool(track.angle.any()):
        cosine, sine = (
            part.float()[:, None, None] for part in (torch.cos(track.angle), torch.sin(track.angle))
        )
        x, y = cosine * x + sine * y, cosine * y - sine * x
    radius = track.radius.float()[:, None, None]
    if shape == "circle":
        distance = torch.sqrt(x.square() + y.square()) - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - _SQUARE_SIDE * radius
    else:
        slanted = 0.5 * math.sqrt(3.0) * x.abs() - 0.5 * y
        distance = torch.maximum(slanted, y) - 0.5 * _TRIANGLE_RADIUS * radius
    return (0.5 - distance).clamp(0, 1)


def _wrapped_distance(grid: Tensor, centre: Tensor, period: int) -> Tensor:
    return (grid - centre[:, None] + period / 2) % period - period / 2


def background_image(background: str, config: WorldConfig) -> Tensor:
    """The background alone: float32 [H, W, 3], equal channels."""
    step = 8 * config.scale
    x = (torch.arange(config.width) + 0.5)[None, :]
    y = (torch.arange(config.height) + 0.5)[:, None]
    if background == "grey wall":
        light = torch.full((config.height, config.width), 0.5)
    elif background == "checkered floor":
        light = ((x // step + y // step) % 2).float()
    elif background == "striped wall":
        light = ((x // step) % 2).expand(config.height, -1).float()
    else:
        distance = torch.sqrt((x % (2 * step) - step).square() + (y % (2 * step) - step).square())
        light = (0.5 + 0.4 * step - distance).clamp(0, 1)
    return (_DARK + (_LIGHT - _DARK) * light)[..., None].expand(-1, -1, 3)


def as_model_pixels(clips: Sequence[Tensor]) -> Tensor:
    """Clips [T, H, W, 3] from 0 to 1 -> [B, 3, T, H, W] from -1 to 1."""
    return torch.stack(list(clips)).permute(0, 4, 1, 2, 3) * 2 - 1


def as_clips(pixels: Tensor) -> list[Tensor]:
    """[B, 3, T, H, W] around -1 to 1 -> clips [T, H, W, 3] from 0 to 1."""
    return list(((pixels.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1))
