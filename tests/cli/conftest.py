"""A checkpoint directory that the commands are run on, and what they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from rfengine.video import VideoWriter
from support.models import small_pipeline, write_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of random weights that makes videos of 32 x 48 pixels."""
    return write_pipeline(tmp_path_factory.mktemp("model"), small_pipeline())


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bytes]:
    """Calling it gives the pixels that were written since the last call. The bytes of a file may differ from
    run to run, as assert_same_video says of x264."""
    pieces, write = [], VideoWriter.write

    def watched(self: VideoWriter, frames: numpy.ndarray) -> None:
        pieces.append(frames.tobytes())
        write(self, frames)

    def taken() -> bytes:
        found = b"".join(pieces)
        pieces.clear()
        assert found
        return found

    monkeypatch.setattr(VideoWriter, "write", watched)
    return taken
