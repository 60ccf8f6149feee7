"""A Triton cache filled without a GPU, and the launches of the published model on a stand-in driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_COMPILER = shutil.which("cc") is None and shutil.which("gcc") is None

FILL = """
import dataclasses, json, sys, warnings
from pathlib import Path
import torch
from compile_ahead import fill_cache
from rfengine.config import PRESETS
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
config = PRESETS["wan-1.3b"]
config = dataclasses.replace(config, height=96, width=160)  # kernels are those of any size
filled = fill_cache(Path(sys.argv[1]), "sm_90", config, torch.bfloat16, [])
print(json.dumps(dataclasses.asdict(filled)))
"""

LAUNCH = """
import ctypes, json, sys
from pathlib import Path
from absent_gpu import StandInDriver
driver = StandInDriver.load(Path(sys.argv[1]))
grid = (ctypes.c_uint * 7)(1, 70000, 1, 128, 1, 1, 300000)  # CUlaunchConfig: grid, block, shared memory
driver.library.cuLaunchKernelEx(ctypes.byref(grid), ctypes.c_char_p(b"kernel"), None, None)
print(json.dumps(driver.counts()))
"""


def run(code: str, cache: Path) -> str:
    pytest.importorskip("triton")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    environment = inherited | {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": paths,
        "CUDA_VISIBLE_DEVICES": "",
    }
    finished = subprocess.run(
        [sys.executable, "-c", code, str(cache)], capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout + finished.stderr


def filled(cache: Path) -> dict[str, object]:
    """What fill_cache tells; warnings of Triton and torch may stand around it."""
    return json.loads(next(line for line in run(FILL, cache).splitlines() if line.startswith('{"kernels"')))


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="the stand-in driver needs a C compiler")
def test_the_engine_launches_by_the_rules_of_the_driver_and_then_compiles_nothing(tmp_path: Path) -> None:
    first = filled(tmp_path)
    assert first["kernels"] >= 36  # of the published sizes, on their own Triton forms
    assert first["driver"]["broken"] == 0
    assert first["driver"]["launches"] >= 500 and first["driver"]["maps"] >= 200
    second = filled(tmp_path)
    assert second["kernels"] == 0
    assert second["driver"] == first["driver"]


@pytest.mark.skipif(NO_COMPILER, reason="the stand-in driver needs a C compiler")
def test_the_stand_in_driver_counts_a_launch_that_breaks_its_rules(tmp_path: Path) -> None:
    told = run(LAUNCH, tmp_path)
    assert '"launches": 1' in told and '"broken": 2' in told
    assert "stand-in driver: kernel: a grid that is too large" in told
    assert "stand-in driver: kernel: more shared memory than a block can have" in told
