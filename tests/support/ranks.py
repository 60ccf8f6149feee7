"""Processes of one training, without torchrun."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed

_SHARED_IMPORTS = ("rfengine.training.build", "rfengine.training.trainer")  # once for all processes
_LONGEST_WAIT = timedelta(minutes=2)  # of a rank for another, which else is half an hour


def run_ranks(
    function: Callable[..., None], count: int, *arguments: object, timeout: timedelta = _LONGEST_WAIT
) -> None:
    """Call `function(rank, *arguments)` in `count` processes of one thread, and wait. timeout: of a rank for
    another."""
    with tempfile.TemporaryDirectory() as directory:
        meeting = (Path(directory) / "meeting").as_uri()
        torch.multiprocessing.get_context("forkserver").set_forkserver_preload(list(_SHARED_IMPORTS))
        torch.multiprocessing.start_processes(
            _start, (function, count, meeting, timeout, arguments), nprocs=count, start_method="forkserver"
        )


def _start(
    rank: int,
    function: Callable[..., None],
    count: int,
    meeting: str,
    timeout: timedelta,
    arguments: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=timeout)
    function(rank, *arguments)
    distributed.destroy_process_group()
