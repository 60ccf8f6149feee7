"""Prompts from a file and real videos as latents: what trainings outside the toy world read.

A directory of latents holds one safetensors file for each video: the tensor `latents` [C, F, h, w], encoded
by the VAE of the checkpoint from the video's first frame on and normalised as WanVAE.encode returns them, and
the metadata `prompt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.loader import read_safetensors
from rfengine.checkpoint.tensor_file import read_header

Encode = Callable[[list[str]], Tensor]  # texts to states [N, L, D]


@dataclass(frozen=True, slots=True)
class FilePrompts:
    """Prompts of a file, drawn evenly; a prompt may come again."""

    texts: tuple[str, ...]
    encode: Encode

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        rows = torch.randint(len(self.texts), (count,), generator=generator).tolist()
        texts = [self.texts[row] for row in rows]
        return texts, self.encode(texts)


class LatentClips:
    """The starts of the videos of a directory of latents, with their prompts.

    size: [C, F, h, w] of a clip. empty_share of the draws get `negative`, states [1, L, D], in place of their
    prompt's, for guidance. Raises ValueError for a directory without files, and for a file of another form.
    """

    def __init__(
        self,
        directory: Path,
        size: tuple[int, ...],
        encode: Encode,
        negative: Tensor,
        empty_share: float = 0.1,
    ) -> None:
        self.paths = sorted(directory.glob("*.safetensors"))
        if not self.paths:
            raise ValueError(f"{directory} has no *.safetensors file; give a directory of encoded videos")
        for path in self.paths:
            _check_latents(path, size)
        self.frames, self.encode, self.negative, self.empty_share = size[1], encode, negative, empty_share

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.paths), (count,), generator=generator).tolist()
        empty = torch.rand(count, generator=generator) < self.empty_share
        found = [self._read(self.paths[row]) for row in rows]
        clips = [clip for clip, _ in found]
        states = self.encode([prompt for _, prompt in found])
        return torch.stack(clips), torch.where(empty[:, None, None], self.negative.to(states), states)

    def _read(self, path: Path) -> tuple[Tensor, str]:
        """One clip [C, F, h, w] and its prompt. Raises ValueError where the file is not as it was checked."""
        tensors, metadata = read_safetensors(path)
        latents = tensors.get("latents")
        if latents is None or latents.shape[1] < self.frames or "prompt" not in metadata:
            raise ValueError(f"{path} was changed since the training began; put back what was there")
        clip = latents[:, : self.frames].float()
        if not torch.isfinite(clip).all():
            raise ValueError(f"{path} has latents that are not finite; encode its video again")
        return clip, metadata["prompt"]


def latent_prompt(path: Path) -> str:
    """The prompt of one file of latents."""
    return read_header(path)[1].get("prompt", "").strip()


def _check_latents(path: Path, size: tuple[int, ...]) -> None:
    channels, frames, *sides = size
    entries, metadata = read_header(path)
    shape = entries["latents"].shape if "latents" in entries else None
    if shape is None or len(shape) != 4:
        raise ValueError(f"{path} has latents of {shape}; it must hold one tensor latents [C, F, h, w]")
    if not entries["latents"].dtype.is_floating_point:
        raise ValueError(
            f"{path} has latents in {entries['latents'].dtype}; they must be floating-point numbers"
        )
    if shape[1] < frames:
        raise ValueError(f"{path} has {shape[1]} latent frames; clips of this training have {frames}")
    if shape[0] != channels or list(shape[2:]) != sides:
        raise ValueError(
            f"{path} has latents of {tuple(shape)}; this training has [{channels}, F, {sides[0]}, {sides[1]}]"
        )
    if not metadata.get("prompt", "").strip():
        raise ValueError(f"{path} has no prompt in its metadata; write it there under 'prompt'")
