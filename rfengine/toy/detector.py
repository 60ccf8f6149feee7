"""Exact measurements on videos of the toy world, from their pixels alone.

Foreground is what has colour; hue separates objects; the place of a shape is the circular mean of its
pixels, so that borders need no special case; shape, radius and angle are those of the template that fits best
once centred. Background and camera are background_fit.py's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.toy.background_fit import BackgroundFit, background_error, fit_background
from rfengine.toy.backgrounds import PLAIN
from rfengine.toy.world import (
    DEFAULT_WORLD,
    DIRECTIONS,
    MOTION_DIRECTIONS,
    PALETTE,
    PANNING,
    PULSE,
    PULSE_FRAMES,
    RADII,
    SHAPES,
    SPEEDS,
    TURN_DEGREES,
    ObjectTrack,
    Scene,
    WorldConfig,
    shape_coverage,
)

ATTRIBUTES = ("colour", "shape", "size", "background", "motion", "direction", "speed", "camera")

_MIN_CHROMA = 0.25
_MIN_LOCAL_CHROMA = 0.2  # of the mean of nine pixels: noise on a tinted background has less
_MARGIN = 4.0  # pixels at 64 added to the radius: what is nearer to a shape belongs to no background
_MIN_AREA = 60.0  # pixels at 64: half a triangle of the smallest radius the world draws is 100
_STILL = 0.3  # pixels a frame at 64: slower than this is standing
_LAG = 4  # frames between two positions whose distance is measured, so that whole pixels do not matter
_RETURN = 0.2  # of the path: a shape that goes this far back bounces
_MIN_GROWTH = 3.0  # pixels at 64 between the smallest and the largest radius of a growing shape
_TURN_STEP = 15  # degrees between two templates
_PERIODS = {"circle": _TURN_STEP, "square": 90, "triangle": 120}  # degrees after which a shape looks the same


@dataclass(frozen=True, slots=True)
class ObjectDetection:
    """One object as measured over T frames; None where nothing could be measured.

    `speed_value` is the mean distance in pixels a frame, per 64 pixels of the shorter side.
    """

    colour: str
    shape: str
    size: str
    motion: str
    direction: str | None
    speed: str
    speed_value: float
    presence: Tensor  # [T] bool, the object is there
    position: Tensor  # [T, 2], (x, y) in pixels; NaN where it is not
    radius: Tensor  # [T] pixels


@dataclass(frozen=True, slots=True)
class Detection:
    """All objects, the one with most pixels first, and the background with its camera."""

    objects: tuple[ObjectDetection, ...]
    fit: BackgroundFit

    @property
    def background(self) -> str:
        return self.fit.name


def detect(frames: Tensor, config: WorldConfig = DEFAULT_WORLD) -> Detection:
    """Measure a video [T, H, W, 3], uint8 or float from 0 to 1, with T >= 2.

    Raises ValueError when its size is not the one of `config`.
    """
    pixels = _as_pixels(frames, config)
    foreground, masks = _colour_masks(pixels)
    areas = {colour: mask.sum((1, 2)) for colour, mask in masks.items()}
    seen = [colour for colour in PALETTE if float(areas[colour].median()) >= _MIN_AREA * config.scale**2]
    seen.sort(key=lambda colour: -float(areas[colour].sum()))
    objects = tuple(_detect_object(colour, masks[colour], config) for colour in seen)
    return Detection(objects, fit_background(pixels, ~foreground, config))


def background_off(frames: Tensor, scene: Scene, config: WorldConfig = DEFAULT_WORLD) -> Tensor:
    """The share [T] of each frame's background pixels that are off by more than background_fit.OFF from the
    background of the scene, wherever its camera is. frames: as in detect. Pixels near a shape that the scene
    names do not count; specks of colour elsewhere do."""
    pixels = _as_pixels(frames, config)
    visible = torch.ones(pixels.shape[:3], dtype=torch.bool)
    _, masks = _colour_masks(pixels)
    for entry in scene.objects:
        mask = masks[entry.colour or ""]
        present = mask.sum((1, 2)) >= _MIN_AREA * config.scale**2
        if not bool(present.any()):
            continue
        position, centred = _centre(mask[present])
        shape, radius, angle = _fit_templates(centred, config)
        track = ObjectTrack(
            position.double(), radius.double() + _MARGIN * config.scale, torch.deg2rad(angle.double())
        )
        visible[present] &= shape_coverage(shape, track, config) == 0
    return background_error(pixels, visible, scene.background or PLAIN, config)


def _as_pixels(frames: Tensor, config: WorldConfig) -> Tensor:
    """Float pixels from 0 to 1. Raises ValueError for a size that is not the one of `config`."""
    if frames.ndim != 4 or frames.shape[1:] != (config.height, config.width, 3) or frames.shape[0] < 2:
        raise ValueError(
            f"frames is {tuple(frames.shape)}; give [T >= 2, {config.height}, {config.width}, 3]"
        )
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()


def _colour_masks(pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Where a shape is, bool [T, H, W], and where one of each colour is, float."""
    low = pixels.amin(-1)
    local = F.avg_pool2d(pixels.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
    coloured = local.amax(1) - local.amin(1) > _MIN_LOCAL_CHROMA
    foreground = (pixels.amax(-1) - low > _MIN_CHROMA) & coloured
    nearest = _nearest_colour(pixels, low)
    return foreground, {
        colour: (foreground & (nearest == index)).float() for index, colour in enumerate(PALETTE)
    }


def _nearest_colour(pixels: Tensor, low: Tensor) -> Tensor:
    """Index into PALETTE of the hue nearest to every pixel, whatever its brightness and saturation."""
    palette = torch.tensor(list(PALETTE.values()))
    palette = palette - palette.amin(-1, keepdim=True)
    hue = F.normalize(pixels - low[..., None], dim=-1)
    return (hue @ F.normalize(palette, dim=-1).T).argmax(-1)


def _detect_object(colour: str, mask: Tensor, config: WorldConfig) -> ObjectDetection:
    presence = mask.sum((1, 2)) >= _MIN_AREA * config.scale**2
    position, centred = _centre(mask)
    shape, radius, angle = _fit_templates(centred[presence], config)
    position = torch.where(presence[:, None], position, torch.nan)
    lag = min(_LAG, len(mask) - 1)
    extent = torch.tensor((config.width, config.height))
    steps = (position[lag:] - position[:-lag])[presence[lag:] & presence[:-lag]]
    steps = ((steps + extent / 2) % extent - extent / 2) / (config.scale * lag)
    motion, direction, value = _classify_motion(shape, steps, radius / config.scale, angle)
    mean_radius = float(radius.mean()) / config.scale
    return ObjectDetection(
        colour=colour,
        shape=shape,
        size=min(RADII, key=lambda name: abs(RADII[name] - mean_radius)),
        motion=motion,
        direction=direction,
        speed=min(SPEEDS, key=lambda name: abs(SPEEDS[name] - value)),
        speed_value=value,
        presence=presence,
        position=position,
        radius=radius,
    )


def _centre(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Circular mean [T, 2] (x, y) of every mask [T, H, W], and the masks centred on it."""
    spectrum = torch.fft.fft2(mask)
    height, width = mask.shape[1:]
    x = (-torch.angle(spectrum[:, 0, 1]) / (2 * math.pi) * width + 0.5) % width
    y = (-torch.angle(spectrum[:, 1, 0]) / (2 * math.pi) * height + 0.5) % height
    frequency_x = torch.fft.fftfreq(width)[None, None, :] * (width / 2 - x)[:, None, None]
    frequency_y = torch.fft.fftfreq(height)[None, :, None] * (height / 2 - y)[:, None, None]
    moved = torch.fft.ifft2(spectrum * torch.exp(-2j * math.pi * (frequency_x + frequency_y))).real
    return torch.stack((x, y), dim=-1), moved


@functools.lru_cache(maxsize=4)
def _templates(config: WorldConfig) -> tuple[Tensor, tuple[tuple[str, float, float], ...]]:
    """Centred masks [N, H * W] of every shape, radius and angle, and what each of them is."""
    masks, names = [], []
    middle = torch.tensor([[config.width / 2, config.height / 2]])
    for shape in SHAPES:
        for radius in range(8, 24):
            for degrees in range(0, _PERIODS[shape], _TURN_STEP):
                track = ObjectTrack(
                    middle.double(),
                    torch.tensor([radius * config.scale], dtype=torch.float64),
                    torch.tensor([math.radians(degrees)], dtype=torch.float64),
                )
                masks.append(shape_coverage(shape, track, config))
                names.append((shape, radius * config.scale, float(degrees)))
    return _centre(torch.cat(masks))[1].flatten(1), tuple(names)


def _fit_templates(centred: Tensor, config: WorldConfig) -> tuple[str, Tensor, Tensor]:
    """The shape that fits all masks [T, H, W] best, and per mask its radius and its angle in degrees."""
    templates, names = _templates(config)
    masks = centred.flatten(1)
    shared = masks @ templates.T
    fit = 2 * shared / (masks.square().sum(-1, keepdim=True) + templates.square().sum(-1))
    best: dict[str, tuple[float, Tensor, Tensor]] = {}
    for shape in SHAPES:
        members = [index for index, name in enumerate(names) if name[0] == shape]
        quality, choice = fit[:, members].max(-1)
        radius = torch.tensor([names[index][1] for index in members])[choice]
        angle = torch.tensor([names[index][2] for index in members])[choice]
        best[shape] = (float(quality.mean()), radius, angle)
    shape = max(best, key=lambda name: best[name][0])
    return shape, best[shape][1], best[shape][2]


def _classify_motion(
    shape: str, steps: Tensor, radius: Tensor, angle: Tensor
) -> tuple[str, str | None, float]:
    """Motion, direction, speed (pixels a frame at 64) from steps [S, 2], radii [T], angles [T] in degrees."""
    if not len(steps):
        return "moving", None, 0.0
    lengths = steps.norm(dim=-1)
    if float(lengths.median()) < _STILL:
        if float(radius.max() - radius.min()) >= _MIN_GROWTH:
            growth = float((radius[1:] - radius[:-1]).abs().mean() / radius.mean())
            return "growing", None, growth * PULSE_FRAMES / (4 * PULSE)
        period = _PERIODS[shape]
        turned = (angle[1:] - angle[:-1] + period / 2) % period - period / 2
        return "turning", None, abs(float(turned.mean())) / TURN_DEGREES
    axis = int(steps.abs().mean(0).argmax())
    along = steps[:, axis]
    forward, back = float(along.clamp(min=0).sum()), float(along.clamp(max=0).abs().sum())
    if min(forward, back) > _RETURN * (forward + back):
        return "bouncing", ("right", "down")[axis], float(lengths.quantile(0.75))
    vectors = torch.tensor(list(DIRECTIONS.values()), dtype=steps.dtype)
    return "moving", list(DIRECTIONS)[int((vectors @ steps.mean(0)).argmax())], float(steps.mean(0).norm())


def matched(scene: Scene, detection: Detection) -> list[ObjectDetection | None]:
    """What was found for each object of the scene: that of its colour, or for an open colour the largest one
    that is nobody else's."""
    found = {entry.colour: entry for entry in detection.objects}
    named = {entry.colour for entry in scene.objects}
    others = iter([entry for entry in detection.objects if entry.colour not in named])
    return [found.get(entry.colour) if entry.colour else next(others, None) for entry in scene.objects]


def score(scene: Scene, detection: Detection) -> dict[str, bool]:
    """Whether each of ATTRIBUTES that the scene says was measured so; of a pair, both objects must agree.

    An attribute the motion has not (the direction of turning) counts as right with the motion.
    """
    seen = matched(scene, detection)
    complete = None not in seen and len(detection.objects) == len(seen)
    if not complete and len(seen) == 1:
        seen = list(detection.objects[:1]) or [None]
    results: dict[str, bool] = {}
    for name in ("colour", "shape", "size"):
        said = [(getattr(true, name), entry) for true, entry in zip(scene.objects, seen, strict=True)]
        said = [(value, entry) for value, entry in said if value is not None]
        if said:
            agree = all(entry is not None and getattr(entry, name) == value for value, entry in said)
            results[name] = complete if name == "colour" else agree
    if scene.background is not None:
        results["background"] = detection.background == scene.background
    for name in ("motion", "direction", "speed"):
        value, without = getattr(scene, name), scene.motion not in (None, *MOTION_DIRECTIONS)
        if value is not None or (name == "direction" and without):
            results[name] = all(entry is not None and getattr(entry, name) == value for entry in seen)
    if scene.camera is not None:
        results["camera"] = _camera_agrees(scene, detection.fit)
    return {name: results[name] for name in ATTRIBUTES if name in results}


def _camera_agrees(scene: Scene, fit: BackgroundFit) -> bool:
    sides = ("left", "right") if scene.camera == PANNING else (scene.camera,)
    return fit.camera in sides and (scene.pan is None or fit.pan == scene.pan)


def accuracy(
    scenes: Sequence[Scene], clips: Sequence[Tensor], config: WorldConfig = DEFAULT_WORLD
) -> dict[str, float]:
    """Share of clips [T, H, W, 3] measured as their scenes say, for each of ATTRIBUTES over the scenes that
    say it, and for `all`."""
    if not scenes or len(scenes) != len(clips):
        raise ValueError(
            f"{len(scenes)} scenes and {len(clips)} clips were given; give as many of each, at least one"
        )
    scores = [score(scene, detect(clip, config)) for scene, clip in zip(scenes, clips, strict=True)]
    result = {}
    for name in ATTRIBUTES:
        said = [entry[name] for entry in scores if name in entry]
        if said:
            result[name] = sum(said) / len(said)
    return result | {"all": sum(all(entry.values()) for entry in scores) / len(scores)}
