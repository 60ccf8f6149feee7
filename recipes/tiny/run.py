"""Trains the shipped `tiny` checkpoint on the toy world, stage by stage.

`python -m recipes.tiny.run --stage vae`, then text, videos, starts, dit, evaluate, export and, on the
exported checkpoint, tiny_decoder. The stages vae and dit are faster in two processes of one thread each:
`torchrun --nproc-per-node 2 -m recipes.tiny.run --stage vae`. docs/tiny_training holds the logs of the run
that made the shipped weights.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

from recipes.tiny.decoder import Teacher, evaluate_tiny_decoder, train_tiny_decoder
from recipes.tiny.report import report_accuracy, report_stream
from recipes.tiny.text_encoder import TextStage
from recipes.tiny.training import StageConfig, train
from recipes.tiny.transformer import TransformerStage
from recipes.tiny.vae import VAEStage, evaluate_autoencoder, with_measured_statistics
from recipes.tiny.videos import encode_dataset
from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.directories import read_json
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.manifest import write_manifest
from rfengine.checkpoint.pickle_file import open_pickle
from rfengine.cli.exit_status import CALLER_ERROR, OTHER_ERROR
from rfengine.cli.process import run_process
from rfengine.config import PRESETS, EngineConfig, VAEConfig, from_dict, to_dict
from rfengine.files import write_text
from rfengine.limits import Range, check_options
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import build_umt5
from rfengine.models.vae import WanVAE
from rfengine.toy.data import load_dataset, save_dataset
from rfengine.training.config import MOST_STEPS
from rfengine.training.parallel import Ranks, ranks_from_environment

Stage = Literal["vae", "text", "videos", "starts", "dit", "evaluate", "export", "tiny_decoder"]
EIGHT_STEPS = (1000, 875, 750, 625, 500, 375, 250, 125)

STEPS = {"vae": 3900, "text": 1460, "dit": 4850, "tiny_decoder": 1897}
VIDEOS = {"videos": 1456, "starts": 5880, "evaluate": 208, "tiny_decoder": 96}
_VIDEO_CHUNKS = 5  # 57 frames: a slow shape has nearly crossed the whole picture


@dataclass(frozen=True)
class Options:
    """One stage; one that was interrupted continues where it stopped."""

    stage: Stage
    directory: Path = Path("runs/tiny")
    """What every stage leaves for the next."""
    steps: Annotated[int | None, Range(1, MOST_STEPS)] = None
    """Of a training; those of the shipped weights where none are given."""
    videos: Annotated[int | None, Range(1, 100_000)] = None
    """To encode (videos, starts), or to measure on (evaluate, tiny_decoder)."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # stages multiply it to draw one for every step
    stream_chunks: Annotated[int, Range(1, 1_000_000)] = 81
    """Of the stream of the evaluate stage; 81 are a minute."""
    output: Path = Path("rfengine/weights/tiny")
    """The checkpoint that export writes and tiny_decoder completes."""


def run_stage(options: Options) -> None:
    """Run one stage; each leaves its result in `directory`, where the next finds it."""
    check_options(options)
    options.directory.mkdir(parents=True, exist_ok=True)
    with ranks_from_environment(torch.device("cpu")) as (ranks, _):
        if options.stage in STEPS:
            _train(options, ranks)
        elif options.stage in ("videos", "starts"):
            _encode_videos(options)
        elif options.stage == "evaluate":
            _evaluate(options, load_config(options.directory))
        else:
            export(load_config(options.directory), options.directory, options.output)


def _train(options: Options, ranks: Ranks) -> None:
    directory, preset = options.directory, PRESETS["tiny"]
    models = {"vae": preset.vae, "text": preset, "dit": preset, "tiny_decoder": preset.tiny_vae}
    steps = STEPS[options.stage] if options.steps is None else options.steps
    config = StageConfig(options.stage, models[options.stage], steps, options.seed)
    if options.stage == "tiny_decoder":
        _add_tiny_decoder(options, config, ranks)
        return
    if options.stage == "vae":
        stage = VAEStage(config, ranks)
    elif options.stage == "text":
        stage = TextStage(config, ranks)
    else:
        videos, starts = (load_dataset(directory / f"{name}.pt") for name in ("videos", "starts"))
        stage = TransformerStage(config, videos, starts, ranks)
    weights = train(config, stage, directory, ranks)
    if ranks.rank:
        return
    if options.stage == "text":
        _record(options, held_out_accuracy=stage.held_out_accuracy())
        weights = stage.encoder().state_dict()
    torch.save(weights, directory / f"{options.stage}_weights.pt")
    if options.stage == "vae":
        _measure_vae(options, preset.vae)


def _measure_vae(options: Options, config: VAEConfig) -> None:
    """Write the configuration with the statistics of the trained latents; record how well it reconstructs."""
    vae = WanVAE(config)
    load_finished(vae, options.directory / "vae_weights.pt")
    vae = with_measured_statistics(vae.eval(), options.seed)
    write_text(options.directory / "vae.json", json.dumps(to_dict(vae.config)))
    _record(options, **evaluate_autoencoder(vae, options.seed))


def _encode_videos(options: Options) -> None:
    """Write videos.pt, five chunks each, or starts.pt, the first chunk of other videos."""
    directory, config = options.directory, load_config(options.directory)
    chunks, seed = (_VIDEO_CHUNKS, options.seed) if options.stage == "videos" else (1, options.seed + 1)
    dataset = encode_dataset(
        load_vae(directory),
        load_text_model(config, directory),
        config.model.text_len,
        chunks * config.cache.chunk_frames,
        _videos(options),
        seed,
    )
    save_dataset(dataset, directory / f"{options.stage}.pt")


def _videos(options: Options) -> int:
    return VIDEOS[options.stage] if options.videos is None else options.videos


def _record(options: Options, **figures: float) -> None:
    """Print measurements of a stage, and append them to evaluations.jsonl."""
    rounded = {name: round(value, 4) for name, value in figures.items()}
    line = json.dumps({"stage": options.stage, **rounded})
    with (options.directory / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    sys.stdout.write(line + "\n")


def _evaluate(options: Options, config: EngineConfig) -> None:
    """Record accuracies at the configured steps and at eight, then those of a long stream."""
    directory = options.directory
    vae, text = load_vae(directory), load_text_model(config, directory)
    model = load_transformer(config, directory)
    for steps in (config.schedule.denoising_steps, EIGHT_STEPS):
        schedule = dataclasses.replace(config.schedule, denoising_steps=steps)
        stepped = dataclasses.replace(config, schedule=schedule)
        accuracies = report_accuracy(model, vae, text, stepped, _videos(options), options.seed + 29)
        _record(options, denoising_steps=len(steps), videos=_videos(options), **accuracies)
    for part in report_stream(model, vae, text, config, options.stream_chunks, options.seed + 31):
        _record(options, **part)


def export(config: EngineConfig, directory: Path, output: Path) -> None:
    """Write the checkpoint that Pipeline loads, its weights rounded to float16."""
    output.mkdir(parents=True, exist_ok=True)
    write_config(output, config)
    parts: dict[str, nn.Module] = {
        "transformer": load_transformer(config, directory),
        "vae": load_vae(directory),
        "text_encoder": load_text_model(config, directory),
    }
    for name, module in parts.items():
        tensors = {key: value.half() for key, value in module.state_dict().items()}
        save_weights(output / f"{name}.safetensors", tensors)
    write_manifest(output)


def _add_tiny_decoder(options: Options, config: StageConfig, ranks: Ranks) -> None:
    """Train the tiny decoder of the exported checkpoint and put it there, in float16; record how it does."""
    stored = Checkpoint.open(options.output).config
    engine = dataclasses.replace(stored, tiny_vae=config.model)
    teacher = Teacher.load(options.output, engine)
    decoder = train_tiny_decoder(teacher, config, options.directory, ranks).half().float()
    figures = evaluate_tiny_decoder(teacher, decoder, _videos(options), options.seed + 29)
    _record(options, videos=_videos(options), **figures)
    write_config(options.output, engine)
    tensors = {key: value.half() for key, value in decoder.state_dict().items()}
    save_weights(options.output / "tiny_vae.safetensors", tensors)
    write_manifest(options.output)


def load_finished(model: nn.Module, path: Path) -> None:
    """Put the weights that a stage left in `path` onto `model`, in place.

    Raises ValueError for a file that is absent, damaged or of another model.
    """
    weights = {name: stored.read() for name, stored in open_pickle(path, ()).items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} holds the weights of another model; run its stage again") from error


def _vae_config(directory: Path) -> VAEConfig:
    """The VAE with the statistics that its stage measured."""
    path = directory / "vae.json"
    try:
        return from_dict(VAEConfig, read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} is not what the stage vae leaves ({error}); run it again") from error


def load_config(directory: Path) -> EngineConfig:
    """The tiny preset with the latent statistics that were measured on the trained VAE."""
    return dataclasses.replace(PRESETS["tiny"], vae=_vae_config(directory))


def load_vae(directory: Path) -> WanVAE:
    vae = WanVAE(_vae_config(directory))
    load_finished(vae, directory / "vae_weights.pt")
    return vae.eval().requires_grad_(False)


def load_text_model(config: EngineConfig, directory: Path) -> nn.Module:
    model = build_umt5(config.text)
    load_finished(model, directory / "text_weights.pt")
    return model.requires_grad_(False)


def load_transformer(config: EngineConfig, directory: Path) -> WanDiT:
    model = WanDiT(config.model)
    load_finished(model, directory / "dit_weights.pt")
    return model.eval().requires_grad_(False)


def main() -> int:
    import tyro

    try:
        run_stage(tyro.cli(Options))
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"tiny_model: error: {error}\n")
        return CALLER_ERROR if isinstance(error, ValueError) else OTHER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(run_process(main, "tiny_model"))
