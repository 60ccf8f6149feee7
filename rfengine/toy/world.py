"""A procedural world of moving shapes whose ground truth is exact.

A scene is one shape (or two that move together) over a background, seen by a camera that stands still or
pans. Shapes are placed in the frame and wrap around its borders, so a shape that moves left keeps moving left
in an endless video; the background has no end (backgrounds.py). Any part of a video can be drawn on its own,
and a scene can go on from another one. Pixels count from the top left; positions are (x, y) in pixels, speeds
in pixels a frame, angles in radians.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.toy.backgrounds import BACKGROUNDS, PERIODS, PLAIN, draw_background

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
MOTIONS = ("moving", "bouncing", "turning", "growing")
MOTION_DIRECTIONS: dict[str, tuple[str, ...]] = {  # of the motions that have a direction
    "moving": tuple(DIRECTIONS),
    "bouncing": ("right", "down"),
}
CAMERAS: dict[str, int] = {"still": 0, "left": -1, "right": 1}  # where a camera pans to
PANNING = "panning"  # a camera that pans, to either side
PANS: dict[str, float] = {"slowly": 0.5, "fast": 1.25}  # pixels a frame, at 64 pixels
CHANGES = ("colour", "shape", "size", "background", "motion", "direction", "speed", "camera")

_SQUARE_SIDE = 0.886  # half side over radius: the square of the same area as the circle
_TRIANGLE_RADIUS = 1.3  # circumradius over radius
_BOUNCE_REACH = 8.0  # pixels from the middle to either turning point, at 64 pixels
_PAIR_OFFSET = 16.0  # pixels from the middle to either shape of a pair, across their motion, at 64 pixels
TURN_DEGREES = 3.0  # a frame, turning slowly
PULSE = 0.3  # part of the radius that growing adds at most
PULSE_FRAMES = 48.0  # frames from one largest size to the next, growing slowly


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Size of the videos and how often each kind of scene is drawn.

    `motion_weights` belongs to MOTIONS in order; `pair_share` is the part of the moving scenes that has two
    shapes, `pan_share` the part of the scenes over anything but a plain wall whose camera pans. `backgrounds`
    are equally likely.
    """

    height: int = 64
    width: int = 64
    motion_weights: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    pair_share: float = 0.15
    pan_share: float = 0.4
    backgrounds: tuple[str, ...] = BACKGROUNDS

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ValueError(f"{name} is {getattr(self, name)}; use a positive multiple of 16")
        weights = self.motion_weights
        if len(weights) != len(MOTIONS) or min(weights) < 0 or not sum(weights):
            raise ValueError(f"motion_weights is {weights}; give one weight >= 0 for each of {MOTIONS}")
        for name in ("pair_share", "pan_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use a share from 0 to 1")
        if not self.backgrounds or not set(self.backgrounds) <= set(BACKGROUNDS):
            raise ValueError(f"backgrounds is {self.backgrounds}; use some of {', '.join(BACKGROUNDS)}")

    @property
    def scale(self) -> float:
        """Pixels of this world per pixel of the 64-pixel world."""
        return min(self.height, self.width) / 64


DEFAULT_WORLD = WorldConfig()


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape: names of PALETTE, SHAPES and RADII; None is open."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("colour", PALETTE), ("shape", SHAPES), ("size", RADII)):
            _check_name(name, getattr(self, name), (*known, None))


@dataclass(frozen=True, slots=True)
class Scene:
    """What a video shows, from its first frame to any later one. None is open, and such a scene cannot be
    drawn: `complete` draws what is open.

    direction: of moving shapes one of DIRECTIONS; a bouncing shape starts towards it, "right" or "down", and
    comes back; None for turning and growing.
    camera: where it pans to, one of CAMERAS, or PANNING, which leaves only that open. pan: its speed, one of
    PANS, None for a still camera.
    start: the offset (x, y) of the first position from the middle, and view: the first x coordinate of the
    background at the left border, in pixels of the 64-pixel world; clock: for how many frames the shape has
    bounced, turned or grown at frame 0. No caption says these three.
    """

    objects: tuple[SceneObject, ...]
    motion: str | None
    speed: str | None
    direction: str | None
    background: str | None
    start: tuple[float, float] = (0.0, 0.0)
    camera: str | None = "still"
    pan: str | None = None
    view: float = 0.0
    clock: float = 0.0

    def __post_init__(self) -> None:
        names = (
            ("motion", MOTIONS),
            ("speed", SPEEDS),
            ("background", BACKGROUNDS),
            ("camera", (*CAMERAS, PANNING)),
        )
        for name, known in (*names, ("pan", PANS)):
            _check_name(name, getattr(self, name), (*known, None))
        self._check_motion()
        if self.pan is not None and self.camera == "still":
            raise ValueError(
                f"pan is {self.pan!r} and camera 'still'; a camera that stands still has no speed"
            )
        if self.background == PLAIN and self.camera not in ("still", None):
            raise ValueError(
                f"camera is {self.camera!r} over a {PLAIN}, which looks the same everywhere; use 'still' or "
                "another background"
            )

    def _check_motion(self) -> None:
        allowed = MOTION_DIRECTIONS.get(self.motion or "", ())
        if self.direction is not None and self.direction not in allowed:
            kind = f"a {self.motion} shape" if self.motion else "a shape whose motion is open"
            raise ValueError(f"direction is {self.direction!r}; {kind} has one of {allowed or (None,)}")
        count, colours = len(self.objects), [entry.colour for entry in self.objects if entry.colour]
        if count not in (1, 2) or (count == 2 and self.motion not in ("moving", None)):
            raise ValueError(f"{count} objects are {self.motion}; use one, or two that are moving")
        if len(set(colours)) != len(colours):
            raise ValueError("both objects have one colour; give each its own, which distinguishes them")


def _check_name(name: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(str, known))}")


@dataclass(frozen=True, slots=True)
class ObjectTrack:
    """Ground truth of one object over T frames, in pixels of the drawn video."""

    position: Tensor  # [T, 2], x in [0, width), y in [0, height)
    radius: Tensor  # [T]
    angle: Tensor  # [T], clockwise


def complete(scene: Scene, generator: random.Random, config: WorldConfig = DEFAULT_WORLD) -> Scene:
    """The scene with all that it leaves open drawn as `config` says, its start and its view as well."""
    motion = scene.motion or _draw_motion(scene, generator, config)
    directions = MOTION_DIRECTIONS.get(motion)
    background = scene.background
    if background is None:
        pans = scene.camera not in ("still", None)
        background = generator.choice([name for name in config.backgrounds if not (pans and name == PLAIN)])
    camera = scene.camera
    if camera is None:
        still = background == PLAIN or generator.random() >= config.pan_share
        camera = "still" if still else PANNING
    if camera == PANNING:
        camera = generator.choice(("left", "right"))
    reach = (config.width / config.scale / 2, config.height / config.scale / 2)
    return Scene(
        objects=_complete_objects(scene.objects, motion, generator),
        motion=motion,
        speed=scene.speed or generator.choice(list(SPEEDS)),
        direction=scene.direction or (generator.choice(directions) if directions else None),
        background=background,
        start=(generator.uniform(-reach[0], reach[0]), generator.uniform(-reach[1], reach[1])),
        camera=camera,
        pan=None if camera == "still" else scene.pan or generator.choice(list(PANS)),
        view=generator.uniform(0, PERIODS[background]),
    )


def _draw_motion(scene: Scene, generator: random.Random, config: WorldConfig) -> str:
    """A motion that fits the objects of the scene."""
    if len(scene.objects) == 2:
        return "moving"
    weights = list(config.motion_weights)
    if scene.objects[0].shape == "circle":
        weights[MOTIONS.index("turning")] = 0.0
    return generator.choices(MOTIONS, weights)[0]


def _complete_objects(
    objects: Sequence[SceneObject], motion: str, generator: random.Random
) -> tuple[SceneObject, ...]:
    named = {entry.colour for entry in objects}
    free = [colour for colour in PALETTE if colour not in named]
    generator.shuffle(free)
    shapes = [shape for shape in SHAPES if motion != "turning" or shape != "circle"]
    sizes = ["small"] if len(objects) == 2 else list(RADII)
    return tuple(
        SceneObject(
            entry.colour or free.pop(),
            entry.shape or generator.choice(shapes),
            entry.size or generator.choice(sizes),
        )
        for entry in objects
    )


def draw_scene(generator: random.Random, config: WorldConfig = DEFAULT_WORLD) -> Scene:
    """A scene of the world, from anywhere in it."""
    motion = generator.choices(MOTIONS, config.motion_weights)[0]
    count = 2 if motion == "moving" and generator.random() < config.pair_share else 1
    return complete(Scene((SceneObject(),) * count, motion, None, None, None, camera=None), generator, config)


def changed(
    scene: Scene, attribute: str, generator: random.Random, config: WorldConfig = DEFAULT_WORLD
) -> Scene:
    """Another scene, of which the first object, or the whole, differs in `attribute`, one of CHANGES, and in
    what depends on it alone: the direction on the motion. Start and view are drawn again.

    Raises ValueError where the scene allows no other value: the size, the shape and the motion of a pair, the
    direction of turning, a camera over a plain wall.
    """
    fixed = len(scene.objects) == 2 and attribute in ("size", "motion")
    unseen = attribute == "camera" and scene.background == PLAIN
    if fixed or unseen or (attribute == "direction" and scene.direction is None):
        raise ValueError(f"the {attribute} of {scene} cannot change; change another of {', '.join(CHANGES)}")
    first, *others = scene.objects
    opened: dict[str, object] = {attribute: None}
    if attribute in ("colour", "shape", "size"):
        opened = {"objects": (dataclasses.replace(first, **{attribute: None}), *others)}
    elif attribute == "motion":
        opened["direction"] = None
    elif attribute == "camera":
        opened["pan"] = None
    while True:
        drawn = complete(dataclasses.replace(scene, **opened), generator, config)
        source = (drawn.objects[0], first) if "objects" in opened else (drawn, scene)
        if getattr(source[0], attribute) != getattr(source[1], attribute):
            return drawn


def continued(scene: Scene, earlier: Scene, frame: int, config: WorldConfig = DEFAULT_WORLD) -> Scene:
    """The scene with the start, the view and the clock that let it go on at `frame` from where `earlier` is
    then, so that what follows is told by what was seen: the first shape keeps its place and a motion its
    phase, a background that stays keeps its view, and what is new begins at its origin."""
    scene = dataclasses.replace(scene, clock=_continued_clock(scene, earlier, frame))
    height, width = config.height / config.scale, config.width / config.scale
    then, now = _displacement(earlier, frame), _displacement(scene, frame)
    places = zip(earlier.start, then, now, _pair_offset(earlier), _pair_offset(scene), strict=True)
    x, y = (start + before - after + old - new for start, before, after, old, new in places)
    start = ((x + width / 2) % width - width / 2, (y + height / 2) % height - height / 2)
    seen = earlier.view + frame * _pan_speed(earlier) if scene.background == earlier.background else 0.0
    view = seen - frame * _pan_speed(scene)
    return dataclasses.replace(scene, start=start, view=view % PERIODS[scene.background or PLAIN])


def _continued_clock(scene: Scene, earlier: Scene, frame: int) -> float:
    if (scene.motion, scene.direction) != (earlier.motion, earlier.direction):
        return -float(frame)
    return (frame + earlier.clock) * SPEEDS[earlier.speed or ""] / SPEEDS[scene.speed or ""] - frame


def _displacement(scene: Scene, frame: int) -> tuple[float, float]:
    """From the start to the place at a frame, in pixels of the 64-pixel world."""
    travelled = float(_travelled(scene, torch.tensor([float(frame)], dtype=torch.float64)))
    along = DIRECTIONS.get(scene.direction or "", (0, 0))
    return travelled * along[0], travelled * along[1]


def _pair_offset(scene: Scene) -> tuple[float, float]:
    """From the place of a scene to its first shape, in pixels of the 64-pixel world."""
    if len(scene.objects) == 1:
        return 0.0, 0.0
    along = DIRECTIONS[scene.direction or "left"]
    return -_PAIR_OFFSET * abs(along[1]), -_PAIR_OFFSET * abs(along[0])


def _pan_speed(scene: Scene) -> float:
    return CAMERAS[scene.camera or "still"] * PANS.get(scene.pan or "", 0.0)


def _travelled(scene: Scene, time: Tensor) -> Tensor:
    """The way along the direction until each time, in pixels of the 64-pixel world."""
    travelled = SPEEDS[scene.speed or ""] * (time + scene.clock)
    if scene.motion != "bouncing":
        return travelled
    phase = (travelled / _BOUNCE_REACH + 1) % 4
    return _BOUNCE_REACH * (torch.minimum(phase, 4 - phase) - 1)


def _times(scene: Scene, frames: int, start_frame: int) -> Tensor:
    """Frame numbers float64 [T]. Raises ValueError for a part that cannot be drawn."""
    if frames < 1 or start_frame < 0:
        raise ValueError(
            f"frames is {frames} and start_frame {start_frame}; draw at least one frame, from 0 on"
        )
    said = [scene.motion, scene.speed, scene.background, None if scene.camera == PANNING else scene.camera]
    said += [value for entry in scene.objects for value in (entry.colour, entry.shape, entry.size)]
    said += [scene.direction] if scene.motion in MOTION_DIRECTIONS else []
    said += [scene.pan] if scene.camera != "still" else []
    if None in said:
        raise ValueError(f"{scene} leaves something open; draw what `complete` makes of it")
    return torch.arange(start_frame, start_frame + frames, dtype=torch.float64)


def ground_truth(
    scene: Scene, frames: int, start_frame: int = 0, config: WorldConfig = DEFAULT_WORLD
) -> tuple[ObjectTrack, ...]:
    """The true track of every object over frames `start_frame` .. `start_frame + frames - 1`."""
    time = _times(scene, frames, start_frame)
    phase = SPEEDS[scene.speed or ""] * (time + scene.clock)
    along = torch.tensor(DIRECTIONS.get(scene.direction or "", (0, 0)), dtype=torch.float64)
    angle, pulse = torch.zeros_like(time), torch.ones_like(time)
    if scene.motion == "turning":
        angle = phase * math.radians(TURN_DEGREES)
    elif scene.motion == "growing":
        pulse = 1 + PULSE * torch.sin(2 * math.pi * phase / PULSE_FRAMES)
    extent = torch.tensor((config.width, config.height), dtype=torch.float64)
    first = torch.tensor(scene.start, dtype=torch.float64) + _travelled(scene, time)[:, None] * along
    aside = torch.tensor(_pair_offset(scene), dtype=torch.float64)
    return tuple(
        ObjectTrack(
            (extent / 2 + config.scale * (first + (1 - 2 * index) * aside)) % extent,
            RADII[entry.size or ""] * config.scale * pulse,
            angle,
        )
        for index, entry in enumerate(scene.objects)
    )


def true_views(scene: Scene, frames: int, start_frame: int = 0) -> Tensor:
    """The x coordinate of the background at the left border of each frame, float64 [T], in pixels of the
    64-pixel world."""
    times = _times(scene, frames, start_frame)
    return scene.view + _pan_speed(scene) * times


def render(scene: Scene, frames: int, start_frame: int = 0, config: WorldConfig = DEFAULT_WORLD) -> Tensor:
    """Draw the frames of `ground_truth`, anti-aliased: float32 [T, H, W, 3] from 0 to 1."""
    pixels = render_background(scene, frames, start_frame, config)
    tracks = ground_truth(scene, frames, start_frame, config)
    for entry, track in reversed(list(zip(scene.objects, tracks, strict=True))):
        coverage = shape_coverage(entry.shape or "", track, config)[..., None]
        pixels = torch.lerp(pixels, torch.tensor(PALETTE[entry.colour or ""]).expand_as(pixels), coverage)
    return pixels.contiguous()


def render_background(
    scene: Scene, frames: int, start_frame: int = 0, config: WorldConfig = DEFAULT_WORLD
) -> Tensor:
    """What `render` draws behind the shapes: float32 [T, H, W, 3]."""
    views = true_views(scene, frames, start_frame) % PERIODS[scene.background or PLAIN]
    if scene.camera == "still":
        views = views[:1]
    size = config.height, config.width, config.scale
    return draw_background(scene.background or PLAIN, views, *size).expand(frames, -1, -1, -1)


def render_switch(
    scenes: Sequence[Scene], starts: Sequence[int], frames: int, config: WorldConfig = DEFAULT_WORLD
) -> Tensor:
    """Scenes one after the other, scene i from frame starts[i] on: float32 [frames, H, W, 3]. Each of them is
    drawn as it is; `continued` lets one go on from another."""
    ends = [*starts[1:], frames]
    return torch.cat(
        [
            render(scene, end - start, start, config)
            for scene, start, end in zip(scenes, starts, ends, strict=True)
        ]
    )


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


def as_model_pixels(clips: Sequence[Tensor]) -> Tensor:
    """Clips [T, H, W, 3] from 0 to 1 -> [B, 3, T, H, W] from -1 to 1."""
    return torch.stack(list(clips)).permute(0, 4, 1, 2, 3) * 2 - 1


def as_clips(pixels: Tensor) -> list[Tensor]:
    """[B, 3, T, H, W] around -1 to 1 -> clips [T, H, W, 3] from 0 to 1."""
    return list(((pixels.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1))
