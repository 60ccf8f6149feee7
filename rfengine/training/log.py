"""The log of a training: a line of JSON for each step, read again after a crash, and a progress bar."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

from rfengine.files import open_regular, write_text
from rfengine.training.learner import Figures

logger = logging.getLogger(__name__)
LOG_FILE = "log.jsonl"


def read_log(path: Path, last_step: int) -> list[Figures]:
    """The lines of a log up to `last_step`, each a `step` and its figures; damaged ones are left out.

    Raises ValueError where `path` is there and no ordinary file.
    """
    return [figures for figures in _entries(path) if figures and figures["step"] <= last_step]


def _entries(path: Path) -> list[Figures | None]:
    """The lines of a log; None for one that a crash or the disk has damaged."""
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    return [_figures(line) for line in lines if line]


def _figures(line: str) -> Figures | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    return found if all(type(value) in (int, float) for value in found.values()) else None


def keep_until(path: Path, step: int) -> None:
    """Drop what an earlier run logged beyond its last checkpoint, whose steps are about to be repeated.

    Damaged lines go as well, with a warning. The file is replaced as a whole.
    """
    entries, kept = _entries(path), read_log(path, step)
    if len(kept) == len(entries):
        return
    if None in entries:
        logger.warning(
            "%s is damaged at line %d of %d; the %d whole lines up to step %d, the last checkpoint, are kept",
            path, entries.index(None) + 1, len(entries), len(kept), step,
        )  # fmt: skip
    write_text(path, "".join(json.dumps(figures) + "\n" for figures in kept))


class TrainingLog:
    """A line of JSON a step, the same to TensorBoard where it is installed, and a progress bar."""

    def __init__(self, directory: Path, title: str, steps: int, step: int) -> None:
        from tqdm import tqdm

        keep_until(directory / LOG_FILE, step)
        self._file = (directory / LOG_FILE).open("a", encoding="utf-8")
        self._board = None
        with suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter

            # what was logged beyond `step` is dropped
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step or None)
        self._bar = tqdm(total=steps, initial=step, desc=title, unit="step", disable=None)

    def close(self) -> None:
        self._file.close()
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, figures: Figures) -> None:
        rounded = {name: round(value, 6) for name, value in figures.items()}
        self._file.write(json.dumps({"step": step} | rounded) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
        self._bar.update()
        self._bar.set_postfix(
            {name: f"{value:.3g}" for name, value in figures.items() if name.endswith("loss")}
        )
