"""log.jsonl of a training: a line of JSON for each step, read again after a crash."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rfengine.files import open_regular, write_text

logger = logging.getLogger(__name__)
LOG_FILE = "log.jsonl"


def read_log(path: Path, last_step: int) -> list[dict[str, float]]:
    """The lines of a log up to `last_step`, each a `step` and its figures; damaged ones are left out.

    Raises ValueError where `path` is there and no ordinary file.
    """
    return [figures for line in _lines(path) if (figures := _figures(line)) and figures["step"] <= last_step]


def _lines(path: Path) -> list[str]:
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []


def _figures(line: str) -> dict[str, float] | None:
    """The figures of one line; None where a crash or the disk has damaged it."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    return found if all(type(value) in (int, float) for value in found.values()) else None


def keep_until(path: Path, step: int) -> None:
    """Drop what an earlier run logged beyond its last checkpoint, which is about to be made again.

    Damaged lines go as well, and are told in a warning. The file is replaced as a whole.
    """
    lines = [line for line in _lines(path) if line]
    damaged = [number for number, line in enumerate(lines, 1) if _figures(line) is None]
    kept = read_log(path, step)
    if len(kept) == len(lines):
        return
    if damaged:
        logger.warning(
            "%s is damaged at line %d of %d; the %d whole lines up to step %d, the last checkpoint, are kept",
            path, damaged[0], len(lines), len(kept), step,
        )  # fmt: skip
    write_text(path, "".join(json.dumps(figures) + "\n" for figures in kept))
