"""Trains the shipped `tiny` checkpoint on the toy world, stage by stage.

`python -m recipes.tiny.run` runs all stages, each behind what it needs, and leaves those that are done as
they are; Ctrl-C stops after the step that is being made, and the same command goes on from there.
docs/tiny_training holds the logs of the run that made the shipped weights.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from recipes.tiny.decoder import evaluate_tiny_decoder, train_tiny_decoder
from recipes.tiny.distillation import distill_student
from recipes.tiny.report import (
    report_accuracy,
    report_decay,
    report_open_attributes,
    report_paraphrases,
    report_starts,
    report_switches,
)
from recipes.tiny.stages import CHECKPOINT, DISTILLED, STAGES, STARTED, STREAMED, RunDirectory, Stage
from recipes.tiny.start import StartStage
from recipes.tiny.streams import train_on_streams
from recipes.tiny.text_encoder import TextStage
from recipes.tiny.training import TINY, TRAINED_VAE, StageConfig, ToyModel, save_part, stored_engine, train
from recipes.tiny.transformer import TransformerStage
from recipes.tiny.vae import VAEStage, evaluate_autoencoder, vae_of, with_first_channels, with_ordered_latents
from recipes.tiny.videos import encode_dataset
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.directories import MODEL_PARTS
from rfengine.checkpoint.layouts import Part
from rfengine.checkpoint.loader import read_safetensors
from rfengine.checkpoint.manifest import write_manifest
from rfengine.cli.process import run_script
from rfengine.files import write_text
from rfengine.limits import Range, check_options
from rfengine.toy.data import LatentDataset, load_dataset, save_dataset
from rfengine.training.build import export_checkpoint
from rfengine.training.config import MOST_STEPS
from rfengine.training.parallel import Ranks, ranks_from_environment

STEPS = {
    "vae": 5000, "text": 4000, "teacher": 41500, "start": 28000, "streams": 8000, "distill": 500,
    "tiny_decoder": 1900,
}  # fmt: skip
VIDEOS = {"videos": 9600, "starts": 16000, "evaluate": 200, "tiny_decoder": 96}
PARTS: dict[str, Part] = {"vae": "vae", "text": "text_encoder", "teacher": "transformer"}
_STREAMS, _STREAM_CHUNKS = 60, 27  # of 20 seconds
_LONG_STREAMS, _SWITCHES, _OPEN_SEEDS = 4, 8, 50  # switches: of each kind
_VIDEO_CHUNKS = 7  # 81 frames: a slow shape has crossed the whole picture


@dataclass(frozen=True)
class Options:
    """All stages that are not done, or one; one that was interrupted continues where it stopped."""

    stage: Stage | None = None
    directory: Path = Path("runs/tiny")
    """What every stage leaves for the next."""
    steps: Annotated[int | None, Range(1, MOST_STEPS)] = None
    """Of a training; the recipe's own where none are given."""
    videos: Annotated[int | None, Range(1, 100_000)] = None
    """To encode (videos, starts) or to measure on (evaluate, tiny_decoder)."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # stages multiply it to draw one for every step
    stream_chunks: Annotated[int, Range(2, 1_000_000)] = 801
    """Of the longest streams of the evaluate stage; 801 are ten minutes."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Of all stages."""
    compiled: bool = False
    """The passes of the stages teacher and start, by torch.compile: a sixth less time on a CPU; needs a C++
    compiler."""
    output: Path = Path("rfengine/weights/tiny")
    """The checkpoint that export writes and tiny_decoder completes."""


def run(options: Options) -> None:
    """Run the stages that are not done, or the one that is named."""
    check_options(options)
    files = RunDirectory(options.directory, options.output)
    for stage in STAGES if options.stage is None else (options.stage,):
        if options.stage is None and files.is_done(stage):
            sys.stdout.write(f"{stage}: {files.result(stage)} is there\n")
        else:
            run_stage(dataclasses.replace(options, stage=stage))


def run_stage(options: Options) -> None:
    """Run one stage; each leaves its result in `directory`, where the next finds it. Raises ValueError where
    what it needs is not there."""
    files = RunDirectory(options.directory, options.output)
    files.check_needs(options.stage)
    options.directory.mkdir(parents=True, exist_ok=True)
    with ranks_from_environment(torch.device(options.device)) as (ranks, device):
        if options.stage in STEPS:
            _train(options, ranks, device)
        elif options.stage in ("videos", "starts"):
            _encode_videos(options, device)
        elif options.stage == "evaluate":
            _evaluate(options, device)
        else:
            export(options.directory / DISTILLED, options.output)
        if not ranks.rank:
            files.remember(options.stage)


def _train(options: Options, ranks: Ranks, device: torch.device) -> None:
    """Train one part; save it, and record how well it does."""
    directory = options.directory
    engine = stored_engine(directory / CHECKPOINT)
    models = {"vae": TRAINED_VAE, "tiny_decoder": engine.tiny_vae}
    steps = STEPS[options.stage] if options.steps is None else options.steps
    config = StageConfig(options.stage, models.get(options.stage, engine), steps, options.seed)
    if options.stage == "tiny_decoder":
        _add_tiny_decoder(options, config, ranks, device)
        return
    if options.stage in ("start", "streams", "distill"):
        _train_student(options, config, ranks, device)
        return
    if options.stage == "vae":
        stage = VAEStage(config, ranks, device)
    elif options.stage == "text":
        stage = TextStage(config, ranks, device)
    else:
        stage = TransformerStage(config, *_datasets(directory), ranks, device, options.compiled)
    weights = train(config, stage, directory, ranks)
    if ranks.rank:
        return
    if options.stage == "vae":
        ordered = with_ordered_latents(vae_of(TRAINED_VAE, weights), options.seed)
        vae = with_first_channels(ordered, TINY.vae.z_dim)
        engine = dataclasses.replace(engine, vae=vae.config)
        _record(options, **evaluate_autoencoder(vae, options.seed))
    elif options.stage == "text":
        weights = stage.encoder().state_dict()
        _record(options, **stage.held_out_accuracy())
    save_part(directory / CHECKPOINT, engine, PARTS[options.stage], weights)


def _train_student(options: Options, config: StageConfig, ranks: Ranks, device: torch.device) -> None:
    """Train the student, in one of its three stages, and write its checkpoint directory."""
    directory, teacher = options.directory, options.directory / CHECKPOINT
    if options.stage == "start":
        model = ToyModel.load(teacher, device).transformer
        stage = StartStage(config, model, *_datasets(directory), ranks, options.compiled)
        weights, target = train(config, stage, directory, ranks), STARTED
    elif options.stage == "streams":
        videos, target = load_dataset(directory / "videos.pt"), STREAMED
        weights = train_on_streams(config, directory / STARTED, videos, directory, ranks, device)
    else:
        videos, target = load_dataset(directory / "videos.pt"), DISTILLED
        student = directory / STREAMED
        weights = distill_student(config, teacher, student, videos, directory, ranks, device)
    if not ranks.rank:
        export_checkpoint(weights, config.model, str(teacher), directory / target)


def _datasets(directory: Path) -> tuple[LatentDataset, LatentDataset]:
    """What the stages videos and starts have left."""
    return load_dataset(directory / "videos.pt"), load_dataset(directory / "starts.pt")


def _encode_videos(options: Options, device: torch.device) -> None:
    """Write videos.pt, seven chunks each, or starts.pt, the first chunk of other videos."""
    source = str(options.directory / CHECKPOINT)
    chunks, seed = (_VIDEO_CHUNKS, options.seed) if options.stage == "videos" else (1, options.seed + 1)
    dataset = encode_dataset(source, chunks, _videos(options), seed, device)
    save_dataset(dataset, options.directory / f"{options.stage}.pt")


def _videos(options: Options) -> int:
    return VIDEOS[options.stage] if options.videos is None else options.videos


def _record(options: Options, **figures: float) -> None:
    """Print measurements of a stage, and append them to evaluations.jsonl."""
    rounded = {name: round(value, 4) for name, value in figures.items()}
    line = json.dumps({"stage": options.stage, **rounded})
    with (options.directory / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    sys.stdout.write(line + "\n")


def _evaluate(options: Options, device: torch.device) -> None:
    """Write evaluated.json: all that the student must reach."""
    model, seed = ToyModel.load(options.directory / DISTILLED, device), options.seed
    videos, seeds = _videos(options), range(seed, seed + 3)
    results = {
        "accuracy": report_accuracy(model, videos, seeds),
        "paraphrases": report_paraphrases(model, videos, seeds),
        "decay": report_decay(model, _STREAMS, _STREAM_CHUNKS, seed),
        "long_decay": report_decay(model, _LONG_STREAMS, options.stream_chunks, seed + 1),
        "starts_apart": report_starts(model, videos, seed),
        "open_attributes": report_open_attributes(model, _OPEN_SEEDS),
        "recached_switches": report_switches(model, _SWITCHES, True, seed),
        "soft_switches": report_switches(model, _SWITCHES, False, seed),
    }
    text = json.dumps(results, indent=1) + "\n"
    write_text(options.directory / "evaluated.json", text)
    sys.stdout.write(text)


def export(source: Path, output: Path) -> None:
    """Write the checkpoint that Pipeline loads: that of the stages, its weights rounded to float16.

    Raises ValueError for a part that is absent or damaged.
    """
    engine = Checkpoint.open(source).config
    weights = {part: read_safetensors(source / f"{part}.safetensors")[0] for part in MODEL_PARTS}
    for part, tensors in weights.items():
        save_part(output, engine, part, {name: value.half() for name, value in tensors.items()})
    write_manifest(output)


def _add_tiny_decoder(options: Options, config: StageConfig, ranks: Ranks, device: torch.device) -> None:
    """Train the tiny decoder of the exported checkpoint and put it there, in float16; record how it does."""
    teacher = ToyModel.load(options.output, device)
    decoder = train_tiny_decoder(teacher, config, options.directory, ranks).half().float()
    figures = evaluate_tiny_decoder(teacher, decoder, _videos(options), options.seed + 29)
    _record(options, videos=_videos(options), **figures)
    engine = dataclasses.replace(teacher.config, tiny_vae=config.model)
    halves = {name: value.half() for name, value in decoder.state_dict().items()}
    save_part(options.output, engine, "tiny_vae", halves)
    write_manifest(options.output)


if __name__ == "__main__":
    sys.exit(run_script("tiny_model", Options, run))
