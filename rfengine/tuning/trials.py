"""Trials: what keeps a start going where a contender of autotune.py hangs, ends its process or breaks the
device.

While a contender first runs, a file beside the record marks it, locked by the process that tries it. A start
that finds such a file and can lock it knows that its process is gone, and refuses the contender from then on:
the refusal stands in the record, which holds until the kernels or another version change.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from rfengine.files import locked, partial_path
from rfengine.tuning.record import Decision, Subject, TuningCache

logger = logging.getLogger(__name__)
NOT_BACK = "it did not come back: the process that first ran it was ended while it did"
_LOOK_S = 1.0  # how long another process, which looks whether a mark was left, may hold it
# what CUDA says of a device that does nothing more in this process
_LOST = (
    "illegal memory access", "illegal instruction", "illegal address", "misaligned address",
    "invalid program counter", "unspecified launch failure", "device-side assert", "hardware stack error",
    "launch timed out",
)  # fmt: skip


class LostDeviceError(RuntimeError):
    """A contender has broken the device for the whole process."""

    def __init__(self, subject: Subject, backend: str, problem: str) -> None:
        super().__init__(
            f"{backend} has broken the device in {subject} ({problem}); nothing runs on it until this "
            f"process is started again, and then {backend} is left out there"
        )


def is_lost(device: torch.device, error: Exception) -> bool:
    """Whether nothing runs on `device` any more in this process, after `error`."""
    if any(sign in str(error) for sign in _LOST):
        return True
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)  # raises for ever after an illegal access
    except RuntimeError:
        return True
    return False


def alone(subject: Subject, backend: str) -> Subject:
    """What the record says of one contender, whatever it contends with."""
    return replace(subject, contenders=(backend,))


class Trials:
    """Those of one record."""

    def __init__(self, cache: TuningCache) -> None:
        self._cache = cache

    def verdict(self, subject: Subject, backend: str) -> Decision | None:
        """What is known of one contender: refused or right; None where it has not run by itself."""
        self._take_left_marks(subject, backend)
        return self._cache.find(alone(subject, backend))

    def refused(self, subject: Subject) -> dict[str, str]:
        """Why contenders of `subject` are not to be run, by name."""
        verdicts = ((backend, self.verdict(subject, backend)) for backend in subject.contenders)
        return {name: found.refused[name] for name, found in verdicts if found and name in found.refused}

    def judge(self, subject: Subject, backend: str, problem: str) -> Decision:
        """Keep that a contender is right, or what its problem is."""
        refused = {backend: problem} if problem else {}
        verdict = Decision(alone(subject, backend), backend, problem or "right", refused=refused)
        self._cache.store([verdict])
        return verdict

    @contextmanager
    def running(self, subject: Subject, backend: str) -> Iterator[None]:
        """Mark a contender during the block."""
        with ExitStack() as stack:
            try:
                self._cache.path.parent.mkdir(parents=True, exist_ok=True)
                mark = partial_path(self._mark(subject, backend))
                stack.enter_context(locked(mark, f"trying {backend}", _LOOK_S))
                mark.write_text(f"on trial: {backend}, {subject}\n")
            except (OSError, RuntimeError) as error:  # where nothing can be written, nothing can be marked
                logger.debug("autotune: %s is tried without a mark: %s", backend, error)
            yield

    def _mark(self, subject: Subject, backend: str) -> Path:
        about = (subject.key, subject.shape, subject.dtype, subject.given, backend)
        text = json.dumps([sorted(self._cache.machine.items()), *about])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._cache.path.with_name(f"{self._cache.path.name}-trial-{digest}")

    def _take_left_marks(self, subject: Subject, backend: str) -> None:
        mark = self._mark(subject, backend)
        for path in mark.parent.glob(f".{glob.escape(mark.name)}.*"):
            try:
                with locked(path, "looking whether a trial came back"):
                    if path.stat().st_size:  # an empty one was made a moment ago
                        problem = f"{NOT_BACK}; to try it again, delete {self._cache.path}"
                        logger.warning("autotune: %s is left out in %s: %s", backend, subject, problem)
                        self.judge(subject, backend, problem)
            except (OSError, RuntimeError):  # its process lives, or it is another user's
                continue
