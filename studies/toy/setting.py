"""How large the toy study is, and where a part of it runs."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from rfengine.training.arithmetic import Precision, casting

WITH_EVICTION, WITHOUT_EVICTION = "re_dmd_0.5", "no_eviction"  # one recipe, trained in both ways
SHIPPED = "shipped"  # halfway between the start and WITH_EVICTION


@dataclass(frozen=True)
class StudySize:
    """Every number of the study; the defaults are those of two CPU cores.

    start_scale: multiplies the steps and the videos of recipes.tiny for the start. clips: of the teacher.
    betas: temperatures of Re-DMD, the first one that of WITH_EVICTION and WITHOUT_EVICTION. training_seeds:
    of every distillation; the streams are those of the first. captions, sampling_seeds: short clips of every
    model, once with full captions and once with open ones. stream_captions: of the streams of stream_seconds,
    long_captions: of those of long_seconds. alphas: of EMA-Sink. flow_clips: captions whose clips get an
    optical flow as well. batch: samples of one training pass. precision: of the arithmetic in training and
    sampling.
    """

    name: str = "cpu"
    start_scale: float = 1.0
    clips: int = 4096
    teacher_steps: int = 3600
    student_steps: int = 600
    betas: tuple[float, ...] = (0.5, 0.2, 0.05)
    training_seeds: tuple[int, ...] = (0,)
    captions: int = 200
    sampling_seeds: tuple[int, ...] = (0, 1, 2)
    stream_captions: int = 6
    stream_seconds: int = 60
    long_captions: int = 2
    long_seconds: int = 600
    alphas: tuple[float, ...] = (0.9, 0.99, 0.999)
    flow_clips: int = 64
    batch: int = 16
    precision: Precision = "bfloat16"

    @property
    def students(self) -> tuple[str, ...]:
        """The distilled students of every training seed."""
        names = ("dmd", *(f"re_dmd_{beta:g}" for beta in self.betas), WITHOUT_EVICTION)
        return tuple(seeded_name(name, seed) for seed in self.training_seeds for name in names)


def seeded_name(model: str, seed: int) -> str:
    """A model of the first training seed, 0, goes by its name alone."""
    return model if seed == 0 else f"{model}_seed{seed}"


def split_model(name: str) -> tuple[str, int]:
    """The model and its training seed: "dmd_seed1" is ("dmd", 1), "dmd" is ("dmd", 0)."""
    model, _, seed = name.partition("_seed")
    return model, int(seed or 0)


CPU = StudySize()
GPU = StudySize(
    name="gpu",
    teacher_steps=6000,
    student_steps=1600,
    betas=(0.5, 1.0, 0.2, 0.1),
    training_seeds=(0, 1, 2),
    captions=400,
    stream_captions=32,
    long_captions=8,
    flow_clips=200,
)
SMOKE = StudySize(
    name="smoke",
    start_scale=0.0002,
    clips=2,
    teacher_steps=2,
    student_steps=5,
    betas=(0.5,),
    captions=2,
    sampling_seeds=(0, 1),
    stream_captions=1,
    stream_seconds=3,
    long_captions=1,
    long_seconds=4,
    alphas=(0.9,),
    flow_clips=1,
    batch=4,
    precision="float32",
)
SIZES = {size.name: size for size in (CPU, GPU, SMOKE)}


@dataclass(frozen=True)
class Setting:
    """directory: of everything that is made on the way, records among it. threads: of this process."""

    size: StudySize
    directory: Path
    device: torch.device
    threads: int

    @property
    def clips_path(self) -> Path:
        return self.directory / "clips.pt"

    @property
    def records(self) -> Path:
        return self.directory / "records"

    def casting(self) -> AbstractContextManager:
        """The arithmetic in which models are sampled."""
        return casting(self.device, self.size.precision)

    def checkpoint(self, model: str) -> Path:
        """The checkpoint directory of a model of the study."""
        return self.directory / model if model == "start" else self.directory / model / "checkpoint"

    def fingerprint(self, model: str) -> str:
        """The first digits of the SHA-256 of a model's weights."""
        data = (self.checkpoint(model) / "transformer.safetensors").read_bytes()
        return hashlib.sha256(data).hexdigest()[:12]
