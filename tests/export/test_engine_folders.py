"""Where exported decoders are written and looked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.export import engine_folders as module
from rfengine.export.engine_folders import engine_folders, export_folder

MARK = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rfengine" / "tensorrt"


def test_checkpoint_that_can_be_written_keeps_its_own(tmp_path: Path, cache: Path) -> None:
    assert export_folder(tmp_path, MARK) == tmp_path / "tensorrt"
    own_first = (tmp_path / "tensorrt", cache / f"{tmp_path.name}-0123456789abcdef")
    assert engine_folders(tmp_path, MARK) == own_first


def test_the_package_is_never_written(cache: Path) -> None:
    tiny = checkpoint_directory("tiny")
    assert export_folder(tiny, MARK) == cache / "tiny-0123456789abcdef"
    assert export_folder(tiny, MARK) in engine_folders(tiny, MARK)


def test_checkpoint_that_cannot_be_written_has_its_folder_in_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)  # root may write everywhere
    assert export_folder(tmp_path, MARK) == cache / f"{tmp_path.name}-0123456789abcdef"
    assert export_folder(tmp_path, MARK) in engine_folders(tmp_path, MARK)


def test_folder_that_is_given_is_the_only_one(tmp_path: Path) -> None:
    given = tmp_path / "mine"
    assert export_folder(tmp_path, MARK, given) == given and engine_folders(tmp_path, MARK, given) == (given,)
    given.write_bytes(b"")
    with pytest.raises(ValueError, match="mine is no directory; choose another --out"):
        export_folder(tmp_path, MARK, given)


def test_user_without_a_home_directory_is_told_to_give_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert engine_folders(tmp_path, MARK) == (tmp_path / "tensorrt",)
    with pytest.raises(RuntimeError, match="no home directory; give --out DIR"):
        export_folder(checkpoint_directory("tiny"), MARK)
