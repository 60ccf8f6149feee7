"""Distils the student from the teacher, and averages what it was with what it becomes.

DMD (rfengine/training/distillation.py) teaches the student to answer a new prompt, and makes what a text
leaves open less varied; streams with the truth before them give the variety back, and take from the answers.
Halfway between the weights, twice, it has a good part of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from recipes.tiny.streams import train_on_streams
from recipes.tiny.training import StageConfig, train
from rfengine.checkpoint.loader import read_safetensors
from rfengine.toy.data import LatentDataset
from rfengine.training.arithmetic import fast_precision
from rfengine.training.build import build_stage, export_checkpoint
from rfengine.training.parallel import Ranks
from rfengine.training.recipes import toy_dmd

_STREAM_STEPS = 1.6  # to a step of DMD, of which one in five is the student's


def distill_student(
    config: StageConfig,
    teacher: Path,
    student: Path,
    videos: LatentDataset,
    directory: Path,
    ranks: Ranks,
    device: torch.device,
) -> dict[str, Tensor]:
    """Train the student of the checkpoint directory `student` by plain DMD, for config.steps; go halfway to
    that, train it on streams of `videos` and go halfway again. The trainings and the checkpoint between
    them are in `directory`. Raises as `train`."""
    plain = toy_dmd(config.model, str(teacher))
    own = {"student": str(student), "base": str(teacher), "steps": config.steps, "seed": config.seed}
    plain = dataclasses.replace(plain, **own, precision=fast_precision(device))
    # the run goes by `config`, which holds no path: a moved directory continues
    distilled = train(config, build_stage(plain, device, ranks), directory, ranks)
    halfway = _mean(read_safetensors(student / "transformer.safetensors")[0], distilled)
    start = directory / f"{config.name}_halfway"
    if not ranks.rank:
        export_checkpoint(halfway, config.model, str(teacher), start)
    ranks.meet()
    steps = max(1, round(_STREAM_STEPS * config.steps))
    seed = config.seed + 1  # other draws than the stage before
    streams = dataclasses.replace(config, name=f"{config.name}_streams", steps=steps, seed=seed)
    return _mean(halfway, train_on_streams(streams, start, videos, directory, ranks, device))


def _mean(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (value.cpu().float() + other[name].cpu().float()) / 2 for name, value in one.items()}
