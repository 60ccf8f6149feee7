"""A call in the shape of a Diffusers pipeline: what it asks for, checked before anything is made, and its
result packed as it asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rfengine.limits import Range, as_integer, shown
from rfengine.prompts import check_prompt
from rfengine.schedule import MAX_SEED, as_seed

OutputType = Literal["np", "pt", "pil", "latent"]
Generators = torch.Generator | Sequence[torch.Generator]
_MOST_VIDEOS = 10_000  # of one prompt; memory ends long before


@dataclass(frozen=True, slots=True)
class Guidance:
    """What Diffusers' pipelines take and a distilled model runs without."""

    negative_prompt: str | None
    scale: float | None
    steps: int | None

    def check(self, own_steps: int) -> None:
        """Raises ValueError for what would have to be left out. own_steps: those of the model."""
        if self.negative_prompt:
            raise ValueError(
                f"negative_prompt is {shown(self.negative_prompt)}; the model is distilled and runs without "
                "guidance, so leave it out"
            )
        if self.scale is not None and not self.scale <= 1:
            raise ValueError(
                f"guidance_scale is {shown(self.scale)}; the model is distilled and runs without guidance, "
                "so use 1 or leave it out"
            )
        if self.steps is not None and as_integer("num_inference_steps", self.steps) != own_steps:
            raise ValueError(
                f"num_inference_steps is {shown(self.steps)}; the model was distilled to {own_steps} steps, "
                f"so use {own_steps} or leave it out"
            )


def requested_videos(
    prompt: str | Sequence[str], per_prompt: int, generator: Generators | None, seed: int | None
) -> list[tuple[str, int]]:
    """Prompt and seed of every video, those of one prompt together.

    A generator gives all seeds and advances; of several each gives one. A seed is that of every prompt's
    first video, and counts up over the others. Raises ValueError where nothing is asked for, or something
    twice.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(f"prompt is {shown(prompt)}; give a text or a list of texts")
    for number, text in enumerate(texts):
        check_prompt(text, f"prompt {number}" if len(texts) > 1 else "the prompt")
    copies = as_integer("num_videos_per_prompt", per_prompt, Range(1, _MOST_VIDEOS))
    if generator is not None and seed is not None:
        raise ValueError(f"seed is {shown(seed)} and a generator is given; give one of them")
    videos = [text for text in texts for _ in range(copies)]
    if generator is None:
        first = 0 if seed is None else as_seed(seed)
        seeds = [as_seed(first + copy) for _ in texts for copy in range(copies)]
    else:
        seeds = _drawn_seeds(generator, len(videos))
    return list(zip(videos, seeds, strict=True))


def _drawn_seeds(generator: Generators, count: int) -> list[int]:
    several = isinstance(generator, list | tuple)
    given = generator if several else [generator] * count
    if not all(isinstance(each, torch.Generator) for each in given):
        raise ValueError(f"generator is {shown(generator)}; give a torch.Generator or a list of them")
    if len(given) != count:
        raise ValueError(f"there are {len(given)} generators for {count} videos; give one, or one for each")
    return [
        int(torch.randint(0, MAX_SEED, (), generator=each, dtype=torch.int64, device=each.device))
        for each in given
    ]


def packed(videos: list[Any], output_type: OutputType) -> Any:
    """Videos, latents [C, F, h, w] or frames uint8 [T, H, W, 3], as Pipeline.__call__ gives them."""
    import numpy

    if output_type == "latent":
        return torch.stack(videos)
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in frames] for frames in videos]
    scaled = numpy.stack(videos).astype(numpy.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 1, 4, 2, 3)
