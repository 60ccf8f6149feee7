"""The kernels as the compiler makes them for Hopper, at the engine's real shapes, and a Triton cache filled
without a GPU. One process does both: filling the cache, for a small model, compiles what the report did not
compile yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILO = 1024
REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65536, 228 * KILO, 64, 32  # of one Hopper multiprocessor

FP8_ATTENTION = tuple(f"sink_window_attention_fp8{form}" for form in ("", "_rows", "_descriptor", "_pointer"))
FP8_PRODUCTS = (
    "linear_fp8_qkv", "linear_fp8_out", "linear_fp8_ffn", "linear_fp8_heads", "linear_heads_fp8",
    "linear_gelu_fp8", "linear_gelu_rows_fp8", "linear_fp8_qkv_one_frame", "linear_gelu_rows_fp8_one_frame",
)  # fmt: skip
CASES = (  # every kernel, and of the linears and convolutions a form of each kind
    "sink_window_attention", "sink_window_attention_pointer", "attention_backward_query",
    "attention_backward_keys", "gated_residual_adaptive_norm", "gated_layer_norm_backward", "rms_norm",
    "rms_norm_backward", "qk_norm_rope_write_raw", "qk_norm_rope_backward", "ema_evict", "rephase_keys",
    "evict_and_rephase", "flow_step", "frame_pack", "linear_gelu", "linear_gelu_int8", "gated_linear_ffn",
    "channel_norm_silu_fp8", "causal_conv3d_level_1", "causal_conv3d_level_3", "causal_conv3d_fp8_level_3",
    "phase_conv_to_level_2", "frame_attention", "conv_frame_pack", "linear_out_one_frame",
    "gated_linear_ffn_one_frame", "sink_window_attention_pointer_one_frame", "adaptive_layer_norm",
    *FP8_ATTENTION, "window_fp8", "qk_norm_rope_write_fp8", "qk_norm_rope_write_fp8_raw",
    *FP8_PRODUCTS, "gelu_rows_fp8",
    *(f"{op}_by_frame" for op in ("flow_step", "adaptive_layer_norm", "gated_residual_adaptive_norm")),
)  # fmt: skip
REPORT_AND_FILL = """
import json, sys, warnings
from dataclasses import replace
from pathlib import Path
import torch
from bench import compile_ahead
from bench.compile_report import Options, run
from rfengine.config import (ScheduleConfig, VAEConfig)
from rfengine.presets import PRESETS
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
cache, *cases = sys.argv[1:]
assert run(Options(arch=("sm_90",), case=tuple(cases), json=True)) == 0
vae = VAEConfig(base_dim=16, dim_mult=(1,), num_res_blocks=1, temporal_downsample=())
wan = PRESETS["wan-1.3b"]
model = replace(wan.model, dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, text_len=64)
config = replace(
    wan, height=32, width=48, vae=vae, model=model, text=replace(wan.text, dim=64),
    cache=replace(wan.cache, window_frames=9), schedule=ScheduleConfig(denoising_steps=(1000, 500)),
)
every = compile_ahead.engine_ops
compile_ahead.engine_ops = lambda architecture: list(every(architecture))[:1]
made, _ = compile_ahead.fill_cache(Path(cache), "sm_90", config, torch.bfloat16, [])
print(json.dumps({"made": made, "kernels": sorted({path.stem for path in Path(cache).rglob("*.cubin")})}))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a process prints that reports, then fills its Triton cache."""
    pytest.importorskip("triton")
    cache = tmp_path_factory.mktemp("triton")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, "-c", REPORT_AND_FILL, str(cache), *CASES], capture_output=True, text=True,
        env=inherited | environment,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def result(printed: str, first_key: str) -> dict[str, Any]:
    """A JSON line; warnings of Triton and torch may stand around it."""
    return json.loads(next(line for line in printed.splitlines() if line.startswith(f'{{"{first_key}"')))


@pytest.fixture(scope="module")
def launches(printed: str) -> list[dict[str, Any]]:
    return result(printed, "triton")["launches"]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["flow_step", "adaptive_layer_norm", "gated_residual_adaptive_norm"])
def test_a_level_for_every_frame_is_the_same_kernel(launches: list[dict[str, Any]], op: str) -> None:
    shared, by_frame = (
        [{**launch, "case": op} for launch in launches if launch["case"] == case]
        for case in (op, f"{op}_by_frame")
    )
    assert len(shared) == 1 and shared == by_frame


@pytest.mark.slow
def test_what_the_engine_launches_is_compiled_into_the_cache(printed: str) -> None:
    filled = result(printed, "made")
    assert filled["made"] >= 10  # sizes and forms that the report does not have
    kernels = {
        "_layer_norm_kernel", "_linear_kernel", "_linear_fp8_kernel", "_gelu_rows_kernel",
        "_causal_conv3d_kernel",
    }  # fmt: skip
    assert kernels <= set(filled["kernels"])


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
    names = ("_sink_window_attention", "_attention_fp8")
    attention = [launch for launch in launches if launch["kernel"].startswith(names)]
    plain = {*CASES[:2], "sink_window_attention_pointer_one_frame"}
    assert {launch["case"] for launch in attention} == {*plain, *FP8_ATTENTION}
    for launch in attention:
        wanted, others = (
            ("products", "fp8_products") if launch["case"] in plain else ("fp8_products", "products")
        )
        assert min(launch[wanted]) > 0, launch["case"]
        assert not any(launch[others]) and not launch["other_products"], launch["case"]


@pytest.mark.slow
def test_the_attention_of_hopper_copies_tiles_by_descriptor(launches: list[dict[str, Any]]) -> None:
    for case in ("sink_window_attention", *FP8_ATTENTION[:2]):
        chosen = next(launch for launch in launches if launch["case"] == case)
        assert chosen["tensor_copies"] >= 3  # q, keys and values
        # a producer and two consumers of four warps, which hand registers on: the compiler did specialise
        assert chosen["warps"] == 12 and chosen["register_moves"] >= 3, case


@pytest.mark.slow
def test_the_convolutions_of_hopper_run_on_warp_groups_from_descriptors(
    launches: list[dict[str, Any]],
) -> None:
    kernels = ("_causal_conv3d_kernel", "_conv_frame_pack_kernel")
    convolutions = [launch for launch in launches if launch["kernel"] in kernels]
    assert len(convolutions) == 5
    for launch in convolutions:
        in_shared, in_registers = (
            sum(each) for each in zip(launch["products"], launch["fp8_products"], strict=True)
        )
        # weights and pixels both straight from shared memory, which is what keeps products in flight
        assert in_shared > 0 and in_registers == 0, launch["case"]
        assert launch["tensor_copies"] >= 2, launch["case"]


@pytest.mark.slow
def test_the_fp8_products_of_hopper_run_on_warp_groups_from_descriptors(
    launches: list[dict[str, Any]],
) -> None:
    products = [launch for launch in launches if launch["case"] in FP8_PRODUCTS]
    assert {launch["kernel"] for launch in products} == {"_linear_fp8_kernel"}
    assert len(products) == len(FP8_PRODUCTS)
    for launch in products:
        in_shared, in_registers = launch["fp8_products"]
        # rows that are rounded as they are read pass through registers
        assert (in_shared == 0) == (launch["case"] == "linear_heads_fp8"), launch["case"]
        assert (in_registers > 0) == (in_shared == 0) and not any(launch["products"]), launch["case"]
        assert not launch["other_products"], launch["case"]
        assert launch["tensor_copies"] >= 2, launch["case"]


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
