"""A video file that grows by what is made, and what is left of it after an interrupt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rfengine.cli.terminal import interrupt_waits
from rfengine.grid import LatentGrid
from rfengine.video import VideoWriter

if TYPE_CHECKING:
    from numpy import ndarray
    from tqdm import tqdm

_QUIET_INTERVAL = 15.0  # seconds between two lines of progress where no terminal shows them


@dataclass(frozen=True, slots=True)
class Piece:
    """Frames, uint8 [T, H, W, 3], and the title of the chapter that begins with them, if one does."""

    frames: ndarray
    chapter: str | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """Frames that were made, those beyond the end of the file too, and the seconds that making them took."""

    frames: int
    seconds: float


def progress_bar(path: Path, total: int, unit: str) -> tqdm:
    """A bar of `total` units on standard error, named by the file."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else _QUIET_INTERVAL
    return tqdm(total=total, desc=path.name, unit=unit, mininterval=interval, file=sys.stderr)


def write_pieces(path: Path, fps: int, grid: LatentGrid, count: int, pieces: Iterator[Piece]) -> Made:
    """Write the first `count` frames of `pieces` as they are made.

    An interrupt leaves a file that plays, with what was written, and says so; without a frame it leaves none.
    """
    made, busy = 0, 0.0
    with VideoWriter(path, fps, grid.height, grid.width) as writer:
        try:
            while True:
                started = time.perf_counter()
                piece = next(pieces, None)
                busy += time.perf_counter() - started
                if piece is None:
                    break
                made += len(piece.frames)
                if piece.chapter is not None:
                    writer.begin_chapter(piece.chapter)
                with interrupt_waits():
                    writer.write(piece.frames[: count - writer.frames_written])
        except KeyboardInterrupt:
            if not writer.frames_written:
                raise
            with interrupt_waits(then_raise=False):  # impatience must not cost the end of the file
                writer.close()
            written = writer.frames_written
            raise KeyboardInterrupt(
                f"{path} holds the first {written / fps:.1f} of {count / fps:.1f} seconds ({written} frames)"
            ) from None
    return Made(made, busy)
