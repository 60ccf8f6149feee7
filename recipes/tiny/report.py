"""How well a model draws the toy world: accuracies on held-out captions, and how a long stream holds up."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.tiny.training import ToyModel
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.detector import accuracy, detect, score
from rfengine.toy.world import SPEEDS, Scene, WorldConfig, as_clips
from rfengine.training.rollout import decode_chunks, roll_out

_BATCH = 16
_PART_SECONDS = 10


def report_accuracy(model: ToyModel, videos: int, seed: int) -> dict[str, float]:
    """Detector accuracies over `videos` held-out captions of the default world, three chunks each."""
    scenes = sample_scenes(videos, seed, WorldConfig(), "held_out")
    clips = []
    for first in range(0, videos, _BATCH):
        clips += as_clips(model.pixels(model.latents(scenes[first : first + _BATCH], 3, seed + first)))
    return accuracy(scenes, clips)


def report_stream(model: ToyModel, chunks: int, seed: int, streams: int = 8) -> list[dict[str, float]]:
    """One entry for every ten seconds of held-out streams of moving shapes.

    Each holds the accuracies, the share of frames in which the right object is there, its speed over the true
    speed, and the mean and the contrast of the pixels, which would leave 0.4 to 0.6 if the stream exploded.
    """
    world = WorldConfig(motion_weights=(1.0, 0.0, 0.0, 0.0), pair_share=0.0)
    scenes = sample_scenes(streams, seed, world, "held_out")
    states, fps = model.encode([caption(scene) for scene in scenes]), model.config.fps
    parts, report = [], []
    latents = roll_out(model.transformer, model.config, states, chunks, seed)
    for index, pixels in enumerate(decode_chunks(model.vae, latents)):
        parts.append(pixels)
        frames = sum(part.shape[2] for part in parts)
        if frames >= _PART_SECONDS * fps or (index == chunks - 1 and frames >= fps):
            report.append(_part_report(scenes, torch.cat(parts, dim=2), len(report)))
            parts = []
    return report


def _part_report(scenes: list[Scene], pixels: Tensor, index: int) -> dict[str, float]:
    clips = as_clips(pixels)
    presence, speeds, scores = [], [], []
    for scene, clip in zip(scenes, clips, strict=True):
        detection = detect(clip)
        scores.append(score(scene, detection))
        seen = [entry for entry in detection.objects if entry.colour == scene.objects[0].colour]
        presence.append(float(seen[0].presence.float().mean()) if seen else 0.0)
        speeds.append(seen[0].speed_value / SPEEDS[scene.speed] if seen else 0.0)
    means = {name: sum(entry[name] for entry in scores) / len(scores) for name in scores[0]}
    stacked = torch.stack(clips)
    return {
        "from_second": float(index * _PART_SECONDS),
        **means,
        "presence": sum(presence) / len(presence),
        "relative_speed": sum(speeds) / len(speeds),
        "pixel_mean": float(stacked.mean()),
        "pixel_deviation": float(stacked.std()),
    }
