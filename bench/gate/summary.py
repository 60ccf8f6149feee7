"""What the results of a gate come to, as a short table."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gate.goals import judge, rows_by_case
from gate.part import NOT_RUN
from gate.processes import CUT_SHORT
from gate.record import Result

from bench.kernels import OURS

TOLD_FAILURES = 40
BAD_STATES = ("failed", "broken", "begun")


def summarise(results: Result) -> tuple[str, bool]:
    """The table, and whether all went well: no failure and, on a GPU, a goal met and none missed."""
    goals, failures = judge(results), failures_of(results)
    small = results["self_check"]
    told = {name: part["results"] for name, part in results["parts"].items()}
    lines = [
        f"{results['device']}; torch {results['torch']}, Triton {results['triton']}, driver "
        f"{results['driver']}; commit {results['commit']}, {results['date']}",
        *(f"{name:<12}{counts_of(part)}" for name, part in results["parts"].items()),
        *([] if small else [*_figure_lines(told), *map(str, goals)]),
        *failures[:TOLD_FAILURES],
        *([f"and {len(failures) - TOLD_FAILURES} failures more"] if len(failures) > TOLD_FAILURES else []),
    ]
    well = not failures and bool(results["parts"])
    if small:
        cut = any(_is_cut(result) for part in results["parts"].values() for result in part["results"])
        passed = "passed, as far as there was time" if cut else "passed"
        lines.append(f"self-check {passed if well else 'FAILED'}")
    met = {goal.met for goal in goals}
    return "\n".join(lines), well and (small or (True in met and False not in met))


def _figure_lines(told: dict[str, list[Result]]) -> list[str]:
    return [
        *_device_lines(told.get("device", [])),
        *_parity_lines(told.get("parity", [])),
        *_speed_lines(told.get("throughput", [])),
        *_flat_lines(told.get("flatness", [])),
        *_kernel_lines(told.get("kernels", [])),
        *_vae_lines(told.get("vae", [])),
    ]


def counts_of(part: Result) -> str:
    """How many items were begun and ended how, and the seconds of the part."""
    cut = {item for result in part["results"] if _is_cut(result) for item in result.get("items", ())}
    counts = Counter("cut short" if item in cut else state for item, state in part["items"].items())
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "nothing"
    if "chosen" in part:
        told = f"{len(part['items'])} of {part['chosen']} begun: {told}"
    reasons = Counter(result["not_run"] for result in part["results"] if "not_run" in result)
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    seconds = f" in {part['seconds']:.0f} s" if "seconds" in part else ""
    return f"{told}{seconds}" + (f" ({NOT_RUN}: {why})" if why else "")


def _is_cut(result: Result) -> bool:
    """Whether the share of the time ran out, which is nobody's failure."""
    return str(result.get("failed", "")).startswith(CUT_SHORT)


def failures_of(results: Result) -> list[str]:
    """One line for each thing that went wrong; what there was no time for is none."""
    lines = []
    for name, part in results["parts"].items():
        told = set()
        for result in part["results"]:
            if "failed" in result:
                told |= {result.get("item"), *result.get("items", ())}
            if "failed" in result and not _is_cut(result):
                where = result.get("item") or ", ".join(result.get("items", ())) or "the part itself"
                lines.append(f"FAILED {name}, {where}: {str(result['failed'])[-400:]}")
            if result.get("ok") is False:
                error = result.get("max_rel_err")
                allowed = result.get("tolerance")
                lines.append(f"APART {name}, {result.get('item')}: {error}, allowed {allowed}")
        lines += [
            f"FAILED {name}, {item}: {state}"
            for item, state in part["items"].items()
            if state in BAD_STATES and item not in told
        ]
    return lines


def _device_lines(told: list[Result]) -> list[str]:
    ceilings = next((result["ceilings"] for result in told if "ceilings" in result), {})
    lines = [f"{name}: {value:.2f}" for name, value in ceilings.items()]
    lines += [f"attention by {row['form']}: {row['problem'] or 'right'}" for row in told if "form" in row]
    for row in told:
        if "ms" in row:
            rates = (
                f", {row[name]:.{places}f} {unit}"
                for name, places, unit in (("tflop_per_s", 0, "TFLOP/s"), ("tb_per_s", 2, "TB/s"))
                if name in row
            )
            lines.append(f"{row['item']}: {row['ms']:.4f} ms{''.join(rates)}")
        if "launch" in row:
            host, whole = row["host_us"], row["whole_us"]
            lines.append(f"launch, {row['launch']}: {host:.2f} us of the host, {whole:.2f} in all")
    return lines


def _parity_lines(told: list[Result]) -> list[str]:
    agreeing = [result["ok"] for result in told if "ok" in result]
    return [f"golden files: {sum(agreeing)} of {len(agreeing)} agree"] if agreeing else []


def _speed_lines(told: list[Result]) -> list[str]:
    lines = []
    for result in told:
        figures = result.get("throughput")
        if figures:
            rate = figures["frames_per_s"]
            lines.append(
                f"in parts: {'unknown' if rate is None else f'{rate:.1f}'} frames/s end to end, "
                f"{figures['frames_per_s_without_vae']:.1f} without the VAE; chunk p50 "
                f"{figures['chunk_ms_p50']:.1f} ms, p99 {figures['chunk_ms_p99']:.1f}"
            )
            lines += [f"  {_part_line(part)}" for part in figures["parts"]]
        if "frames" in result:
            figures = result["frames"]
            lines.append(
                f"frames per s: {figures['frames_per_s']:.1f} over {figures['chunks']} chunks, chunk p50 "
                f"{figures['chunk_ms_p50']:.1f} ms, p99 {figures['chunk_ms_p99']:.1f}; first frame "
                f"{figures['first_frame_ms']:.0f} ms; weights: {figures['weights']}"
            )
        if "comparison" in result:
            lines += [f"baseline, {line}" for line in _comparison_lines(result["comparison"])]
        if "variant" in result:
            lines.append(
                f"{result['variant']}: {result['frames_per_s']:.1f} frames/s, chunk p50 "
                f"{result['chunk_ms_p50']:.1f} ms, latents {_number(result['latents_apart'])} apart"
            )
    return lines


def _flat_lines(told: list[Result]) -> list[str]:
    runs = [result["flat"] for result in told if "flat" in result]
    return [
        f"{run['chunks']} chunks in a row: p50 {run['chunk_ms_p50']:.1f} ms, p99 {run['chunk_ms_p99']:.1f}; "
        f"time {_number(run['time_growth'])} and memory {_bytes(run['memory_growth_bytes'])} grown"
        for run in runs[-1:]
    ]


def _part_line(part: Result) -> str:
    floor = part.get("floor_ms")
    return f"{part['part']}: {part['ms']:.2f} ms" + ("" if floor is None else f", floor {floor:.2f}")


def _comparison_lines(comparison: Result) -> list[str]:
    return [
        f"{name}: {row['ratio']['median']:.2f} times as fast ({row['ratio']['min']:.2f} to "
        f"{row['ratio']['max']:.2f})"
        for name, row in comparison.items()
        if isinstance(row, dict)
    ]


def _number(value: Any) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def _bytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value} bytes"


def _kernel_lines(told: list[Result]) -> list[str]:
    """One line for each kernel: its share of the ceiling, and its time beside the others'."""
    lines = []
    for case, rows in rows_by_case(told).items():
        own = rows.get(OURS)
        share = (own["share_of_copy"] or own["share_of_product"]) if own else None
        times = ", ".join(f"{name} {row['timing']['median_ms']:.4f}" for name, row in rows.items())
        lines.append(f"{case}: {'' if share is None else f'{share:.0%} of the ceiling, '}ms: {times}")
    return lines


def _vae_lines(told: list[Result]) -> list[str]:
    lines = []
    for row in told:
        if row.get("ms") is not None:
            graph = ", graph" if row["graph"] else ""
            lines.append(f"decoder {row['decoder']}{graph}: {row['ms']:.1f} ms for {row['frames']} frames")
        if "psnr_db" in row:
            lines.append(f"decoder {row['decoder']} against float32: {_number(row['psnr_db'])} dB")
        for decoder in row.get("bench_vae", {}).get("decoders", ()):
            ms = decoder.get("chunk_ms")
            took = decoder.get("error", "nothing") if ms is None else f"{ms:.1f} ms a chunk"
            lines.append(f"bench_vae, {decoder['decoder']}: {took}")
    return lines
