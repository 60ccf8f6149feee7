"""The cases of products in FP8: which there are, who is offered, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.grid import LatentGrid
from rfengine.ops import Ops, default_choice, library_fp8, reference_fp8
from rfengine.presets import PRESETS
from rfengine.runtime_config import Precision
from rfengine.tuning import candidates as tuning_candidates
from rfengine.tuning.autotune import tune
from rfengine.tuning.candidates import TuningCase, TuningShapes, transformer_cases
from rfengine.tuning.trials import LostDeviceError
from support.interpreter_rounding import round_to_nearest_even
from support.models import GRID, small_config

CPU = torch.device("cpu")
WAN = PRESETS["wan-1.3b"]


def in_precision(config: EngineConfig, precision: Precision) -> EngineConfig:
    return dataclasses.replace(config, runtime=RuntimeConfig(precision=precision))


def cases_of(
    config: EngineConfig, dtype: torch.dtype = torch.bfloat16, grid: LatentGrid | None = None
) -> dict[str, TuningCase]:
    """Those of products in FP8, by name."""
    cases = transformer_cases(TuningShapes(config, grid or LatentGrid.of(config), dtype, CPU))
    return {each.key.name: each for each in cases if "_fp8@" in each.key.name}


def small_cases(dtype: torch.dtype) -> dict[str, TuningCase]:
    return cases_of(in_precision(small_config(), "fp8-attention"), dtype, GRID)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends seem to run here, each as the reference under its own name."""

    def able(op: str, *_: object) -> dict[str, Callable[..., object]]:
        def named(name: str) -> Callable[..., object]:
            def run(*arguments: Tensor) -> object:
                return getattr(reference_fp8, op)(*arguments)

            run.__name__ = name
            return run

        backends = ("cublaslt", "triton") if "_fp8" in op else ("reference",)
        return {name: named(name) for name in backends}

    monkeypatch.setattr(tuning_candidates, "runnable", able)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("precision", ["default", "bf16"])
def test_in_16_bits_nothing_is_in_fp8(precision: Precision) -> None:
    cases = list(transformer_cases(TuningShapes(in_precision(WAN, precision), GRID, torch.bfloat16, CPU)))
    plain = list(transformer_cases(TuningShapes(WAN, GRID, torch.bfloat16, CPU)))
    assert [each.key for each in cases[:-1]] == [each.key for each in plain[:-1]]
    assert cases[-1]({}).key == plain[-1]({}).key and cases[-1]({}).key.name == "folds_gate"


def test_in_fp8_every_product_of_the_blocks_is_a_case_and_the_gate_is_none() -> None:
    shapes = TuningShapes(in_precision(WAN, "fp8"), LatentGrid.of(WAN), torch.bfloat16, CPU)
    cases = list(transformer_cases(shapes))
    assert [each.key.name for each in cases] == [
        "sink_window_attention", "clip_attention", "linear_fp8@4608x1536x1", "linear_fp8@1536x1536x1",
        "linear_gelu_rows_fp8@8960x1536x1", "linear_fp8@1536x8960x1", "evict_and_rephase",
    ]  # fmt: skip
    assert cases[2].key.shape == (4680, 4608, 1536, 1)
    # operands of one byte, a result of two, of one where GELU is rounded
    assert cases[2].set_bytes == (4680 + 4608) * 1536 + 2 * 4680 * 4608
    assert cases[4].set_bytes == (4680 + 8960) * 1536 + 4680 * 8960


def test_cublaslt_is_offered_where_it_multiplies(on_cuda: None) -> None:
    both, one = ("cublaslt", "triton"), ("triton",)
    attends = in_precision(WAN, "fp8-attention")
    assert {name: each.key.candidates for name, each in cases_of(attends).items()} == {
        "linear_fp8@4608x1536x1": both, "linear_fp8@1536x1536x1": both,
        "linear_gelu_rows_fp8@8960x1536x1": both, "linear_fp8@1536x8960x1": both,
        "linear_fp8@1536x1536x12": one,
    }  # fmt: skip
    for dtype in (torch.float16, torch.float32):  # its results are in bfloat16
        assert {each.key.candidates for each in cases_of(attends, dtype).values()} == {one}
    odd = dataclasses.replace(WAN, model=dataclasses.replace(WAN.model, ffn_dim=8968))
    found = {name: each.key.candidates for name, each in cases_of(in_precision(odd, "fp8")).items()}
    assert found["linear_gelu_rows_fp8@8968x1536x1"] == found["linear_fp8@1536x8968x1"] == one
    assert found["linear_fp8@1536x1536x1"] == both


def test_the_library_multiplies_where_it_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of the candidates is that of the backend itself."""
    calls = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda x, *_, **__: calls.append(x.shape) or x.float())
    for name, case in cases_of(in_precision(small_config(), "fp8"), grid=GRID).items():
        if name.startswith("linear_fp8@"):
            library_fp8.linear_fp8(*case.make_inputs(seeded()))
    assert calls == [(18, 48), (18, 48), (18, 64)]


def test_without_triton_what_cublaslt_cannot_make_is_left_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning_candidates, "runnable", lambda *_: {"cublaslt": reference_fp8.linear_fp8})
    cases = cases_of(in_precision(WAN, "fp8-attention"))
    assert cases["linear_fp8@1536x1536x12"].key.candidates == ("reference",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_case_accepts_the_reference_and_refuses_a_changed_result(dtype: torch.dtype) -> None:
    cases = small_cases(dtype)
    assert len(cases) == 5
    for case in cases.values():
        arguments = case.make_inputs(seeded())
        assert case.problem(case.meaning, arguments) == "", case.key

        def last_row_off(*arguments: Tensor, case: TuningCase = case) -> object:
            returned = case.meaning(*arguments)
            rows = returned[1] if isinstance(returned, tuple) else returned
            rows[:, -1:].mul_(1.5)
            return returned

        assert "from float64" in case.problem(last_row_off, arguments), case.key


def test_of_many_rows_a_part_is_compared_with_its_own_scales() -> None:
    cases = cases_of(in_precision(small_config(), "fp8-attention"), torch.float32, LatentGrid(160, 160))
    for case in cases.values():
        arguments = case.make_inputs(seeded())
        values, scale = case.part(arguments)[:2]
        assert arguments[0].shape[1] == 300 and values.shape[1] == scale.shape[1] == 150
        assert torch.equal(values[:, -1].float(), arguments[0][:, -1].float())
        assert torch.equal(scale[:, -1], arguments[1][:, -1])
        assert case.problem(case.meaning, arguments) == "", case.key


def test_a_gelu_that_is_rounded_twice_is_right_and_one_without_bias_is_not() -> None:
    """cuBLASLt's product is rounded to 16 bits before a kernel of ours makes the GELU."""
    case = small_cases(torch.bfloat16)["linear_gelu_rows_fp8@64x48x1"]

    def twice(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        *operands, reach = arguments
        gelu = F.gelu(reference_fp8.linear_fp8(*operands).float(), approximate="tanh")
        scale = operands[1] * reach[0] + reach[1]
        return (gelu / scale).to(torch.float8_e4m3fn), scale

    def without_bias(*arguments: Tensor) -> object:
        return case.meaning(*arguments[:4], torch.zeros_like(arguments[4]), arguments[5])

    arguments = case.make_inputs(seeded())
    assert case.problem(twice, arguments) == ""
    assert "from float64" in case.problem(without_bias, arguments)


def test_triton_in_the_interpreter_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    round_to_nearest_even(monkeypatch)
    for case in small_cases(torch.float32).values():
        assert "cublaslt" not in case.candidates
        assert case.problem(case.candidates["triton"], case.make_inputs(seeded())) == "", case.key


def timer_of(**milliseconds: float) -> Callable[..., Callable[[], float]]:
    return lambda run, sets: lambda: milliseconds[run.__name__]


def test_the_faster_one_runs_the_shapes_it_won(on_cuda: None, tmp_path: Path) -> None:
    cases = cases_of(in_precision(small_config(), "fp8-attention"), torch.bfloat16, GRID).values()
    path = tmp_path / "autotune.json"
    choice = tune(cases, CPU, cache_path=path, timer=timer_of(cublaslt=2.0, triton=1.0))
    assert choice.overrides == dict.fromkeys((each.key.name for each in cases), "triton")
    assert not choice.folds_gate
    lost = tune(cases, CPU, cache_path=tmp_path / "other.json", timer=timer_of(cublaslt=1.0, triton=2.0))
    assert lost.overrides == choice.overrides | {
        name: "cublaslt" for name in choice.overrides if name.endswith("x1")
    }
    ops = Ops(default_choice(CPU) | lost.overrides)
    single, parted = (case.make_inputs(seeded()) for case in list(cases)[1::3])
    assert ops.backend_of("linear_fp8", *single) == "cublaslt"
    assert ops.backend_of("linear_fp8", *parted) == "triton"


def test_a_product_that_breaks_the_device_is_left_out_by_the_next_start(
    on_cuda: None, tmp_path: Path
) -> None:
    case = cases_of(in_precision(small_config(), "fp8"), torch.bfloat16, GRID)["linear_fp8@144x48x1"]

    def cublaslt(*_: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = dataclasses.replace(case, candidates=case.candidates | {"cublaslt": cublaslt})
    path, timer = tmp_path / "autotune.json", timer_of(cublaslt=1.0, triton=2.0)
    with pytest.raises(LostDeviceError, match="cublaslt has broken the device in linear_fp8@144x48x1"):
        tune([broken], CPU, cache_path=path, timer=timer)
    choice = tune([case], CPU, cache_path=path, timer=timer)
    assert choice.overrides == {"linear_fp8@144x48x1": "triton"}
    assert "it broke the device" in choice.decisions[0].refused["cublaslt"]
