"""convert: what it makes can be used, and what it cannot read is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from rfengine import cli
from support.outcome import fails, frame_count


def test_converted_checkpoint_generates(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "converted"
    assert cli.main(["convert", str(model), str(converted), "--dtype", "float16", "--no-use-ema"]) == 0
    assert f"{converted}: converted from {model} in float16" in capsys.readouterr().out
    path = tmp_path / "a.mp4"
    assert cli.main(["generate", "a", "-o", str(path), "--model", str(converted), "--seconds", "0.2"]) == 0
    assert frame_count(path) == 3


def test_conversion_of_nothing_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, cli.CALLER_ERROR, "convert", tmp_path / "no", tmp_path / "out")
    assert "no does not exist" in message
    assert list(tmp_path.iterdir()) == []
