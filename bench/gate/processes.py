"""Runs a part as a process under time limits; one that dies is started again behind the item it died in."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gate.record import BEGUN, Record, read_line

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 5.0  # a process with less left is not started: it would not get past its imports
STOPPED, NO_TIME = "stopped after", "no time was left"
CUT_SHORT = (STOPPED, NO_TIME)  # how results begin that time alone is to blame for
LOOK_S = 0.5  # how often a silence is looked at
TOLD_GARBAGE = 3  # lines of a part that are no results and are kept


class ProcessFailedError(RuntimeError):
    """A process ended badly, or was ended."""


def stream_lines(
    command: Sequence[str],
    limit_s: float,
    silent_s: float | Callable[[], float],
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Lines that a command prints, as they come. It and all it started are killed after limit_s, or after
    silent_s without a line; a function gives what holds at each moment.

    Raises ProcessFailedError at the end for one that was killed or did not end with 0.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"} | dict(environment or {})
    with tempfile.TemporaryFile("w+b") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", cwd=ROOT,
            env=variables, start_new_session=True,
        )  # fmt: skip
        watch = _Watch(process, limit_s, silent_s if callable(silent_s) else lambda: silent_s)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                watch.heard = time.monotonic()
                yield line.rstrip("\n")
            code = process.wait()
        finally:
            watch.end()
        if watch.reason:
            raise ProcessFailedError(watch.reason)
        if code:
            told = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            raise ProcessFailedError(f"{told}: {_last_lines(errors)}")


def _last_lines(errors: tempfile._TemporaryFileWrapper) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4000))
    return " | ".join(errors.read().decode(errors="replace").strip().splitlines()[-4:])[-600:]


class _Watch:
    """Kills a process group when its time is up; `reason` says why, or is empty."""

    def __init__(self, process: subprocess.Popen[str], limit_s: float, silent_s: Callable[[], float]) -> None:
        self.heard = time.monotonic()
        self.reason = ""
        self._process, self._limit_s, self._silent_s = process, limit_s, silent_s
        self._stop = self.heard + limit_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self.reason:
            silent_s = self._silent_s()
            until = min(self._stop, self.heard + silent_s, time.monotonic() + LOOK_S)
            if self._ended.wait(max(0.0, until - time.monotonic())):
                return
            if time.monotonic() >= self._stop:
                self.reason = f"{STOPPED} {self._limit_s:.0f} s, its share of the time"
            elif time.monotonic() >= self.heard + silent_s:
                self.reason = f"ended after {silent_s:.0f} s without a word"
        self._kill()

    def end(self) -> None:
        """The process is done with, or given up."""
        self._ended.set()
        self._thread.join()
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        try:  # the group outlives its leader while a process that it started runs
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def run_part(
    record: Record,
    part: str,
    command: Sequence[str],
    stop: float,
    silent_share: float = 0.6,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `command`, which tells its items and results line by line (part.py), until time.monotonic() is
    `stop`; all that goes wrong is in the record. A process counts as hung that says nothing for silent_share
    of the time that was left when it started; an item may have a share of its own (part.py)."""
    begun: set[str] = set()
    while True:
        left = stop - time.monotonic()
        if left < LEAST_SECONDS:
            record.add(part, {"failed": NO_TIME})
            return
        reader = _Reader(record, part, silent_share, left)
        try:
            for line in stream_lines(command, left, reader.silent_s, environment):
                reader.take(line)
        except ProcessFailedError as error:
            broken = reader.abandon()
            record.add(part, {"failed": str(error), "items": broken})
            if reader.begun <= begun or stop - time.monotonic() < LEAST_SECONDS:
                return
            begun |= reader.begun
        else:
            left_open = reader.abandon()
            if left_open or not reader.begun:
                told = "ended before its time" if left_open else "told nothing that is a result"
                record.add(part, {"failed": told, "items": left_open})
            return


class _Reader:
    """Takes what one process tells into the record. begun: the items that it got to."""

    def __init__(self, record: Record, part: str, silent_share: float, seconds: float) -> None:
        self.begun: set[str] = set()
        self._usual_share = self._silent_share = silent_share
        self._seconds = seconds
        self._record, self._part = record, part
        self._open: list[str] = []
        self._garbage = 0

    def take(self, line: str) -> None:
        result = read_line(line)
        if result is None:
            self._garbage += 1
            if self._garbage <= TOLD_GARBAGE:
                self._record.add(self._part, {"no_result": line[:200]})
        elif isinstance(result.get("chosen"), int):
            self._record.count(self._part, result["chosen"])
        elif isinstance(result.get("begun"), str):
            own_share = result.get("silent_share")
            self._silent_share = own_share if isinstance(own_share, float) else self._usual_share
            self.begun.add(result["begun"])
            self._open.append(result["begun"])
            self._record.mark(self._part, result["begun"], BEGUN)
        elif isinstance(result.get("ended"), str):
            if result["ended"] in self._open:
                self._open.remove(result["ended"])
            self._record.mark(self._part, result["ended"], str(result.get("state")))
        else:
            self._record.add(self._part, result)

    def silent_s(self) -> float:
        """How long the process may say nothing where it is."""
        return self._silent_share * self._seconds

    def abandon(self) -> list[str]:
        """The items that the process did not end, now marked as broken."""
        for item in self._open:
            self._record.mark(self._part, item, "broken")
        return self._open
