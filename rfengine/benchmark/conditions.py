"""The circumstances of a measurement: device, clocks and power, versions, commit."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rfengine
from rfengine.doctor import cpu_name, driver_version, version_of

CHECKOUT = Path(__file__).resolve().parents[2]
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
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    queries = f"--query-gpu={','.join(GPU_QUERIES)}"
    return read_state(_output_of("nvidia-smi", gpu, queries, "--format=csv,noheader,nounits"))


def read_state(line: str) -> dict[str, Any]:
    """The values of a line of nvidia-smi by our names: numbers where they are numbers."""
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(GPU_QUERIES):
        return dict.fromkeys(GPU_QUERIES.values(), UNKNOWN)
    found = dict(zip(GPU_QUERIES.values(), values, strict=True))
    for name, value in found.items():
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value if value.startswith("0x") else UNKNOWN
    return found


def versions(device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    return {
        "rfengine": rfengine.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numpy": version_of("numpy"),
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "driver": driver_version() or UNKNOWN if on_cuda else None,
    }


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it; unknown for an installed package."""
    is_checkout = (CHECKOUT / ".git").exists()
    found = _output_of("git", "rev-parse", "--short=12", "HEAD") if is_checkout else ""
    if not found:
        return UNKNOWN
    return found + ("+" if _output_of("git", "status", "--porcelain", "--untracked-files=no") else "")


def reset_peak_memory(device: torch.device) -> None:
    """Free what nothing refers to any more, and start the count of peak_memory again on a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that torch held at most since the reset; on a CPU of the whole process, None where unknown."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _process_bytes("VmHWM")


def held_memory(device: torch.device) -> int | None:
    """Bytes that torch holds now; on a CPU of the whole process, None where unknown."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else _process_bytes("VmRSS")


def _process_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _output_of(*command: str) -> str:
    """What a command prints; empty where it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=CHECKOUT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
