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
from rfengine.toy.captions import caption, opened, paraphrase, sample_scenes
from rfengine.toy.world import DEFAULT_WORLD, Scene, WorldConfig

_CAPTION_SHARE = 0.3  # of the texts: the caption itself
_OPEN_SHARE = 0.35  # of the attributes of a scene that an open text leaves open


def negative_states(text_len: int, text_dim: int) -> Tensor:
    """The empty text of the toy world: zeros [1, text_len, text_dim]."""
    return torch.zeros(1, text_len, text_dim)


def scene_text(scene: Scene, generator: random.Random) -> str:
    """A text that says all of a scene that is not open."""
    return caption(scene) if generator.random() < _CAPTION_SHARE else paraphrase(scene, generator)


def open_scene(scene: Scene, generator: random.Random) -> Scene:
    """The scene with some of its attributes left open."""
    return opened(scene, generator, _OPEN_SHARE)


@dataclass(frozen=True, slots=True)
class ToyPrompts:
    """Texts of training scenes, open_share of them with attributes left open.

    encode: texts to states [N, L, D], on the CPU.
    """

    encode: Callable[[list[str]], Tensor]
    open_share: float = 0.5
    world: WorldConfig = DEFAULT_WORLD

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        seed = int(torch.randint(2**62, (), generator=generator))
        own = random.Random(seed)
        texts = [
            scene_text(open_scene(scene, own) if own.random() < self.open_share else scene, own)
            for scene in sample_scenes(count, seed, self.world, "train")
        ]
        return texts, self.encode(texts)


@dataclass(frozen=True, slots=True)
class ToyClips:
    """Clips of `frames` latent frames out of encoded videos, half of them from the start, the others from a
    later chunk on, within one scene; their texts say all of it, with the given shares a part or nothing."""

    dataset: LatentDataset
    frames: int
    chunk_frames: int
    open_share: float = 0.3
    empty_share: float = 0.1

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        data = self.dataset
        choices = random.Random(int(torch.randint(2**62, (), generator=generator)))
        clips, states = [], []
        while len(clips) < count:
            row = choices.randrange(len(data.latents))
            starts = self._starts(data.text_rows[row, :, 0].tolist())
            if not starts:
                continue
            start = starts[0] if starts[0] == 0 and choices.random() < 0.5 else choices.choice(starts)
            first = start * self.chunk_frames
            clips.append(data.latents[row, :, first : first + self.frames].float())
            kind = choices.random()
            text = data.texts[data.text_rows[row, start, int(kind < self.open_share + self.empty_share)]]
            states.append(text.float() * float(kind >= self.empty_share))
        return torch.stack(clips), torch.stack(states)

    def _starts(self, rows: list[int]) -> list[int]:
        """The chunks from which a clip stays within one scene."""
        length = -(-self.frames // self.chunk_frames)
        places = range(len(rows) - length + 1)
        return [start for start in places if len(set(rows[start : start + length])) == 1]


_REMEDY = "make it again with `python -m recipes.tiny.run --stage videos`"


@dataclass(frozen=True, slots=True)
class LatentDataset:
    """N videos from their first frame on, of one scene or of several that follow each other.

    latents: normalised, float16 [N, C, F, h, w]. foreground: bool [N, F, h, w], where a shape is. texts:
    float16 [K, text_len, dim]. text_rows: [N, chunks, 2], rows of the texts of each chunk: one that says all
    of its scene and one that leaves something open. places: [N, P], where each begins, in turns. values:
    [N, 3, V, 2], what its full text, its open one and no text leave to chance; NaN where they do not. Of both
    the meaning is in recipes/tiny/noise.py.
    """

    latents: Tensor
    foreground: Tensor
    texts: Tensor
    text_rows: Tensor
    places: Tensor
    values: Tensor


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
    wanted = [shapes["latents"][0], *shapes["latents"][2:]]
    if shapes["foreground"] != wanted:
        return f"foreground {shapes['foreground']} where the others ask for {wanted}"
    if rows.ndim != 3 or len(rows) != wanted[0] or rows.shape[2] != 2:
        return f"text_rows {shapes['text_rows']} where the others ask for [{wanted[0]}, chunks, 2]"
    if dataset.places.ndim != 2 or len(dataset.places) != wanted[0]:
        return f"places {shapes['places']} where the others ask for [{wanted[0]}, places]"
    values = dataset.values
    if values.ndim != 4 or len(values) != wanted[0] or values.shape[1::2] != (3, 2):
        return f"values {shapes['values']} where the others ask for [{wanted[0]}, 3, values, 2]"
    for name in ("latents", "texts", "places"):
        values = getattr(dataset, name)
        if not values.is_floating_point() or not torch.isfinite(values).all():
            return f"{name} in {values.dtype} that are not all finite numbers"
    if dataset.foreground.dtype != torch.bool or rows.dtype != torch.int64:
        return f"foreground in {dataset.foreground.dtype} and text_rows in {rows.dtype}, not bool and int64"
    if rows.min() < 0 or rows.max() >= len(texts):
        return f"text_rows from {int(rows.min())} to {int(rows.max())} of {len(texts)} texts"
    return ""
