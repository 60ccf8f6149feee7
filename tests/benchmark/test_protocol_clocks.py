"""What is inside of each protocol's time, on an engine whose every piece of work takes seconds of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rfengine.benchmark import steady
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.protocols import fresh_process, session, streams, videos
from rfengine.benchmark.protocols.protocol import Setting, Trial
from rfengine.config import CacheConfig

CHUNK, IDLE, TEXT, WRITE, CLOSE = 1.0, 0.25, 10.0, 0.5, 3.0  # seconds
FILLING, COMPILING = 20.0, 1000.0  # more for each of the first WARM chunks: of a stream, of an engine
WARM, FRAMES, FPS = 20, 30, 16  # chunks, of a whole video, of a second
CHUNKS = 3  # of a whole video: it has 12 frames in each


class SlowStream:
    def __init__(self, engine: SlowEngine) -> None:
        self.engine, self.grid, self.index = engine, engine.grid, 0

    def advance(self, decode: bool = True) -> SimpleNamespace:
        engine = self.engine
        engine.now += CHUNK + FILLING * (self.index < WARM) + COMPILING * (engine.made < WARM)
        self.index, engine.made = self.index + 1, engine.made + 1
        return SimpleNamespace(frames=[0] * 12, index=self.index - 1)

    def take(self, count: int) -> Iterator[SimpleNamespace]:
        return (self.advance() for _ in range(count))

    def close(self) -> None:
        pass


class SlowEngine:
    """As much of MeasuredEngine as a measure sees; its pipeline is itself."""

    def __init__(self) -> None:
        self.now, self.made = 0.0, 0
        self.given, self.text_encoder, self.encodes_text = "given", "encoder", True
        self.grid = SimpleNamespace(height=32, width=32, temporal_stride=4)
        self.config = SimpleNamespace(cache=CacheConfig(), fps=FPS)
        self.device, self.pipeline = torch.device("cpu"), self

    def stream(self) -> SlowStream:
        self.now += TEXT * (self.text_encoder != self.given)
        return SlowStream(self)

    def generate(self, prompt: str, num_frames: int, height: int, width: int, seed: int) -> None:
        list(self.stream().take(self.chunk_count(num_frames)))

    def chunk_count(self, frames: int) -> int:
        return -(-frames // 12)

    def synchronize(self) -> None:
        self.now += IDLE


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Trial:
    engine = SlowEngine()

    @contextmanager
    def writer(path: Path, *size: float) -> Iterator[SimpleNamespace]:
        def write(frames: list[int]) -> None:
            engine.now += WRITE
            made.frames_written += len(frames)

        made = SimpleNamespace(frames_written=0, write=write)
        yield made
        engine.now += CLOSE
        path.write_text("a video")

    monkeypatch.setattr(time, "perf_counter", lambda: engine.now)
    monkeypatch.setattr(steady, "recorded_chunks", lambda cache: WARM)
    monkeypatch.setattr(videos, "VideoWriter", writer)
    return Trial(Setting(ThroughputOptions(chunks=100)), FRAMES, engine)


def test_chunks_are_timed_in_their_steady_state_with_the_device_idle_after_latents(trial: Trial) -> None:
    latents = streams.measure_latents(trial)
    assert latents["chunk_ms_p50"] == latents["chunk_ms_p99"] == (CHUNK + IDLE) * 1e3
    frames = streams.measure_frames(trial)
    assert frames["chunk_ms_p50"] == frames["chunk_ms_p99"] == CHUNK * 1e3 and frames["chunks"] == 100
    assert (latents["frames_per_s"], frames["frames_per_s"]) == (12 / (CHUNK + IDLE), 12 / CHUNK)


def test_the_first_frame_of_a_steady_run_is_that_of_a_new_stream_in_a_warm_engine(trial: Trial) -> None:
    assert steady.time_frames(trial.engine, 1).first_ms == (TEXT + CHUNK + FILLING) * 1e3


@pytest.mark.parametrize(("fps", "late"), [(FPS, 100), (12, 0)])
def test_a_chunk_is_late_when_it_takes_longer_than_it_plays(trial: Trial, fps: int, late: int) -> None:
    trial.engine.config.fps = fps
    figures = streams.measure_latency(trial)
    assert figures["chunk_ms_longest"] == CHUNK * 1e3 and figures["jitter_ms"] == 0
    assert figures["late_chunks"] == late


def test_a_first_frame_has_a_new_stream_and_its_text_in_a_warm_engine(trial: Trial) -> None:
    figures = streams.measure_first_frame(trial)
    assert figures["given_ms"] == figures["given_ms_most"] == (CHUNK + FILLING) * 1e3
    assert figures["encoded_ms"] == figures["encoded_ms_most"] == (TEXT + CHUNK + FILLING) * 1e3


def test_a_file_has_its_text_its_encoding_and_its_closing_in_its_time(trial: Trial) -> None:
    figures = videos.measure_file(trial)
    assert figures["writing_s"] == CHUNKS * WRITE + CLOSE
    assert figures["seconds"] == TEXT + CHUNKS * (CHUNK + FILLING + WRITE) + CLOSE
    assert figures["frames"] == FRAMES


def test_a_warm_clip_comes_after_one_that_is_not_counted(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial.engine.made = WARM - CHUNKS  # a clip of tiny fills no window, and leaves nothing to compile
    monkeypatch.setattr(videos, "CLIPS", 2)
    figures = videos.measure_warm_clip(trial)
    assert figures["seconds"] == figures["seconds_most"] == TEXT + CHUNKS * (CHUNK + FILLING)


def test_threads_are_those_asked_for_here_and_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, set_to = ThroughputOptions(threads=3, protocol=("latency",)), list[int]()

    class LoadedError(Exception):
        pass

    def load(*given: Any) -> None:
        raise LoadedError

    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(Setting, "load", load)
    with pytest.raises(LoadedError):
        session.run(replace(options, device="cpu", model="tiny", height=32, width=32))
    monkeypatch.setattr(fresh_process.pickle, "loads", lambda content: fresh_process.Task(Setting(options)))
    (tmp_path / fresh_process.TASK_FILE).write_bytes(b"")
    monkeypatch.setattr(fresh_process.sys, "argv", ["", str(tmp_path)])
    with pytest.raises(LoadedError):
        fresh_process.main()
    assert set_to == [3, 3]
