"""The kernels as the compiler makes them for Hopper, at the engine's real shapes, and a Triton cache filled
without a GPU, with the launches of the published model on a stand-in driver.

The report compiles what filling the cache did not compile yet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILO = 1024
REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65536, 228 * KILO, 64, 32  # of one Hopper multiprocessor
needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None,
    reason="the stand-in driver needs a C compiler",
)

FILL = """
import dataclasses, json, sys, warnings
from pathlib import Path
import torch
from bench.compile_ahead import fill_cache
from rfengine.config import PRESETS
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
config = PRESETS["wan-1.3b"]
config = dataclasses.replace(config, height=96, width=160)  # kernels are those of any size
filled = fill_cache(Path(sys.argv[1]), "sm_90", config, torch.bfloat16, [])
print(json.dumps(dataclasses.asdict(filled)))
"""
REPORT = """
from bench.compile_report import Options, run
sys.exit(run(Options(arch=("sm_90",), json=True)))
"""
LAUNCH = """
import ctypes, json, sys
from pathlib import Path
from bench.absent_gpu import StandInDriver
driver = StandInDriver.load(Path(sys.argv[1]))
grid = (ctypes.c_uint * 7)(1, 70000, 1, 128, 1, 1, 300000)  # CUlaunchConfig: grid, block, shared memory
driver.library.cuLaunchKernelEx(ctypes.byref(grid), ctypes.c_char_p(b"kernel"), None, None)
print(json.dumps(driver.counts()))
"""


def run(code: str, cache: Path) -> str:
    """What a process of its own prints that fills the Triton cache `cache`."""
    pytest.importorskip("triton")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, "-c", code, str(cache)], capture_output=True, text=True, env=inherited | environment
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout + finished.stderr


def result(printed: str, first_key: str) -> dict[str, Any]:
    """A JSON line; warnings of Triton and torch may stand around it."""
    return json.loads(next(line for line in printed.splitlines() if line.startswith(f'{{"{first_key}"')))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What two processes print that fill the same cache, the second of which reports as well."""
    cache = tmp_path_factory.mktemp("triton")
    return [run(FILL, cache), run(FILL + REPORT, cache)]


@pytest.fixture(scope="module")
def launches(processes: list[str]) -> list[dict[str, Any]]:
    return result(processes[1], "triton")["launches"]


@pytest.mark.slow
@needs_compiler
def test_the_engine_launches_by_the_rules_of_the_driver_and_then_compiles_nothing(
    processes: list[str],
) -> None:
    first, second = (result(printed, "kernels") for printed in processes)
    assert first["kernels"] >= 36  # of the published sizes, on their own Triton forms
    assert first["driver"]["broken"] == 0
    assert first["driver"]["launches"] >= 500 and first["driver"]["maps"] >= 200
    assert second["kernels"] == 0
    assert second["driver"] == first["driver"]


@needs_compiler
def test_the_stand_in_driver_counts_a_launch_that_breaks_its_rules(tmp_path: Path) -> None:
    printed = run(LAUNCH, tmp_path)
    assert '"launches": 1' in printed and '"broken": 2' in printed
    assert "stand-in driver: kernel: a grid that is too large" in printed
    assert "stand-in driver: kernel: more shared memory than a block can have" in printed


@pytest.mark.slow
def test_every_file_of_kernels_is_compiled(launches: list[dict[str, Any]]) -> None:
    compiled = {launch["kernel"] for launch in launches}
    written = {
        line.removeprefix("def ").split("(")[0]
        for path in (ROOT / "kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert compiled == written


@pytest.mark.slow
def test_no_forward_kernel_spills(launches: list[dict[str, Any]]) -> None:
    forward = [launch for launch in launches if "backward" not in launch["kernel"]]
    spilled = {
        launch["case"]: launch["spills"] for launch in forward if launch["spills"] or launch["stack_bytes"]
    }
    assert forward and not spilled


@pytest.mark.slow
def test_both_products_of_the_attention_run_on_warp_groups(launches: list[dict[str, Any]]) -> None:
    attention = [launch for launch in launches if launch["kernel"].startswith("_sink_window_attention")]
    assert {launch["case"] for launch in attention} == {
        "sink_window_attention", "sink_window_attention_descriptor", "sink_window_attention_pointer"
    }  # fmt: skip
    for launch in attention:
        assert min(launch["products"]) > 0, launch["case"]
        assert not launch["other_products"], launch["case"]


@pytest.mark.slow
def test_the_attention_of_hopper_copies_tiles_by_descriptor(launches: list[dict[str, Any]]) -> None:
    chosen = [launch for launch in launches if launch["case"] == "sink_window_attention"]
    assert chosen[0]["tensor_copies"] >= 3  # q, keys and values
    assert chosen[0]["warps"] == 12  # a producer and two consumers of four warps: the compiler did specialise


@pytest.mark.slow
def test_the_convolutions_of_hopper_run_on_warp_groups_from_descriptors(
    launches: list[dict[str, Any]],
) -> None:
    kernels = ("_causal_conv3d_kernel", "_conv_frame_pack_kernel")
    convolutions = [launch for launch in launches if launch["kernel"] in kernels]
    assert len(convolutions) >= 12
    for launch in convolutions:
        in_shared, in_registers = launch["products"]
        fp8 = launch["other_products"].get("QGMMA", 0)
        # weights and pixels both straight from shared memory, which is what keeps products in flight
        assert in_shared + fp8 > 0 and in_registers == 0, launch["case"]
        assert launch["tensor_copies"] >= 2 or launch["case"] == "causal_conv3d_pointer", launch["case"]


@pytest.mark.slow
def test_every_kernel_fits_shared_memory(launches: list[dict[str, Any]]) -> None:
    assert max(launch["shared_bytes"] for launch in launches) <= 227 * KILO


@pytest.mark.slow
def test_occupancy_is_the_most_that_fits(launches: list[dict[str, Any]]) -> None:
    def fits(launch: dict[str, Any], blocks: int) -> bool:
        registers = -(-launch["registers"] // 8) * 8 * 32 * launch["warps"]
        shared = launch["shared_bytes"] + KILO
        sums = (blocks * registers, blocks * shared, blocks * launch["warps"], blocks)
        return all(
            used <= most for used, most in zip(sums, (REGISTERS, SHARED_BYTES, WARPS, BLOCKS), strict=True)
        )

    for launch in launches:
        assert fits(launch, launch["blocks"]) and not fits(launch, launch["blocks"] + 1), launch["case"]
        assert launch["occupancy"] == launch["blocks"] * launch["warps"] / WARPS


def test_report_refuses_to_run_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from bench.compile_report import Options
    from bench.compile_report import run as report

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        report(Options())
