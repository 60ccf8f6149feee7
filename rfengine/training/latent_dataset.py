"""Latents of toy-world videos, encoded once, with their text states, so that training does nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.pickle_file import open_pickle
from rfengine.files import replaced
from rfengine.models.vae import WanVAE
from rfengine.training.autoencoder import as_model_pixels
from rfengine.training.caption_encoder import text_states
from rfengine.training.cpu_arithmetic import cpu_autocast
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
_REMEDY = "make it again with `python -m rfengine.training.tiny_model --stage videos`"
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
        with torch.inference_mode(), cpu_autocast():
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
    """Write the dataset to one file, whole or not at all; load_dataset is the way back. Raises OSError."""
    with replaced(path) as partial:
        torch.save({name: getattr(dataset, name) for name in LatentDataset.__slots__}, partial)


def load_dataset(path: Path) -> LatentDataset:
    """Raises ValueError for a file that is absent, damaged or holds anything but a LatentDataset."""
    stored = open_pickle(path, ())
    names = LatentDataset.__slots__
    if stored.keys() != set(names):
        raise ValueError(
            f"{path} holds {list_names(sorted(stored))} and clips are {', '.join(names)}; {_REMEDY}"
        )
    dataset = LatentDataset(**{name: tensor.read() for name, tensor in stored.items()})
    problem = _problem(dataset)
    if problem:
        raise ValueError(f"{path} has {problem}; {_REMEDY}")
    return dataset


def _problem(dataset: LatentDataset) -> str:
    """What does not fit in the tensors of a dataset, or ""."""
    latents, texts, rows = dataset.latents, dataset.texts, dataset.text_rows
    shapes = {name: list(getattr(dataset, name).shape) for name in LatentDataset.__slots__}
    if latents.ndim != 5 or texts.ndim != 3 or not latents.numel() or not texts.numel():
        return f"latents {shapes['latents']} and texts {shapes['texts']}, not [N, C, F, h, w] and [K, L, D]"
    wanted = {
        "foreground": [shapes["latents"][0], *shapes["latents"][2:]],
        "open_texts": shapes["texts"],
        "text_rows": shapes["latents"][:1],
    }
    for name, shape in wanted.items():
        if shapes[name] != shape:
            return f"{name} {shapes[name]} where the others ask for {shape}"
    for name in ("latents", "texts", "open_texts"):
        values = getattr(dataset, name)
        if not values.is_floating_point() or not torch.isfinite(values).all():
            return f"{name} in {values.dtype} that are not all finite numbers"
    if dataset.foreground.dtype != torch.bool or rows.dtype != torch.int64:
        return f"foreground in {dataset.foreground.dtype} and text_rows in {rows.dtype}, not bool and int64"
    if rows.min() < 0 or rows.max() >= len(texts):
        return f"text_rows from {int(rows.min())} to {int(rows.max())} of {len(texts)} texts"
    return ""


def foreground_cells(scene: Scene, clip: Tensor, vae: WanVAE) -> Tensor:
    """Latent cells [F, h, w] (bool) in whose pixels and frames a shape of the clip [T, H, W, 3] is seen."""
    world = WorldConfig(height=clip.shape[1], width=clip.shape[2])
    change = (clip - background_image(scene.background, world)).abs().amax(-1) > _MIN_CHANGE
    cells = F.max_pool2d(change.float()[:, None], vae.config.spatial_stride)[:, 0]
    later = cells[1:].unflatten(0, (-1, vae.config.temporal_stride)).amax(1)
    return torch.cat([cells[:1], later]) > 0
