"""How well a model draws the toy world: accuracies on held-out captions, and how a long stream holds up."""

from __future__ import annotations

import torch
from torch import nn

from recipes.tiny.text_encoder import text_states
from rfengine.config import EngineConfig
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.toy.detector import accuracy, detect, score
from rfengine.toy.world import SPEEDS, Scene, WorldConfig, caption, sample_scenes
from rfengine.training.rollout import decode_chunks, roll_out
from rfengine.video import as_clips

_BATCH = 16
_PART_SECONDS = 10


def report_accuracy(
    model: WanDiT, vae: WanVAE, text_model: nn.Module, config: EngineConfig, videos: int, seed: int
) -> dict[str, float]:
    """Detector accuracies over `videos` held-out captions of the default world, three chunks each."""
    scenes = sample_scenes(videos, seed, WorldConfig(), "held_out")
    clips = []
    for first in range(0, videos, _BATCH):
        drawn = scenes[first : first + _BATCH]
        texts = text_states(text_model, [caption(scene) for scene in drawn], config.model.text_len)
        parts = list(decode_chunks(vae, roll_out(model, config, texts, 3, seed + first)))
        clips += as_clips(torch.cat(parts, dim=2))
    return accuracy(scenes, clips)


def report_stream(
    model: WanDiT,
    vae: WanVAE,
    text_model: nn.Module,
    config: EngineConfig,
    chunks: int,
    seed: int,
    streams: int = 8,
) -> list[dict[str, float]]:
    """One entry for every ten seconds of held-out streams of moving shapes.

    Each holds the accuracies, the share of frames in which the right object is there, its speed over the true
    speed, and the mean and the contrast of the pixels, which would leave 0.4 to 0.6 if the stream exploded.
    """
    world = WorldConfig(motion_weights=(1.0, 0.0, 0.0, 0.0), pair_share=0.0)
    scenes = sample_scenes(streams, seed, world, "held_out")
    texts = text_states(text_model, [caption(scene) for scene in scenes], config.model.text_len)
    parts, report = [], []
    frames = 0
    for pixels in decode_chunks(vae, roll_out(model, config, texts, chunks, seed)):
        parts.append(pixels)
        frames += pixels.shape[2]
        if frames >= _PART_SECONDS * config.fps:
            report.append(_part_report(scenes, torch.cat(parts, dim=2), len(report)))
            parts, frames = [], 0
    if frames >= config.fps:
        report.append(_part_report(scenes, torch.cat(parts, dim=2), len(report)))
    return report


def _part_report(scenes: list[Scene], pixels: torch.Tensor, index: int) -> dict[str, float]:
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
