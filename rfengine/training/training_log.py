"""The log of a training: a line of JSON for each step, the same to TensorBoard, and a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rfengine.training.learner import Figures
from rfengine.training.log_file import LOG_FILE, keep_until


class TrainingLog:
    """A line of JSON a step, the same to TensorBoard where it is installed, and a progress bar."""

    def __init__(self, directory: Path, writes: bool, title: str, steps: int, step: int) -> None:
        self._writes = writes
        if not writes:
            return
        from tqdm import tqdm

        keep_until(directory / LOG_FILE, step)
        self._file = (directory / LOG_FILE).open("a", encoding="utf-8")
        self._board = _tensorboard(directory / "tensorboard", step)
        self._bar = tqdm(total=steps, initial=step, desc=title, unit="step", disable=None)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._file.close()
            self._bar.close()
            if self._board is not None:
                self._board.close()

    def write(self, step: int, figures: Figures) -> None:
        if not self._writes:
            return
        rounded = {name: round(value, 6) for name, value in figures.items()}
        self._file.write(json.dumps({"step": step} | rounded) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
        self._bar.update()
        losses = {name: f"{value:.3g}" for name, value in figures.items() if name.endswith("loss")}
        self._bar.set_postfix(losses)


def _tensorboard(directory: Path, step: int) -> Any:
    """A writer that drops what lies beyond `step`, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step or None)
