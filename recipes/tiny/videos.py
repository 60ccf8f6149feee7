"""Latents of toy-world videos, encoded once, with their text states, so that training does nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from recipes.tiny.training import CPU
from rfengine.models.vae import WanVAE
from rfengine.toy.data import LatentDataset
from rfengine.toy.world import (
    Scene,
    WorldConfig,
    as_model_pixels,
    background_image,
    caption,
    open_caption,
    render,
    sample_scenes,
)
from rfengine.training.arithmetic import cpu_autocast
from rfengine.training.build import base_engine, load_vae, text_states_of

_BATCH = 8
_MIN_CHANGE = 0.05  # of the range from 0 to 1, by which a pixel of the foreground differs from the background


def encode_dataset(source: str, chunks: int, videos: int, seed: int) -> LatentDataset:
    """Draw `videos` training videos of `chunks` chunks, and encode them and their captions by the VAE and the
    text encoder of a checkpoint."""
    engine = base_engine(source)
    vae, encode = load_vae(source, engine, CPU), text_states_of(source, engine, CPU)
    frames = 1 + vae.config.temporal_stride * (chunks * engine.cache.chunk_frames - 1)
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
    opened = {caption(scene): open_caption(scene) for scene in scenes}
    texts = sorted(opened)
    rows = {text: index for index, text in enumerate(texts)}
    return LatentDataset(
        latents=torch.cat(latents),
        foreground=torch.stack(foreground),
        texts=encode(texts).half(),
        open_texts=encode([opened[text] for text in texts]).half(),
        text_rows=torch.tensor([rows[caption(scene)] for scene in scenes]),
    )


def foreground_cells(scene: Scene, clip: Tensor, vae: WanVAE) -> Tensor:
    """Latent cells [F, h, w] (bool) in whose pixels and frames a shape of the clip [T, H, W, 3] is seen."""
    world = WorldConfig(height=clip.shape[1], width=clip.shape[2])
    change = (clip - background_image(scene.background, world)).abs().amax(-1) > _MIN_CHANGE
    cells = F.max_pool2d(change.float()[:, None], vae.config.spatial_stride)[:, 0]
    later = cells[1:].unflatten(0, (-1, vae.config.temporal_stride)).amax(1)
    return torch.cat([cells[:1], later]) > 0
