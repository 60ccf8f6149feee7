"""What `rfengine generate` does with a diffusion forcing model, and the options that it alone has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rfengine.cli.cleaned_prompt import check_cleaned
from rfengine.cli.start import StartOptions, picture_of_size, start_frames
from rfengine.cli.written_video import Piece, progress_bar, write_pieces
from rfengine.config import EngineConfig
from rfengine.diffusion_forcing.options import DiffusionForcingOptions
from rfengine.diffusion_forcing.pipeline import DiffusionForcingPipeline
from rfengine.diffusion_forcing.plan import plan_video
from rfengine.grid import LatentGrid
from rfengine.video import frame_count

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True, kw_only=True)
class ForcingArguments:
    """Of diffusion forcing models alone (SkyReels-V2-DF); what is not given is the model's own."""

    num_frames: int | None = None
    """Frames of the video, in place of --seconds, with those of --image or --video."""
    negative_prompt: str | None = None
    """What the video is led away from."""
    fps: int | None = None
    """Frames per second of the file; the model is told whether they are 16 or not."""
    guidance_scale: float | None = None
    """How strongly the prompt leads, away from the negative one; 1 is without, and half the work."""
    steps: int | None = None
    """Denoising steps of each frame."""
    shift: float | None = None
    """How much of the steps goes to high noise."""
    ar_step: int | None = None
    """Rows between a block of frames and the next one; 0 denoises all together."""
    causal_block_size: int | None = None
    """Latent frames of a block; with --ar-step."""
    causal_attention: bool = False
    """Let a block see itself and those before it alone."""
    end_image: Path | None = None
    """A picture that the video comes to and does not show, as --image is given and of its size."""
    overlap_history: int | None = None
    """Frames that a part of a long video takes over from the one before, such as 17."""
    overlap_latents: bool = False
    """Take those over as latents, in place of decoding and encoding them again."""
    addnoise_condition: int | None = None
    """Noise on the frames that are given or taken over, 0 to 60; 20 is recommended for long videos."""


@dataclass(frozen=True, slots=True)
class ForcingVideo:
    """One video as it was asked for, checked before the model is loaded."""

    options: DiffusionForcingOptions
    start_frames: ndarray | None
    end_frame: ndarray | None

    @classmethod
    def of(
        cls,
        arguments: ForcingArguments,
        config: EngineConfig,
        start: StartOptions,
        seconds: float | None,
        size: tuple[int | None, int | None],
    ) -> ForcingVideo:
        """size: height and width. Raises ValueError for a video that the model of `config` cannot make."""
        given = {name: value for name, value in _given(arguments).items() if name != "end_image"}
        fps = arguments.fps or config.fps
        if seconds is not None:
            given["num_frames"] = frame_count(fps, seconds, arguments.num_frames)
        options = DiffusionForcingOptions(height=size[0], width=size[1], **given)
        grid = LatentGrid.of(config, *size)
        begin = start_frames(start, replace(config, fps=fps), grid)
        path = arguments.end_image
        end = None if path is None else picture_of_size(path, grid, start.resize)
        plan = plan_video(config, options, 0 if begin is None else len(begin), end is not None)
        if plan.guidance_scale > 1:
            check_cleaned(plan.negative_prompt, "the negative prompt")
        return cls(options, begin, end)

    def write(self, pipeline: DiffusionForcingPipeline, prompt: str, path: Path, seed: int) -> None:
        """Make the video of `prompt` and write it to `path`, with a bar of rows."""
        options = replace(self.options, seed=seed)
        plan = pipeline.plan(options, self.start_frames, self.end_frame)
        rows = pipeline.rows(prompt, options, start_frames=self.start_frames, end_frame=self.end_frame)
        with progress_bar(path, plan.row_count, "row") as bar:

            def pieces() -> Iterator[Piece]:
                for row in rows:
                    bar.update()
                    yield Piece(row.frames)

            made = write_pieces(path, plan.fps, plan.grid, plan.num_frames, pieces())
        rate, fps = plan.num_frames / made.seconds, plan.fps
        print(
            f"{path}: {plan.num_frames} frames, {plan.num_frames / fps:.1f} s of video; made at {rate:.2f} "
            f"frames/s, {rate / fps:.2f} times as fast as it plays; {pipeline.config.runtime.vae} decoder, "
            f"{pipeline.vae_tier}"
        )


def refuse_forcing(arguments: ForcingArguments, config: EngineConfig) -> None:
    """Raises ValueError where an option of diffusion forcing models is given for one that streams."""
    for name in _given(arguments):
        raise ValueError(
            f"--{name.replace('_', '-')} is for diffusion forcing models and {config.name} streams; leave it "
            "out, or give --model a directory that `rfengine convert` made of SkyReels-V2-DF"
        )


def refuse_options_of_streams(given: Mapping[str, object], config: EngineConfig) -> None:
    """Raises ValueError where one of these options of models that stream, by name, is given."""
    for name, value in given.items():
        if value:
            way = "merge it by `rfengine convert`" if name == "lora" else "leave it out"
            raise ValueError(
                f"--{name} is for models that stream and {config.name} is a diffusion forcing model; {way}"
            )


def _given(arguments: ForcingArguments) -> dict[str, object]:
    """What was asked for, by name."""
    named = {entry.name: getattr(arguments, entry.name) for entry in dataclasses.fields(arguments)}
    return {name: value for name, value in named.items() if value is not None and value is not False}
