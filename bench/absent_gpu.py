"""A GPU that is not here, as Triton and the kernels see it: launches are compiled for it and not run."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

KILO = 1024
# kernels that choose by the device
CHOOSING = (
    "conv_frame_pack", "convolution_tile", "frame_attention", "linear_tile", "sink_window_attention",
    "sink_window_attention_descriptor", "sink_window_attention_fp8", "sink_window_attention_fp8_descriptor",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor, and how many of them the largest GPU of the kind has."""

    capability: int
    shared_bytes: int  # of a multiprocessor; a block can have all but 1 KB, which is taken for every block
    warps: int
    blocks: int
    processors: int

    # what Triton asks of its driver; it keeps compiled kernels by the index of the device
    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


# CUDA C++ Programming Guide, technical specifications for each compute capability
ArchitectureName = Literal["sm_80", "sm_90", "sm_100", "sm_120"]
ARCHITECTURES: dict[ArchitectureName, Architecture] = {
    "sm_80": Architecture(80, 164 * KILO, 64, 32, 108),
    "sm_90": Architecture(90, 228 * KILO, 64, 32, 132),
    "sm_100": Architecture(100, 228 * KILO, 64, 32, 148),
    "sm_120": Architecture(120, 100 * KILO, 48, 24, 188),
}


@contextlib.contextmanager
def recorded_launches(architecture: Architecture) -> Iterator[list[tuple[str, tuple[int, ...], Any]]]:
    """Inside, a launch is compiled for the architecture and recorded (name, grid, kernel), not run; kernels
    choose their form and their share of the work as on a GPU of it."""
    recorded: list[tuple[str, tuple[int, ...], Any]] = []
    compile_or_run = JITFunction.run

    def record(
        kernel: JITFunction, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> Any:
        compiled = compile_or_run(kernel, *arguments, grid=grid, warmup=True, **options)
        recorded.append((kernel.fn.__name__, tuple(grid), compiled))
        return compiled

    answers = {
        "capability_of": lambda _: divmod(architecture.capability, 10),
        "count_processors": lambda _: architecture.processors,
    }
    before = driver._active  # asking for driver.active would look for a GPU
    driver.set_active(architecture)
    try:
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(JITFunction, "run", record))
            for file in CHOOSING:
                module = importlib.import_module(f"rfengine.kernels.{file}")
                for name in answers.keys() & vars(module).keys():
                    patches.enter_context(mock.patch.object(module, name, answers[name]))
            yield recorded
    finally:
        driver.set_active(before)
