"""The file of captions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rfengine.evaluation.captions_file import read_captions

RED = "a large red square moving fast to the left over a grey wall"
BLUE = "a small blue circle moving slowly upwards over a dotted wall"


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_captions_and_switches_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, {"a.mp4": RED, "b.mp4": [[0, RED], [48, BLUE]]})
    assert read_captions(path) == {"a.mp4": ((0, RED),), "b.mp4": ((0, RED), (48, BLUE))}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ([RED], "is no object with entries"),
        ({}, "is no object with entries"),
        ({"a.mp4": 3}, "says '3' for a.mp4"),
        ({"a.mp4": []}, r"says '\[\]' for a.mp4"),
        ({"a.mp4": [[4, RED]]}, "pairs of first frame, from 0 on"),
        ({"a.mp4": [[0, RED], [0, BLUE]]}, "pairs of first frame, from 0 on"),
        ('{"a.mp4": "x", "a.mp4": "y"}', "is no JSON .*'a.mp4' twice"),
        ("[" * 100_000, "is no JSON .*nested too deep"),
        ({"a.mp4": "a cat"}, "a.mp4: 'a cat' is no caption of the toy world"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_captions(written(tmp_path, content))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        read_captions(tmp_path / "none.json")


def test_file_that_never_ends_and_one_that_waits_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in (
        (tmp_path / "pipe", "is a pipe"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(ValueError, match=f"{told}; give an ordinary file"):
            read_captions(path)
