"""True videos, and the same videos with one thing wrong; all uint8 [T, H, W, 3]."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rfengine.toy.world import Scene, SceneObject, WorldConfig, render

WORLD = WorldConfig(64, 176)  # wide, so that what moves sideways does not come back within a clip
SCENE = Scene((SceneObject("red", "square", "large"),), "moving", "fast", "right", "sandy beach")


def as_frames(pixels: Tensor) -> Tensor:
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def toy_clip(frames: int = 69, scene: Scene = SCENE, world: WorldConfig = WORLD) -> Tensor:
    return as_frames(render(scene, frames, config=world))


def textured_clip(frames: int = 69, step: float = 1.0, seed: int = 0) -> Tensor:
    """Coloured clouds of three sizes, wider than the video, that pass at `step` pixels a frame."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 48, 64
    reach = width + int(step * frames) + 2
    light = torch.zeros(1, 1, height, reach)
    tint = torch.zeros(1, 3, height, reach)
    for clouds, sizes in ((light, {3: 0.3, 6: 0.6, 16: 0.6}), (tint, {8: 0.2, 16: 0.2})):
        for size, weight in sizes.items():
            shape = (clouds.shape[1], -(-height // size) + 1, -(-reach // size) + 1)
            seeds = torch.rand(1, *shape, generator=generator) - 0.5
            clouds += weight * functional.interpolate(seeds, (height, reach), mode="bicubic")
    clouds = 0.5 + 0.75 * (light + tint)
    columns = torch.arange(width)
    pictures = []
    for index in range(frames):
        whole, part = divmod(step * index, 1.0)
        places = columns + int(whole)
        pictures.append(torch.lerp(clouds[0, :, :, places], clouds[0, :, :, places + 1], part))
    return as_frames(torch.stack(pictures).permute(0, 2, 3, 1))


def frozen(video: Tensor) -> Tensor:
    return video[:1].expand_as(video).contiguous()


def blur_ramp(video: Tensor, most: float = 2.0) -> Tensor:
    """Sharp at first, at the end blurred with a Gaussian of `most` pixels."""

    def blurred(picture: Tensor, sigma: float) -> Tensor:
        places = torch.arange(-8, 9).float()
        kernel = torch.exp(-places.square() / (2 * max(sigma, 1e-3) ** 2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        picture = functional.pad(picture, (8, 8, 8, 8), mode="replicate")
        rows = functional.conv2d(picture, kernel, groups=3)
        return functional.conv2d(rows, kernel.transpose(2, 3), groups=3)

    pictures = video.permute(0, 3, 1, 2).float() / 255
    ramp = torch.linspace(0, most, len(video)).tolist()
    changed = [blurred(picture[None], sigma) for picture, sigma in zip(pictures, ramp, strict=True)]
    return as_frames(torch.cat(changed).permute(0, 2, 3, 1))


def gamma_ramp(video: Tensor, last: float = 2.0) -> Tensor:
    exponent = torch.linspace(1, last, len(video))[:, None, None, None]
    return as_frames((video.float() / 255) ** exponent)


def tint_ramp(video: Tensor, last: float = 0.3) -> Tensor:
    """More and more red and less and less blue."""
    amount = torch.linspace(0, last, len(video))[:, None, None, None]
    return as_frames(video.float() / 255 * (1 + amount * torch.tensor([1.0, 0.0, -1.0])))


def noise_ramp(video: Tensor, last: float = 0.15) -> Tensor:
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    return as_frames(video.float() / 255 + noise * torch.linspace(0, last, len(video))[:, None, None, None])


def pulse(video: Tensor, height: float = 0.1, period: int = 12) -> Tensor:
    """One brighter frame at the beginning of every chunk."""
    bright = (torch.arange(len(video)) % period == 0).float()[:, None, None, None]
    return as_frames(video.float() / 255 + height * bright)


def loop(video: Tensor, period: int = 31) -> Tensor:
    return video[torch.arange(len(video)) % period]


def copied_start(video: Tensor, share: float = 0.6) -> Tensor:
    """The second half blended with the first frame."""
    late = (torch.arange(len(video)) >= len(video) // 2).float()[:, None, None, None] * share
    return as_frames(torch.lerp(video.float(), video[:1].float().expand(video.shape), late) / 255)


CLIPS: dict[str, Callable[[], Tensor]] = {"toy": toy_clip, "textured": textured_clip}
DISTORTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "true": lambda video: video,
    "frozen": frozen,
    "blur": blur_ramp,
    "gamma": gamma_ramp,
    "tint": tint_ramp,
    "noise": noise_ramp,
    "pulse": pulse,
    "loop": loop,
    "copied": copied_start,
}


@functools.cache
def distorted(clip: str, distortion: str) -> Tensor:
    """A clip of CLIPS changed by one of DISTORTIONS; shared, not to be written to."""
    return DISTORTIONS[distortion](CLIPS[clip]())
