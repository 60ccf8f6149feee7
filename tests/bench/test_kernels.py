"""bench/kernels.py without a GPU: what it checks, how often it times, and what it leaves in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import kernels
from bench.kernel_cases import CASES_BY_NAME, KernelCase
from bench.kernels import ABSENT, Options, fault_of, run, seeded_draw
from rfengine.costs.chunk import ChunkWork
from rfengine.costs.shapes import Shapes
from rfengine.ops import reference
from rfengine.presets import PRESETS
from support.interpreter_rounding import round_to_nearest_even


@pytest.fixture
def computes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes a function stand in the place of every kernel."""
    return lambda function: monkeypatch.setattr(KernelCase, "kernel", lambda _: function)


def wrong_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return reference.rms_norm(x, weight, eps) * 1.02


def test_a_wrong_kernel_has_a_fault(computes: Callable[[Any], None]) -> None:
    case, shapes = CASES_BY_NAME["rms_norm"], Shapes(PRESETS["tiny"])
    computes(reference.rms_norm)
    assert fault_of(case, shapes, seeded_draw(1, "cpu")) == ""
    computes(wrong_rms_norm)
    assert "rms_norm: result 0 is " in fault_of(case, shapes, seeded_draw(1, "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would check the kernel on the GPU")
def test_a_wrong_case_is_written_and_makes_the_exit_status_1(
    computes: Callable[[Any], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    computes(wrong_rms_norm)
    path = tmp_path / "figures.json"
    assert run(Options(case=("rms_norm",), check=True, json=path)) == 1
    figures = json.loads(path.read_text())
    assert [row["case"] for row in figures["cases"]] == ["rms_norm"]
    assert "from float64, the limit is" in figures["cases"][0]["wrong"] and figures["cases"][0]["rows"] == []
    assert "wrong: rms_norm: result 0" in capsys.readouterr().out
    computes(reference.rms_norm)
    assert run(Options(case=("rms_norm",), check=True)) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would time the kernel")
def test_without_a_gpu_it_says_so_and_gives_no_figure() -> None:
    with pytest.raises(RuntimeError, match=ABSENT):
        run(Options())


def test_a_case_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="--case is 'rms'; use one of sink_window_attention, "):
        run(Options(case=("rms",), check=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for a CPU")
def test_the_interpreter_checks_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert run(Options(case=("rms_norm",), check=True)) == 0
    assert capsys.readouterr().out.split() == ["rms_norm", "right"]


FP8_CASES = [
    "linear_fp8_qkv", "linear_fp8_out", "linear_fp8_ffn", "linear_fp8_heads", "linear_gelu_fp8",
    "linear_gelu_rows_fp8", "linear_heads_fp8", "gelu_rows_fp8",
]  # fmt: skip


@pytest.mark.parametrize("name", FP8_CASES)
def test_an_fp8_case_accepts_the_kernel_and_refuses_another_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    round_to_nearest_even(monkeypatch)
    small = dataclasses.replace(PRESETS["tiny"], height=32, width=32)
    shapes, draw = Shapes(small), lambda: seeded_draw(1, "cpu", torch.float32)
    case = CASES_BY_NAME[name]
    assert fault_of(case, shapes, draw()) == ""
    kernel = case.kernel()

    def one_row_off(*arguments: Any) -> Any:
        returned = kernel(*arguments)
        rows = returned[-1] if isinstance(returned, tuple) else returned
        rows[..., -1:, :] *= 1.5  # of e4m3 rows, their scale
        return returned

    monkeypatch.setattr(KernelCase, "kernel", lambda _: one_row_off)
    assert f"{name}: result 0 is " in fault_of(case, shapes, draw())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("linear_fp8_qkv", "self-attention q, k, v"),
        ("linear_fp8_out", "cross-attention q"),
        ("linear_heads_fp8", "cross-attention out"),
        ("linear_gelu_rows_fp8", "feed-forward in"),
        ("linear_fp8_ffn", "feed-forward out"),
    ],
)
def test_floors_of_fp8_products_are_those_of_the_roofline(name: str, part: str) -> None:
    """150 calls in a chunk: 30 layers in 5 passes."""
    shapes, case = Shapes(), CASES_BY_NAME[name]
    (row,) = (each for each in ChunkWork.steady(shapes, "fp8").parts() if each.name == part)
    assert (150 * case.floor_bytes(shapes), 150 * case.floor_flops(shapes)) == (row.bytes, row.flops)
    assert row.is_fp8


def test_the_floor_of_a_product_behind_fp8_attention_is_that_of_the_roofline() -> None:
    shapes, case = Shapes(), CASES_BY_NAME["linear_fp8_heads"]
    parts = ChunkWork.steady(shapes, "fp8-attention").parts()
    _, in_fp8 = (each for each in parts if each.name == "self-attention out")
    assert (90 * case.floor_bytes(shapes), 90 * case.floor_flops(shapes)) == (in_fp8.bytes, in_fp8.flops)


@pytest.mark.parametrize(("ms", "runs"), [(0.05, 60), (10.0, 30), (100.0, 3), (500.0, 3)])
def test_what_is_slow_is_timed_in_fewer_runs_and_says_how_many(
    monkeypatch: pytest.MonkeyPatch, ms: float, runs: int
) -> None:
    replays = []
    graph = SimpleNamespace(replay=lambda: replays.append(ms))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return ms

    monkeypatch.setattr(kernels, "capture_calls", lambda run, sets: graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timing = kernels.time_calls(None, [(), ()])
    assert timing == kernels.Timing(ms / 2, ms / 2, runs)
    assert len(replays) == runs + 2 + (runs > 3)
