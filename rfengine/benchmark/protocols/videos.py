"""Measures of whole videos: a long one with its file, and a clip in a warm and in a fresh process."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from rfengine.benchmark.measured_engine import PROMPT, SEED
from rfengine.benchmark.protocols.fresh_process import Task, run_fresh
from rfengine.benchmark.protocols.protocol import RATE, Figures, Trial
from rfengine.benchmark.steady import warm_up
from rfengine.benchmark.timing import spread
from rfengine.tuning.record import default_cache_path
from rfengine.video import VideoWriter

CLIPS = 3


def measure_file(trial: Trial) -> Figures:
    """A new stream until the MP4 with its first `frames` frames is closed."""
    engine, frames = trial.engine, trial.frames
    warm_up(engine)
    writing_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        started = time.perf_counter()
        stream = engine.stream()
        with VideoWriter(path, engine.pipeline.config.fps, engine.grid.height, engine.grid.width) as writer:
            for chunk in stream.take(engine.pipeline.chunk_count(frames)):
                begun = time.perf_counter()
                writer.write(chunk.frames[: frames - writer.frames_written])
                writing_s += time.perf_counter() - begun
            begun = time.perf_counter()
        ended = time.perf_counter()
        return {
            "seconds": ended - started, RATE: frames / (ended - started), "frames": writer.frames_written,
            "writing_s": writing_s + ended - begun, "file_bytes": path.stat().st_size,
        }  # fmt: skip


def measure_warm_clip(trial: Trial) -> Figures:
    """CLIPS clips one after another, after one that is not counted."""
    seconds = [_clip_s(trial) for _ in range(1 + CLIPS)][1:]
    found = spread(seconds)
    return {
        "seconds": found["median"], "seconds_least": found["min"], "seconds_most": found["max"],
        RATE: trial.frames / found["median"], "frames": trial.frames,
    }  # fmt: skip


def _clip_s(trial: Trial) -> float:
    engine = trial.engine
    started = time.perf_counter()
    engine.pipeline.generate(
        PROMPT, num_frames=trial.frames, height=engine.grid.height, width=engine.grid.width, seed=SEED
    )
    return time.perf_counter() - started


def measure_cold_clip(trial: Trial) -> Figures:
    """A clip in a process of its own, from its start; kernels are compiled and backends timed anew."""
    trial.release()
    with tempfile.TemporaryDirectory() as folder:
        empty = empty_caches(Path(folder))
        started = time.monotonic()
        marks = run_fresh(Task(trial.setting, frames=trial.frames), Path(folder), empty)
    seconds = marks["made"] - started
    return {
        "seconds": seconds, RATE: trial.frames / seconds, "frames": trial.frames,
        "start_s": marks["imported"] - started,
        "load_s": marks["loaded"] - marks["imported"],
        "making_s": marks["made"] - marks["loaded"],
        "first_frame_s": marks["first_frame"] - started,
    }  # fmt: skip


def empty_caches(folder: Path) -> dict[str, str]:
    """Variables by which a process finds no kernel that Triton or the driver has compiled before, and no
    record of timed backends. The engines of `rfengine export-vae`, which no start builds, are there."""
    own = folder / "rfengine"
    own.mkdir()
    (own / "tensorrt").symlink_to(default_cache_path().parent / "tensorrt")
    return {
        "XDG_CACHE_HOME": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
    }
