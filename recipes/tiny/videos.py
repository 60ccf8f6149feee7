"""Latents of toy-world videos, encoded once, with their text states, so that training does nothing else."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from recipes.tiny.noise import all_open, places, told_values
from recipes.tiny.training import CPU
from rfengine.models.vae import WanVAE
from rfengine.toy.captions import sample_scenes
from rfengine.toy.data import LatentDataset, open_scene, scene_text
from rfengine.toy.world import (
    CHANGES,
    Scene,
    WorldConfig,
    as_model_pixels,
    changed,
    continued,
    draw_scene,
    render,
    render_background,
)
from rfengine.training.arithmetic import fast_autocast
from rfengine.training.build import base_engine, load_vae, text_states_of

TRAINED_WORLD = WorldConfig(motion_weights=(0.55, 0.15, 0.15, 0.15), pair_share=0.3)  # more of what is hard
_BATCH = 8
_TEXT_BATCH = 64
_SWITCH_SHARE = 0.4  # of the videos, in which another scene follows
_CHANGE_SHARE = 0.5  # of the scenes that follow, which differ in one attribute
_MIN_CHANGE = 0.05  # of the range from 0 to 1, by which a pixel of the foreground differs from the background

Part = tuple[Scene, int, int]  # a scene with its first frame and the one behind its last


def encode_dataset(
    source: str, chunks: int, videos: int, seed: int, device: torch.device = CPU
) -> LatentDataset:
    """Draw `videos` training videos of `chunks` chunks, and encode them and their texts by the VAE and the
    text encoder of a checkpoint."""
    engine = base_engine(source)
    vae, encode = load_vae(source, engine, device), text_states_of(source, engine, device)
    stride, size = vae.config.temporal_stride, engine.cache.chunk_frames
    starts = [0, *(1 + stride * (size * chunk - 1) for chunk in range(1, chunks + 1))]
    generator = random.Random(seed)
    latents, foreground, rows, texts, begins, values = [], [], [], [], [], []
    for first in tqdm(range(0, videos, _BATCH), "encoding", unit="batch", disable=None):
        scenes = sample_scenes(min(_BATCH, videos - first), seed * 1_000_003 + first, TRAINED_WORLD, "train")
        drawn = [video_parts(scene, starts, generator) for scene in scenes]
        clips = [torch.cat([render(scene, end - at, at) for scene, at, end in parts]) for parts in drawn]
        with torch.inference_mode(), fast_autocast(device):
            latents.append(vae.encode(as_model_pixels(clips).to(device)).half().cpu())
        begins += [places(parts[0][0], TRAINED_WORLD) for parts in drawn]
        for parts, clip in zip(drawn, clips, strict=True):
            foreground.append(foreground_cells(parts, clip, vae))
            scene_rows = []
            for scene, at, end in parts:
                number = sum(at <= start < end for start in starts[:-1])
                scene_rows += [[len(texts), len(texts) + 1]] * number
                texts.append(scene_text(scene, generator))
                said = open_scene(scene, generator)
                texts.append(scene_text(said, generator))
                if at == 0:
                    ways = (scene, said, all_open(scene))
                    values.append([told_values(scene, way, TRAINED_WORLD) for way in ways])
            rows.append(scene_rows)
    pieces = range(0, len(texts), _TEXT_BATCH)
    return LatentDataset(
        latents=torch.cat(latents),
        foreground=torch.stack(foreground),
        texts=torch.cat([encode(texts[first : first + _TEXT_BATCH]).half().cpu() for first in pieces]),
        text_rows=torch.tensor(rows),
        places=torch.tensor(begins),
        values=torch.tensor(values),
    )


def video_parts(scene: Scene, starts: list[int], generator: random.Random) -> list[Part]:
    """The scene alone, or for a share of the videos another scene that goes on from it at a chunk after the
    first. starts: the first frame of every chunk, and the number of frames."""
    if len(starts) < 3 or generator.random() >= _SWITCH_SHARE:
        return [(scene, 0, starts[-1])]
    at = generator.choice(starts[1:-1])
    return [(scene, 0, at), (continued(_follower(scene, generator), scene, at), at, starts[-1])]


def _follower(scene: Scene, generator: random.Random) -> Scene:
    """A scene that differs from the given one in an attribute, or another scene altogether."""
    if generator.random() < _CHANGE_SHARE:
        try:
            return changed(scene, generator.choice(CHANGES), generator, TRAINED_WORLD)
        except ValueError:  # this attribute of this scene has no other value
            pass
    return draw_scene(generator, TRAINED_WORLD)


def foreground_cells(parts: list[Part], clip: Tensor, vae: WanVAE) -> Tensor:
    """Latent cells [F, h, w] (bool) in whose pixels and frames a shape of the clip [T, H, W, 3] is seen."""
    behind = torch.cat([render_background(scene, end - at, at) for scene, at, end in parts])
    change = (clip - behind).abs().amax(-1) > _MIN_CHANGE
    cells = F.max_pool2d(change.float()[:, None], vae.config.spatial_stride)[:, 0]
    later = cells[1:].unflatten(0, (-1, vae.config.temporal_stride)).amax(1)
    return torch.cat([cells[:1], later]) > 0
