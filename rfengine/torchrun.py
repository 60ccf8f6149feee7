"""What torchrun tells each of the processes that it starts, by environment variables."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path

import torch

from rfengine.limits import shown

MOST_RANKS = 65536


def started_ranks() -> int:
    """The processes that torchrun has started with this one; 1 without it. Raises ValueError for a number
    that is none."""
    return environment_integer("WORLD_SIZE", 1, MOST_RANKS, "1")


def own_gpu() -> torch.device:
    """The GPU of this process: that of its number on its machine. Raises ValueError where there is none."""
    return torch.device("cuda", environment_integer("LOCAL_RANK", 0, torch.cuda.device_count() - 1))


def own_agent() -> str:
    """What tells the agent of torchrun that has started this process from every other: its machine, number
    and, where /proc has it, start. "" without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    number, started = os.getppid(), ""
    with suppress(OSError):
        started = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {number} {started}"


def environment_integer(name: str, low: int, high: int, default: str = "") -> int:
    """The variable `name` as an integer from `low` to `high`; ValueError for anything else."""
    text = os.environ.get(name, default)
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if not low <= number <= high:
        raise ValueError(
            f"the environment variable {name} is {shown(text)}; torchrun sets it, here from {low} to {high}: "
            "start the ranks with it"
        )
    return number
