"""Throughput of one stream on this machine, end to end: text states in, uint8 frames in host memory out.

    python bench/throughput.py --json figures.json --compare baseline

First the engine is compared with the reference (agreement.py); one that is wrong is not timed. The window is
full and chunks follow one another before the clock starts; writing a file is not part of it. The first frame
is that of a new stream in a warm process, from the text states on. A preset has random weights, which cost
the same as the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from rfengine.benchmark.agreement import check_agreement
from rfengine.benchmark.comparison import compare, compare_with_default
from rfengine.benchmark.conditions import peak_memory, reset_peak_memory, state, versions
from rfengine.benchmark.measured_engine import MeasuredEngine, setting_of
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.parts import measure_parts, part_floors, part_rows, steady_flops
from rfengine.benchmark.report import check_plot, draw, render
from rfengine.benchmark.steady import time_frames, time_latents, warm
from rfengine.benchmark.timing import ChunkTimes, frames_of, latents_of
from rfengine.costs.rates import GPU, rates_of
from rfengine.files import require_writable, write_text
from rfengine.limits import check_options
from rfengine.models.streaming_decoder import StreamingDecoder

PROFILED_CHUNKS = 3
CHUNKS_A_ROUND = 3  # a chunk of the baseline takes more than half a second on an H100
MOST_LATENT_CHUNKS = 40  # their median needs no more


def measure(options: ThroughputOptions) -> dict[str, Any]:
    """Figures and the circumstances they were measured under. Raises WrongEngineError, ValueError."""
    return list(stages(options))[-1]


def stages(options: ThroughputOptions) -> Iterator[dict[str, Any]]:
    """The figures of chunks, then with the comparison, if it is asked for, then with those of the parts."""
    check_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    engine = MeasuredEngine.load(options)
    # what is loaded beside it has the options of the preset that it has, and not those of another one
    options = replace(options, runtime=replace(engine.pipeline.config.runtime, preset=None))
    device = engine.device
    # FP8 frames are held to a PSNR when the decoder is opened
    held = engine.decoder if options.runtime.vae_precision != "fp8" else None
    agreements = check_agreement(engine.pipeline, engine.grid, held)
    gpu = rates_of(device, engine.pipeline.model.dtype)
    before = state(device)
    reset_peak_memory(device)
    whole = time_frames(engine, options.chunks) if engine.decodes else None
    latents_only = time_latents(engine, min(options.chunks, MOST_LATENT_CHUNKS))
    peak, after = peak_memory(device), state(device)
    figures = {
        **setting_of(engine, options),
        "versions": versions(device),
        "before": before,
        "after": after,
        "agreement": [asdict(agreement) for agreement in agreements],
        **_rates(engine, (whole or latents_only).times, latents_only.times),
        "first_frame_ms": whole and whole.first_ms,
        "peak_memory_bytes": peak,
        "memory_growth_bytes": (whole or latents_only).memory_growth,
        "ceilings": gpu and asdict(gpu),
        "flop_utilisation": whole and _utilisation(engine, gpu, whole.times, True),
        "flop_utilisation_without_vae": _utilisation(engine, gpu, latents_only.times, False),
    }
    yield figures
    if options.compare is not None:
        rounds = min(CHUNKS_A_ROUND, options.chunks)
        figures["comparison"] = _compared(engine, options, rounds)
        yield figures
    figures["parts"] = _time_parts(options, gpu)
    yield figures


def _compared(engine: MeasuredEngine, options: ThroughputOptions, rounds: int) -> dict[str, Any]:
    if options.compare == "baseline":
        return compare(engine.pipeline, engine.grid, rounds, engine.decodes)
    runtime = replace(
        options.runtime, precision="default", vae_precision="default", fp8_table=None, block_weights=None
    )
    dtype = str(engine.pipeline.model.dtype).removeprefix("torch.")
    plain = MeasuredEngine.load(replace(options, runtime=runtime, dtype=dtype))
    return compare_with_default(engine, plain, rounds)


def _time_parts(options: ThroughputOptions, gpu: GPU | None) -> list[dict[str, Any]]:
    """Of the same engine without graphs and without overlap, which is what a profiler can see into."""
    runtime = replace(options.runtime, graphs=False, overlap=False)
    engine = MeasuredEngine.load(replace(options, runtime=runtime))
    frames = engine.pipeline.config.cache.chunk_frames
    advance = frames_of(engine.stream()) if engine.decodes else latents_of(engine.stream(), frames)
    warm(engine, advance, waits=True)
    decoder = StreamingDecoder if runtime.vae == "full" or not options.decode else type(engine.decoder)
    model = engine.pipeline.model
    times = measure_parts(advance, model.ops, decoder, PROFILED_CHUNKS, engine.device)
    return part_rows(times, part_floors(engine.shapes, gpu, model.dtype, engine.decodes))


def _rates(engine: MeasuredEngine, times: ChunkTimes, latents_only: ChunkTimes) -> dict[str, Any]:
    return {
        "frames_per_s": times.frames_per_s if engine.decodes else None,
        "real_time_factor": times.frames_per_s / engine.pipeline.config.fps,
        "frames_per_s_without_vae": latents_only.frames_per_s,
        "chunk_ms_p50": times.percentile_ms(0.5),
        "chunk_ms_p95": times.tail_ms(0.95),
        "chunk_ms_p99": times.tail_ms(0.99),
        "chunk_ms_without_vae_p50": latents_only.percentile_ms(0.5),
        "jitter_ms": times.jitter_ms,
        "time_growth": times.growth,
    }


def _utilisation(engine: MeasuredEngine, gpu: GPU | None, times: ChunkTimes, decodes: bool) -> float | None:
    """FLOPs of the model in a chunk over its median time and the rate of products."""
    rate = steady_flops(engine.shapes, decodes) / times.percentile_ms(0.5) / 1e9
    return gpu and rate / gpu.bf16_tflop_per_s


def run(options: ThroughputOptions) -> int:
    """Measure, then print the table; JSON takes its place, or goes to a file after every stage. Returns the
    exit status."""
    if options.plot is not None:
        check_plot(options.plot)
    to_terminal, figures = str(options.json) == "-", {}
    if options.json is not None and not to_terminal:
        require_writable(options.json, "--json")
    for figures in stages(options):
        if options.json is not None and not to_terminal:
            write_text(options.json, json.dumps(figures, indent=2) + "\n")
    if options.plot is not None:
        draw(figures, options.plot)
    print(json.dumps(figures, indent=2) if to_terminal else render(figures))
    return 0
