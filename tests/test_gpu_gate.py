"""The gate and the benchmarks where there is no GPU, and what they decide: goals, outcomes, wrong kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_shapes import Shapes
from gate_summary import judge, summarise
from gpu_gate import read_outcome, stream_lines
from kernel_cases import CASES, CASES_BY_NAME
from measurement import ABSENT, check, seeded_draw

from rfengine import reference
from rfengine.config import PRESETS

ROOT = Path(__file__).resolve().parents[1]


def row(case: str, contender: str, milliseconds: float, share: float | None = None) -> dict[str, Any]:
    timing = {"median_ms": milliseconds, "p95_ms": milliseconds, "runs": 60}
    shares = {"share_of_copy": share, "share_of_product": 0.5}
    return {"case": case, "contender": contender, "timing": timing, **shares}


def goals_met(*rows: dict[str, Any]) -> dict[str, bool]:
    return {goal["goal"].split(",")[0]: goal["met"] for goal in judge({"kernels": list(rows)})}


@pytest.mark.parametrize(("own", "met"), [(0.9, True), (1.06, False)])
def test_attention_is_held_against_the_faster_of_its_rivals(own: float, met: bool) -> None:
    rivals = (
        row("sink_window_attention", name, ms)
        for name, ms in (("SDPA cuDNN", 1.5), ("FlashAttention-3", 1.0))
    )
    slow = row("sink_window_attention", "SDPA efficient", 0.1)  # no rival of this goal
    assert goals_met(row("sink_window_attention", "rfengine", own), *rivals, slow)["attention"] is met


def test_row_kernel_is_held_against_a_large_copy() -> None:
    assert goals_met(row("rms_norm", "rfengine", 0.01, 0.85))["rms_norm"]
    assert not goals_met(row("rms_norm", "rfengine", 0.01, 0.84))["rms_norm"]


def test_eviction_and_rotation_are_held_against_their_goal_together() -> None:
    rephase, goal = row("rephase_keys", "rfengine", 0.7), "ema_evict and rephase_keys"
    assert goals_met(row("ema_evict", "rfengine", 0.8), rephase)[goal]
    assert not goals_met(row("ema_evict", "rfengine", 0.81), rephase)[goal]
    assert not goals_met(rephase)[goal]
    assert goals_met(rephase, row("evict_and_rephase", "rfengine", 1.4))[goal]


def test_summary_tells_of_a_failed_test_and_of_a_wrong_kernel() -> None:
    parts = {
        "tests": [{"test": "a::b", "outcome": "FAILED"}, {"test": "a::c", "outcome": "PASSED"}],
        "kernels": [{"case": "rms_norm", "wrong": "AssertionError: far off"}],
        "parity": [{"file": "vae", "backend": "triton", "dtype": "float32", "ok": False, "max_rel_err": 0.5}],
    }
    text, well = summarise({"torch": "2", "triton": "3", "parts": parts})
    assert not well
    assert "FAILED a::b" in text and "WRONG rms_norm" in text and "APART vae triton float32: 0.5" in text
    assert "1 passed, 1 failed" in text


@pytest.mark.parametrize(
    ("line", "test", "outcome"),
    [
        (
            "tests/kernels/test_x.py::test_y[1-2] PASSED [ 3%]",
            "tests/kernels/test_x.py::test_y[1-2]",
            "PASSED",
        ),
        ("[gw3] [ 12%] FAILED tests/test_x.py::test_y[a b] ", "tests/test_x.py::test_y[a b]", "FAILED"),
        ("tests/test_x.py::test_y SKIPPED (needs a CUDA device)", "tests/test_x.py::test_y", "SKIPPED"),
    ],
)
def test_outcomes_are_read_with_one_process_and_with_many(line: str, test: str, outcome: str) -> None:
    assert read_outcome(line) == {"test": test, "outcome": outcome}
    assert read_outcome(test) is None


def test_a_part_that_hangs_or_breaks_keeps_what_it_told() -> None:
    told = "import time, sys; print('told', flush=True); "
    hung = list(stream_lines([sys.executable, "-c", told + "time.sleep(60)"], 2.0))
    assert hung == ["told", "failed: stopped after 2 s"]
    broken = list(stream_lines([sys.executable, "-c", told + "sys.exit('out of luck')"], 60.0))
    assert broken == ["told", "failed: exit 1: out of luck"]


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES_BY_NAME["rms_norm"]

    def check_with(kernel: Any) -> None:
        monkeypatch.setattr(type(case), "kernel", lambda _: kernel)
        check(case, Shapes(PRESETS["tiny"]), seeded_draw(1, "cpu"))

    check_with(reference.rms_norm)
    with pytest.raises(AssertionError, match="rms_norm"):
        check_with(lambda x, weight, eps: reference.rms_norm(x, weight, eps) * 1.02)


def test_every_kernel_file_with_a_forward_case_has_a_benchmark() -> None:
    timed = {case.file for case in CASES if case.is_forward}
    assert timed == {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run the gate")
@pytest.mark.parametrize(
    "command",
    [
        ("bench/gpu_gate.py", "--out", "gate.json"),
        ("-m", "pytest", "-p", "no:cacheprovider", "bench/bench_rms_norm.py"),
    ],
    ids=["gate", "benchmark"],
)
def test_without_a_gpu_it_says_so_and_gives_no_figure(command: tuple[str, ...]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    assert ABSENT in finished.stdout
    assert not (ROOT / "gate.json").exists()
