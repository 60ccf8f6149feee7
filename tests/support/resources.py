"""What this process holds: memory, files, threads and tasks, for tests that look for leaks."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Resources:
    """files: open file descriptors. tasks: of one event loop."""

    memory_bytes: int
    files: int
    threads: int
    tasks: int


def resources(loop: asyncio.AbstractEventLoop | None = None) -> Resources:
    """What the process holds once nothing is left to be collected, and free memory is given back."""
    for _ in range(3):
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
    tasks = 0 if loop is None else asyncio.run_coroutine_threadsafe(_count_tasks(), loop).result(60)
    return Resources(resident, len(os.listdir("/proc/self/fd")), threading.active_count(), tasks)


async def _count_tasks() -> int:
    return len(asyncio.all_tasks()) - 1
