"""What nvcc makes of csrc/ for Hopper, read from the fatbin, in the columns of compile_report.py.

    cmake -S . -B build && cmake --build build && python bench/native_report.py

Registers are those of a thread at launch: in a convolution 168, of which the warps that copy keep 24 and
those that multiply take 240. Shared memory is what rfengine/ops/native launches with.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.absent_gpu import ARCHITECTURES
from bench.compile_report import count_instructions, render, resident_blocks, run_tool
from rfengine.cli.process import run_script
from rfengine.ops.native import FATBIN, convolution, eviction

ARCH = "sm_90a"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What nvcc makes of csrc/ for Hopper: registers, spills, shared memory, instructions."""

    fatbin: Path = FATBIN
    """The fatbin that CMakeLists.txt builds."""


def describe_fatbin(fatbin: Path) -> list[dict[str, Any]]:
    """Every kernel of a fatbin for Hopper, as compile_report.describe describes one of Triton's."""
    usage = run_tool("cuobjdump", "-res-usage", "-arch", ARCH, str(fatbin))
    registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", usage))
    listing = run_tool("cuobjdump", "-sass", "-arch", ARCH, str(fatbin))
    codes = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", listing, re.DOTALL))
    shared_bytes = {str(tile.columns): tile.shared_bytes for tile in convolution.TILES}
    architecture, kernels = ARCHITECTURES["sm_90"], []
    for name, code in sorted(codes.items()):
        form = re.fullmatch(r"causal_conv3d_(\d+)_\w+", name)
        warps = (convolution.THREADS if form else eviction.THREADS) // 32
        shared = shared_bytes[form[1]] if form else 0
        blocks = resident_blocks(architecture, int(registers[name]), warps, shared)
        kernels.append({
            "arch": ARCH, "case": "csrc", "kernel": name, "warps": warps, "registers": int(registers[name]),
            "shared_bytes": shared, "blocks": blocks, "occupancy": blocks * warps / architecture.warps,
            **count_instructions(code),
        })  # fmt: skip
    return kernels


def compiler_of(fatbin: Path) -> str:
    """The toolkit that the fatbin was made by, such as "nvcc 13.0"; "nvcc" where it does not say."""
    found = re.search(r"release (\d+\.\d+)", run_tool("cuobjdump", "-elf", "-arch", ARCH, str(fatbin)))
    return f"nvcc {found[1]}" if found else "nvcc"


def run(options: Options) -> int:
    if not options.fatbin.is_file():
        raise RuntimeError(
            f"there is no {options.fatbin}; cmake -S . -B build && cmake --build build, or use --fatbin"
        )
    print(render(describe_fatbin(options.fatbin), compiler_of(options.fatbin)))
    return 0


if __name__ == "__main__":
    sys.exit(run_script("native_report", Options, run))
