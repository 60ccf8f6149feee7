"""The kernels as the compiler makes them for Hopper, at the engine's real shapes; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "bench" / "compile_report.py"
KILO = 1024
REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65536, 228 * KILO, 64, 32  # of one Hopper multiprocessor


def run_report(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, REPORT, *arguments], capture_output=True, text=True, env=inherited | environment
    )


@pytest.fixture(scope="module")
def launches() -> list[dict[str, Any]]:
    finished = run_report("--arch", "sm_90", "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)["launches"]


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


def test_report_refuses_to_run_under_the_interpreter() -> None:
    finished = run_report(TRITON_INTERPRET="1")
    assert finished.returncode == 1
    assert "TRITON_INTERPRET" in finished.stderr
