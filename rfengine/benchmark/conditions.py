"""The circumstances of a measurement: device, clocks and power, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rfengine
from rfengine.doctor import cpu_name

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"
TIMEOUT_S = 20.0
# what nvidia-smi calls it, and what we do
GPU_QUERIES = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "max_sm_clock_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "clocks_event_reasons.active": "clock_reasons",
}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power and temperature of a GPU; the load of a CPU. What cannot be found out is "unknown"."""
    if device.type != "cuda":
        return {"load_average_1_min": os.getloadavg()[0] if hasattr(os, "getloadavg") else UNKNOWN}
    uuid = torch.cuda.get_device_properties(device).uuid
    asked = ",".join(GPU_QUERIES)
    told = _told_by("nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={asked}", "--format=csv,noheader,nounits")
    return read_state(told)


def read_state(line: str) -> dict[str, Any]:
    """A line of nvidia-smi by our names: numbers where they are numbers."""
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(GPU_QUERIES):
        return dict.fromkeys(GPU_QUERIES.values(), UNKNOWN)
    return {name: _number(value) for name, value in zip(GPU_QUERIES.values(), values, strict=True)}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text if text.startswith("0x") else UNKNOWN


def versions(device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    driver = _told_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else ""
    return {
        "rfengine": rfengine.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "driver": (driver.splitlines() or [UNKNOWN])[0] if on_cuda else None,
    }


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    found = _told_by("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return UNKNOWN
    return found + ("+" if _told_by("git", "status", "--porcelain", "--untracked-files=no") else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _told_by(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
