"""Measures of streams: chunks of the steady state, with and without frames, and the first frame."""

from __future__ import annotations

from rfengine.benchmark.protocols.protocol import RATE, Figures, Trial
from rfengine.benchmark.steady import first_frame, time_frames, time_latents, warm_up
from rfengine.benchmark.timing import ChunkTimes, spread

FIRST_FRAMES = 5  # new streams


def measure_latents(trial: Trial) -> Figures:
    """Chunks up to their latents, the device waited for after each; counted as the frames they would give."""
    return _chunk_figures(time_latents(trial.engine, trial.setting.options.chunks).times)


def measure_frames(trial: Trial) -> Figures:
    """Chunks as frames in host memory, one after another."""
    return _chunk_figures(time_frames(trial.engine, trial.setting.options.chunks).times)


def measure_latency(trial: Trial) -> Figures:
    """How long a caller waits for each chunk, and how evenly they come."""
    engine = trial.engine
    times = time_frames(engine, trial.setting.options.chunks).times
    cache, fps = engine.pipeline.config.cache, engine.pipeline.config.fps
    plays_s = cache.chunk_frames * engine.grid.temporal_stride / fps
    return {
        **_chunk_figures(times),
        "chunk_ms_longest": max(times.seconds) * 1e3,
        "jitter_ms": times.jitter_ms,
        "late_chunks": sum(seconds > plays_s for seconds in times.seconds),
    }


def measure_first_frame(trial: Trial) -> Figures:
    """From the call to the frames of the first chunk: with the text states given and, where the model has a
    text encoder, with the prompt encoded."""
    engine = trial.engine
    warm_up(engine)
    encoded = _first_frames(trial) if engine.encodes_text else None
    engine.pipeline.text_encoder = engine.given
    given = _first_frames(trial)
    return {
        "given_ms": given["median"], "given_ms_least": given["min"], "given_ms_most": given["max"],
        "encoded_ms": encoded and encoded["median"],
        "encoded_ms_least": encoded and encoded["min"],
        "encoded_ms_most": encoded and encoded["max"],
    }  # fmt: skip


def _first_frames(trial: Trial) -> dict[str, float]:
    return spread([first_frame(trial.engine)[1] for _ in range(FIRST_FRAMES)])


def _chunk_figures(times: ChunkTimes) -> Figures:
    return {
        RATE: times.frames_per_s,
        "chunk_ms_p50": times.percentile_ms(0.5),
        "chunk_ms_p95": times.tail_ms(0.95),
        "chunk_ms_p99": times.tail_ms(0.99),
        "chunks": len(times.seconds),
    }
