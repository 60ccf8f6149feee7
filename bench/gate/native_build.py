"""csrc/ compiled for this GPU, where that can be and nobody has, so that its tests run: ends part device."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from gate.part import AbsentError, Item, Setting
from gate.record import Result

ROOT = Path(__file__).resolve().parents[2]
LOADERS = ("pycuda", "cuda")  # cuda is the package of cuda.core


def item(setting: Setting) -> Item:
    return Item("native build", lambda: _build(setting), least_s=0 if setting.small else 10)


def _build(setting: Setting) -> Iterator[Result]:
    if (ROOT / "rfengine" / "_native.fatbin").exists():
        yield {"native": "was built before"}
        return
    if setting.small:
        raise AbsentError("a self-check builds nothing")
    missing = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
    if missing:
        raise AbsentError(f"{missing[0]} is not here")
    if not any(importlib.util.find_spec(name) for name in LOADERS):
        raise AbsentError("neither pycuda nor cuda-python is here to load it")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major >= 9 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        for command in (
            ["cmake", "-S", str(ROOT), "-B", folder, f"-DRFENGINE_CUDA_ARCHS={arch}"],
            ["cmake", "--build", folder],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=setting.seconds_left)
            if done.returncode:
                raise RuntimeError(f"{command[1]} of cmake failed: {done.stderr[-300:]}")
    yield {"native": f"built for sm_{arch}"}
