"""How a profile is divided into parts, on traces made by hand and on one of the CPU."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.roofline import Options, roofline
from rfengine.benchmark.parts import (
    COPIES,
    FUSED,
    PARTS,
    UNASSIGNED,
    device_times,
    host_times,
    marked_parts,
    measure_parts,
    part_floors,
    steady_flops,
)
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import RuntimeConfig
from rfengine.costs.rates import GPUS, gpu_of
from rfengine.costs.shapes import Shapes
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.ops import Ops
from rfengine.ops.table import OPS


def event(kind: str, name: str, start: float, length: float, **details: Any) -> dict[str, Any]:
    thread = details.pop("tid", 1)
    return {
        "ph": "X", "cat": kind, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": length,
        "args": details,
    }  # fmt: skip


def launch(start: float, correlation: int, **place: Any) -> dict[str, Any]:
    return event("cuda_runtime", "cudaLaunchKernel", start, 1, correlation=correlation, **place)


def kernel(length: float, correlation: int, kind: str = "kernel") -> dict[str, Any]:
    return event(kind, "some_kernel", 500, length, correlation=correlation, tid=77)


CHUNK = event("user_annotation", "chunk", 0, 100)


def test_host_time_goes_to_the_innermost_part() -> None:
    events = [
        CHUNK,
        event("user_annotation", "part: VAE", 10, 50),
        event("cpu_op", "aten::conv3d", 15, 20),
        event("cpu_op", "aten::linear", 40, 10),  # inside of a part it is that part's
        event("cpu_op", "aten::linear", 70, 10),
        event("cpu_op", "aten::sigmoid", 85, 5),
        event("cpu_op", "aten::linear", 200, 10),  # after the chunk
    ]
    assert host_times(events) == {"VAE": 50, "linears": 10, UNASSIGNED: 40}


def test_a_part_inside_a_part_is_taken_from_it() -> None:
    events = [
        CHUNK,
        event("user_annotation", "part: eviction", 10, 40),
        event("user_annotation", "part: row kernels", 20, 15),
    ]
    assert host_times(events) == {"eviction": 25, "row kernels": 15, UNASSIGNED: 60}


def test_calls_that_only_touch_are_not_nested() -> None:
    events = [CHUNK, event("cpu_op", "aten::mm", 0, 50), event("cpu_op", "aten::gelu", 50, 50)]
    assert host_times(events) == {"linears": 50, "row kernels": 50, UNASSIGNED: 0}


def test_a_kernel_belongs_to_the_part_that_launched_it() -> None:
    events = [
        CHUNK,
        event("user_annotation", "part: row kernels", 10, 20),
        launch(12, 1),  # by Triton: no operation of torch around it
        event("cpu_op", "aten::linear", 40, 10),
        launch(42, 2),
        launch(60, 3),
        launch(70, 4),
        launch(300, 5),  # after the chunk
        kernel(7, 1),
        kernel(30, 2),
        kernel(2, 3),
        kernel(4, 4, "gpu_memcpy"),
        kernel(900, 5),
        event("gpu_user_annotation", "part: row kernels", 500, 7, tid=77),
    ]
    assert device_times(events) == {"row kernels": 7, "linears": 30, UNASSIGNED: 2, COPIES: 4}


def test_kernels_of_a_decoding_thread_count_while_a_chunk_runs() -> None:
    events = [CHUNK, event("user_annotation", "part: VAE", 20, 50, tid=2), launch(25, 1, tid=2), kernel(9, 1)]
    assert device_times(events) == {"VAE": 9}


def test_every_op_has_a_part() -> None:
    assert {op.part for op in OPS.values()} <= set(PARTS)


def test_marks_are_gone_afterwards() -> None:
    ops = Ops(dict.fromkeys(OPS, "reference"))
    begin, decode = StreamingKVCache.begin_chunk, StreamingDecoder.decode_frames
    with marked_parts(ops, StreamingDecoder):
        assert "rms_norm" in vars(ops) and StreamingKVCache.begin_chunk is not begin
    assert "rms_norm" not in vars(ops)
    assert StreamingKVCache.begin_chunk is begin and StreamingDecoder.decode_frames is decode


def test_parts_of_a_real_profile_add_up_to_the_chunk() -> None:
    ops = Ops(dict.fromkeys(OPS, "reference"))
    x, weight = torch.ones(64, 256), torch.ones(256)
    seconds: list[float] = []

    def advance() -> None:
        started = time.perf_counter()
        for _ in range(20):
            ops.rms_norm(x, weight, 1e-6)
            x @ x.T
        seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    times = measure_parts(advance, ops, StreamingDecoder, 3, torch.device("cpu"))
    around = time.perf_counter() - started
    assert times["row kernels"] > 0 and times["linears"] > 0 and times["VAE"] == 0
    assert 0.99 * sum(seconds) <= sum(times.values()) * 3 / 1e3 <= around


def test_floors_are_those_of_the_roofline() -> None:
    floors = part_floors(Shapes(), GPUS["h100"], torch.bfloat16, decodes=True)
    assert floors.pop(COPIES) is None and floors.pop(UNASSIGNED) is None
    found = roofline(Options())
    totals = found["totals"]
    fused = [row["floor_ms"] for row in found["parts"] if row["part"] in FUSED]
    assert len(fused) == len(FUSED)
    assert sum(floors.values()) + sum(fused) == pytest.approx(totals["with_vae"]["floor_ms"])
    without = part_floors(Shapes(), GPUS["h100"], torch.bfloat16, decodes=False)
    assert without["VAE"] == 0
    assert steady_flops(Shapes(), decodes=True) == totals["with_vae"]["flops"]


@pytest.mark.parametrize("precision", ["fp8", "fp8-attention"])
def test_floors_follow_the_precision_where_the_device_multiplies_in_it(precision: str) -> None:
    plain = Shapes()
    runtime = RuntimeConfig(precision=precision, vae_precision="fp8")
    shapes = Shapes(replace(plain.config, runtime=runtime))
    floors = part_floors(shapes, GPUS["h100"], torch.bfloat16, decodes=True)
    found = roofline(Options(precision=precision, vae_precision="fp8"))
    fused = sum(row["floor_ms"] for row in found["parts"] if row["part"] in FUSED)
    expected = found["totals"]["with_vae"]["floor_ms"]
    assert sum(filter(None, floors.values())) + fused == pytest.approx(expected)
    without_fp8 = replace(GPUS["h100"], fp8_tflop_per_s=None)
    emulated = part_floors(shapes, without_fp8, torch.bfloat16, decodes=True)
    assert emulated == part_floors(plain, GPUS["h100"], torch.bfloat16, decodes=True)


def test_float32_moves_twice_the_bytes() -> None:
    halves, singles = (
        part_floors(Shapes(), GPUS["h100"], dtype, decodes=True) for dtype in (torch.bfloat16, torch.float32)
    )
    assert singles["eviction"] == pytest.approx(2 * halves["eviction"])


def test_a_gpu_without_a_data_sheet_has_no_floors() -> None:
    assert gpu_of("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_of("NVIDIA H100 PCIe") is None
    assert set(part_floors(Shapes(), None, torch.bfloat16, decodes=True).values()) == {None}
