"""Which part of the engine the time of a chunk goes to: torch.profiler over some chunks, without graphs.

Every op of the model, the eviction and the decoder run inside a range with the name of their part. A kernel
belongs to the part whose range was open when the host launched it; outside of all ranges to the part that
torch's own operation names; what is left over is unassigned. On a CPU it is the operations themselves.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rfengine.benchmark.timing import synchronize
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.costs.chunk import ChunkWork, Part
from rfengine.costs.rates import GPU, floor_ms
from rfengine.costs.shapes import Shapes
from rfengine.ops import Ops
from rfengine.ops.table import OPS

LINEARS, SELF_ATTENTION, CROSS_ATTENTION = "linears", "self-attention", "cross-attention"
ROW_KERNELS, EVICTION, VAE, COPIES = "row kernels", "eviction", "VAE", "copies"
PARTS = (LINEARS, SELF_ATTENTION, CROSS_ATTENTION, ROW_KERNELS, EVICTION, VAE, COPIES)
UNASSIGNED = "unassigned"
# of torch's operations that no range holds
_ATEN_PARTS = {
    **dict.fromkeys(("aten::linear", "aten::addmm", "aten::mm", "aten::bmm"), LINEARS),
    "aten::gelu": ROW_KERNELS,
    **dict.fromkeys(("aten::to", "aten::copy_", "aten::contiguous", "aten::clone"), COPIES),
    **dict.fromkeys(("aten::cat", "aten::stack"), COPIES),
}
FUSED = ("VAE history and upsampling",)  # passes of their own in costs/chunk.py
_CHUNK = "chunk"
_MARKED = {f"part: {part}": part for part in PARTS}  # names of the ranges
_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_MOVES = {"gpu_memcpy", "gpu_memset"}
Event = dict[str, Any]


def measure_parts(
    advance: Callable[[], object], ops: Ops, decoder: type, chunks: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds of one chunk by part, with what is unassigned; the mean over `chunks` of them.

    advance makes one chunk, without graphs; decoder is the class of what it decodes with.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with marked_parts(ops, decoder), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(chunks):
            with record_function(_CHUNK):
                advance()
                synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    times = device_times(events) if device.type == "cuda" else host_times(events)
    return {part: times[part] / chunks / 1e3 for part in (*PARTS, UNASSIGNED)}


@contextmanager
def marked_parts(ops: Ops, decoder: type) -> Iterator[None]:
    """Inside, every op of `ops`, the start of a chunk and a decoder open a range with their part's name."""
    targets = [(ops, name, op.part) for name, op in OPS.items()]
    targets += [(decoder, name, VAE) for name in ("decode", "decode_frames", "run") if hasattr(decoder, name)]
    targets.append((StreamingKVCache, "begin_chunk", EVICTION))

    def in_range(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(call)
        def marked(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part: {part}"):
                return call(*args, **kwargs)

        return marked

    with ExitStack() as stack:
        for owner, name, part in targets:
            stack.enter_context(patch.object(owner, name, in_range(getattr(owner, name), part)))
        yield


def host_times(events: Iterable[Event]) -> Counter[str]:
    """Microseconds by part that the host itself spent inside of chunks, from a Chrome trace."""
    times: Counter[str] = Counter()
    for call in _host_calls(events):
        if call.in_chunk:
            times[call.part or UNASSIGNED] += call.own_us
    return times


def device_times(events: Iterable[Event]) -> Counter[str]:
    """Microseconds by part of what ran on the device, from a Chrome trace: kernels, copies and fills."""
    events = list(events)
    launched = {
        call.correlation: call.part for call in _host_calls(events) if call.correlation and call.in_chunk
    }
    times: Counter[str] = Counter()
    for event in events:
        kind, correlation = event.get("cat"), event.get("args", {}).get("correlation")
        if kind in _ON_DEVICE and correlation in launched:
            part = launched[correlation] or (COPIES if kind in _MOVES else UNASSIGNED)
            times[part] += event["dur"]
    return times


@dataclass
class _HostCall:
    """One range, operation or launch on the host: its part, and the time that nothing inside it took."""

    end: float
    part: str | None
    own_us: float
    in_chunk: bool
    correlation: int | None


def _host_calls(events: Iterable[Event]) -> Iterator[_HostCall]:
    events = [event for event in events if event.get("ph") == "X" and event.get("cat") in _HOST]
    chunks = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == _CHUNK]
    threads: dict[tuple[Any, Any], list[Event]] = {}
    for event in events:
        threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for thread in threads.values():
        yield from _thread_calls(sorted(thread, key=lambda event: (event["ts"], -event["dur"])), chunks)


def _thread_calls(events: Iterable[Event], chunks: list[tuple[float, float]]) -> Iterator[_HostCall]:
    """The calls of one thread; a part goes from a call to what it calls, unless that names its own."""
    open_calls: list[_HostCall] = []
    for event in events:
        while open_calls and open_calls[-1].end <= event["ts"]:
            yield open_calls.pop()
        parent = open_calls[-1] if open_calls else None
        if parent is not None:
            parent.own_us -= event["dur"]
        inherited = parent.part if parent else None
        part = _MARKED.get(event["name"]) or inherited or _ATEN_PARTS.get(event["name"])
        in_chunk = any(start <= event["ts"] < end for start, end in chunks)
        correlation = event.get("args", {}).get("correlation")
        open_calls.append(_HostCall(event["ts"] + event["dur"], part, event["dur"], in_chunk, correlation))
    yield from open_calls


def part_rows(times: dict[str, float], floors: dict[str, float | None]) -> list[dict[str, Any]]:
    """A row for each part; share_of_floor is 1 where it is as fast as the device allows."""
    return [
        {"part": part, "ms": ms, "floor_ms": floor, "share_of_floor": floor / ms if floor and ms else None}
        for part, ms in times.items()
        for floor in (floors[part],)
    ]


def part_floors(
    shapes: Shapes, gpu: GPU | None, dtype: torch.dtype, decodes: bool
) -> dict[str, float | None]:
    """Floor of each part in a steady chunk, in ms; None for copies, which the link to the host bounds.

    Products are in the precision of shapes.config.runtime, but for a device without FP8 rates, which emulates
    it. Bytes are counted for 16 bits, and scaled to `dtype`. What the engine does inside of another kernel
    counts nothing. Upsampling convolutions of the VAE count as they are written; folded they do 5% less.
    """
    if gpu is None:
        return dict.fromkeys((*PARTS, UNASSIGNED))
    wider = dtype.itemsize / torch.bfloat16.itemsize
    scaled = GPU(gpu.name, gpu.tb_per_s / wider, gpu.bf16_tflop_per_s, gpu.fp8_tflop_per_s)
    floors: dict[str, float | None] = dict.fromkeys(PARTS, 0.0) | {COPIES: None, UNASSIGNED: None}
    for part in _steady_parts(shapes, gpu.fp8_tflop_per_s is not None):
        name = {"flow_step": ROW_KERNELS}.get(part.name, VAE if part.decodes else part.group)
        if part.name not in FUSED and (decodes or not part.decodes):
            floors[name] += floor_ms(part, scaled)
    return floors


def steady_flops(shapes: Shapes, decodes: bool) -> int:
    """FLOPs of a steady chunk, with the VAE's where it is decoded."""
    return sum(part.flops for part in _steady_parts(shapes, False) if decodes or not part.decodes)


@cache
def _steady_parts(shapes: Shapes, has_fp8: bool) -> list[Part]:
    runtime = shapes.config.runtime
    if not has_fp8:
        return ChunkWork.steady(shapes).parts()
    precision = "bf16" if runtime.precision == "default" else runtime.precision
    return ChunkWork.steady(shapes, precision, runtime.vae_precision == "fp8").parts()
