"""The trainings of the toy study: the student before distillation, the teacher and its clips, the distilled
students."""

from __future__ import annotations

import dataclasses

import torch

from recipes.tiny.run import STEPS, VIDEOS, Options, run_stage
from recipes.tiny.stages import CHECKPOINT
from recipes.tiny.training import save_part
from recipes.tiny.videos import encode_dataset
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import read_safetensors
from rfengine.toy.data import save_dataset
from rfengine.training.build import base_engine, build_stage, export_checkpoint
from rfengine.training.checkpoints import locked_run
from rfengine.training.config import TrainConfig
from rfengine.training.parallel import Ranks
from rfengine.training.recipes import toy_dmd, toy_re_dmd, toy_re_dmd_no_eviction, toy_teacher
from rfengine.training.samples import averaged_state
from rfengine.training.trainer import Trainer
from studies.toy.setting import SHIPPED, WITH_EVICTION, WITHOUT_EVICTION, Setting, seeded_name

_BASE = "tiny"  # whose VAE and text encoder the whole study uses
_CLIP_SEED = 77
_CLIP_CHUNKS = 4  # of which a clip of three begins at the first or at the second


def train_start(setting: Setting) -> None:
    """The student before distillation: the shipped VAE and text encoder, and a transformer by teacher forcing
    as recipes.tiny trains it."""
    directory, engine = setting.directory / "start_run", base_engine(_BASE)
    parts = directory / CHECKPOINT
    for part in ("vae", "text_encoder"):
        weights, _ = read_safetensors(checkpoint_directory(_BASE) / f"{part}.safetensors")
        save_part(parts, engine, part, weights)
    scale = setting.size.start_scale
    for stage in ("videos", "starts"):
        if not (directory / f"{stage}.pt").exists():
            run_stage(Options(stage, directory, videos=max(1, int(scale * VIDEOS[stage]))))
    run_stage(Options("teacher", directory, max(1, int(scale * STEPS["teacher"]))))
    start, _ = read_safetensors(parts / "transformer.safetensors")
    export_checkpoint(start, engine, _BASE, setting.checkpoint("start"))


def encode_clips(setting: Setting) -> None:
    """Rendered and encoded videos of four chunks, which the teacher learns from."""
    save_dataset(encode_dataset(_BASE, _CLIP_CHUNKS, setting.size.clips, _CLIP_SEED), setting.clips_path)


def training_configs(setting: Setting) -> dict[str, TrainConfig]:
    """The trainings by the name of their model."""
    engine, size = base_engine(_BASE), setting.size
    start, teacher = str(setting.checkpoint("start")), str(setting.checkpoint("teacher"))
    configs = {
        "teacher": dataclasses.replace(
            toy_teacher(engine, str(setting.clips_path)), steps=size.teacher_steps, student=start
        )
    }
    for seed in size.training_seeds:
        students = {"dmd": toy_dmd(engine, teacher)}
        students |= {f"re_dmd_{beta:g}": toy_re_dmd(engine, teacher, beta) for beta in size.betas}
        students[WITHOUT_EVICTION] = toy_re_dmd_no_eviction(engine, teacher, size.betas[0])
        for name, config in students.items():
            configs[seeded_name(name, seed)] = dataclasses.replace(
                config, steps=size.student_steps, student=start, seed=seed
            )
    return {
        name: dataclasses.replace(config, batch=size.batch, precision=size.precision)
        for name, config in configs.items()
    }


def run_training(setting: Setting, name: str) -> None:
    """Train model `name` to its end, from its newest checkpoint where there is one, and export it."""
    config, ranks = training_configs(setting)[name], Ranks()
    with locked_run(setting.directory / name):
        stage = build_stage(config, setting.device, ranks)
        Trainer(config, stage, setting.directory / name, ranks).finish("with the same command")
        export_checkpoint(averaged_state(stage), config.engine, _BASE, setting.checkpoint(name))


def average_with_start(setting: Setting) -> None:
    """The model that is shipped: the mean of the weights of WITH_EVICTION and of the start.

    Distillation moves the weights by little, so the models on the straight line between both ends work too
    (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022); halfway keeps what the start does
    better.
    """
    ends = [
        read_safetensors(setting.checkpoint(model) / "transformer.safetensors")[0]
        for model in ("start", WITH_EVICTION)
    ]
    weights = {key: torch.lerp(value.float(), ends[1][key].float(), 0.5) for key, value in ends[0].items()}
    export_checkpoint(weights, base_engine(_BASE), _BASE, setting.checkpoint(SHIPPED))
