"""Free memory, checked before something large is allocated, and freed memory of the host that is kept."""

from __future__ import annotations

from pathlib import Path

import torch

_GIB = 2**30
_LARGEST_MEASURE = 31 * 2**20  # glibc takes its measure from no block of 32 MiB or more
_MEMORY_INFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # the limits of a container, where it has some


def free_memory(device: torch.device) -> int | None:
    """Free bytes of the device, on a CPU of the system and the container; None where neither reports it."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, unused
        return torch.cuda.mem_get_info(device)[0] + held
    known = [size for size in (_free_in_system(), _free_in_group()) if size is not None]
    return min(known, default=None)


def require_memory(needed: int, device: torch.device, what: str, way_out: str) -> None:
    """Raises torch.OutOfMemoryError, a RuntimeError, where `what` needs more bytes than are free on the
    device."""
    free = free_memory(device)
    if free is not None and needed > free:
        place = f"{device} has" if device.type == "cuda" else "this machine has"
        raise torch.OutOfMemoryError(
            f"{what} needs {needed / _GIB:.1f} GiB and {place} {free / _GIB:.1f} GiB free; {way_out}"
        )


def keep_freed_memory() -> None:
    """Let the C library keep what the work of a chunk on the host frees, up to 62 MiB, for the next chunk.

    glibc gives freed memory back to the system beyond twice the largest block that a program has freed, and
    every 4 KiB of what was given back costs a page fault when it is taken again. This frees one large block,
    which was never touched and so takes no memory; where another library allocates, it changes nothing.
    """
    torch.empty(_LARGEST_MEASURE, dtype=torch.uint8, device="cpu")


def _free_in_system() -> int | None:
    lines = _lines(_MEMORY_INFO)
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_in_group() -> int | None:
    """Bytes that the control group (version 2) of this process may still take; file pages count as free."""
    limit, used = _lines(_GROUP / "memory.max"), _lines(_GROUP / "memory.current")
    if not limit or not used or not limit[0].isdecimal():
        return None
    cached = (line.split()[1] for line in _lines(_GROUP / "memory.stat") if line.startswith("inactive_file "))
    return max(0, int(limit[0]) - int(used[0]) + int(next(cached, 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
