"""Disks and files that are soon full, for tests."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of that size at `place`; the test is skipped where it cannot be mounted."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k"]
    if subprocess.run(["mount", *options, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def small_files(most_bytes: int) -> Iterator[int]:
    """No file can grow beyond so many bytes meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    yield most_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
