"""log.jsonl after a crash: what is whole is kept, what is damaged or ahead goes, and damage is reported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rfengine.training.log import keep_until, read_log

LINES = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
WHOLE = "".join(json.dumps(line) + "\n" for line in LINES).encode()
DAMAGE = [
    b'{"step": 4, "critic_lo', b"\0" * 64, b'{"step": "4"}\n', b"[4]\n", b"4\n", b"\xff\n", b"{" * 100_000,
    b'{"loss": 1.0}\n', b'{"step": true}\n', b'{"step": 2, "loss": "low"}\n',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_dropped_with_a_warning(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + damage)
    assert read_log(path, 3) == LINES
    keep_until(path, 3)
    assert path.read_bytes() == WHOLE
    assert "log.jsonl is damaged at line 4 of 4; the 3 whole lines up to step 3" in caplog.text


def test_damage_in_the_middle_costs_its_own_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE.replace(b'"step": 2', b'"step": 2"'))
    keep_until(path, 3)
    assert [figures["step"] for figures in read_log(path, 9)] == [1, 3]
    assert "damaged at line 2 of 3" in caplog.text


def test_what_is_beyond_the_step_goes_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE)
    keep_until(path, 2)
    assert read_log(path, 9) == LINES[:2]
    assert not caplog.text


def test_a_log_that_is_whole_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE)
    before = path.stat().st_ino
    keep_until(path, 3)
    assert path.stat().st_ino == before


def test_an_absent_log_is_empty_and_a_pipe_is_refused(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl", 3) == []
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="log.jsonl is a pipe"):
        keep_until(tmp_path / "log.jsonl", 3)
