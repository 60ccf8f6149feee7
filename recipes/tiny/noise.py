"""Noise that tells where a video begins: the start of its shape and of its background, which no caption says.

Were noise and video drawn apart, all that a few-step model could answer to pure noise is the mean of all
places, and it would have to choose one while it denoises. Pairs of noise and video may be drawn together as
long as each has its own law (arXiv 2304.14772). A place on a circle is the angle of two independent
coordinates of the noise: their length stays, their angle becomes that of the place. The angle of two such
coordinates is even on the circle, as the places are, so the noise by itself is as before, and a model learns
to read from it where to draw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rfengine.toy.backgrounds import PERIODS, PLAIN
from rfengine.toy.world import DEFAULT_WORLD, Scene, WorldConfig

PLACES = 3  # of a scene: x and y of its shape, and its view of the background


def places(scene: Scene, config: WorldConfig = DEFAULT_WORLD) -> tuple[float, float, float]:
    """Where a scene begins, in turns: x and y of its start, and its view in periods of its background."""
    x, y = scene.start
    period = PERIODS[scene.background or PLAIN]
    return x * config.scale / config.width % 1, y * config.scale / config.height % 1, scene.view / period % 1


def telling_noise(noise: Tensor, turns: Tensor) -> Tensor:
    """The noise [B, C, F, h, w] of a first chunk, made to tell `turns` [B, PLACES], places of its scene: each
    is the angle of the means of two channels. Raises ValueError for less than two channels a place."""
    if noise.shape[1] < 2 * PLACES:
        raise ValueError(
            f"noise has {noise.shape[1]} channels; {PLACES} places take two each, so use a VAE of at least "
            f"{2 * PLACES}"
        )
    told = noise[:, : 2 * PLACES]
    means = told.mean((2, 3, 4)).unflatten(1, (PLACES, 2))
    angles = 2 * math.pi * turns.to(means)
    wanted = means.norm(dim=2, keepdim=True) * torch.stack([angles.cos(), angles.sin()], 2)
    change = (wanted - means).flatten(1)[:, :, None, None, None]
    return torch.cat([told + change, noise[:, 2 * PLACES :]], dim=1)
