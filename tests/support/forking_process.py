"""A process that has imported what tests need, which takes seconds, and forks for each line that it reads."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds


class ForkingProcess:
    """Runs a Python program and talks with it in lines."""

    def __init__(self, program: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def write(self, line: str) -> None:
        self._process.stdin.write(f"{line}\n")

    def has_line(self, limit: float = 0) -> bool:
        """Whether it writes something within so many seconds."""
        return bool(select.select([self._process.stdout], [], [], limit)[0])

    def read_line(self) -> str:
        assert self.has_line(LIMIT), "nothing came from the process"
        return self._process.stdout.readline().rstrip("\n")
