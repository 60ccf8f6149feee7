"""What a part is inside its process: items that run one after another and tell their results."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from gate.record import Result, read_line

# what an item may fail with while the next ones go on; after anything else the process is started again
FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    TypeError, ValueError, subprocess.TimeoutExpired,
)  # fmt: skip
NOT_RUN = "not run"
TOLD_CHARACTERS = 400
LOGGER = "rfengine.runtime"


class AbsentError(Exception):
    """What an item needs is not here; this is no failure."""


@dataclass(frozen=True)
class Item:
    """One thing to find out; `run` yields results. It is not begun with less than least_s left.

    silent_share: of the time of its process that it may say nothing before it counts as hung; None: as the
    part.
    """

    name: str
    run: Callable[[], Iterable[Result]]
    least_s: float = 0.0
    silent_share: float | None = None


@dataclass(frozen=True)
class Setting:
    """How a part is to run. small: the self-check, on a CPU. stop: the time.monotonic() of its end."""

    part: str
    small: bool
    stop: float
    record_path: Path
    shard: tuple[int, int] = (0, 1)

    @property
    def seconds_left(self) -> float:
        return self.stop - time.monotonic()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.small else "cuda")

    @cached_property
    def _record(self) -> Result:
        if not self.record_path.exists():
            return {}
        return read_line(self.record_path.read_text()) or {}

    def results(self, part: str) -> list[Result]:
        """What was found out before this process started."""
        return self._record.get("parts", {}).get(part, {}).get("results", [])

    @property
    def taken(self) -> frozenset[str]:
        """Items that an earlier process of this part began."""
        return frozenset(self._record.get("parts", {}).get(self.part, {}).get("items", {}))


class Teller:
    """Prints results as lines of the pipe that the process was started with, and sends all else that it
    prints, libraries included, to the standard error."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self, result: Result) -> None:
        self._pipe.write(json.dumps(result) + "\n")
        self._pipe.flush()


class _LogTeller(logging.Handler):
    """Tells what the engine logs while it tunes, so that a hang shows where it is."""

    def __init__(self, tell: Callable[[Result], None]) -> None:
        super().__init__(logging.INFO)
        self.item = ""
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell({"item": self.item, "log": record.getMessage()})


@contextmanager
def _logs_told(tell: Callable[[Result], None]) -> Iterator[_LogTeller]:
    logger, teller = logging.getLogger(LOGGER), _LogTeller(tell)
    before = logger.level
    logger.addHandler(teller)
    logger.setLevel(logging.INFO)
    try:
        yield teller
    finally:
        logger.removeHandler(teller)
        logger.setLevel(before)


def run_items(items: Sequence[Item], setting: Setting, tell: Callable[[Result], None]) -> None:
    """Run the items that no earlier process began. Raises RuntimeError when the device is lost, so that a
    fresh process goes on."""
    taken = setting.taken
    if not any(item.name in taken for item in items):  # the first process of this part
        tell({"chosen": len(items)})
    with _logs_told(tell) as teller:
        for item in items:
            if item.name not in taken:
                teller.item = item.name
                _run_item(item, setting, tell)


def _run_item(item: Item, setting: Setting, tell: Callable[[Result], None]) -> None:
    failures = (*FAILURES, *_triton_errors())
    tell({"begun": item.name} | ({} if item.silent_share is None else {"silent_share": item.silent_share}))
    if setting.seconds_left < item.least_s:
        tell({"item": item.name, "not_run": f"it takes {item.least_s:.0f} s and less were left"})
        tell({"ended": item.name, "state": NOT_RUN})
        return
    state = "done"
    started = time.monotonic()
    try:
        for result in item.run():
            tell({"item": item.name} | result)
    except AbsentError as absence:
        state = NOT_RUN
        tell({"item": item.name, "not_run": str(absence)})
    except failures as error:
        state = "failed"
        told = " ".join(str(error).split())[:TOLD_CHARACTERS]
        tell({"item": item.name, "failed": f"{type(error).__name__}: {told}"})
    tell({"ended": item.name, "state": state, "seconds": round(time.monotonic() - started, 3)})
    gc.collect()  # an engine is in cycles, and the next item may load another beside it
    if not setting.small:
        torch.cuda.synchronize()  # raises for ever after an illegal access
        torch.cuda.empty_cache()


def _triton_errors() -> tuple[type[Exception], ...]:
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)
