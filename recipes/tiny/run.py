"""Trains the shipped `tiny` checkpoint on the toy world, stage by stage.

`python -m recipes.tiny.run --stage vae`, then text, videos, starts, dit, evaluate, export and, on
the exported checkpoint, tiny_decoder;
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
from torch import nn

from recipes.tiny.decoder import Teacher, evaluate_tiny_decoder, train_tiny_decoder
from recipes.tiny.report import report_accuracy, report_stream
from recipes.tiny.stage_run import StageRun
from recipes.tiny.text_encoder import train_caption_encoder
from recipes.tiny.transformer import train_transformer
from recipes.tiny.vae import evaluate_autoencoder, train_autoencoder, with_measured_statistics
from recipes.tiny.videos import encode_dataset
from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.directories import read_json
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.manifest import write_manifest
from rfengine.checkpoint.pickle_file import open_pickle
from rfengine.config import PRESETS, EngineConfig, VAEConfig, from_dict, to_dict
from rfengine.files import write_text
from rfengine.limits import Range, check_options
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import build_umt5
from rfengine.models.vae import WanVAE
from rfengine.toy.data import save_dataset
from rfengine.training.parallel import run_workers

Stage = Literal["vae", "text", "videos", "starts", "dit", "evaluate", "export", "tiny_decoder"]
EIGHT_STEPS = (1000, 875, 750, 625, 500, 375, 250, 125)

MINUTES: dict[str, float] = {
    "vae": 40.5, "text": 8.0, "videos": 4.0, "starts": 3.5, "dit": 42.0, "tiny_decoder": 24.0,
}  # fmt: skip
_VIDEO_CHUNKS = 5  # 57 frames: a slow shape has nearly crossed the whole picture


@dataclass(frozen=True)
class Options:
    """`minutes` is the budget of a training stage; a stage that was interrupted goes on where it was."""

    stage: Stage
    directory: Path = Path("runs/tiny")
    minutes: float | None = None
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # stages multiply it to draw one for every step
    # the vae and dit stages run as many processes of one thread instead
    threads: Annotated[int, Range(1, 1024)] = 2
    batch: Annotated[int, Range(1, 65536)] = 16  # videos a step of the dit stage, over all processes
    # of the evaluate stage and of the evaluation of the tiny decoder
    videos: Annotated[int, Range(1, 100_000)] = 208
    stream_chunks: Annotated[int, Range(1, 1_000_000)] = 81  # of the evaluate stage; 81 are a minute
    output: Path = Path("rfengine/weights/tiny")  # of the export stage; tiny_decoder adds to it


def run_stage(options: Options) -> None:
    """Run one stage; each leaves its result in `directory`, where the next finds it."""
    check_options(options)
    torch.set_num_threads(options.threads)
    minutes = MINUTES.get(options.stage, 1.0) if options.minutes is None else options.minutes
    directory, seed, preset = options.directory, options.seed, PRESETS["tiny"]
    if options.stage == "vae":
        run_workers(train_autoencoder, options.threads, preset.vae, directory, minutes, seed, options.threads)
        _measure_vae(preset.vae, directory, seed)
    elif options.stage == "text":
        model = train_caption_encoder(preset, directory, minutes, seed)
        torch.save(model.state_dict(), directory / "text_weights.pt")
    elif options.stage in ("videos", "starts"):
        _encode_videos(options, minutes)
    elif options.stage == "dit":
        batch = options.batch // options.threads
        run_workers(train_transformer, options.threads, preset, directory, minutes, seed, batch)
    elif options.stage == "evaluate":
        _evaluate(options, load_config(directory))
    elif options.stage == "tiny_decoder":
        _add_tiny_decoder(options, minutes)
    else:
        export(load_config(directory), directory, options.output)


def _measure_vae(config: VAEConfig, directory: Path, seed: int) -> None:
    """Write the configuration with the statistics of the trained latents; log how well it reconstructs."""
    vae = WanVAE(config)
    load_finished(vae, directory / "vae_weights.pt")
    vae = with_measured_statistics(vae.eval(), seed)
    write_text(directory / "vae.json", json.dumps(to_dict(vae.config)))
    StageRun(directory, "vae", 1.0).log(evaluation=_rounded(evaluate_autoencoder(vae, seed)))


def _encode_videos(options: Options, minutes: float) -> None:
    """Write videos.pt, five chunks each, or starts.pt, the first chunk of other videos."""
    directory, config = options.directory, load_config(options.directory)
    chunks, seed = (_VIDEO_CHUNKS, options.seed) if options.stage == "videos" else (1, options.seed + 1)
    dataset = encode_dataset(
        load_vae(directory),
        load_text_model(config, directory),
        config.model.text_len,
        chunks * config.cache.chunk_frames,
        StageRun(directory, options.stage, minutes),
        seed,
    )
    save_dataset(dataset, directory / f"{options.stage}.pt")


def _evaluate(options: Options, config: EngineConfig) -> None:
    """Accuracies at the configured steps and at eight, then a long stream; logged in evaluate.jsonl."""
    directory = options.directory
    vae, text = load_vae(directory), load_text_model(config, directory)
    model = load_transformer(config, directory)
    run = StageRun(directory, "evaluate", 1.0)
    for steps in (config.schedule.denoising_steps, EIGHT_STEPS):
        schedule = dataclasses.replace(config.schedule, denoising_steps=steps)
        stepped = dataclasses.replace(config, schedule=schedule)
        accuracies = report_accuracy(model, vae, text, stepped, options.videos, options.seed + 29)
        run.log(steps=len(steps), videos=options.videos, accuracy=_rounded(accuracies))
    for part in report_stream(model, vae, text, config, options.stream_chunks, options.seed + 31):
        run.log(stream=_rounded(part))


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


def _add_tiny_decoder(options: Options, minutes: float) -> None:
    """Train the tiny decoder of the exported checkpoint and put it there, in float16; log how it does."""
    stored = Checkpoint.open(options.output).config
    config = dataclasses.replace(stored, tiny_vae=PRESETS["tiny"].tiny_vae)
    teacher = Teacher.load(options.output, config)
    decoder = train_tiny_decoder(teacher, config.tiny_vae, options.directory, minutes, options.seed)
    decoder = decoder.half().float()
    figures = evaluate_tiny_decoder(teacher, decoder, options.videos, options.seed + 29)
    run = StageRun(options.directory, "tiny_decoder", 1.0)
    run.log(videos=options.videos, evaluation=_rounded(figures))
    write_config(options.output, config)
    tensors = {key: value.half() for key, value in decoder.state_dict().items()}
    save_weights(options.output / "tiny_vae.safetensors", tensors)
    write_manifest(options.output)


def load_finished(model: nn.Module, path: Path, keys: tuple[str, ...] = ()) -> None:
    """Put the weights that a stage left in `path` onto `model`, in place. keys: where they lie in the file.

    Raises ValueError for a file that is absent, damaged or of another model.
    """
    weights = {name: stored.read() for name, stored in open_pickle(path, keys).items()}
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
    """The finished transformer, or the averaged weights of a run that goes on."""
    model = WanDiT(config.model)
    finished = directory / "dit_weights.pt"
    if finished.exists():
        load_finished(model, finished)
    else:
        load_finished(model, directory / "dit.pt", ("average",))
    return model.eval().requires_grad_(False)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> int:
    import tyro

    try:
        run_stage(tyro.cli(Options))
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"tiny_model: error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
