"""A call with the arguments of a Diffusers pipeline: its request, checked before anything is computed, each
video, and the packed result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from rfengine.limits import Range, as_integer, shown
from rfengine.prompts import check_prompt
from rfengine.schedule import MAX_SEED, as_seed
from rfengine.stream import VideoStream

if TYPE_CHECKING:
    from numpy import ndarray

OutputType = Literal["np", "pt", "pil", "latent"]
Generators = torch.Generator | Sequence[torch.Generator]
StepEnd = Callable[[int, float, dict[str, Tensor]], Any]
_MOST_VIDEOS = 10_000  # of one prompt; memory ends long before


class PipelineOutput(NamedTuple):
    """Result of calling a pipeline, a tuple of one; `frames` depends on output_type (Pipeline.__call__)."""

    frames: Any


def refuse_guidance(
    negative_prompt: str | None, scale: float | None, steps: int | None, own_steps: int
) -> None:
    """Raises ValueError for arguments that a distilled model would ignore. own_steps: those of the model."""
    if negative_prompt:
        raise ValueError(
            f"negative_prompt is {shown(negative_prompt)}; the model is distilled and runs without guidance, "
            "so leave it out"
        )
    if scale is not None and not scale <= 1:
        raise ValueError(
            f"guidance_scale is {shown(scale)}; the model is distilled and runs without guidance, so use 1 "
            "or leave it out"
        )
    if steps is not None and as_integer("num_inference_steps", steps) != own_steps:
        raise ValueError(
            f"num_inference_steps is {shown(steps)}; the model was distilled to {own_steps} steps, so use "
            f"{own_steps} or leave it out"
        )


def requested_videos(
    prompt: str | Sequence[str], per_prompt: int, generator: Generators | None, seed: int | None
) -> list[tuple[str, int]]:
    """Prompt and seed of every video, those of one prompt together.

    One generator draws all seeds and advances; of several, each draws one. A seed is that of every prompt's
    first video and counts up over the others. Raises ValueError for no prompt, and for a seed beside a
    generator.
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


def make_video(
    stream: VideoStream, count: int, num_chunks: int, as_latents: bool, on_step_end: StepEnd | None
) -> Tensor | ndarray:
    """Latents [C, F, h, w] or frames uint8 [T, H, W, 3] of a video of `count` frames in `num_chunks` chunks.

    on_step_end(step, timestep, {"latents": ...}): see Pipeline.__call__.
    """
    import numpy

    latents, frames, steps = [], [], 0
    for chunk in range(num_chunks):
        on_step = None if on_step_end is None else _step_callback(on_step_end, steps)
        steps += stream.num_steps
        ahead = chunk + 1 < num_chunks
        frames.append(stream.advance(on_step, decode=not as_latents, ahead=ahead).frames)
        latents.append(stream.latents)
    if as_latents:
        return torch.cat(latents, dim=2)[0, :, : stream.grid.latent_frames(count)]
    return numpy.concatenate(frames)[:count]


def _step_callback(on_step_end: StepEnd, offset: int) -> Callable[[int, float, Tensor], Tensor | None]:
    def on_step(step: int, timestep: float, latents: Tensor) -> Tensor | None:
        answer = on_step_end(offset + step, timestep, {"latents": latents})
        return answer.get("latents") if isinstance(answer, dict) else None

    return on_step


def packed(videos: list[Any], output_type: OutputType) -> Any:
    """Videos, latents [C, F, h, w] or frames uint8 [T, H, W, 3], as Pipeline.__call__ returns them."""
    import numpy

    if output_type == "latent":
        return torch.stack(videos)
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in frames] for frames in videos]
    scaled = numpy.stack(videos).astype(numpy.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 1, 4, 2, 3)
