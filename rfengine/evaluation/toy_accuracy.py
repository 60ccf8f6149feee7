"""Videos of the toy world against their captions: what is drawn, how it moves, and whether it stays."""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.evaluation.video_frames import (
    Frames,
    FrameSource,
    NotMeasurableError,
    as_frames,
    split_ranges,
    windows,
)
from rfengine.toy.captions import parse_caption
from rfengine.toy.detector import detect, matched, score
from rfengine.toy.reward import ToyReward
from rfengine.toy.world import Scene, WorldConfig

_PART_FRAMES = 48  # one full period of the slowest motion that comes back
_LEAST_FRAMES = 12
_MOST_PIXELS = 2**18  # of a frame: the detector holds 48 to 95 frames in several copies
_WINDOW = 4  # frames judged together on whether an object is there: the detector drops one that mostly is not


def toy_accuracy(frames: FrameSource, text: str) -> dict[str, float]:
    """Shares of the video, from 0 to 1, in which each attribute of the detector is as `text` says.

    frames: uint8 [T, H, W, 3]. The video is judged in parts of 48 frames or more. With them `permanence`: the
    share of frames in which every object named is there. An attribute that the text leaves open is left out.
    Raises ValueError for a text that means no scene of the toy world, NotMeasurableError for a video too
    short or of a size the world does not have.
    """
    video = as_frames(frames)
    scene = parse_caption(text)
    if video.count < _LEAST_FRAMES:
        raise NotMeasurableError(f"{video.count} frames are too few; the toy world needs {_LEAST_FRAMES}")
    check_world_size(video)
    world = WorldConfig(video.height, video.width)
    results: dict[str, list[float]] = {}
    for part in windows(video.batches(), split_ranges(video.count, max(1, video.count // _PART_FRAMES))):
        detection = detect(part, world)
        for name, right in score(scene, detection).items():
            results.setdefault(name, []).append(float(right))
    results["permanence"] = [
        _presence(window, scene, world)
        for window in windows(video.batches(), split_ranges(video.count, video.count // _WINDOW))
    ]
    return {name: sum(values) / len(values) for name, values in results.items()}


def check_world_size(video: Frames) -> None:
    """Raises NotMeasurableError for a size that the toy world does not have."""
    if video.height % 16 or video.width % 16 or video.height * video.width > _MOST_PIXELS:
        size = f"{video.height} x {video.width}"
        raise NotMeasurableError(
            f"the video is {size}; the toy world has multiples of 16 and up to {_MOST_PIXELS} pixels"
        )


def _presence(window: Tensor, scene: Scene, world: WorldConfig) -> float:
    """The share of frames in which every object the caption names is there."""
    there = torch.ones(len(window), dtype=torch.bool, device="cpu")
    for entry in matched(scene, detect(window, world)):
        there &= torch.zeros_like(there) if entry is None else entry.presence
    return float(there.float().mean())


def toy_window_score(frames: Tensor, text: str) -> float:
    """The share of what a caption says that frames uint8 [T, H, W, 3] show: a scorer for prompt switches."""
    world = WorldConfig(frames.shape[1], frames.shape[2])
    return float(ToyReward(world)(frames[None], [text])["agreement"][0])
