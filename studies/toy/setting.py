"""How large the toy study is, and where a part of it runs."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.tiny.stages import CHECKPOINT, STARTED
from rfengine.training.arithmetic import Precision, casting, fast_precision

OWN_SINK = "ema_0.999"  # of the checkpoint that recipes.tiny trains
STREAMED = "sink_"  # before its sink in the name of a student that is trained on streams of its own
WITH_EVICTION, WITHOUT_EVICTION = f"{STREAMED}{OWN_SINK}", "no_eviction"  # trained alike, in both ways


@dataclass(frozen=True)
class StudySize:
    """Every number of the study; the defaults are those of two CPU cores.

    base_steps, base_videos: of the trainings of recipes.tiny that come before a student; the recipe's own
    where none are given. betas: temperatures of Re-DMD. training_seeds: of every student; the
    streams are those of the first. captions, sampling_seeds: short clips of every model, once with full
    captions and once with open ones. stream_captions, stream_seeds: of the streams of stream_seconds. alphas:
    of EMA-Sink. student_steps: of the distilled students; stream_steps: of those that learn by the truth of
    their streams. flow_clips: captions whose clips get an optical flow as well. batch: samples of one
    training pass of a distilled student.
    """

    name: str = "cpu"
    base_steps: int | None = None
    base_videos: int | None = None
    student_steps: int = 500
    stream_steps: int = 1000
    betas: tuple[float, ...] = (0.5, 0.2, 0.05)
    training_seeds: tuple[int, ...] = (0,)
    captions: int = 200
    sampling_seeds: tuple[int, ...] = (0, 1, 2)
    stream_captions: int = 12
    stream_seeds: tuple[int, ...] = (0, 1)
    stream_seconds: int = 60
    alphas: tuple[float, ...] = (0.9, 0.99, 0.999)
    flow_clips: int = 64
    batch: int = 16

    @property
    def distilled(self) -> tuple[str, ...]:
        """The students by DMD and Re-DMD, of every training seed."""
        return self._seeded(["dmd", *(f"re_dmd_{beta:g}" for beta in self.betas)])

    @property
    def streamed(self) -> tuple[str, ...]:
        """The students that learn from the truth of their own streams, one for each sink and one that never
        sees an eviction, of every training seed."""
        sinks = ("none", "frozen", *(f"ema_{alpha:g}" for alpha in self.alphas))
        return self._seeded([*(f"{STREAMED}{sink}" for sink in sinks), WITHOUT_EVICTION])

    def _seeded(self, names: list[str]) -> tuple[str, ...]:
        return tuple(seeded_name(name, seed) for seed in self.training_seeds for name in names)


def seeded_name(model: str, seed: int) -> str:
    """A model of the first training seed, 0, goes by its name alone."""
    return model if seed == 0 else f"{model}_seed{seed}"


def trained_sink(model: str) -> str:
    """The sink that a student was trained with."""
    name = split_model(model)[0]
    return name.removeprefix(STREAMED) if name.startswith(STREAMED) else OWN_SINK


def split_model(name: str) -> tuple[str, int]:
    """The model and its training seed: "dmd_seed1" is ("dmd", 1), "dmd" is ("dmd", 0)."""
    model, _, seed = name.partition("_seed")
    return model, int(seed or 0)


CPU = StudySize()
GPU = StudySize(
    name="gpu",
    student_steps=2000,
    stream_steps=4000,
    betas=(0.5, 1.0, 0.2, 0.1),
    training_seeds=(0, 1, 2),
    captions=400,
    stream_captions=32,
    stream_seeds=(0, 1, 2),
    flow_clips=200,
)
SMOKE = StudySize(
    name="smoke",
    base_steps=2,
    base_videos=2,
    student_steps=5,
    stream_steps=2,
    betas=(0.5,),
    captions=2,
    sampling_seeds=(0, 1),
    stream_captions=1,
    stream_seconds=5,
    alphas=(0.9, 0.999),
    flow_clips=1,
    batch=4,
)
SIZES = {size.name: size for size in (CPU, GPU, SMOKE)}


@dataclass(frozen=True)
class Setting:
    """base: the directory of the run of recipes.tiny whose teacher and start the students have. directory: of
    everything else that is made on the way, records among it. threads: of this process."""

    size: StudySize
    base: Path
    directory: Path
    device: torch.device
    threads: int

    @property
    def precision(self) -> Precision:
        """Of the arithmetic in training and sampling."""
        return fast_precision(self.device)

    @property
    def records(self) -> Path:
        return self.directory / "records"

    def casting(self) -> AbstractContextManager:
        """The arithmetic in which models are sampled."""
        return casting(self.device, self.precision)

    def checkpoint(self, model: str) -> Path:
        """The checkpoint directory of a model of the study."""
        before = {"teacher": CHECKPOINT, "start": STARTED}
        return self.base / before[model] if model in before else self.directory / model / "checkpoint"

    def fingerprint(self, model: str) -> str:
        """The first digits of the SHA-256 of a model's weights."""
        data = (self.checkpoint(model) / "transformer.safetensors").read_bytes()
        return hashlib.sha256(data).hexdigest()[:12]
