"""The record of what autotune decided: several who store at once, damage, and places that are none."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from rfengine.files import locked
from rfengine.tuning import record as tuning_cache
from rfengine.tuning.record import CaseKey, Decision, TuningCache, default_cache_path

MACHINE = {"gpu": "none", "kernels": "1"}


def decision(key: str) -> Decision:
    case = CaseKey(key, (3, 4), "float32", ("plain", "other"), "a")
    return Decision(case, "other", "it is faster", {"plain": (2.0, 0.1), "other": (1.0, 0.1)}, {"x": "y"})


def stored(path: Path, count: int) -> list[Decision]:
    """A record with `count` decisions."""
    decisions = [decision(f"op{number}") for number in range(count)]
    TuningCache(path, MACHINE).store(decisions)
    return decisions


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def store_ten(path: Path, name: str, start: multiprocessing.Barrier) -> None:
    cache = TuningCache(path, MACHINE)
    start.wait()
    for number in range(10):
        cache.store([decision(f"{name}-{number}")])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside torch's threads, which are idle
def test_four_processes_that_store_at_once_keep_every_entry(tmp_path):
    path, context = tmp_path / "autotune.json", multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=store_ten, args=(path, name, start)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    kept = {each.key.name for each in TuningCache(path, MACHINE).decisions()}
    assert kept == {f"{name}-{number}" for name in "abcd" for number in range(10)}
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_that_stays_locked_is_left_as_it_was_with_a_warning(tmp_path, monkeypatch, caplog):
    path = tmp_path / "autotune.json"
    stored(path, 1)
    before = path.read_bytes()
    monkeypatch.setattr(tuning_cache, "_LOCK_WAIT_S", 0.0)
    cache = TuningCache(path, MACHINE)
    with locked(tmp_path / ".autotune.json.lock", "trying the test"):
        cache.store([decision("late")])
    assert path.read_bytes() == before and cache.find(decision("late").key) == decision("late")
    (warning,) = warnings_of(caplog)
    assert "is not written, so the next start measures again" in warning


def test_a_damaged_entry_costs_itself_alone(tmp_path, caplog):
    path = tmp_path / "autotune.json"
    decisions = stored(path, 3)
    whole = json.loads(path.read_text())
    damages = [
        {"backend": 3}, {"backend": "fourth"}, {"reason": None}, {"reason": "\ud800"}, {"machine": [1]},
        {"milliseconds": {"plain": [1.0]}}, {"milliseconds": {"plain": ["x", 1.0]}}, {"refused": 3},
        {"key": {"name": "op1", "shape": [[3]], "candidates": ["other"]}}, {"key": []}, {"more": 1},
    ]  # fmt: skip
    for damage in damages:
        values = json.loads(json.dumps(whole))
        values["decisions"][1].update(damage)
        path.write_text(json.dumps(values))
        caplog.clear()
        cache = TuningCache(path, MACHINE)
        assert cache.decisions() == [decisions[0], decisions[2]], damage
        (warning,) = warnings_of(caplog)
        assert "1 entries of" in warning and "damaged and measured again" in warning
        cache.store([decision("op9")])
        assert TuningCache(path, MACHINE).decisions() == [decisions[0], decisions[2], decision("op9")]


def test_flipped_and_cut_bytes_never_stop_a_start(tmp_path):
    path = tmp_path / "autotune.json"
    stored(path, 2)
    whole, source = path.read_bytes(), random.Random(0)
    for trial in range(300):
        content = bytearray(whole)
        for _ in range(3):
            content[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        path.write_bytes(content[: source.randrange(len(whole))] if trial % 3 == 0 else content)
        for each in TuningCache(path, MACHINE).decisions():
            str(each).encode()
    for text in (
        "",
        "null",
        "3",
        "[" * 100_000,
        '{"format": 1}',
        '{"format": 1, "decisions": {}}',
        "9" * 9999,
    ):
        path.write_text(text)
        assert TuningCache(path, MACHINE).decisions() == []


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("absent")


@pytest.mark.parametrize("make", [make_fifo, make_directory, make_endless, make_link_to_nothing])
def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path, caplog, make):
    path = tmp_path / "autotune.json"
    make(path)
    kind = path.lstat().st_mode
    cache = TuningCache(path, MACHINE)
    cache.store([decision("op")])
    assert cache.decisions() == [decision("op")] and path.lstat().st_mode == kind
    read, written = warnings_of(caplog)
    assert "is ignored and all is measured again" in read and "is not written" in written


def test_a_huge_file_is_not_read(tmp_path, caplog):
    path = tmp_path / "autotune.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert TuningCache(path, MACHINE).decisions() == []
    assert "has more than the 16777216 bytes that are read" in caplog.text


def test_without_a_home_the_record_lies_in_a_folder_of_the_user(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it gives for a user without an entry
    assert default_cache_path() == Path(f"/tmp/rfengine-{os.getuid()}/autotune.json")


def test_a_relative_cache_directory_counts_as_unset(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / ".cache" / "rfengine" / "autotune.json"


def test_a_home_that_is_not_there_costs_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    cache = TuningCache(default_cache_path(), MACHINE)
    cache.store([decision("op")])
    assert cache.decisions() == [decision("op")]
    (warning,) = warnings_of(caplog)
    assert "is not written" in warning
