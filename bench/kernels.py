"""Checks each kernel against the reference, then times it beside PyTorch, as a share of what the GPU reaches.

    python bench/kernels.py --case rms_norm linear_out --json figures.json
    TRITON_INTERPRET=1 python bench/kernels.py --check --case rms_norm

A case is one call of an op at the engine's own shapes (kernel_cases.py). The JSON file is written again after
every case, so that a case that hangs loses itself and those behind it. Exit status 1: a kernel is wrong, or
raises; it is not timed, and the others are.
--check needs no GPU: Triton's interpreter runs the kernels at the shapes of a video of 32 x 32 pixels.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.kernel_cases import KernelCase, chosen_cases
from bench.kernel_inputs import Arguments, Draw
from rfengine.accuracy import wrong_result
from rfengine.benchmark.attention_libraries import libraries
from rfengine.benchmark.conditions import device_name, state, versions
from rfengine.cli.process import run_script
from rfengine.costs.shapes import Shapes
from rfengine.files import write_text
from rfengine.presets import PRESETS
from rfengine.tuning.timing import capture_calls, count_cold_sets
from rfengine.tuning.trials import is_lost

RUNS, LEAST_RUNS = 60, 3
LONGEST_S = 0.3  # that the timed runs of one candidate take together
CHECKED_LAYERS = 2  # an arena of all layers in float64 would not fit beside its copies
CHECKED_SIDE = 32  # pixels, where Triton's interpreter runs the kernels
ERROR_CHARACTERS = 120
ABSENT = "no CUDA device here: nothing is measured"
OURS, NATIVE = "rfengine", "native"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check every kernel against the reference, then time it beside PyTorch, eager and compiled."""

    case: tuple[str, ...] = ()
    """Only these cases of kernel_cases.py."""
    check: bool = False
    """Check alone; without a GPU by Triton's interpreter (TRITON_INTERPRET=1) on a small video."""
    compile: bool = True
    """Time what torch.compile makes of the reference as well, which takes seconds to compile."""
    json: Path | None = None
    """Write the figures as JSON, again after every case."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `runs` runs."""

    median_ms: float
    p95_ms: float
    runs: int


@dataclass(frozen=True)
class Row:
    """One candidate at one case; what cannot run here has an error instead of figures."""

    case: str
    candidate: str
    timing: Timing | None = None
    error: str = ""
    tb_per_s: float | None = None
    share_of_copy: float | None = None
    share_of_chunk_copy: float | None = None
    tflop_per_s: float | None = None
    share_of_product: float | None = None

    def __str__(self) -> str:
        head = f"{self.case:<34} {self.candidate:<17}"
        if self.timing is None:
            return f"{head} {self.error}"
        line = f"{head} {self.timing.median_ms:>9.4f} ms (p95 {self.timing.p95_ms:.4f})"
        if self.tflop_per_s is not None:
            return f"{line} {self.tflop_per_s:>6.0f} TFLOP/s, {self.share_of_product:>4.0%} of a product"
        own = f"{self.share_of_chunk_copy:.0%} of a copy of a chunk"
        return f"{line} {self.tb_per_s:>6.2f} TB/s, {self.share_of_copy:>4.0%} of a large copy, {own}"


def time_calls(run: Callable[..., object], sets: Sequence[Arguments], runs: int = RUNS) -> Timing:
    """Time `run` over the sets of arguments one after another, as one CUDA graph, after warm-up.

    The sets together are larger than the L2 cache, so that it serves nothing (see input_sets). What is slow
    has fewer runs, LEAST_RUNS at least, so that they take LONGEST_S; Timing.runs says how many.
    """
    graph = capture_calls(run, sets)
    graph.replay()  # the first also uploads the graph
    runs = max(LEAST_RUNS, min(runs, int(LONGEST_S * 1e3 / max(_replay_ms(graph, 1)[0], 1e-6))))
    if runs > LEAST_RUNS:
        graph.replay()  # a third warm-up, where it costs little
    milliseconds = sorted(each / len(sets) for each in _replay_ms(graph, runs))
    return Timing(statistics.median(milliseconds), milliseconds[math.ceil(0.95 * runs) - 1], runs)


def measured_ceilings(shapes: Shapes) -> dict[str, float]:
    """What this GPU reaches: a large copy and one of a chunk's rows (bytes read and written), and a large
    product in bf16."""

    def copy_rate(elements: int) -> float:
        def make() -> Arguments:
            source = torch.randn(elements, device="cuda", dtype=torch.float32).bfloat16()
            return source, torch.empty_like(source)

        moved = 2 * 2 * elements
        timing = time_calls(lambda source, target: target.copy_(source), input_sets(make, moved))
        return moved / timing.median_ms / 1e9

    side = 8192
    sets = [tuple(torch.randn(side, side, device="cuda").bfloat16() for _ in range(2)) for _ in range(2)]
    return {
        "copy_tb_per_s": copy_rate(2**29),
        "chunk_copy_tb_per_s": copy_rate(shapes.chunk),
        "product_tflop_per_s": 2 * side**3 / time_calls(torch.mm, sets).median_ms / 1e9,
    }


def _replay_ms(graph: torch.cuda.CUDAGraph, runs: int) -> list[float]:
    """Milliseconds of each of so many replays in a row."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def input_sets(make: Callable[[], Arguments], set_bytes: int) -> list[Arguments]:
    """As many sets of arguments as it takes to make the L2 cache forget the first; at most 64."""
    return [make() for _ in range(count_cold_sets("cuda", set_bytes))]


def seeded_draw(seed: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Draw:
    return Draw(device, dtype, torch.Generator(device).manual_seed(seed))


def fault_of(case: KernelCase, shapes: Shapes, draw: Draw, run: Callable[..., object] | None = None) -> str:
    """What is wrong with the kernel of a case, or with `run` in its place (beyond_reference_error), or what
    it raises; empty where it is right. Raises what has broken the device, which does nothing more in this
    process."""
    arguments = case.inputs(shapes.with_layers(min(CHECKED_LAYERS, shapes.layers)), draw)
    try:
        part = case.checked_part(arguments)
        problem = wrong_result(run or case.kernel(), case.meaning(), arguments, part, case.checked)
    # a launcher or a compiler may raise anything, and the other cases can be measured whatever it is
    except Exception as error:  # noqa: BLE001
        if is_lost(torch.device(draw.device), error):
            raise
        problem = _shown(error)
    return problem and f"{case.name}: {problem}"


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:ERROR_CHARACTERS]}"


def candidates(case: KernelCase, compiles: bool) -> Iterator[tuple[str, Callable[..., object]]]:
    """Functions of the arguments by name: ours first, then rivals (csrc/, libraries), and PyTorch."""
    yield OURS, case.kernel()
    yield from case.rivals.items()
    if case.op != "sink_window_attention":
        yield "eager", case.meaning()
        if compiles:
            yield "torch.compile", torch.compile(case.meaning(), dynamic=False)
    elif case.op == case.name:  # once for all its forms
        for name, attend in libraries().items():
            yield name, lambda q, keys, values, *_, attend=attend: attend(q, keys, values)


def measure_case(
    case: KernelCase, shapes: Shapes, ceilings: dict[str, float], compiles: bool = False
) -> Iterator[Row]:
    """Rows of all candidates, ours first; a native kernel that is wrong is not timed."""
    torch.cuda.empty_cache()
    draw = seeded_draw(2)
    sets = input_sets(lambda: case.inputs(shapes, draw), case.floor_bytes(shapes))
    for name, run in candidates(case, compiles):
        try:
            if name == NATIVE and (fault := fault_of(case, shapes, seeded_draw(1), run)):
                raise ValueError(f"wrong: {fault}")
            timing = time_calls(run, sets)
        # a library, or csrc/, that does not serve this shape or this GPU
        except (RuntimeError, ImportError, ValueError) as error:
            if name == OURS:
                raise
            yield Row(case.name, name, error=_shown(error))
        else:
            yield _row(case, name, timing, shapes, ceilings)
        torch.cuda.empty_cache()


def _row(case: KernelCase, name: str, timing: Timing, shapes: Shapes, ceilings: dict[str, float]) -> Row:
    if case.floor_flops is not None:
        rate = case.floor_flops(shapes) / timing.median_ms / 1e9
        share = rate / ceilings["product_tflop_per_s"]
        return Row(case.name, name, timing, tflop_per_s=rate, share_of_product=share)
    rate = case.floor_bytes(shapes) / timing.median_ms / 1e9
    large, own = (rate / ceilings[name] for name in ("copy_tb_per_s", "chunk_copy_tb_per_s"))
    return Row(case.name, name, timing, tb_per_s=rate, share_of_copy=large, share_of_chunk_copy=own)


@torch.no_grad()
def run(options: Options) -> int:
    """Check, then measure the cases; returns the exit status. Raises RuntimeError without a GPU."""
    on_cuda = torch.cuda.is_available()
    if not on_cuda and not options.check:
        raise RuntimeError(f"{ABSENT}; --check alone can do without")
    device = torch.device("cuda" if on_cuda else "cpu")
    small = replace(PRESETS["tiny"], height=CHECKED_SIDE, width=CHECKED_SIDE)
    shapes = Shapes() if on_cuda else Shapes(small)
    ceilings = None if options.check else measured_ceilings(shapes)
    figures: dict[str, Any] = {
        "device": device_name(device),
        "versions": versions(device),
        "before": state(device),
        "ceilings": ceilings,
        "cases": [],
    }
    for case in _runnable(chosen_cases(options.case), on_cuda):
        dtype = torch.bfloat16 if on_cuda else torch.float32  # the interpreter misrounds 16 bits
        fault = fault_of(case, shapes, seeded_draw(1, device.type, dtype))
        print(f"{case.name:<34} {f'wrong: {fault}' if fault else 'right'}", flush=True)
        rows = []
        for row in () if fault or ceilings is None else measure_case(case, shapes, ceilings, options.compile):
            print(row, flush=True)
            rows.append(asdict(row))
        figures["cases"].append({"case": case.name, "wrong": fault, "rows": rows})
        if options.json is not None:
            write_text(options.json, json.dumps(figures, indent=1) + "\n")
    return int(any(row["wrong"] for row in figures["cases"]))


def _runnable(cases: list[KernelCase], on_cuda: bool) -> list[KernelCase]:
    """Forward cases that run here: those of this GPU, or those that the interpreter runs in float32."""
    least = 80
    if on_cuda:
        major, minor = torch.cuda.get_device_capability()
        least = 10 * major + minor
    return [case for case in cases if "backward" not in case.name and case.minimum_capability <= least]


if __name__ == "__main__":
    sys.exit(run_script("kernels", Options, run))
