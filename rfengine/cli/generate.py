"""`rfengine generate`: a video from a prompt, one from each line of a file, or one of several scenes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.systems import SystemName, configured
from rfengine.cli.cleaned_prompt import check_cleaned
from rfengine.cli.forcing import ForcingArguments, ForcingVideo, refuse_forcing, refuse_options_of_streams
from rfengine.cli.lora_options import LoraOptions
from rfengine.cli.start import StartOptions, check_start, start_frames, start_mode, start_parts
from rfengine.cli.terminal import find_device
from rfengine.cli.written_video import Piece, progress_bar, write_pieces
from rfengine.config import Backend, DTypeName, EngineConfig, RuntimeConfig
from rfengine.diffusion_forcing.pipeline import DiffusionForcingPipeline
from rfengine.grid import LatentGrid
from rfengine.pipeline import Pipeline
from rfengine.prompt_script import PlannedScene, PromptScript, Scene, ScriptPlan, play
from rfengine.prompts import prompt_line, read_prompts
from rfengine.runtime.ranks import leave
from rfengine.schedule import as_seed
from rfengine.stream import VideoStream
from rfengine.torchrun import started_ranks
from rfengine.video import check_video_path, frame_count

if TYPE_CHECKING:
    import torch
    from numpy import ndarray
    from tqdm import tqdm as ProgressBar

_SECONDS = 5.0
_SLUG_LENGTH = 48
_SHOWN_TEXT = 40  # characters of a scene in the progress bar


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Make a video from a prompt, one from each line of a file, or one of several scenes. Under `torchrun
    --no-python --nproc-per-node N` the processes hold the transformer together."""

    prompt: Positional[str | None] = None
    """What the video shows."""
    output: Annotated[Path, arg(aliases=("-o",))]
    """The MP4 to write; with --prompts the directory that gets one MP4 for each prompt."""
    prompts: Path | None = None
    """A text file with one prompt per line, instead of PROMPT; empty lines are skipped."""
    script: Path | None = None
    """A text file with one scene per line, instead of PROMPT: its seconds, how it begins (start, cut, soft,
    soft:CHUNKS, soft:CHUNKS:spherical or recache) and its text, such as '4 soft:3 a red circle'; they are the
    MP4's chapters."""
    seconds: float | None = None
    """Length of each video, 5 where nothing is given, and with diffusion forcing what the model was trained
    at; a script has its own."""
    seed: int = 0
    """The same seed, model and prompt give the same video."""
    start: OmitArgPrefixes[StartOptions] = StartOptions()
    model: str = "tiny"
    """A checkpoint directory, or tiny, which comes with the package."""
    system: SystemName | None = None
    """The cache and the denoising steps of a published system, in place of the checkpoint's own."""
    height: int | None = None
    """Pixels, a multiple of 16; the size the model was trained at where nothing is given."""
    width: int | None = None
    """Pixels, a multiple of 16."""
    device: str | None = None
    """cpu, cuda or cuda:N; cuda where there is one."""
    dtype: DTypeName | None = None
    """Precision of the weights; bfloat16 on CUDA, float32 on the CPU."""
    backend: Backend | None = None
    """What runs the ops; auto, the default, takes what is fastest here."""
    loras: OmitArgPrefixes[LoraOptions] = LoraOptions()
    runtime: OmitArgPrefixes[RuntimeConfig] = RuntimeConfig()
    verify: bool = False
    """Read every file of the checkpoint first and refuse to start where one differs from its manifest."""
    forcing: OmitArgPrefixes[ForcingArguments] = ForcingArguments()


def run(options: GenerateOptions) -> int:
    jobs = _jobs(options)
    checkpoint = _open_checkpoint(options)
    device = find_device(options.device)
    find_device(options.runtime.decode_device, "--decode-device")
    if checkpoint.config.diffusion_forcing is not None:
        write = _forcing_writer(checkpoint, device, options)
    else:
        write = _stream_writer(checkpoint, device, options, jobs[0][0])
    _write_all(write, jobs)
    leave()  # not after an error: it could wait for a rank that has gone
    return 0


def _write_all(
    write: Callable[[str | PromptScript, Path], None], jobs: list[tuple[str | PromptScript, Path]]
) -> None:
    for done, (prompt, path) in enumerate(jobs):
        try:
            write(prompt, path)
        except KeyboardInterrupt as error:
            if not done:
                raise
            begun = str(error) or f"{path} was not begun"
            raise KeyboardInterrupt(f"{begun}; {done} of {len(jobs)} videos are whole") from None


def _stream_writer(
    checkpoint: Checkpoint, device: torch.device | None, options: GenerateOptions, prompt: str | PromptScript
) -> Callable[[str | PromptScript, Path], None]:
    """What writes a video to a file, with a model that streams. prompt: one of those to come; what cannot be
    made of it is refused before loading, which can take minutes."""
    refuse_forcing(options.forcing, checkpoint.config)
    config = checkpoint.config if options.system is None else configured(checkpoint.config, options.system)
    grid = LatentGrid.of(config, options.height, options.width)
    frames = start_frames(options.start, config, grid)
    has_size = frames is not None or options.height is not None or options.width is not None
    is_begun = frames is not None and bool(start_parts(options.start, frames, config).prefilled)
    _plan(prompt, options.seconds, config, is_begun)
    pipeline = Pipeline.from_pretrained(
        checkpoint,
        device,
        options.dtype,
        system=options.system,
        backend=options.backend,
        runtime=options.runtime,
        loras=options.loras.loras(),
        tensor_parallel=started_ranks(),
        size=(grid.height, grid.width) if has_size else None,
    )

    def write(prompt: str | PromptScript, path: Path) -> None:
        plan = _plan(prompt, options.seconds, config, is_begun)
        _write_video(pipeline, plan, path, options, frames, has_chapters=isinstance(prompt, PromptScript))

    return write


def _forcing_writer(
    checkpoint: Checkpoint, device: torch.device | None, options: GenerateOptions
) -> Callable[[str, Path], None]:
    """What writes the video of a prompt to a file, with a diffusion forcing model."""
    if (ranks := started_ranks()) > 1:
        raise ValueError(
            f"{ranks} processes are started and a diffusion forcing model runs in one; leave torchrun out"
        )
    given = {
        "script": options.script, "system": options.system, "start-mode": options.start.start_mode,
        "lora": options.loras.lora, "allow-unmatched-lora": options.loras.allow_unmatched_lora,
    }  # fmt: skip
    refuse_options_of_streams(given, checkpoint.config)
    size = (options.height, options.width)
    video = ForcingVideo.of(options.forcing, checkpoint.config, options.start, options.seconds, size)
    pipeline = DiffusionForcingPipeline.from_pretrained(
        checkpoint, device, options.dtype, backend=options.backend, runtime=options.runtime
    )
    return lambda prompt, path: video.write(pipeline, prompt, path, options.seed)


def _jobs(options: GenerateOptions) -> list[tuple[str | PromptScript, Path]]:
    """Every prompt, or the script, and the file its video goes to."""
    _check_one_source(options)
    if options.script is not None:
        script = PromptScript.read(options.script, check_cleaned)
        check_video_path(options.output)
        return [(script, options.output)]
    if options.prompt is not None:
        check_cleaned(options.prompt)
        check_video_path(options.output)
        return [(options.prompt, options.output)]
    prompts = read_prompts(options.prompts, skip_empty_lines=True)
    for prompt in prompts:
        check_cleaned(prompt)
    if not options.output.is_dir():
        raise ValueError(
            f"{options.output} is no directory; create it first, --prompts writes its videos there"
        )
    return [(prompt, options.output / _file_name(number, prompt)) for number, prompt in enumerate(prompts, 1)]


def _check_one_source(options: GenerateOptions) -> None:
    """Raises ValueError unless there is one of a prompt, a file of prompts and a script."""
    sources = {
        "PROMPT": options.prompt, "--prompts FILE": options.prompts, "--script FILE": options.script,
    }  # fmt: skip
    given = [name for name, value in sources.items() if value is not None]
    if not given:
        raise ValueError("none of PROMPT, --prompts FILE and --script FILE is given; give one of them")
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; give one of them")
    if options.script is not None and options.seconds is not None:
        raise ValueError(f"--seconds is {options.seconds} beside --script, whose scenes have their own")


def _file_name(number: int, prompt: str) -> str:
    """A name that any file system takes and no other prompt of the file has: 0001-a-red-circle.mp4."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_SLUG_LENGTH].rstrip("-")
    return f"{number:04}-{slug or 'prompt'}.mp4"


def _open_checkpoint(options: GenerateOptions) -> Checkpoint:
    """The checkpoint, none of whose tensors is read yet."""
    from rfengine.checkpoint.manifest import verify

    as_seed(options.seed)
    if options.verify:
        verify(checkpoint_directory(options.model))
    resize = options.start.resize and options.forcing.end_image is None  # which it may be for as well
    check_start(replace(options.start, resize=resize))
    return Checkpoint.open(options.model)


def _plan(
    prompt: str | PromptScript, seconds: float | None, config: EngineConfig, is_begun: bool
) -> ScriptPlan:
    """The scenes of a video; that of one prompt has one. Raises ValueError for a length that cannot be."""
    if isinstance(prompt, PromptScript):
        return prompt.plan(config, is_begun)
    seconds = _SECONDS if seconds is None else seconds
    frame_count(config.fps, seconds)
    return PromptScript((Scene(seconds, prompt),)).plan(config, is_begun)


def _write_video(
    pipeline: Pipeline,
    plan: ScriptPlan,
    path: Path,
    options: GenerateOptions,
    start: ndarray | None,
    has_chapters: bool,
) -> None:
    """start: the frames that the video begins with or continues."""
    fps, count = pipeline.config.fps, plan.num_frames
    grid = LatentGrid.of(pipeline.config, options.height, options.width)
    stream = pipeline.stream(
        plan.scenes[0].scene.prompt, seed=options.seed, height=grid.height, width=grid.width,
        start_frames=start, start_mode=start_mode(options.start, pipeline.config),
    )  # fmt: skip
    if not pipeline.has_frames:
        for _ in play(stream, plan):
            pass
        return
    with progress_bar(path, plan.num_chunks, "chunk") as bar:
        pieces = _pieces(stream, plan, bar, has_chapters)
        made = write_pieces(path, fps, grid, count, pieces)
    rate = made.frames / made.seconds
    scenes = f" in {len(plan.scenes)} scenes" if has_chapters else ""
    print(
        f"{path}: {count} frames, {count / fps:.1f} s of video{scenes}; streams at {rate:.1f} frames/s, "
        f"{rate / fps:.1f} times as fast as it plays; {pipeline.config.runtime.vae} decoder, "
        f"{pipeline.vae_tier}{_preset_words(pipeline)}"
    )


def _preset_words(pipeline: Pipeline) -> str:
    """The preset of the pipeline, if there is one."""
    config = pipeline.config
    return f"; preset {config.runtime.preset}" if config.runtime.preset else ""


def _pieces(stream: VideoStream, plan: ScriptPlan, bar: ProgressBar, has_chapters: bool) -> Iterator[Piece]:
    """The chunks of a video, of which the first of a scene begins a chapter."""
    scene = None
    for planned, chunk in play(stream, plan):
        is_new, scene = planned is not scene, planned
        if has_chapters and is_new:
            _show_scene(bar, scene, plan)
        yield Piece(chunk.frames, prompt_line(scene.scene.prompt) if has_chapters and is_new else None)
        bar.update()


def _show_scene(bar: ProgressBar, scene: PlannedScene, plan: ScriptPlan) -> None:
    text = " ".join(prompt_line(scene.scene.prompt).split())
    text = text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]} ..."
    bar.set_postfix_str(f"scene {scene.number} of {len(plan.scenes)}: {text}")
