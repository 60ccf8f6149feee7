"""What a command left behind: its one sentence of error, and the frames of its video."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from rfengine import cli


def frame_count(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """Run a command that must fail with `status` and one sentence, and return the sentence."""
    assert cli.main([str(argument) for argument in arguments]) == status
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("rfengine: error: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(lines), lines
    return errors[0].removeprefix("rfengine: error: ")
