"""Distils the student from the teacher, and averages what it was with what it has become.

DMD (rfengine/training/distillation.py) teaches the student to answer a new prompt and loses a little of what
it knew about captions; halfway between the two weights it has both.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from recipes.tiny.training import StageConfig
from rfengine.checkpoint.loader import read_safetensors
from rfengine.training.arithmetic import fast_precision
from rfengine.training.build import build_stage
from rfengine.training.checkpoints import locked_run
from rfengine.training.config import TrainConfig
from rfengine.training.parallel import Ranks
from rfengine.training.recipes import toy_dmd
from rfengine.training.samples import averaged_state
from rfengine.training.trainer import Trainer


def distill(config: TrainConfig, directory: Path, ranks: Ranks, device: torch.device) -> dict[str, Tensor]:
    """Train in `directory`, from the newest checkpoint there; returns the averaged weights.

    Raises KeyboardInterrupt after a signal: the same call continues.
    """
    with locked_run(directory):
        stage = build_stage(config, device, ranks)
        Trainer(config, stage, directory, ranks).finish("with the same command")
    return averaged_state(stage)


def distill_student(
    config: StageConfig, teacher: Path, student: Path, directory: Path, ranks: Ranks, device: torch.device
) -> dict[str, Tensor]:
    """The mean of the weights in the checkpoint directory `student` and of what plain DMD makes of them, in
    `directory`/NAME, as `train` does."""
    plain = toy_dmd(config.model, str(teacher))
    precision = fast_precision(device)
    own = {"student": str(student), "base": str(teacher), "steps": config.steps, "seed": config.seed}
    learnt = distill(
        dataclasses.replace(plain, **own, precision=precision), directory / config.name, ranks, device
    )
    before = read_safetensors(student / "transformer.safetensors")[0]
    return {name: (value.cpu().float() + before[name].float()) / 2 for name, value in learnt.items()}
