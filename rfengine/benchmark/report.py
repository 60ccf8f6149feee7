"""The figures of throughput.py as a table, and its parts beside their floors as a plot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

GIB = 2**30
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def render(figures: dict[str, Any]) -> str:
    return "\n".join([*_head(figures), "", *_rates(figures), "", *_parts(figures), *_comparison(figures)])


def _head(figures: dict[str, Any]) -> list[str]:
    versions = figures["versions"]
    tier = f" in {figures['vae_dtype']} ({figures['vae_tier']})" if figures.get("vae_tier") else ""
    packages = ("torch", "triton", "cuda", "cudnn", "driver")
    known = ", ".join(f"{name} {versions[name]}" for name in packages if versions[name] is not None)
    switches = (f"{name} {'on' if figures[name] else 'off'}" for name in ("graphs", "overlap", "autotune"))
    states = {
        when: ", ".join(
            f"{name} {f'{value:g}' if isinstance(value, float) else value}"
            for name, value in figures[when].items()
        )
        for when in ("before", "after")
    }
    agreement = ", ".join(
        f"{result['what']} {result['error']:.1e} (allowed {result['allowed']:.1e})"
        for result in figures["agreement"]
    )
    return [
        f"{figures['model']} at {figures['width']} x {figures['height']}, {figures['denoising_steps']} "
        f"steps, window {figures['window_frames']}, {figures['dtype']}, VAE {figures['vae']}{tier}; "
        f"weights: {figures['weights']}",
        f"backend {figures['backend']}, {', '.join(switches)}",
        f"{figures['device']}, {figures['threads']} threads; commit {versions['commit']}, {known}",
        *(f"{when}: {state}" for when, state in states.items()),
        f"against the reference, first {figures['agreement'][0]['chunks']} chunks: {agreement}",
    ]


def _rates(figures: dict[str, Any]) -> list[str]:
    whole, first, memory = (figures[name] for name in ("frames_per_s", "first_frame_ms", "peak_memory_bytes"))
    played = f"{figures['real_time_factor']:.1f} times as fast as it plays"
    tails = "".join(
        f"{name} {value:.1f}, "
        for name in ("p95", "p99")
        if (value := figures[f"chunk_ms_{name}"]) is not None
    )
    end_to_end = "" if whole is None else f"{whole:.1f} frames/s end to end, {played}; "
    shares = [
        "unknown" if share is None else f"{share:.1%}"
        for share in (figures["flop_utilisation"], figures["flop_utilisation_without_vae"])
    ]
    return [
        f"{end_to_end}{figures['frames_per_s_without_vae']:.1f} frames/s without the VAE",
        f"chunk {figures['chunk_ms_p50']:.1f} ms ({tails}jitter {figures['jitter_ms']:.1f}; without the VAE "
        f"{figures['chunk_ms_without_vae_p50']:.1f}), {figures['chunks']} chunks measured"
        + ("" if first is None else f"; first frame {first:.1f} ms after the text states"),
        f"peak memory {'unknown' if memory is None else f'{memory / GIB:.2f} GiB'}; model FLOP utilisation "
        f"{shares[0]} end to end, {shares[1]} without the VAE",
    ]


def _parts(figures: dict[str, Any]) -> list[str]:
    ceilings = figures["ceilings"]
    rates = "of no data sheet here"
    if ceilings is not None:
        rates = (
            f"{ceilings['name']}: {ceilings['tb_per_s']:.3g} TB/s, {ceilings['bf16_tflop_per_s']:.3g} TFLOP/s"
        )
    lines = [
        f"parts of a chunk under the profiler, without graphs; floors at the rates {rates}",
        f"{'part':<18}{'ms':>10}{'floor, ms':>12}{'share':>8}",
    ]
    for row in figures["parts"]:
        floor, share = row["floor_ms"], row["share_of_floor"]
        lines.append(
            f"{row['part']:<18}{row['ms']:>10.3f}{'' if floor is None else f'{floor:.3f}':>12}"
            f"{'' if share is None else f'{share:.0%}':>8}"
        )
    together = f"{'together':<18}{sum(row['ms'] for row in figures['parts']):>10.3f}"
    return [*lines, f"{together}  a chunk takes {figures['chunk_ms_p50']:.3f} ms unprofiled"]


def _comparison(figures: dict[str, Any]) -> list[str]:
    comparison = figures.get("comparison")
    if comparison is None:
        return []
    rounds = f"{comparison['rounds']} rounds of {comparison['chunks_a_round']} chunks"
    if "default" in comparison:
        ours = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in comparison["default"].items())
        rival = f"the same engine without {ours} in the same process, alternating ({rounds})"
    else:
        rival = (
            f"the baseline in the same process, alternating ({rounds}; its attention: "
            f"{comparison['attention']}, its VAE: {comparison['vae']})"
        )
    lines = ["", rival]
    for name, label in (("end_to_end", "end to end"), ("without_vae", "without the VAE")):
        if name in comparison:
            rows = comparison[name]
            ratio = rows["ratio"]
            lines.append(
                f"{label}: {ratio['median']:.2f} times as fast ({ratio['min']:.2f} to {ratio['max']:.2f}); "
                f"chunk {rows['engine_chunk_ms']['median']:.1f} ms against "
                f"{rows['baseline_chunk_ms']['median']:.1f} ms"
            )
    return lines


def draw(figures: dict[str, Any], path: Path) -> None:
    """Bars of measured milliseconds and of floors, one pair for each part, written to `path`."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = figures["parts"]
    places = range(len(rows))
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar([place - 0.2 for place in places], [row["ms"] for row in rows], 0.4, label="measured")
    axes.bar([place + 0.2 for place in places], [row["floor_ms"] or 0 for row in rows], 0.4, label="floor")
    for place, row in zip(places, rows, strict=True):
        if row["share_of_floor"] is not None:
            axes.annotate(f"{row['share_of_floor']:.0%}", (place - 0.2, row["ms"]), ha="center", va="bottom")
    axes.set_xticks(list(places), [row["part"] for row in rows])
    axes.set_xlabel("part of a chunk (percent: floor over measured)")
    axes.set_ylabel("milliseconds in one chunk")
    axes.set_title(
        f"{figures['model']} at {figures['width']} x {figures['height']}, {figures['dtype']}, on "
        f"{figures['device']}\ncommit {figures['versions']['commit']}"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def check_plot(path: Path) -> None:
    """Raises RuntimeError where matplotlib is missing, ValueError for a file that cannot be drawn to."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no directory; make it, or write the plot elsewhere")
    if path.suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--plot is {path}; end it in {', '.join(PLOT_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib, which is not installed; pip install matplotlib")
