"""Trials: a start survives a candidate of autotune.py that hangs, ends its process or breaks the device.

While a candidate first runs, a trial file beside the record names it, locked by the process that tries it. A
start that finds such a file and can lock it knows that its process is gone, and refuses the candidate: the
refusal is an entry of the record, valid until the kernels or another version change.
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
from rfengine.tuning.record import CaseKey, Decision, TuningCache

logger = logging.getLogger(__name__)
NOT_BACK = "it did not come back: the process that first ran it was ended while it did"
_LOOK_S = 1.0  # how long another process, which looks whether a trial file was left, may hold it
# messages of CUDA after which the device does nothing more in this process
_LOST = (
    "illegal memory access", "illegal instruction", "illegal address", "misaligned address",
    "invalid program counter", "unspecified launch failure", "device-side assert", "hardware stack error",
    "launch timed out",
)  # fmt: skip


class LostDeviceError(RuntimeError):
    """A candidate has broken the device for the whole process."""

    def __init__(self, key: CaseKey, backend: str, problem: str) -> None:
        super().__init__(
            f"{backend} has broken the device in {key} ({problem}); nothing runs on it until this "
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


def alone(key: CaseKey, backend: str) -> CaseKey:
    """The key of a verdict on one candidate, whatever it is compared with."""
    return replace(key, candidates=(backend,))


class Trials:
    """The verdicts on single candidates in one record."""

    def __init__(self, cache: TuningCache) -> None:
        self._cache = cache

    def verdict(self, key: CaseKey, backend: str) -> Decision | None:
        """A candidate is refused or right; None where it has not run by itself."""
        self._refuse_left_trials(key, backend)
        return self._cache.find(alone(key, backend))

    def refused(self, key: CaseKey) -> dict[str, str]:
        """The reasons by candidate of `key` that must not be run."""
        verdicts = ((backend, self.verdict(key, backend)) for backend in key.candidates)
        return {name: found.refused[name] for name, found in verdicts if found and name in found.refused}

    def judge(self, key: CaseKey, backend: str, problem: str) -> Decision:
        """Store that a candidate is right, or its problem."""
        refused = {backend: problem} if problem else {}
        verdict = Decision(alone(key, backend), backend, problem or "right", refused=refused)
        self._cache.store([verdict])
        return verdict

    @contextmanager
    def running(self, key: CaseKey, backend: str) -> Iterator[None]:
        """Hold the trial file of a candidate during the block."""
        with ExitStack() as stack:
            try:
                self._cache.path.parent.mkdir(parents=True, exist_ok=True)
                trial = partial_path(self._trial_path(key, backend))
                stack.enter_context(locked(trial, f"trying {backend}", _LOOK_S))
                trial.write_text(f"on trial: {backend}, {key}\n")
            except (OSError, RuntimeError) as error:  # where nothing can be written, there is no trial file
                logger.debug("autotune: %s is tried without a trial file: %s", backend, error)
            yield

    def _trial_path(self, key: CaseKey, backend: str) -> Path:
        """Of one candidate on one machine; the files of its processes have hidden names beside it."""
        about = (key.name, key.shape, key.dtype, key.depends_on, backend)
        text = json.dumps([sorted(self._cache.machine.items()), *about])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._cache.path.with_name(f"{self._cache.path.name}-trial-{digest}")

    def _refuse_left_trials(self, key: CaseKey, backend: str) -> None:
        trial = self._trial_path(key, backend)
        for path in trial.parent.glob(f".{glob.escape(trial.name)}.*"):
            try:
                with locked(path, "looking whether a trial came back"):
                    if path.stat().st_size:  # an empty one was made a moment ago
                        problem = f"{NOT_BACK}; to try it again, delete {self._cache.path}"
                        logger.warning("autotune: %s is left out in %s: %s", backend, key, problem)
                        self.judge(key, backend, problem)
            except (OSError, RuntimeError):  # its process lives, or it is another user's
                continue
