"""Whole files, locks and files of strangers, with real pipes, devices, processes and threads."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from rfengine.files import (
    appears,
    file_sha256,
    locked,
    new_directory,
    open_regular,
    partial_path,
    read_text,
    replaced,
    require_writable,
    reserved,
    text_lines,
    write_text,
)


def test_every_writer_has_a_hidden_name_of_its_own(tmp_path: Path) -> None:
    names = {partial_path(tmp_path / "video.mp4").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".video.mp4.") and name.endswith(".partial") for name in names)


def test_a_long_name_stays_within_what_a_file_system_takes(tmp_path: Path) -> None:
    for name in ("n" * 255, "я" * 127):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_the_last_of_two_writers_wins_and_both_files_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with replaced(path) as first:
        first.write_text("first " * 1000)
        with replaced(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first " * 1000
    assert os.listdir(tmp_path) == ["out.txt"]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]


def _hold(path: Path, held: object, let_go: object) -> None:
    with locked(path, "holding"):
        held.set()
        let_go.wait(30)


def test_a_lock_keeps_another_process_out_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, held, let_go))
    process.start()
    assert held.wait(30)
    refused = pytest.raises(RuntimeError, match=r"\.lock is locked: another process is testing; wait")
    with refused, locked(path, "testing"):
        pytest.fail("two processes hold one lock")
    process.kill()
    process.join()
    with locked(path, "testing"):
        assert path.exists()
    assert not path.exists()


def test_a_lock_is_held_by_one_thread_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with locked(tmp_path / ".lock", "counting", wait_s=60):
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_pipes_devices_and_directories_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe; give an ordinary file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        open_regular(Path("/dev/zero"))
    with pytest.raises(ValueError, match="is a directory"):
        open_regular(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with pytest.raises(ValueError, match="link is a pipe"):
        read_text(tmp_path / "link", 10)


def test_pipes_devices_and_directories_are_never_replaced(tmp_path: Path) -> None:
    pipe, folder, link = (tmp_path / name for name in ("pipe", "folder", "link"))
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to(pipe)
    for path, kind in ((pipe, "a pipe"), (folder, "a directory"), (link, "a pipe")):
        with pytest.raises(OSError, match=f"it is {kind}"):
            write_text(path, "text")
        with pytest.raises(ValueError, match=f"--json is {path}, {kind}; name an ordinary file"):
            require_writable(path, "--json")
    assert pipe.is_fifo() and link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


def test_a_file_that_can_be_written_is_found_out_without_touching_it(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "one" / "two" / "new.json"
    old.write_text("old")
    for path in (old, new):
        require_writable(path, "--json")
    assert old.read_text() == "old" and list(new.parent.iterdir()) == []
    for path, reason in ((old / "a.json", "File exists"), (tmp_path / ("n" * 256), "File name too long")):
        with pytest.raises(ValueError, match=f"which cannot be written .{reason}.; choose another"):
            require_writable(path, "--json")


def test_text_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(path, 6) == "abc"
    with pytest.raises(ValueError, match="more than the 5 bytes"):
        read_text(path, 5)
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="not UTF-8 at byte 2"):
        read_text(path, 5)
    with pytest.raises(ValueError, match="does not exist"):
        read_text(tmp_path / "none", 5)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\nb\r\nc", ["a", "b", "c"]),
        ("a\u2028b\x0bc\x85d\x1ce\n", ["a\u2028b\x0bc\x85d\x1ce"]),
        ("", []),
        ("a\n\n", ["a", ""]),
        ("a\rb\n", ["a\rb"]),
    ],
)
def test_lines_end_at_newlines_alone(text: str, lines: list[str]) -> None:
    assert text_lines(text) == lines


def test_the_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


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
    message = r"cannot write .*out \(no more\); free space or choose another place"
    with pytest.raises(RuntimeError, match=message), new_directory(out) as directory:
        (directory / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


HOLDS = "writing it"


def hold(destination: Path, held: Event, end: Event) -> None:
    with reserved(destination, HOLDS):
        held.set()
        end.wait(60)


def test_a_second_writer_in_another_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    context, out = multiprocessing.get_context("fork"), tmp_path / "a" / "out"
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(out, held, end))
    process.start()
    try:
        assert held.wait(60)
        message = r"\.out\.lock is locked: another process is writing it; wait until it has ended"
        with pytest.raises(RuntimeError, match=message), reserved(out, HOLDS):
            raise AssertionError("two hold one destination")
        with reserved(tmp_path / "a" / "other", HOLDS):
            pass
    finally:
        end.set()
        process.join()
    with reserved(out, HOLDS), new_directory(out) as directory:
        (directory / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    with pytest.raises(ValueError, match="out exists and is not an empty directory"), reserved(out, HOLDS):
        raise AssertionError("a directory in use was reserved")


def test_folders_made_for_a_failure_go_again_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for place in ("a/b/out", "there/out"):
        out = tmp_path / place
        with pytest.raises(KeyError), reserved(out, HOLDS), new_directory(out) as directory:
            (directory / "file").touch()
            raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_destination_with_the_longest_name_is_written(tmp_path: Path) -> None:
    out = tmp_path / ("\u00fc" * 127)
    with reserved(out, HOLDS), new_directory(out) as directory:
        (directory / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_comes_late_is_waited_for_and_what_does_not_come_is_not(tmp_path: Path) -> None:
    path = tmp_path / "late"
    threading.Timer(0.1, path.touch).start()
    assert not appears(path, 0)
    assert appears(path, 20)
    assert not appears(tmp_path / "never", 0.05)
