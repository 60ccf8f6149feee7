"""The toy world as a source of prompts and of clips for the stages of training."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.pickle_file import open_pickle
from rfengine.files import replaced
from rfengine.toy.world import WorldConfig, caption, open_caption, sample_scenes


def negative_states(text_len: int, text_dim: int) -> Tensor:
    """The empty text of the toy world: zeros [1, text_len, text_dim]."""
    return torch.zeros(1, text_len, text_dim)


@dataclass(frozen=True, slots=True)
class ToyPrompts:
    """Captions of training scenes, open_share of them without their speed.

    encode: texts to states [N, L, D], on the CPU.
    """

    encode: Callable[[list[str]], Tensor]
    open_share: float = 0.5
    world: WorldConfig = WorldConfig()

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        seed = int(torch.randint(2**62, (), generator=generator))
        scenes = sample_scenes(count, seed, self.world, "train")
        opened = random.Random(seed)
        texts = [open_caption(s) if opened.random() < self.open_share else caption(s) for s in scenes]
        return texts, self.encode(texts)


@dataclass(frozen=True, slots=True)
class ToyClips:
    """Clips of `frames` latent frames out of encoded videos, half of them from the start, the others from a
    later chunk on; their texts are the caption, with the given shares the caption without its speed or
    nothing."""

    dataset: LatentDataset
    frames: int
    chunk_frames: int
    open_share: float = 0.3
    empty_share: float = 0.1

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        data = self.dataset
        rows = torch.randint(len(data.latents), (count,), generator=generator)
        choices = random.Random(int(torch.randint(2**62, (), generator=generator)))
        late = (data.latents.shape[2] - self.frames) // self.chunk_frames
        clips, states = [], []
        for row in rows.tolist():
            start = choices.randint(1, late) * self.chunk_frames if late and choices.random() < 0.5 else 0
            clips.append(data.latents[row, :, start : start + self.frames].float())
            kind = choices.random()
            texts = data.texts if kind >= self.open_share + self.empty_share else data.open_texts
            known = float(kind >= self.empty_share)
            states.append(texts[data.text_rows[row]].float() * known)
        return torch.stack(clips), torch.stack(states)


_REMEDY = "make it again with `python -m recipes.tiny.run --stage videos`"


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
