from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rfengine import memory

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal:  8000 kB\nMemFree:  1 kB\nMemAvailable:  4000 kB\n")
    monkeypatch.setattr(memory, "_MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    return tmp_path


def test_free_memory_is_what_the_system_gives_where_no_container_gives_less(group: Path) -> None:
    assert memory.free_memory(CPU) == 4_096_000
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000000\n")
    assert memory.free_memory(CPU) == 4_096_000


def test_free_memory_is_what_a_container_gives_with_the_pages_of_files(group: Path) -> None:
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("2000000\n")
    assert memory.free_memory(CPU) == 1_000_000
    (group / "memory.stat").write_text("anon 5\ninactive_file 700000\n")
    assert memory.free_memory(CPU) == 1_700_000


def test_what_does_not_fit_is_refused_with_both_sizes(group: Path) -> None:
    memory.require_memory(4_096_000, CPU, "it", "take less")
    message = "it needs 2.0 GiB and this machine has 0.0 GiB free; take less"
    with pytest.raises(RuntimeError, match=message):
        memory.require_memory(2**31, CPU, "it", "take less")


def test_nothing_is_refused_where_nothing_tells(group: Path) -> None:
    (group / "meminfo").unlink()
    assert memory.free_memory(CPU) is None
    memory.require_memory(10**30, CPU, "it", "take less")
