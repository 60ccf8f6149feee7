"""The file that keeps what autotune.py decided: JSON, by machine and by case.

An entry is valid for one GPU, driver, set of versions and kernels, and for one case key. Entries of other
machines stay where they are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rfengine.files import locked, read_text, replaced, strict_json

logger = logging.getLogger(__name__)
FORMAT = 2
_DRIVER_VERSION = Path("/sys/module/nvidia/version")
_KERNELS = Path(__file__).parents[1] / "kernels"
_MOST_BYTES = 16 << 20  # of the file; an entry has about 700
_LOCK_WAIT_S = 5.0  # for other processes that store as well
_PLACE_WITHOUT_HOME = Path("/tmp")


@dataclass(frozen=True, slots=True)
class CaseKey:
    """Cache key of a decision. name: a key of Ops.choice, or "folds_gate". depends_on: other settings that
    affect it."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    candidates: tuple[str, ...] = ()
    depends_on: str = ""

    def __str__(self) -> str:
        size = f" at {'x'.join(map(str, self.shape))} in {self.dtype}" if self.shape else ""
        return f"{self.name}{size}{self.depends_on and f' ({self.depends_on})'}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of one case.

    milliseconds: median and interquartile spread of one call by candidate. refused: reason by candidate that
    failed or was wrong.
    """

    key: CaseKey
    backend: str
    reason: str
    milliseconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.key}: {self.backend}, {self.reason}"


Entry = tuple[dict[str, str], Decision]  # the machine, and a decision made on it


def default_cache_path() -> Path:
    """autotune.json in rfengine's folder of the user's cache directory (XDG_CACHE_HOME, or ~/.cache), or in
    a folder of the user's in /tmp where there is no home directory."""
    for place in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(place):  # one that is not counts as unset (XDG); without a home the "~" stays
            return Path(place, "rfengine", "autotune.json")
    return _PLACE_WITHOUT_HOME / f"rfengine-{os.getuid()}" / "autotune.json"


def describe_machine(device: torch.device | str) -> dict[str, str]:
    """What a measurement depends on besides its shape: GPU, driver, versions, and our own kernels."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_cuda else "none",
        "driver": _DRIVER_VERSION.read_text().strip() if _DRIVER_VERSION.exists() else "unknown",
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        **{name: _version(name) for name in ("triton", "flash-attn")},
        "kernels": _kernels_fingerprint(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _kernels_fingerprint() -> str:
    """Changes with any kernel: a new one has to win again."""
    digest = hashlib.sha256()
    for path in sorted(_KERNELS.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class TuningCache:
    """The decisions of one machine in one file. A file that cannot be read counts as empty, and an entry that
    is damaged as absent, with a warning."""

    def __init__(self, path: Path, machine: Mapping[str, str]) -> None:
        self.path = path
        self.machine = dict(machine)
        self._entries = _read(path)
        self._has_warned = False  # that the file cannot be written

    def decisions(self) -> list[Decision]:
        """Those of this machine."""
        return [decision for machine, decision in self._entries if machine == self.machine]

    def find(self, key: CaseKey) -> Decision | None:
        return next((decision for decision in self.decisions() if decision.key == key), None)

    def store(self, decisions: Iterable[Decision]) -> None:
        """Add `decisions` to the file, in place of older ones of the same machine and key; what other
        processes have added since it was read stays.

        The file is replaced as a whole. Where it cannot be written, a warning says so and it stays as it was.
        """
        new = {decision.key: decision for decision in decisions}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f".{self.path.name}.lock")
            with locked(lock, "storing what it measured", _LOCK_WAIT_S):
                self._take(_read(self.path, warns=False) or self._entries, new)
                self._write()
        except (OSError, RuntimeError, ValueError) as error:
            self._take(self._entries, new)
            logger.log(
                logging.DEBUG if self._has_warned else logging.WARNING,
                "autotune: %s is not written, so the next start measures again: %s", self.path, error,
            )  # fmt: skip
            self._has_warned = True

    def _take(self, entries: Iterable[Entry], new: Mapping[CaseKey, Decision]) -> None:
        kept = [
            (machine, decision)
            for machine, decision in entries
            if machine != self.machine or decision.key not in new
        ]
        self._entries = kept + [(self.machine, decision) for decision in new.values()]

    def _write(self) -> None:
        if os.path.lexists(self.path) and not self.path.is_file():
            raise ValueError("it is no ordinary file")
        entries = [{"machine": machine, **asdict(decision)} for machine, decision in self._entries]
        text = json.dumps({"format": FORMAT, "decisions": entries}, indent=1)
        with replaced(self.path) as partial:
            partial.write_text(text, encoding="utf-8")


def _read(path: Path, warns: bool = True) -> list[Entry]:
    """The entries of the file that are whole; a warning names what is left out."""
    if not os.path.lexists(path):
        return []
    level = logging.WARNING if warns else logging.DEBUG
    ignored = "autotune: %s is ignored and all is measured again: %s"
    try:
        stored = strict_json(read_text(path, _MOST_BYTES))
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        if not isinstance(stored.get("decisions"), list):
            raise ValueError("it has no list of decisions")
    except ValueError as error:
        logger.log(level, ignored, path, error)
        return []
    entries, damaged = [], []
    for values in stored["decisions"]:
        try:
            entries.append(_entry(**values))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append(f"{type(error).__name__}: {error}")
    if damaged and not entries:
        logger.log(level, ignored, path, damaged[0])
    elif damaged:
        message = "autotune: %d entries of %s are damaged and measured again: %s"
        logger.log(level, message, len(damaged), path, damaged[0])
    return entries


def _entry(
    machine: dict[str, str],
    key: dict[str, Any],
    backend: str,
    reason: str,
    milliseconds: dict[str, list[float]],
    refused: dict[str, str],
) -> Entry:
    """Raises TypeError, KeyError, ValueError or AttributeError where the values are not what store writes."""
    case = CaseKey(**{**key, "shape": tuple(key["shape"]), "candidates": tuple(key["candidates"])})
    if any(type(size) is not int for size in case.shape):
        raise TypeError("a shape is not made of integers")
    for text in (
        case.name, case.dtype, case.depends_on, *case.candidates, backend, reason,
        *machine, *machine.values(), *refused, *refused.values(), *milliseconds,
    ):  # fmt: skip
        text.encode()  # AttributeError for no text, ValueError for half a character
    if backend not in case.candidates:
        raise ValueError(f"{case} is decided for {backend!r}, which is no candidate")
    times = {name: (float(median), float(spread)) for name, (median, spread) in milliseconds.items()}
    if not all(math.isfinite(value) for pair in times.values() for value in pair):
        raise ValueError(f"{case} has times that are not finite")
    return dict(machine), Decision(case, backend, reason, times, dict(refused))
