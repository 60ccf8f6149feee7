"""Checks a kernel against the reference, then times it beside PyTorch, as a share of what the GPU reaches."""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from kernel_cases import KernelCase
from kernel_inputs import Arguments, Draw
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rfengine.accuracy import beyond_reference_error
from rfengine.costs.shapes import Shapes
from rfengine.ops import native
from rfengine.tuning.timing import capture_calls, count_cold_sets

RUNS = 60
LONGEST_S = 0.3  # that the timed runs of one contender take together
LEAST_RUNS = 3
CHECKED_LAYERS = 2  # an arena of all layers in float64 would not fit beside its copies
ABSENT = "no CUDA device here: nothing is measured"
OURS = "rfengine"
SDPA = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLASH_MODULES = {"FlashAttention-2": "flash_attn", "FlashAttention-3": "flash_attn_interface"}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `runs` runs."""

    median_ms: float
    p95_ms: float
    runs: int


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches, measured: a large copy and one of a chunk's rows (bytes read and written), and a
    large bf16 matrix product."""

    copy_tb_per_s: float
    chunk_copy_tb_per_s: float
    product_tflop_per_s: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One contender at one case; what cannot run here has an error instead of figures."""

    case: str
    contender: str
    timing: Timing | None = None
    error: str = ""
    tb_per_s: float | None = None
    share_of_copy: float | None = None
    share_of_chunk_copy: float | None = None
    tflop_per_s: float | None = None
    share_of_product: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.case:<34} {self.contender:<17}"
        if self.timing is None:
            return f"{head} {self.error}"
        line = f"{head} {self.timing.median_ms:>9.4f} ms (p95 {self.timing.p95_ms:.4f})"
        if self.tflop_per_s is not None:
            return f"{line} {self.tflop_per_s:>6.0f} TFLOP/s, {self.share_of_product:>4.0%} of a product"
        own = f"{self.share_of_chunk_copy:.0%} of a copy of a chunk"
        return f"{line} {self.tb_per_s:>6.2f} TB/s, {self.share_of_copy:>4.0%} of a large copy, {own}"


def time_calls(run: Callable[..., object], sets: Sequence[Arguments], runs: int = RUNS) -> Timing:
    """Time `run` over the sets of arguments in turn, as one CUDA graph; between CUDA events, after warm-up.

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


@cache
def measured_ceilings() -> Ceilings:
    shapes = Shapes()

    def copies(elements: int) -> float:
        def make() -> Arguments:
            source = torch.randn(elements, device="cuda", dtype=torch.float32).bfloat16()
            return source, torch.empty_like(source)

        moved = 2 * 2 * elements
        timing = time_calls(lambda source, target: target.copy_(source), input_sets(make, moved))
        return moved / timing.median_ms / 1e9

    side = 8192
    sets = [tuple(torch.randn(side, side, device="cuda").bfloat16() for _ in range(2)) for _ in range(2)]
    product = time_calls(torch.mm, sets)
    return Ceilings(copies(2**29), copies(shapes.chunk), 2 * side**3 / product.median_ms / 1e9)


def seeded_draw(seed: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Draw:
    return Draw(device, dtype, torch.Generator(device).manual_seed(seed))


def check(case: KernelCase, shapes: Shapes, draw: Draw) -> None:
    """AssertionError unless the kernel is as near to float64 as accuracy.beyond_reference_error asks."""
    arguments = case.inputs(shapes.with_layers(min(CHECKED_LAYERS, shapes.layers)), draw)
    found, expected = (
        _results(case, run, _map(Tensor.clone, arguments)) for run in (case.kernel(), case.meaning())
    )
    truth = _results(case, case.meaning(), _map(_widened, arguments))
    for index, tensors in enumerate(zip(found, expected, truth, strict=True)):
        problem = beyond_reference_error(*tensors)
        assert not problem, f"{case.name}, result {index} is {problem}"


def _results(case: KernelCase, run: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    return [result.clone() for result in case.checked(arguments, run(*arguments))]


def _map(change: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    return tuple(change(item) if isinstance(item, Tensor) else item for item in arguments)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def contenders(case: KernelCase) -> Iterator[tuple[str, Callable[..., object]]]:
    """Functions of the arguments by name: ours first, then those of csrc/, PyTorch and FlashAttention."""
    yield OURS, case.kernel()
    yield from case.rivals.items()
    if hasattr(native, case.op):  # where the fatbin cannot run, the row says why
        yield "native", getattr(native, case.op)
    if case.op != "sink_window_attention":
        yield "eager", case.meaning()
    elif case.op == case.name:  # once for all its forms
        for name, backend in SDPA.items():
            yield name, _sdpa(case, backend)
        for name, module in FLASH_MODULES.items():
            if importlib.util.find_spec(module) is not None:
                yield name, _flash(importlib.import_module(module).flash_attn_func)


def _sdpa(case: KernelCase, backend: SDPBackend) -> Callable[..., object]:
    def attend(*arguments: Any) -> object:
        with sdpa_kernel(backend):
            return case.meaning()(*arguments)

    return attend


def _flash(attend: Callable[..., object]) -> Callable[..., object]:
    return lambda q, keys, values, *_: attend(q, keys, values)


def measure_case(case: KernelCase, shapes: Shapes, ceilings: Ceilings) -> Iterator[Row]:
    """Rows of all contenders, ours first. A kernel that is wrong is not timed: AssertionError."""
    check(case, shapes, seeded_draw(1))
    yield from _rows(case, contenders(case), shapes, ceilings)


def measure_compiled(case: KernelCase, shapes: Shapes, ceilings: Ceilings) -> Iterator[Row]:
    """The row of what torch.compile makes of the reference; none for the attention, which is one call."""
    if case.op != "sink_window_attention":
        compiled = torch.compile(case.meaning(), dynamic=False)
        yield from _rows(case, [("torch.compile", compiled)], shapes, ceilings)


def _rows(
    case: KernelCase,
    runs: Iterable[tuple[str, Callable[..., object]]],
    shapes: Shapes,
    ceilings: Ceilings,
) -> Iterator[Row]:
    torch.cuda.empty_cache()
    draw = seeded_draw(2)
    sets = input_sets(lambda: case.inputs(shapes, draw), case.floor_bytes(shapes))
    for name, run in runs:
        try:
            timing = time_calls(run, sets)
        except (RuntimeError, ImportError) as error:  # a library that does not serve this shape or this GPU
            if name == OURS:
                raise
            yield Row(case.name, name, error=f"{type(error).__name__}: {str(error)[:120]}")
        else:
            yield _row(case, name, timing, shapes, ceilings)
        torch.cuda.empty_cache()


def _row(case: KernelCase, name: str, timing: Timing, shapes: Shapes, ceilings: Ceilings) -> Row:
    if case.floor_flops is not None:
        rate = case.floor_flops(shapes) / timing.median_ms / 1e9
        return Row(
            case.name, name, timing, tflop_per_s=rate, share_of_product=rate / ceilings.product_tflop_per_s
        )
    rate = case.floor_bytes(shapes) / timing.median_ms / 1e9
    return Row(
        case.name,
        name,
        timing,
        tb_per_s=rate,
        share_of_copy=rate / ceilings.copy_tb_per_s,
        share_of_chunk_copy=rate / ceilings.chunk_copy_tb_per_s,
    )
