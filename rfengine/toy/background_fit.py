"""Which background a video of the toy world shows, how its camera pans, and how far its pixels are off.

Every frame is compared with every background at every view; what fits best over all frames is the background,
and its views tell the camera's speed. Only pixels that no shape covers count.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.toy.backgrounds import BACKGROUNDS, PERIODS, PLAIN, draw_background
from rfengine.toy.world import PANS, WorldConfig

OFF = 0.06  # of the range from 0 to 1: a background pixel further from the truth has decayed

_COARSE_STEPS = 192  # views at most of one background, at steps of half a pixel or more
_FINE_STEPS = 17  # views around the best one
_LAG = 4  # frames between two views whose distance is measured
_STILL = 0.25  # pixels a frame at 64: slower than this is standing
_FRAMES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class BackgroundFit:
    """The background, where the camera pans to and how fast (None where it stands), and the view of each
    frame, [T] in pixels of the 64-pixel world."""

    name: str
    camera: str
    pan: str | None
    views: Tensor


def fit_background(pixels: Tensor, visible: Tensor, config: WorldConfig) -> BackgroundFit:
    """pixels: float [T, H, W, 3] from 0 to 1; visible: bool [T, H, W], where no shape is."""
    pooled, weight, size = _pooled(pixels, visible, config)
    best: dict[str, tuple[float, Tensor]] = {}
    for name in BACKGROUNDS:
        errors, views = _best_views(name, pooled, weight, size)
        best[name] = (float(errors.sum()), views)
    name = min(best, key=lambda key: best[key][0])
    return BackgroundFit(name, *_camera(name, best[name][1]), best[name][1])


def _best_views(name: str, pooled: Tensor, weight: Tensor, size: tuple) -> tuple[Tensor, Tensor]:
    """Of each frame the error [T] of a background at the view [T] that fits best, less the pixels' own
    squares; pooled, weight, size: of _pooled."""
    views, templates = _templates(name, *size)
    lowest, place = (weight @ templates.square().T - 2 * pooled @ templates.T).min(1)
    return lowest, views[place]


def _pooled(pixels: Tensor, visible: Tensor, config: WorldConfig) -> tuple[Tensor, Tensor, tuple]:
    """Visible pixels and their weights [T, N] at about 32 pixels, and the size that their templates have."""
    pool = max(1, int(2 * config.scale))
    weight = visible.float()[..., None].expand_as(pixels)
    parts = [F.avg_pool2d(part.permute(0, 3, 1, 2), pool) for part in (pixels * weight, weight)]
    height, width = parts[0].shape[2:]
    return parts[0].flatten(1), parts[1].flatten(1), (height, width, config.scale / pool)


@functools.lru_cache(maxsize=2 * len(BACKGROUNDS))
def _templates(name: str, height: int, width: int, scale: float) -> tuple[Tensor, Tensor]:
    """Views [V] all around a background, and its pixels [V, N] there."""
    period = PERIODS[name]
    count = _view_count(name)
    views = torch.arange(count) * (period / count)
    drawn = draw_background(name, views, height, width, scale)
    return views, drawn.permute(0, 3, 1, 2).flatten(1)


def _view_count(name: str) -> int:
    return 1 if name == PLAIN else min(_COARSE_STEPS, int(2 * PERIODS[name]))


def _camera(name: str, views: Tensor) -> tuple[str, str | None]:
    lag = min(_LAG, len(views) - 1)
    if name == PLAIN or lag < 1:
        return "still", None
    period = PERIODS[name]
    steps = (views[lag:] - views[:-lag] + period / 2) % period - period / 2
    speed = float(steps.mean()) / lag
    if abs(speed) < _STILL:
        return "still", None
    return "right" if speed > 0 else "left", min(PANS, key=lambda pan: abs(PANS[pan] - abs(speed)))


def background_error(pixels: Tensor, visible: Tensor, name: str, config: WorldConfig) -> Tensor:
    """The share [T] of the visible pixels of each frame that are off by more than OFF in a channel, from the
    background `name` at the view that fits the frame best. 0 where nothing is visible. Shapes as in
    fit_background; videos as large as the world draws them.
    """
    shares = []
    for part, seen in zip(pixels.split(_FRAMES_AT_ONCE), visible.split(_FRAMES_AT_ONCE), strict=True):
        _, coarse = _best_views(name, *_pooled(part, seen, config))
        step = PERIODS[name] / _view_count(name)
        fine = torch.linspace(-step, step, 1 if name == PLAIN else _FINE_STEPS)
        tried = (coarse[:, None] + fine).flatten()
        drawn = draw_background(name, tried, config.height, config.width, config.scale)
        distance = (drawn.unflatten(0, (len(part), len(fine))) - part[:, None]).abs().amax(-1)
        off = ((distance > OFF) & seen[:, None]).flatten(2).sum(-1)
        squares = (distance.square() * seen[:, None]).flatten(2).sum(-1)
        chosen = off.gather(1, squares.argmin(1, keepdim=True))[:, 0]
        shares.append(chosen / seen.flatten(1).sum(1).clamp_min(1))
    return torch.cat(shares)
