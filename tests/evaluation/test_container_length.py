"""The length that a container states: whole files have it, cut ones lack bytes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rfengine.evaluation.container_length import declared_bytes
from support.video_files import corner_clip, encode


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi"])
def test_a_whole_file_is_as_long_as_it_says(tmp_path: Path, name: str) -> None:
    path = encode(tmp_path / name, corner_clip(), "mpeg4")
    with path.open("rb") as file:
        assert declared_bytes(file) == path.stat().st_size and file.tell() == 0


def test_what_states_no_length_has_none_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"", b"text", bytes(40), b"\x00\x00\x00\x01moov" + bytes(8), b"\x1a\x45\xdf\xa3\x01"):
        path.write_bytes(content)
        with path.open("rb") as file:
            assert declared_bytes(file) == 0


def test_what_follows_the_last_box_does_not_count(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", corner_clip())
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\x00\x00\x10\x00note")
    with path.open("rb") as file:
        assert declared_bytes(file) == size
