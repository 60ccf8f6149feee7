"""Throughput of one stream on this machine, end to end: text states in, uint8 frames in host memory out.

    python bench/throughput.py --json figures.json --compare baseline

First the engine is held against the reference (agreement.py); one that is wrong is not timed. The window is
full and chunks follow one another before the clock starts; writing a file is not part of it. The first frame
is that of a new stream in a warm process, from the text states on. A preset has random weights, which cost
the same as the published ones.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rfengine.benchmark.agreement import Agreement, check_agreement
from rfengine.benchmark.comparison import compare
from rfengine.benchmark.conditions import device_name, state, versions
from rfengine.benchmark.measured_engine import Engine
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.parts import PartTime, measure_parts, part_floors, steady_flops
from rfengine.benchmark.plot import check_plot, draw
from rfengine.benchmark.report import render
from rfengine.benchmark.timing import (
    ChunkTimes,
    frames_of,
    latents_of,
    recorded_chunks,
    time_chunks,
    time_flow,
)
from rfengine.costs.rates import GPU, gpu_of, measured_cpu
from rfengine.limits import check_options
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.runtime.options import runtime_switches

PROFILED_CHUNKS = 3
CHUNKS_A_ROUND = 5


def measure(options: ThroughputOptions, agreements: list[Agreement] | None = None) -> dict[str, Any]:
    """Figures and the circumstances they were measured under. Raises WrongEngineError, ValueError.

    agreements: what check_agreement found for an engine of these options; it is asked where this is None.
    """
    check_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    engine = Engine.load(options)
    device = engine.device
    if agreements is None:
        # FP8 frames are held to a PSNR when the decoder is opened
        held = engine.decoder if options.vae_precision == "default" else None
        agreements = check_agreement(engine.pipeline, engine.grid, held)
    gpu = gpu_of(device_name(device)) if device.type == "cuda" else measured_cpu(engine.pipeline.model.dtype)
    before = state(device)
    _reset_peak_memory(device)
    whole, first_ms = _time_whole(engine, options.chunks) if engine.decodes else (None, None)
    latents_only = _time_latents(engine, options.chunks)
    peak, after = _peak_memory(device), state(device)
    parts = _time_parts(options, gpu)
    figures = {
        **_setting(engine, options),
        "versions": versions(device),
        "before": before,
        "after": after,
        "agreement": [agreement.to_dict() for agreement in agreements],
        **_rates(engine, whole or latents_only, latents_only),
        "first_frame_ms": first_ms,
        "peak_memory_bytes": peak,
        "ceilings": None if gpu is None else {"name": gpu.name, "tb_per_s": gpu.tb_per_s,
                                              "tflop_per_s": gpu.bf16_tflop_per_s},
        **_utilisation(engine, gpu, whole, latents_only),
        "parts": [part.to_dict() for part in parts],
    }  # fmt: skip
    if options.compare is not None:
        rounds = min(CHUNKS_A_ROUND, options.chunks)
        figures["comparison"] = compare(engine.pipeline, engine.grid, rounds, engine.decodes)
    return figures


def _setting(engine: Engine, options: ThroughputOptions) -> dict[str, Any]:
    config, model = engine.pipeline.config, engine.pipeline.model
    switches = runtime_switches(config.runtime, engine.device)
    return {
        "model": config.name,
        "weights": engine.weights,
        "height": engine.grid.height,
        "width": engine.grid.width,
        "denoising_steps": len(config.schedule.denoising_steps),
        "window_frames": config.cache.window_frames,
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": engine.pipeline.backend,
        "ops": model.ops.choice,
        "vae": options.vae,
        "vae_precision": options.vae_precision,
        "vae_tier": engine.pipeline.vae_tier if engine.decodes else None,
        **{name: switches[name].on for name in ("graphs", "overlap", "autotune")},
        "device": device_name(engine.device),
        "threads": torch.get_num_threads(),
        "chunks": options.chunks,
    }


def _time_whole(engine: Engine, chunks: int) -> tuple[ChunkTimes, float]:
    """Times of chunks as frames, and ms from the text states to the first frames of a new stream."""
    _warm(engine, frames_of(engine.stream()), waits=False)
    started = time.perf_counter()
    advance = frames_of(engine.stream())
    advance()
    first_ms = (time.perf_counter() - started) * 1e3
    _warm(engine, advance, waits=False)
    return time_flow(advance, chunks), first_ms


def _time_latents(engine: Engine, chunks: int) -> ChunkTimes:
    advance = latents_of(engine.stream(), engine.pipeline.config.cache.chunk_frames)
    _warm(engine, advance, waits=True)
    return time_chunks(advance, chunks, engine.device, waits=True)


def _warm(engine: Engine, advance: Any, waits: bool) -> None:
    """Until the window is full and all graphs are recorded."""
    time_chunks(advance, recorded_chunks(engine.pipeline.config.cache), engine.device, waits)


def _time_parts(options: ThroughputOptions, gpu: GPU | None) -> list[PartTime]:
    """Of the same engine without graphs and without overlap, which is what a profiler can see into."""
    engine = Engine.load(replace(options, graphs="off", overlap="off"))
    frames = engine.pipeline.config.cache.chunk_frames
    advance = frames_of(engine.stream()) if engine.decodes else latents_of(engine.stream(), frames)
    _warm(engine, advance, waits=True)
    decoder = StreamingDecoder if options.vae in ("full", "none") else type(engine.decoder)
    model = engine.pipeline.model
    times = measure_parts(advance, model.ops, decoder, PROFILED_CHUNKS, engine.device)
    floors = part_floors(engine.shapes, gpu, model.dtype, engine.decodes)
    return [PartTime(part, ms, floors[part]) for part, ms in times.items()]


def _rates(engine: Engine, times: ChunkTimes, latents_only: ChunkTimes) -> dict[str, Any]:
    return {
        "frames_per_s": times.frames_per_s if engine.decodes else None,
        "real_time_factor": times.frames_per_s / engine.pipeline.config.fps,
        "frames_per_s_without_vae": latents_only.frames_per_s,
        "chunk_ms_p50": times.percentile_ms(0.5),
        "chunk_ms_p95": times.percentile_ms(0.95),
        "chunk_ms_p99": times.percentile_ms(0.99),
        "chunk_ms_without_vae_p50": latents_only.percentile_ms(0.5),
        "jitter_ms": times.jitter_ms,
    }


def _utilisation(
    engine: Engine, gpu: GPU | None, whole: ChunkTimes | None, latents_only: ChunkTimes
) -> dict[str, float | None]:
    """FLOPs of the model in a chunk over its median time and the rate of products."""

    def share(times: ChunkTimes | None, decodes: bool) -> float | None:
        if gpu is None or times is None:
            return None
        rate = steady_flops(engine.shapes, decodes) / times.percentile_ms(0.5) / 1e9
        return rate / gpu.bf16_tflop_per_s

    return {
        "flop_utilisation": share(whole, True),
        "flop_utilisation_without_vae": share(latents_only, False),
    }


def _reset_peak_memory(device: torch.device) -> None:
    gc.collect()  # what the agreement needed is no part of the engine
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes that torch held at most since the reset; on a CPU of the whole process, where it is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def run(options: ThroughputOptions) -> int:
    """Measure, then print the table; JSON goes to a file, or takes its place. Returns the exit status."""
    if options.plot is not None:
        check_plot(options.plot)
    figures = measure(options)
    if options.plot is not None:
        draw(figures, options.plot)
    text = json.dumps(figures, indent=2)
    to_terminal = str(options.json) == "-"
    if options.json is not None and not to_terminal:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text if to_terminal else render(figures))
    return 0
