"""Where a part of the study runs and how large it is."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from rfengine.training.arithmetic import casting
from studies.toy.size import StudySize


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
