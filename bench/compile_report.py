"""What the compiler makes of every kernel at the engine's real shapes, for GPUs that need not be here.

    python bench/compile_report.py --arch sm_90 sm_80 --json
    python bench/compile_report.py --cache DIR  # fills a Triton cache to carry there (TRITON_CACHE_DIR=DIR)

Each op is called as the engine calls it, with tensors on the CPU; its launches are compiled for the
architecture in question, with the launch parameters the kernel files choose, and not run. Registers are those
of a thread at launch, spills the local-memory instructions in the machine code, products the matrix
instructions (on sm_90 HGMMA, in FP8 QGMMA, by where their first factor lies, shared memory + registers: in
attention the first product and the second), TMA the loads and stores of the tensor memory accelerator.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError

from bench.absent_gpu import ARCHITECTURES, KILO, Architecture, ArchitectureName, recorded_launches
from bench.kernel_cases import KernelCase, chosen_cases
from bench.kernel_inputs import Draw
from rfengine.cli.process import run_script
from rfengine.costs.shapes import Shapes
from rfengine.presets import PRESETS

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MODEL = "wan-1.3b"
WARP_GROUP_PRODUCTS = ("HGMMA", "QGMMA")  # of sm_90, in 16 bits and in FP8
REGISTERS = 65536  # of one multiprocessor, on every architecture here


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the compiler makes of every kernel at the engine's real shapes, for GPUs that need not be here."""

    arch: tuple[ArchitectureName, ...] = ("sm_90",)
    """Architectures to compile for."""
    case: tuple[str, ...] = ()
    """Only these cases of kernel_cases.py."""
    json: bool = False
    """Print JSON instead of a table."""
    cache: Path | None = None
    """Fill this Triton cache, and print no report."""


def compile_case(case: KernelCase, arch: str, shapes: Shapes) -> list[dict[str, Any]]:
    """Every kernel that one case launches on `arch`."""
    architecture = ARCHITECTURES[arch]
    kernel = case.kernel()
    with recorded_launches(architecture) as recorded, torch.no_grad():
        kernel(*case.inputs(shapes, Draw()))
    return [describe(case, arch, *launch) for launch in recorded]


def describe(
    case: KernelCase, arch: str, kernel: str, grid: tuple[int, ...], compiled: Any
) -> dict[str, Any]:
    """Resources and instructions of one compiled kernel.

    warps: those of the block, with what warp specialisation adds. products: HGMMA with the first factor in
    shared memory, in registers; fp8_products: the same of QGMMA. other_products: matrix instructions of other
    generations. register_moves: setmaxnreg, by which warps of a specialised kernel hand registers on.
    tensor_copies: instructions of the tensor memory accelerator. blocks: resident on one multiprocessor.
    """
    architecture = ARCHITECTURES[arch]
    threads = int(re.search(r"\.reqntid\s+(\d+)", compiled.asm["ptx"])[1])
    warps = threads // 32
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = run_tool("cuobjdump", "-res-usage", binary.name)
        # without analysis of the data flow, which is slow
        code = run_tool("nvdisasm", "-c", "-ndf", binary.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    blocks = resident_blocks(architecture, registers, warps, compiled.metadata.shared)
    return {
        "arch": arch, "case": case.name, "kernel": kernel, "grid": grid, "warps": warps,
        "registers": registers, "stack_bytes": stack, "shared_bytes": compiled.metadata.shared,
        "blocks": blocks, "occupancy": blocks * warps / architecture.warps, **count_instructions(code),
    }  # fmt: skip


def count_instructions(code: str) -> dict[str, Any]:
    """What one machine code has of each kind of instruction, as `describe` names them."""
    instructions = re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", code, re.MULTILINE
    )
    names = [name.split(".")[0] for name, _ in instructions]
    others = {name for name in names if "MMA" in name and name not in ("HGMMA", "QGMMA")}
    return {
        "spills": sum(name in ("LDL", "STL") for name in names),
        "products": _by_first_factor(instructions, "HGMMA"),
        "fp8_products": _by_first_factor(instructions, "QGMMA"),
        "other_products": {name: names.count(name) for name in sorted(others)},
        "register_moves": names.count("USETMAXREG"),
        "tensor_copies": sum(name in ("UTMALDG", "UTMASTG", "UTMAREDG") for name in names),
    }


def _by_first_factor(instructions: list[tuple[str, str]], product: str) -> tuple[int, int]:
    """Of the products of this name, how many have their first factor in shared memory, and in registers."""
    factors = [text.split(",")[1].strip() for name, text in instructions if name.split(".")[0] == product]
    in_shared = sum(factor.startswith("gdesc") for factor in factors)
    return in_shared, len(factors) - in_shared


def resident_blocks(architecture: Architecture, registers: int, warps: int, shared_bytes: int) -> int:
    """Blocks of `warps` warps that one multiprocessor holds at once; 0 when one alone does not fit."""
    # registers are given out to a warp in units of 256, shared memory with 1 KB more for each block
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // (warp_registers * warps)
    by_shared = architecture.shared_bytes // (shared_bytes + KILO)
    return min(by_registers, by_shared, architecture.warps // warps, architecture.blocks)


def run_tool(program: str, *arguments: str) -> str:
    """What one of the CUDA tools that come with Triton prints."""
    finished = subprocess.run([BINARIES / program, *arguments], capture_output=True, text=True, check=True)
    return finished.stdout


def render(launches: list[dict[str, Any]], compiler: str) -> str:
    """One line for each launch, under a heading for each architecture."""
    lines = []
    for arch in dict.fromkeys(launch["arch"] for launch in launches):
        lines += [f"{arch}, {compiler}", HEADING]
        lines += [_line(launch) for launch in launches if launch["arch"] == arch]
    return "\n".join(lines)


HEADING = (
    f"{'case: kernel':<74} {'warps':>5} {'regs':>4} {'spills':>6} {'shared KB':>9} {'products':>10} "
    f"{'TMA':>3} {'blocks':>6} {'occupancy':>9}"
)


def _line(launch: dict[str, Any]) -> str:
    products = "+".join(map(str, launch["products"])) if any(launch["products"]) else "-"
    if any(launch["fp8_products"]):
        products = "+".join(map(str, launch["fp8_products"])) + " QGMMA"
    for name, count in launch["other_products"].items():
        products = f"{count} {name}"
    return (
        f"{launch['case'] + ': ' + launch['kernel']:<74} {launch['warps']:>5} {launch['registers']:>4} "
        f"{launch['spills']:>6} {launch['shared_bytes'] / KILO:>9.1f} {products:>10} "
        f"{launch['tensor_copies']:>3} {launch['blocks']:>6} {launch['occupancy']:>9.0%}"
    )


def fill(archs: tuple[ArchitectureName, ...], cache: Path) -> None:
    """Fill a Triton cache with the kernels of MODEL and of the golden files, and say what is in it."""
    from bench.compile_ahead import fill_cache

    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    golden = sorted(GOLDEN.glob("*.safetensors"))
    for arch in archs:
        made, seconds = fill_cache(cache, arch, PRESETS[MODEL], torch.bfloat16, golden)
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        print(
            f"{arch}, Triton {triton.__version__}: {made} kernels of {MODEL} in bfloat16, its decoder "
            f"in float16, and of {len(golden)} golden files compiled in {seconds:.1f} s; {cache} holds "
            f"{size / 1e6:.1f} MB"
        )


def run(options: Options) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set, so nothing is compiled; unset it")
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
    if options.cache is not None:
        fill(options.arch, options.cache)
        return 0
    shapes = Shapes()
    launches, failures = [], []
    for arch in options.arch:
        for case in chosen_cases(options.case):
            if case.minimum_capability <= ARCHITECTURES[arch].capability:
                try:
                    launches += compile_case(case, arch, shapes)
                except (CompilationError, PTXASError, RuntimeError) as error:
                    last_line = str(error).strip().splitlines()[-1]
                    failures.append({"arch": arch, "case": case.name, "error": last_line})
    if options.json:
        print(json.dumps({"triton": triton.__version__, "launches": launches, "failures": failures}))
    else:
        print(render(launches, f"Triton {triton.__version__}"))
        for failure in failures:
            print("{arch}, {case}: not compiled: {error}".format_map(failure))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_script("compile_report", Options, run))
