"""What the configuration of an engine says of a diffusion forcing model; config.py has the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rfengine.limits import Range, Text, check_fields
from rfengine.prompts import WAN_NEGATIVE_PROMPT

FPS_ROWS = 2  # of the table of frame rates (WanConfig.fps_embedding)


@dataclass(frozen=True, slots=True)
class DiffusionForcingConfig:
    """What a diffusion forcing model was trained at, and how it is sampled where nothing else is asked for.

    image_shift and image_guidance_scale: where the video begins with a picture. The values are those of
    SkyReels-V2, which takes Wan's negative prompt.
    """

    base_frames: Annotated[int, Range(1, 4096)] = 97  # pixel frames that the model sees at once
    steps: Annotated[int, Range(1, 1000)] = 30
    shift: Annotated[float, Range(1e-3, 1e3)] = 8.0
    image_shift: Annotated[float, Range(1e-3, 1e3)] = 5.0
    guidance_scale: Annotated[float, Range(1, 100)] = 6.0  # 1 is without
    image_guidance_scale: Annotated[float, Range(1, 100)] = 5.0
    negative_prompt: Annotated[str, Text(1, 10_000)] = WAN_NEGATIVE_PROMPT

    def __post_init__(self) -> None:
        check_fields(self)


def check_diffusion_forcing(
    forcing: DiffusionForcingConfig | None, fps_embedding: bool, temporal_stride: int
) -> None:
    """Raises ValueError where the parts of a configuration do not fit.

    fps_embedding: whether the model is told its frame rate. temporal_stride: pixel frames per latent frame.
    """
    if fps_embedding and forcing is None:
        raise ValueError(
            "model.fps_embedding is true and diffusion_forcing is null; such a model is one of diffusion "
            "forcing, so give both"
        )
    if forcing is not None and (forcing.base_frames - 1) % temporal_stride:
        raise ValueError(
            f"base_frames of diffusion_forcing is {forcing.base_frames}; whole latent frames are 1 + a "
            f"multiple of {temporal_stride}"
        )
