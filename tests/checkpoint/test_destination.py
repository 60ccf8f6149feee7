from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from rfengine.checkpoint.destination import new_directory, reserved


def hold(destination: Path, held: Event, end: Event) -> None:
    with reserved(destination):
        held.set()
        end.wait(60)


def test_a_second_writer_in_another_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    context, out = multiprocessing.get_context("fork"), tmp_path / "a" / "out"
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(out, held, end))
    process.start()
    try:
        assert held.wait(60)
        message = r"\.out\.lock is locked: another process is converting into .*out; wait until it has ended"
        with pytest.raises(RuntimeError, match=message), reserved(out):
            raise AssertionError("two hold one destination")
        with reserved(tmp_path / "a" / "other"):
            pass
    finally:
        end.set()
        process.join()
    with reserved(out), new_directory(out) as directory:
        (directory / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    with pytest.raises(ValueError, match="out exists and is not an empty directory"), reserved(out):
        raise AssertionError("a directory in use was reserved")


def test_folders_made_for_a_failure_go_again_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for place in ("a/b/out", "there/out"):
        out = tmp_path / place
        with pytest.raises(KeyError), reserved(out), new_directory(out) as directory:
            (directory / "file").touch()
            raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_destination_with_the_longest_name_is_written(tmp_path: Path) -> None:
    out = tmp_path / ("\u00fc" * 127)
    with reserved(out), new_directory(out) as directory:
        (directory / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_is_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(KeyError), new_directory(out) as directory:
        (directory / "new").touch()
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with new_directory(out) as directory:
        (directory / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_what_is_there_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "old").touch()

    def refused(path: Path, target: Path) -> Path:
        if (path / "new").exists():
            raise OSError("no more")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    told = r"cannot write .*out \(no more\); free space or choose another place"
    with pytest.raises(RuntimeError, match=told), new_directory(out) as directory:
        (directory / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
