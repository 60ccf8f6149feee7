"""Backgrounds of the toy world: functions of a plane that has no end, of which a video shows a part.

A camera that pans moves the part to the left or to the right. `view` is the x coordinate of the plane at the
left border of the frame, in pixels of the 64-pixel world. Every background repeats in x after its PERIODS,
none of which divides the width of a frame. Chroma is at most TINT, so that shapes stand out by their colour.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BACKGROUNDS = (
    "grey wall",
    "checkered floor",
    "striped wall",
    "dotted wall",
    "cloudy sky",
    "sandy beach",
    "grassy meadow",
)
PLAIN = "grey wall"  # the same everywhere, so that no pan is seen on it
TINT = 0.13  # largest difference between the channels of a background
PERIODS: dict[str, float] = {  # pixels, at 64 pixels
    "grey wall": 1.0,
    "checkered floor": 24.0,
    "striped wall": 22.0,
    "dotted wall": 18.0,
    "cloudy sky": 80.0,
    "sandy beach": 53.0,
    "grassy meadow": 23.0,
}

_DARK, _LIGHT = 0.42, 0.58
_EDGE = 4.0  # pixels from dark to light, at 64 pixels: out of focus, as a background is
_DOT_RADIUS = 5.0  # pixels, at 64 pixels
_TINTS: dict[str, tuple[float, float, float]] = {
    "cloudy sky": (0.49, 0.55, 0.62),
    "sandy beach": (0.61, 0.56, 0.49),
    "grassy meadow": (0.45, 0.56, 0.44),
}
# of every wave: radians a pixel of y, amplitude, phase. Along x both have the period of the background, so
# that no other view looks nearly the same.
_WAVES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "cloudy sky": ((0.06, 0.045, 0.0), (-0.11, 0.025, 1.3)),
    "sandy beach": ((0.30, 0.045, 0.5), (-0.09, 0.025, 2.1)),
    "grassy meadow": ((0.10, 0.045, 1.0), (-0.14, 0.025, 0.3)),
}


def draw_background(name: str, views: Tensor, height: int, width: int, scale: float) -> Tensor:
    """The background alone at each of T views: float32 [T, height, width, 3].

    scale: pixels of the frame per pixel of the 64-pixel world, in which the views are given.
    """
    x = (torch.arange(width) + 0.5) / scale + views.float()[:, None]
    x = x[:, None, :].expand(-1, height, -1)
    y = ((torch.arange(height) + 0.5) / scale)[None, :, None]
    if name in _TINTS:
        light = sum(
            amplitude * torch.cos(2 * math.pi / PERIODS[name] * x + radians * y + phase)
            for radians, amplitude, phase in _WAVES[name]
        )
        return light[..., None] + torch.tensor(_TINTS[name])
    light = _pattern(name, x, y)
    return (_DARK + (_LIGHT - _DARK) * light)[..., None].expand(-1, -1, -1, 3)


def _pattern(name: str, x: Tensor, y: Tensor) -> Tensor:
    """How light each pixel of a grey background is, from 0 to 1."""
    period = PERIODS[name]
    if name == "checkered floor":
        one, other = _bars(x, period), _bars(y, period)
        return one + other - 2 * one * other
    if name == "striped wall":
        return _bars(x, period)
    if name == "dotted wall":
        across, down = (_from_middle(part, period) for part in (x, y))
        return _softly(torch.sqrt(across.square() + down.square()) - _DOT_RADIUS)
    return torch.full_like(x, 0.5)


def _bars(x: Tensor, period: float) -> Tensor:
    """1 in the second half of every period, 0 in the first, with soft edges."""
    return _softly(_from_middle(x - period / 4, period).abs() - period / 4)


def _from_middle(x: Tensor, period: float) -> Tensor:
    return x % period - period / 2


def _softly(distance: Tensor) -> Tensor:
    """1 inside an edge, 0 outside of it, `distance` being 0 on it, in pixels of the 64-pixel world."""
    return (0.5 - distance / _EDGE).clamp(0, 1)
