"""A GPU that is not here, as Triton and the kernels see it: what they launch is compiled for it.

Launches are recorded and not run, or go through Triton's own launcher to a stand-in for the driver
(stand_ins/libcuda.c), which needs a C compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

KILO = 1024
_SOURCE = Path(__file__).parent / "stand_ins" / "libcuda.c"
_HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor, and how many of them the largest GPU of the kind has."""

    capability: int
    shared_bytes: int  # of a multiprocessor; a block can have all but 1 KB, which is taken for every block
    warps: int
    blocks: int
    processors: int


# CUDA C++ Programming Guide, technical specifications for each compute capability
ArchitectureName = Literal["sm_80", "sm_90", "sm_100", "sm_120"]
ARCHITECTURES: dict[ArchitectureName, Architecture] = {
    "sm_80": Architecture(80, 164 * KILO, 64, 32, 108),
    "sm_90": Architecture(90, 228 * KILO, 64, 32, 132),
    "sm_100": Architecture(100, 228 * KILO, 64, 32, 148),
    "sm_120": Architecture(120, 100 * KILO, 48, 24, 188),
}


class AbsentGPU:
    """Stands in for Triton's driver: names the architecture to compile for.

    The device index, by which Triton keeps compiled kernels, is the architecture.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.capability = architecture.capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class StandInGPU(AbsentGPU):
    """An AbsentGPU whose driver is the stand-in: Triton's own launcher loads and launches kernels there."""

    def __init__(self, architecture: Architecture) -> None:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        super().__init__(architecture)
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher


@dataclass(frozen=True)
class StandInDriver:
    """The stand-in for libcuda, loaded into this process for good: no real driver can be loaded after it."""

    library: ctypes.CDLL

    @classmethod
    def load(cls, folder: Path) -> StandInDriver | None:
        """Compile it into `folder`, which has to stay, and load it; None where there is no C compiler.

        Raises RuntimeError when it does not compile.
        """
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            return None
        path = folder / "libcuda.so.1"
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", f"-I{_HEADERS}", "-Wl,-soname,libcuda.so.1"]
        built = subprocess.run([*command, str(_SOURCE), "-o", str(path)], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"{_SOURCE} does not compile: {built.stderr.strip().splitlines()[-1]}")
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # where Triton links its launcher
        return cls(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))

    def counts(self) -> dict[str, int]:
        """Launches, tensor maps and broken rules of the driver so far."""
        return {
            name: int(getattr(self.library, f"stand_in_{name}")()) for name in ("launches", "maps", "broken")
        }


@contextlib.contextmanager
def recorded_launches(architecture: Architecture) -> Iterator[list[tuple[str, tuple[int, ...], Any]]]:
    """Inside, a launch is compiled for the architecture and recorded (name, grid, kernel), not run."""
    recorded: list[tuple[str, tuple[int, ...], Any]] = []
    compile_or_run = JITFunction.run

    def record(
        kernel: JITFunction, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> Any:
        compiled = compile_or_run(kernel, *arguments, grid=grid, warmup=True, **options)
        recorded.append((kernel.fn.__name__, tuple(grid), compiled))
        return compiled

    before = driver._active  # asking for driver.active would look for a GPU
    driver.set_active(AbsentGPU(architecture))
    try:
        with mock.patch.object(JITFunction, "run", record):
            yield recorded
    finally:
        driver.set_active(before)


@contextlib.contextmanager
def stand_in_launches(architecture: Architecture) -> Iterator[None]:
    """Inside, a launch is compiled for the architecture and goes to the stand-in driver, which is loaded."""
    before = driver._active
    driver.set_active(StandInGPU(architecture))
    descriptors = importlib.import_module("rfengine.kernels.sink_window_attention_descriptor")

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8)

    try:
        with mock.patch.object(descriptors, "_allocate_scratch", scratch):
            yield
    finally:
        driver.set_active(before)


@contextlib.contextmanager
def seen_architecture(architecture: Architecture) -> Iterator[None]:
    """Inside, kernels choose their form and their share of the work as on a GPU of the architecture."""
    files = (
        "sink_window_attention", "sink_window_attention_descriptor", "convolution_tile", "frame_attention",
        "linear_tile",
    )  # fmt: skip
    capability = divmod(architecture.capability, 10)
    answers = {"capability_of": capability, "count_processors": architecture.processors}
    with contextlib.ExitStack() as patches:
        for file in files:
            module = importlib.import_module(f"rfengine.kernels.{file}")
            for name in answers.keys() & vars(module).keys():
                answer = answers[name]
                patches.enter_context(mock.patch.object(module, name, lambda _, answer=answer: answer))
        yield
