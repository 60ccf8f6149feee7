"""Latents of toy-world videos, encoded once, with their text states, so that training does nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from recipes.tiny.text_encoder import text_states
from rfengine.models.vae import WanVAE
from rfengine.toy.data import LatentDataset
from rfengine.toy.world import (
    Scene,
    WorldConfig,
    background_image,
    caption,
    open_caption,
    render,
    sample_scenes,
)
from rfengine.training.arithmetic import cpu_autocast
from rfengine.video import as_model_pixels

_BATCH = 8
_MIN_CHANGE = 0.05  # of the range from 0 to 1, by which a pixel of the foreground differs from the background


def encode_dataset(
    vae: WanVAE, text_model: nn.Module, text_len: int, latent_frames: int, videos: int, seed: int
) -> LatentDataset:
    """Draw and encode `videos` training videos of `latent_frames` latent frames."""
    frames = 1 + vae.config.temporal_stride * (latent_frames - 1)
    scenes: list[Scene] = []
    latents, foreground = [], []
    for step, first in enumerate(tqdm(range(0, videos, _BATCH), "encoding", unit="batch", disable=None)):
        count = min(_BATCH, videos - first)
        drawn = sample_scenes(count, seed * 1_000_003 + step, WorldConfig(), "train")
        clips = [render(scene, frames) for scene in drawn]
        with torch.inference_mode(), cpu_autocast():
            latents.append(vae.encode(as_model_pixels(clips)).half())
        foreground += [foreground_cells(scene, clip, vae) for scene, clip in zip(drawn, clips, strict=True)]
        scenes += drawn
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


def foreground_cells(scene: Scene, clip: Tensor, vae: WanVAE) -> Tensor:
    """Latent cells [F, h, w] (bool) in whose pixels and frames a shape of the clip [T, H, W, 3] is seen."""
    world = WorldConfig(height=clip.shape[1], width=clip.shape[2])
    change = (clip - background_image(scene.background, world)).abs().amax(-1) > _MIN_CHANGE
    cells = F.max_pool2d(change.float()[:, None], vae.config.spatial_stride)[:, 0]
    later = cells[1:].unflatten(0, (-1, vae.config.temporal_stride)).amax(1)
    return torch.cat([cells[:1], later]) > 0
