"""The toy world as a source of prompts and of clips for the stages of training."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.training.latent_dataset import LatentDataset
from rfengine.training.toy_world import WorldConfig, caption, open_caption, sample_scenes


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
