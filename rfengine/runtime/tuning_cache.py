"""The file that keeps what autotune.py decided: JSON, by machine and by contest.

An entry holds for one GPU, driver, set of versions and kernels, and for one subject: what was asked, at which
shape. Entries of other machines stay where they are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)
FORMAT = 1
_DRIVER_VERSION = Path("/sys/module/nvidia/version")
_KERNELS = Path(__file__).parents[1] / "kernels"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a decision is about. key: of Ops.choice, or "folds_gate". given: what else it depends on."""

    key: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    contenders: tuple[str, ...] = ()
    given: str = ""

    def __str__(self) -> str:
        size = f" at {'x'.join(map(str, self.shape))} in {self.dtype}" if self.shape else ""
        return f"{self.key}{size}{self.given and f' ({self.given})'}"


@dataclass(frozen=True, slots=True)
class Decision:
    """What one contest ended with.

    milliseconds: median and interquartile spread of one call by contender. refused: reason by contender that
    failed or was wrong.
    """

    subject: Subject
    backend: str
    reason: str
    milliseconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.subject}: {self.backend}, {self.reason}"


def default_cache_path() -> Path:
    """autotune.json in rfengine's folder of the user's cache directory (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rfengine" / "autotune.json"


def describe_machine(device: torch.device | str) -> dict[str, str]:
    """What a measurement depends on besides its shape: GPU, driver, versions, and our own kernels."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_cuda else "none",
        "driver": _DRIVER_VERSION.read_text().strip() if _DRIVER_VERSION.exists() else "unknown",
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        **{name: _version(name) for name in ("triton", "flash-attn")},
        "kernels": _kernel_mark(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _kernel_mark() -> str:
    """Changes with any kernel: a new one has to win again."""
    digest = hashlib.sha256()
    for path in sorted(_KERNELS.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class TuningCache:
    """The decisions of one machine in one file; a file that cannot be read counts as empty."""

    def __init__(self, path: Path, machine: Mapping[str, str]) -> None:
        self.path = path
        self.machine = dict(machine)
        self._entries = _read(path)
        self._is_told = False  # that the file cannot be written

    def decisions(self) -> list[Decision]:
        """Those of this machine."""
        return [decision for machine, decision in self._entries if machine == self.machine]

    def find(self, subject: Subject) -> Decision | None:
        return next((decision for decision in self.decisions() if decision.subject == subject), None)

    def store(self, decisions: Iterable[Decision]) -> None:
        """Add `decisions` to the file, in place of older ones of the same machine and subject; what another
        process has added since it was read stays.

        The file is replaced as a whole. Where it cannot be written, a warning says so: nothing else is lost.
        """
        self._entries = _read(self.path, warns=False) or self._entries
        new = {decision.subject: decision for decision in decisions}
        kept = [
            (machine, decision)
            for machine, decision in self._entries
            if machine != self.machine or decision.subject not in new
        ]
        self._entries = kept + [(self.machine, decision) for decision in new.values()]
        entries = [{"machine": machine, **asdict(decision)} for machine, decision in self._entries]
        text = json.dumps({"format": FORMAT, "decisions": entries}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError as error:
            logger.log(
                logging.DEBUG if self._is_told else logging.WARNING,
                "autotune: %s is not written, so the next start measures again: %s", self.path, error,
            )  # fmt: skip
            self._is_told = True


def _read(path: Path, warns: bool = True) -> list[tuple[dict[str, str], Decision]]:
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise ValueError(f"its format is {stored['format']!r}, not {FORMAT}")
        return [_entry(**values) for values in stored["decisions"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.log(
            logging.WARNING if warns else logging.DEBUG,
            "autotune: %s is ignored and all is measured again: %s: %s", path, type(error).__name__, error,
        )  # fmt: skip
        return []


def _entry(
    machine: dict[str, str],
    subject: dict[str, Any],
    backend: str,
    reason: str,
    milliseconds: dict[str, list[float]],
    refused: dict[str, str],
) -> tuple[dict[str, str], Decision]:
    """Raises TypeError, ValueError or AttributeError where the values are not what store writes."""
    lists = {name: tuple(subject[name]) for name in ("shape", "contenders")}
    about = Subject(**{**subject, **lists})
    if backend not in about.contenders:
        raise ValueError(f"{about} is decided for {backend!r}, which is no contender")
    times = {name: (float(median), float(spread)) for name, (median, spread) in milliseconds.items()}
    return dict(machine), Decision(about, backend, str(reason), times, dict(refused))
