"""Videos of the toy world against their captions: what is drawn, how it moves, and whether it stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfengine.evaluation.video_frames import NotMeasurableError, as_video
from rfengine.training.toy_detector import detect, score
from rfengine.training.toy_reward import CaptionFacts, ToyReward, parse_caption
from rfengine.training.toy_world import SPEEDS, Scene, SceneObject, WorldConfig

if TYPE_CHECKING:
    from numpy import ndarray

_PART_FRAMES = 48  # one full period of the slowest motion that comes back
_LEAST_FRAMES = 12
_WINDOW = 4  # frames judged together on whether an object is there: the detector drops one that mostly is not


def toy_accuracy(frames: Tensor | ndarray, text: str) -> dict[str, float]:
    """Shares of the video, from 0 to 1, in which each attribute of the detector is as `text` says.

    frames: uint8 [T, H, W, 3]. The video is judged in parts of 48 frames or more. With them `permanence`: the
    share of frames in which every object named is there. The speed is left out where an open caption leaves
    it open. Raises ValueError for a text that is no caption of the toy world, NotMeasurableError for a video
    too short or of a size the world does not have.
    """
    video = as_video(frames)
    facts = parse_caption(text)
    if len(video) < _LEAST_FRAMES:
        raise NotMeasurableError(f"{len(video)} frames are too few; the toy world needs {_LEAST_FRAMES}")
    if video.shape[1] % 16 or video.shape[2] % 16:
        size = f"{video.shape[1]} x {video.shape[2]}"
        raise NotMeasurableError(f"the video is {size}; the toy world has multiples of 16")
    world = WorldConfig(video.shape[1], video.shape[2])
    scene = _scene(facts)
    results: dict[str, list[float]] = {}
    for part in video.tensor_split(max(1, len(video) // _PART_FRAMES)):
        detection = detect(part, world)
        for name, right in score(scene, detection).items():
            results.setdefault(name, []).append(float(right))
    results["permanence"] = [
        _presence(window, facts, world) for window in video.tensor_split(len(video) // _WINDOW)
    ]
    if facts.speed is None:
        del results["speed"]
    return {name: sum(values) / len(values) for name, values in results.items()}


def _presence(window: Tensor, facts: CaptionFacts, world: WorldConfig) -> float:
    """The share of frames in which every object the caption names is there."""
    seen = {entry.colour: entry.presence for entry in detect(window, world).objects}
    there = torch.ones(len(window), dtype=torch.bool)
    for _, colour, _ in facts.objects:
        there &= seen.get(colour, torch.zeros_like(there))
    return float(there.float().mean())


def toy_window_score(frames: Tensor, text: str) -> float:
    """The share of what a caption says that frames uint8 [T, H, W, 3] show: a scorer for prompt switches."""
    world = WorldConfig(frames.shape[1], frames.shape[2])
    return float(ToyReward(world)(frames[None], [text])["agreement"][0])


def _scene(facts: CaptionFacts) -> Scene:
    return Scene(
        objects=tuple(SceneObject(colour, shape, size) for size, colour, shape in facts.objects),
        motion=facts.motion,
        speed=facts.speed or next(iter(SPEEDS)),
        direction=facts.direction,
        background=facts.background,
    )
