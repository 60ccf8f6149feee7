"""Latents of toy-world videos, encoded once, with their text states, so that training does nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfengine.models.vae import WanVAE
from rfengine.training.autoencoder import as_model_pixels
from rfengine.training.caption_encoder import text_states
from rfengine.training.stage_run import StageRun
from rfengine.training.toy_world import (
    Scene,
    WorldConfig,
    background_image,
    caption,
    open_caption,
    render,
    sample_scenes,
)

_BATCH = 8
_MIN_CHANGE = (
    0.05  # of the range from 0 to 1: a pixel that differs this much from the background is foreground
)


@dataclass(frozen=True, slots=True)
class LatentDataset:
    """N videos from their first frame on.

    latents: normalised, float16 [N, C, F, h, w]. foreground: bool [N, F, h, w], where a shape is. texts:
    float16 [K, text_len, dim], one for each caption; open_texts: the same of the captions without their
    speed. text_rows: [N], row of both of each video.
    """

    latents: Tensor
    foreground: Tensor
    texts: Tensor
    open_texts: Tensor
    text_rows: Tensor


def encode_dataset(
    vae: WanVAE, text_model: nn.Module, text_len: int, latent_frames: int, run: StageRun, seed: int
) -> LatentDataset:
    """Draw and encode training videos of `latent_frames` until the budget of `run` is used."""
    frames = 1 + vae.config.temporal_stride * (latent_frames - 1)
    scenes: list[Scene] = []
    latents, foreground = [], []
    while run.progress < 1:
        drawn = sample_scenes(_BATCH, seed * 1_000_003 + run.step, WorldConfig(), "train")
        clips = [render(scene, frames) for scene in drawn]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(as_model_pixels(clips)).half())
        foreground += [foreground_cells(scene, clip, vae) for scene, clip in zip(drawn, clips, strict=True)]
        scenes += drawn
        run.tick(videos=float(len(scenes)))
    run.log(videos=len(scenes))
    return LatentDataset(
        torch.cat(latents), torch.stack(foreground), *encode_captions(scenes, text_model, text_len)
    )


def encode_captions(
    scenes: Sequence[Scene], text_model: nn.Module, text_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """texts, open_texts and text_rows of a LatentDataset of these scenes."""
    by_caption = {caption(scene): open_caption(scene) for scene in scenes}
    texts = sorted(by_caption)
    rows = {text: index for index, text in enumerate(texts)}
    return (
        text_states(text_model, texts, text_len).half(),
        text_states(text_model, [by_caption[text] for text in texts], text_len).half(),
        torch.tensor([rows[caption(scene)] for scene in scenes]),
    )


def save_dataset(dataset: LatentDataset, path: Path) -> None:
    """Write the dataset to one file; load_dataset is the way back."""
    torch.save({name: getattr(dataset, name) for name in LatentDataset.__slots__}, path)


def load_dataset(path: Path) -> LatentDataset:
    return LatentDataset(**torch.load(path, weights_only=True))


def foreground_cells(scene: Scene, clip: Tensor, vae: WanVAE) -> Tensor:
    """Latent cells [F, h, w] (bool) in whose pixels and frames a shape of the clip [T, H, W, 3] is seen."""
    world = WorldConfig(height=clip.shape[1], width=clip.shape[2])
    change = (clip - background_image(scene.background, world)).abs().amax(-1) > _MIN_CHANGE
    cells = F.max_pool2d(change.float()[:, None], vae.config.spatial_stride)[:, 0]
    later = cells[1:].unflatten(0, (-1, vae.config.temporal_stride)).amax(1)
    return torch.cat([cells[:1], later]) > 0
