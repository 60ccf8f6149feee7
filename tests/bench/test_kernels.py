"""bench/kernels.py without a GPU: what it checks, how often it times, and what it leaves in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import kernels
from bench.kernel_cases import CASES_BY_NAME, KernelCase
from bench.kernels import ABSENT, CHECKED_SIDE, Options, fault_of, run, seeded_draw
from rfengine.costs.chunk import ChunkWork
from rfengine.costs.shapes import Shapes
from rfengine.ops import native, reference
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
def test_a_kernel_that_raises_is_a_fault_and_the_next_case_is_checked(
    computes: Callable[[Any], None], tmp_path: Path
) -> None:
    def refuse(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(rest) == 2:  # rms_norm
            raise AssertionError("strides must be 16-byte aligned")
        return reference.affine_layer_norm(x, *rest)

    computes(refuse)
    path = tmp_path / "figures.json"
    assert run(Options(case=("rms_norm", "affine_layer_norm"), check=True, json=path)) == 1
    found = {each["case"]: each["wrong"] for each in json.loads(path.read_text())["cases"]}
    assert found == {
        "rms_norm": "rms_norm: AssertionError: strides must be 16-byte aligned", "affine_layer_norm": ""
    }  # fmt: skip


def test_an_error_that_breaks_the_device_ends_the_run(computes: Callable[[Any], None]) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    computes(fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fault_of(CASES_BY_NAME["rms_norm"], Shapes(PRESETS["tiny"]), seeded_draw(1, "cpu"))


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


CONVOLUTIONS = [name for name in CASES_BY_NAME if "conv" in name and "pointer" not in name]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_checked_on_its_last_frame(computes: Callable[[Any], None], name: str) -> None:
    """The reference of that frame is the frame of the whole result; and a wrong last frame is a fault."""
    case, shapes = (
        CASES_BY_NAME[name],
        Shapes(replace(PRESETS["tiny"], height=CHECKED_SIDE, width=CHECKED_SIDE)),
    )

    def wrong(*arguments: Any) -> torch.Tensor:
        result = case.meaning()(*arguments).clone()
        result[-1] = result[-1] // 2 if result.dtype == torch.uint8 else result[-1] * 1.05
        return result

    for stand_in, is_right in ((case.meaning(), True), (wrong, False)):
        computes(stand_in)
        assert (fault_of(case, shapes, seeded_draw(1, "cpu", torch.float32)) == "") is is_right


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


def test_a_native_kernel_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, draw = Shapes(PRESETS["tiny"]), seeded_draw(1, "cpu", torch.float32)
    rivals = {"native": wrong_rms_norm, "other": wrong_rms_norm}
    case = replace(CASES_BY_NAME["rms_norm"], rivals=rivals, reference=reference.rms_norm)
    monkeypatch.setattr(KernelCase, "kernel", lambda _: reference.rms_norm)
    monkeypatch.setattr(kernels, "seeded_draw", lambda seed: draw)
    monkeypatch.setattr(kernels, "input_sets", lambda make, _: [make()])
    monkeypatch.setattr(kernels, "time_calls", lambda run, sets: kernels.Timing(1.0, 1.0, 3))
    rates = {"copy_tb_per_s": 1.0, "chunk_copy_tb_per_s": 1.0}
    rows = {row.candidate: row for row in kernels.measure_case(case, shapes, rates)}
    assert rows.keys() == {"rfengine", "native", "other", "eager"}
    assert rows["native"].timing is None and "wrong: rms_norm: result 0 is " in rows["native"].error
    assert all(row.timing for name, row in rows.items() if name != "native")


def test_the_convolutions_are_timed_beside_the_native_one_and_cudnn() -> None:
    for level in range(4):
        case = CASES_BY_NAME[f"causal_conv3d_level_{level}"]
        assert list(dict(kernels.candidates(case, compiles=False))) == [
            "rfengine",
            "native",
            "cuDNN",
            "eager",
        ]
        x, weight, _ = case.inputs(Shapes(), kernels.Draw("meta", torch.float16))
        assert native.convolution.unserved(tuple(weight.shape), x.dtype, x.device) == ""
