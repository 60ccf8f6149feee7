"""The record of a protocol as text: its words, its figures with and without graphs, and its rivals."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from rfengine.benchmark.protocols.protocol import UNSTATED
from rfengine.benchmark.protocols.repetition import IN_ONE_PROCESS, IN_TWO_PROCESSES

GIB = 2**30
MOST_COLUMNS = 100
_LABEL, _NUMBER = 10, 14  # columns
_FIGURES = {
    "frames_per_s": ("frames a second", ".1f"),
    "chunk_ms_p50": ("chunk, median, ms", ".1f"),
    "chunk_ms_p95": ("chunk, p95, ms", ".1f"),
    "chunk_ms_p99": ("chunk, p99, ms", ".1f"),
    "chunk_ms_longest": ("longest chunk, ms", ".1f"),
    "jitter_ms": ("jitter, ms", ".2f"),
    "late_chunks": ("chunks slower than they play", "d"),
    "chunks": ("chunks measured", "d"),
    "seconds": ("all, s", ".2f"),
    "seconds_least": ("least, s", ".2f"),
    "seconds_most": ("most, s", ".2f"),
    "frames": ("frames", "d"),
    "writing_s": ("of it encoding and writing, s", ".2f"),
    "file_bytes": ("bytes of the file", "d"),
    "start_s": ("of it starting Python, s", ".2f"),
    "load_s": ("of it loading, s", ".2f"),
    "making_s": ("of it making the clip, s", ".2f"),
    "first_frame_s": ("until the first frame, s", ".2f"),
    "given_ms": ("text given, median, ms", ".1f"),
    "given_ms_least": ("text given, least, ms", ".1f"),
    "given_ms_most": ("text given, most, ms", ".1f"),
    "encoded_ms": ("text encoded, median, ms", ".1f"),
    "encoded_ms_least": ("text encoded, least, ms", ".1f"),
    "encoded_ms_most": ("text encoded, most, ms", ".1f"),
    "compared_chunks": ("chunks compared", "d"),
}
_UNITS = {"frames_per_s": "frames/s", "chunk_ms_p50": "ms a chunk", "seconds": "s"}
_COMPARED = {IN_ONE_PROCESS: "in one process", IN_TWO_PROCESSES: "in two processes"}


def render(record: dict[str, Any]) -> str:
    """The record of session.py, as wide as the terminal."""
    width = _width()
    lines = [record["protocol"], *textwrap.wrap(record["summary"], width - 2)]
    lines[1:] = [f"  {line}" for line in lines[1:]]
    agreement = record["runs"][0]["agreement"]
    errors = ", ".join(
        f"{each['what']} {each['error']:.1e} (allowed {each['allowed']:.1e})" for each in agreement
    )
    for label, words in (
        ("inside", ", ".join(record["inside"])),
        ("outside", ", ".join(record["outside"])),
        ("model", _model(record)),
        ("checked", f"{agreement[0]['chunks']} chunks against the reference: {errors}"),
    ):
        lines += _labelled(label, words, width)
    heads = [f"graphs {'on' if run['graphs'] else 'off'}" for run in record["runs"]]
    lines += [*_figures(record["runs"], heads), *_equalities(record["runs"], heads, width)]
    return "\n".join([*lines, *_rivals(record["rivals"], heads, width), ""])


def render_machine(record: dict[str, Any]) -> str:
    """What all protocols of a session were measured on."""
    versions, packages = record["versions"], ("torch", "triton", "cuda", "cudnn", "driver")
    known = ", ".join(f"{name} {versions[name]}" for name in packages if versions[name] is not None)
    words = f"{record['device']}, {record['threads']} threads; commit {versions['commit']}, {known}"
    return "\n".join([*textwrap.wrap(words, _width(), break_on_hyphens=False), ""])


def _width() -> int:
    return min(MOST_COLUMNS, shutil.get_terminal_size().columns)


def _model(record: dict[str, Any]) -> str:
    decoder = ""
    if record["vae_tier"]:
        decoder = f", {record['vae']} decoder in {record['vae_dtype']} ({record['vae_tier']})"
    system = f", system {record['system']}" if record["system"] else ""
    precision = f" ({each})" if (each := record["runtime"]["precision"]) != "default" else ""
    return (
        f"{record['model']} at {record['width']} x {record['height']}{system}, {record['denoising_steps']} "
        f"steps, window {record['window_frames']}, {record['dtype']}{precision}{decoder}; weights: "
        f"{record['weights']}; text {record['text']}"
    )


def _labelled(label: str, words: str, width: int) -> list[str]:
    begin, indent = f"  {label:<{_LABEL}}", " " * (_LABEL + 2)
    return textwrap.wrap(
        words, width, initial_indent=begin, subsequent_indent=indent, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def _figures(runs: list[dict[str, Any]], heads: list[str]) -> list[str]:
    """A row for each figure, a column for each run."""
    column = max(len(label) for label, _ in _FIGURES.values())

    def row(label: str, values: Iterable[Any], form: str) -> str:
        return f"  {label:<{column}}" + "".join(f"{value:>{_NUMBER}{form}}" for value in values)

    lines = [row("", heads, "")]
    for name, (label, form) in _FIGURES.items():
        values = [run["figures"].get(name) for run in runs]
        if None not in values:
            lines.append(row(label, values, form))
    if all(run["peak_memory_bytes"] is not None for run in runs):
        lines.append(row("peak memory, GiB", [run["peak_memory_bytes"] / GIB for run in runs], ".2f"))
    clocks = [run["after"].get("sm_clock_mhz") for run in runs]
    if all(isinstance(clock, float) for clock in clocks):
        lines.append(row("clock afterwards, MHz", clocks, ".0f"))
    return lines


def _equalities(runs: list[dict[str, Any]], heads: list[str], width: int) -> list[str]:
    """What came of the comparisons of repetition.py, if there are any."""
    lines = []
    for name, label in _COMPARED.items():
        for run, head in zip(runs, heads, strict=True):
            if name in run["figures"]:
                words = _equality(run["figures"][name], run["figures"]["other_ops"])
                lines += textwrap.wrap(f"{label}, {head}: {words}", width - 4)
    return [f"  {line}" for line in lines]


def _equality(found: dict[str, Any], other_ops: list[str]) -> str:
    if found["equal"]:
        return "equal, bit for bit"
    difference = found["difference"]
    ops = f"; other backends run {', '.join(other_ops)}" if other_ops else ""
    largest = difference["largest"]
    size = "some of them no numbers" if largest is None else f"by up to {largest:.3g}"
    return (
        f"DIFFERS from chunk {difference['chunk']} on, {difference['values']} of {difference['of_values']} "
        f"values of its {difference['what']}, {size}{ops}"
    )


def _rivals(rivals: list[dict[str, Any]], heads: list[str], width: int) -> list[str]:
    """Each rival, and after the last of those with one source what is inside of their time."""
    lines = []
    for place, rival in enumerate(rivals):
        words = (
            f"{rival['name']}, {rival['value']:g} {_UNITS[rival['figure']]} on {rival['gpu']}: "
            f"{_compared(rival, heads)}"
        )
        following = rivals[place + 1] if place + 1 < len(rivals) else {}
        if any(following.get(name) != rival[name] for name in ("note", "source")):
            words += f" ({rival['note']}; {rival['source']})"
        lines += _labelled("" if lines else "beside", words, width)
    return lines


def _compared(rival: dict[str, Any], heads: list[str]) -> str:
    if rival["ratios"] is not None:
        ratios = zip(rival["ratios"], heads, strict=True)
        return ", ".join(f"{ratio:.2f} times as fast ({head})" for ratio, head in ratios)
    others = [name for name in rival["differences"] if name != UNSTATED]
    reasons = [f"another {', '.join(others)}"] if others else []
    if UNSTATED in rival["differences"]:
        reasons.append(f"nobody says {UNSTATED}")
    return f"not comparable: {'; '.join(reasons)}"
