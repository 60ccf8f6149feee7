"""The goals of the engine on a GPU, each with what the results of a gate say of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from gate.graphs import SHIPPED
from gate.processes import CUT_SHORT
from gate.record import Result
from gate.speed import FLAT_CHUNKS

from bench.kernel_cases import CASES
from bench.kernels import OURS

ATTENTION_SHARE = 0.95  # of the faster of cuDNN and FlashAttention-3
ROW_SHARE = 0.85  # of the bandwidth of a large copy
# for the sink and the rotation of all layers, once a chunk: 6.48 GB at 86 % of the 3.0 TB/s that a copy
# reaches on an H100. The 1.5 ms asked for at first lie below the floor of 1.93 ms there (docs/kernels.md).
CACHE_MS = 2.5
FRAMES_PER_S, WISHED_FRAMES_PER_S = 36.0, 46.0
BASELINE_RATIO = 2.5
P99_OVER_P50 = 1.05
LEAST_P99_CHUNKS = 100  # fewer have no 99th percentile
FIRST_FRAME_MS = 400.0
TIME_GROWTH = 0.02  # what counts as flat: the last tenth of the chunks against the first
CUDNN_MS, TRITON_MS, FP8_MS, TINY_MS = 110.0, 90.0, 60.0, 8.0
PSNR_DB, FP8_PSNR_DB = 50.0, 45.0


@dataclass(frozen=True)
class Goal:
    """asked: a bound, from below where at_least. reached is None where it was not measured."""

    issue: int
    name: str
    asked: float
    reached: float | None
    at_least: bool
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.asked if self.at_least else self.reached <= self.asked

    def to_dict(self) -> Result:
        return asdict(self) | {"met": self.met}

    def __str__(self) -> str:
        word = {True: "met", False: "NOT met", None: "not measured"}[self.met]
        reached = "" if self.reached is None else f" {self.reached:.3f},"
        bound = "at least" if self.at_least else "at most"
        note = f" ({self.note})" if self.note else ""
        return f"{word:<12} {self.name}:{reached} asked {bound} {self.asked:g}{note}"


def judge(results: Result) -> list[Goal]:
    """Every goal; a self-check measures none."""
    parts = {} if results.get("self_check") else results["parts"]
    told = {name: part["results"] for name, part in parts.items()}
    return [
        *_kernel_goals(told.get("kernels", [])),
        *_speed_goals(told.get("throughput", []), told.get("flatness", [])),
        _graph_goal(told.get("graphs", [])),
        *_vae_goals(told.get("vae", [])),
    ]


def rows_by_case(kernels: Iterable[Result]) -> dict[str, dict[str, Result]]:
    """Rows with a time, by case and contender."""
    rows: dict[str, dict[str, Result]] = {}
    for row in kernels:
        if row.get("timing"):
            rows.setdefault(row["case"], {})[row["candidate"]] = row
    return rows


def _kernel_goals(kernels: list[Result]) -> list[Goal]:
    rows = rows_by_case(kernels)

    def median_ms(case: str, contender: str = OURS) -> float | None:
        row = rows.get(case, {}).get(contender)
        return row["timing"]["median_ms"] if row else None

    own = median_ms("sink_window_attention")
    rivals = {name: median_ms("sink_window_attention", name) for name in ("SDPA cuDNN", "FlashAttention-3")}
    there = {name: ms for name, ms in rivals.items() if ms is not None}
    best = min(there, key=there.__getitem__, default=None)
    share = there[best] / own if own is not None and best is not None else None
    name = "attention, share of the better of cuDNN and FlashAttention-3"
    goals = [Goal(3, name, ATTENTION_SHARE, share, True, f"the better here: {best}" if best else "")]
    for case in CASES:
        if case.is_row:
            row = rows.get(case.name, {}).get(OURS)
            share = row["share_of_copy"] if row else None
            goals.append(Goal(3, f"{case.name}, share of copy bandwidth", ROW_SHARE, share, True))
    evict, rephase = median_ms("ema_evict"), median_ms("rephase_keys")
    apart = None if evict is None or rephase is None else evict + rephase
    ways = [ms for ms in (apart, median_ms("evict_and_rephase")) if ms is not None]
    name = "ema_evict and rephase_keys, apart or in one, ms"
    return [*goals, Goal(3, name, CACHE_MS, min(ways, default=None), False)]


def _speed_goals(told: list[Result], flat_told: list[Result]) -> list[Goal]:
    figures = _last(told, "frames") or _last(told, "throughput") or {}
    comparison = _last(told, "comparison") or {}
    flat = _last(flat_told, "flat") or {}
    rate, ratio = figures.get("frames_per_s"), comparison.get("end_to_end", {}).get("ratio", {})
    weights = figures.get("weights", "")
    spread = f"{ratio['min']:.2f} to {ratio['max']:.2f}" if ratio else ""
    count = flat.get("chunks", 0)
    long = flat if count >= LEAST_P99_CHUNKS else figures
    enough = long.get("chunks", 0) >= LEAST_P99_CHUNKS
    tail = long["chunk_ms_p99"] / long["chunk_ms_p50"] if enough else None
    over = f"over {long['chunks']} chunks" if enough else ""
    flat_note = f"{count} of {FLAT_CHUNKS} chunks were run" if count else ""
    whole = flat if count >= FLAT_CHUNKS else {}
    return [
        Goal(4, "frames per second, full VAE", FRAMES_PER_S, rate, True, weights),
        Goal(4, "frames per second on the way to", WISHED_FRAMES_PER_S, rate, True, weights),
        Goal(4, "times as fast as the eager baseline", BASELINE_RATIO, ratio.get("median"), True, spread),
        Goal(4, "p99 over p50 of chunk times", P99_OVER_P50, tail, False, over),
        Goal(4, f"growth of chunk time over {FLAT_CHUNKS} chunks", TIME_GROWTH, whole.get("time_growth"),
             False, _so_far(flat_note, flat, "time_growth", "{:+.2%}")),
        Goal(4, f"growth of memory over {FLAT_CHUNKS} chunks, bytes", 0.0, whole.get("memory_growth_bytes"),
             False, _so_far(flat_note, flat, "memory_growth_bytes", "{:+d} bytes")),
        Goal(4, "first frame, ms", FIRST_FRAME_MS, figures.get("first_frame_ms"), False),
    ]  # fmt: skip


def _so_far(note: str, flat: Result, name: str, form: str) -> str:
    value = flat.get(name)
    return note if value is None else f"{note}: {form.format(value)}"


def _graph_goal(told: list[Result]) -> Goal:
    """The share of the compared engines that was equal; of small models alone it is not measured."""
    compared = [result for result in told if "equal" in result]
    shipped = any(str(result.get("item")).startswith(SHIPPED) for result in compared)
    failures = (str(result["failed"]) for result in told if "failed" in result)
    broken = sum(not failure.startswith(CUT_SHORT) for failure in failures)
    equal = sum(result["equal"] for result in compared) / len(compared) if compared else None
    note = f"{len(compared)} engines, {sum(result['chunks'] for result in compared)} chunks"
    if broken:
        equal, note = 0.0, f"{note}, {broken} failures"
    elif not shipped:
        equal, note = None, f"{note}, none of the shipped size" if compared else ""
    return Goal(4, "graph replay bit-equal to eager, share", 1.0, equal, True, note)


def _vae_goals(told: list[Result]) -> list[Goal]:
    def fastest(name: str) -> float | None:
        times = (row["ms"] for row in told if row.get("decoder") == name and row.get("ms") is not None)
        return min(times, default=None)

    def worst_db(names: tuple[str, ...]) -> float | None:
        return min(
            (row["psnr_db"] for row in told if row.get("psnr_db") and row.get("decoder") in names),
            default=None,
        )

    return [
        Goal(5, "full decoder with cuDNN, ms per chunk", CUDNN_MS, fastest("cudnn"), False),
        Goal(5, "full decoder with Triton convolutions, ms per chunk", TRITON_MS, fastest("triton"), False),
        Goal(5, "full decoder with FP8 convolutions, ms per chunk", FP8_MS, fastest("fp8"), False),
        Goal(5, "tiny decoder, ms per chunk", TINY_MS, fastest("tiny"), False),
        Goal(
            5, "bfloat16 against float32, dB", PSNR_DB, worst_db(("cudnn", "triton")), True, "random weights"
        ),
        Goal(5, "FP8 against float32, dB", FP8_PSNR_DB, worst_db(("fp8",)), True, "random weights"),
    ]


def _last(told: list[Result], name: str) -> Result | None:
    found = [result[name] for result in told if isinstance(result.get(name), dict)]
    return found[-1] if found else None
