"""What one video of a diffusion forcing model is asked to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rfengine.config import Pixels
from rfengine.diffusion_forcing.unipc import SigmaKind
from rfengine.limits import Range, check_fields
from rfengine.schedule import MAX_SEED


@dataclass(frozen=True, slots=True)
class DiffusionForcingOptions:
    """How a video is made; None leaves a field to the model's DiffusionForcingConfig or EngineConfig.

    num_frames: pixel frames, those of a start clip included. guidance_scale: 1 is without the negative
    prompt. ar_step: rows of the schedule between a block and the next; 0 denoises all frames together.
    causal_block_size: latent frames of a block. causal_attention: a frame attends to its own block and those
    before it alone; without it every frame of the window attends to all.
    overlap_history: pixel frames of the end of a piece with which the next one begins, where the video is
    longer than the model sees at once. overlap_latents: takes those as latents, as Diffusers does; else they
    are decoded and encoded again, as SkyReels-V2 does.
    addnoise_condition: the timestep at which the clean frames at the beginning are shown, with fresh noise
    in each row; 0 shows them clean, 20 is recommended.
    fps: of the file, and shown to a model that is told. sigmas: whose table of noise levels.
    """

    negative_prompt: str | None = None
    num_frames: Annotated[int, Range(1, 86_400)] | None = None  # an hour at 24 frames per second
    height: Pixels | None = None
    width: Pixels | None = None
    seed: Annotated[int, Range(0, MAX_SEED)] = 0
    steps: Annotated[int, Range(1, 1000)] | None = None
    shift: Annotated[float, Range(1e-3, 1e3)] | None = None
    guidance_scale: Annotated[float, Range(1, 100)] | None = None
    ar_step: Annotated[int, Range(0, 1000)] = 0
    causal_block_size: Annotated[int, Range(1, 1024)] = 1
    causal_attention: bool = False
    overlap_history: Annotated[int, Range(1, 4096)] | None = None
    overlap_latents: bool = False
    addnoise_condition: Annotated[int, Range(0, 60)] = 0
    fps: Annotated[int, Range(1, 1000)] | None = None
    sigmas: SigmaKind = "skyreels"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.causal_block_size > 1 and not self.ar_step:
            raise ValueError(
                f"causal_block_size is {self.causal_block_size} and ar_step is 0, which denoises all frames "
                "together; use causal_block_size 1, or ar_step 5"
            )
        if self.overlap_latents and self.overlap_history is None:
            raise ValueError(
                "overlap_latents is on and overlap_history, which says how much is taken over, is not given; "
                "give it, such as 17, or leave both out"
            )
