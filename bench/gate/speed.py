"""Parts throughput and flatness: frames per second, by the functions of bench/throughput.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gate.part import Item, Setting
from gate.record import Result
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.benchmark import throughput
from rfengine.benchmark.agreement import Agreement, WrongEngineError, check_agreement, engine_latents
from rfengine.benchmark.comparison import compare
from rfengine.benchmark.measured_engine import Engine
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.timing import (
    LEAD_IN,
    Advance,
    ChunkTimes,
    frames_of,
    latents_of,
    recorded_chunks,
    time_chunks,
    time_flow,
)
from rfengine.config import RuntimeConfig

CHUNKS, VARIANT_CHUNKS = 30, 20
ROUNDS, COMPARED_CHUNKS = 3, 2  # a chunk of the baseline takes more than half a second
FLAT_CHUNKS = 1000  # what the goal asks for
TOLD_EVERY = 10
LEAST_TENTHS = 20  # chunks below which a tenth of them says nothing
VARIANTS: dict[str, dict[str, Any]] = {
    "no VAE": {"decode": False},
    "tiny VAE": {"runtime": RuntimeConfig(vae="tiny")},
    "graphs off": {"runtime": RuntimeConfig(graphs=False)},
    "overlap off": {"runtime": RuntimeConfig(overlap=False)},
    "graphs off, overlap off": {"runtime": RuntimeConfig(graphs=False, overlap=False)},
}


def options_of(setting: Setting) -> ThroughputOptions:
    if setting.small:
        return ThroughputOptions(device="cpu", model="tiny", height=32, width=32, chunks=2, threads=1)
    return ThroughputOptions(device="cuda", chunks=CHUNKS)


@dataclass
class Measured:
    """The engine that all items of a process measure, once it was found right.

    agreements: what its first chunks were found to be; None before, and where an earlier process looked.
    """

    setting: Setting
    agreements: list[Agreement] | None = None
    _engine: Engine | None = None
    _latents: list[Tensor] = field(default_factory=list)
    _wrong: WrongEngineError | None = None

    def loaded(self) -> Engine:
        """The engine, tuned, of which nothing is known yet."""
        if self._engine is None:
            self._engine = Engine.load(options_of(self.setting))
        return self._engine

    def engine(self) -> Engine:
        """Raises WrongEngineError; an engine that an earlier process found right is not looked at again."""
        engine = self.loaded()
        if self._wrong is not None:
            raise self._wrong
        earlier = (told for part in ("throughput", "flatness") for told in self.setting.results(part))
        if self.agreements is None and not any("agreement" in told for told in earlier):
            try:
                self.agreements = check_agreement(engine.pipeline, engine.grid, engine.decoder)
            except WrongEngineError as error:
                self._wrong = error
                raise
        return engine

    def latents(self) -> list[Tensor]:
        engine = self.engine()
        if not self._latents:
            self._latents = first_latents(engine)
        return self._latents


def throughput_items(setting: Setting) -> list[Item]:
    measured = Measured(setting)
    variants = ["no VAE"] if setting.small else list(VARIANTS)
    least_s = (0, 0) if setting.small else (45, 60)
    return [
        # every contest tells of itself, so a long silence is a hang
        Item("load", lambda: _loaded(measured), silent_share=0.25),
        Item("agreement", lambda: _agreement(measured), silent_share=0.4),  # loads too, after a hang
        Item("frames", lambda: _frames(measured)),
        Item("baseline", lambda: _against_baseline(measured), least_s[1]),
        Item("engine", lambda: _whole(measured), least_s[0]),
        *(Item(name, _variant(measured, name), least_s=8) for name in variants),
    ]


def flatness_items(setting: Setting) -> list[Item]:
    return [Item("chunks in a row", lambda: flat_run(Measured(setting), setting), least_s=10)]


def _loaded(measured: Measured) -> Iterator[Result]:
    """Loading, which compiles the kernels and tunes, takes long: what it took is told by itself."""
    yield {"choice": measured.loaded().pipeline.model.ops.choice}


def _agreement(measured: Measured) -> Iterator[Result]:
    measured.engine()
    yield {"agreement": [agreement.to_dict() for agreement in measured.agreements or ()]}


def _frames(measured: Measured) -> Iterator[Result]:
    """The figures that goals are for, before anything that takes longer."""
    engine = measured.engine()
    warm_up = recorded_chunks(engine.pipeline.config.cache)
    time_chunks(advance_of(engine), warm_up, engine.device, False)
    started = time.perf_counter()
    advance = advance_of(engine)
    advance()
    first_ms = (time.perf_counter() - started) * 1e3
    time_chunks(advance, warm_up, engine.device, False)
    times = time_flow(advance, options_of(measured.setting).chunks)
    yield {"frames": _figures(times) | {"first_frame_ms": first_ms, "weights": engine.weights}}


def _whole(measured: Measured) -> Iterator[Result]:
    """The table of bench/throughput.py: parts against their floors, utilisation, memory."""
    measured.engine()
    yield {"throughput": throughput.measure(options_of(measured.setting), measured.agreements)}


def _against_baseline(measured: Measured) -> Iterator[Result]:
    engine = measured.engine()
    chunks = 1 if measured.setting.small else COMPARED_CHUNKS
    yield {"comparison": compare(engine.pipeline, engine.grid, chunks, engine.decodes, ROUNDS)}


def _variant(measured: Measured, name: str) -> Callable[[], Iterator[Result]]:
    def run() -> Iterator[Result]:
        setting = measured.setting
        expected = measured.latents()
        engine = Engine.load(replace(options_of(setting), **VARIANTS[name]))
        pairs = zip(first_latents(engine), expected, strict=True)
        apart = max(relative_error(own, other.cpu()) for own, other in pairs)
        advance = advance_of(engine)
        warm_up = recorded_chunks(engine.pipeline.config.cache)
        time_chunks(advance, warm_up, engine.device, not engine.decodes)
        chunks = 1 if setting.small else VARIANT_CHUNKS
        if engine.decodes:
            times = time_flow(advance, chunks)
        else:
            times = time_chunks(advance, chunks, engine.device, waits=True)
        yield {"variant": name, "latents_apart": apart, **_figures(times)}

    return run


def first_latents(engine: Engine) -> list[Tensor]:
    """Those of a new stream as far as the first eviction."""
    return engine_latents(engine.pipeline, engine.grid, engine.pipeline.config.cache.window_chunks + 1)


def advance_of(engine: Engine) -> Advance:
    if engine.decodes:
        return frames_of(engine.stream())
    return latents_of(engine.stream(), engine.pipeline.config.cache.chunk_frames)


def _figures(times: ChunkTimes) -> Result:
    return {
        "chunks": len(times.seconds),
        "frames_per_s": times.frames_per_s,
        "chunk_ms_p50": times.percentile_ms(0.5),
        "chunk_ms_p99": times.percentile_ms(0.99),
    }


def flat_run(measured: Measured, setting: Setting) -> Iterator[Result]:
    """As many chunks in a row as there is time for, FLAT_CHUNKS at most, told of again and again."""
    engine = measured.engine()
    advance, device = advance_of(engine), engine.device
    time_chunks(advance, recorded_chunks(engine.pipeline.config.cache), device, False)
    most = 2 if setting.small else FLAT_CHUNKS
    seconds: list[float] = []
    frames, before = 0, None
    longest = 0.0
    while len(seconds) < most and (setting.small or setting.seconds_left > 2 + 1.5 * longest):
        times = time_flow(advance, min(TOLD_EVERY, most - len(seconds)), 0 if seconds else LEAD_IN)
        longest = max(longest, sum(times.seconds))
        seconds += times.seconds
        frames += times.frames
        run = ChunkTimes(tuple(seconds), frames)
        held = memory_bytes(device)
        # held against what it is after some chunks: recording the graphs emptied torch's cache of free memory
        grown = None if before is None else held - before
        before = held if before is None else before
        yield {"flat": _figures(run) | {"memory_growth_bytes": grown, "time_growth": time_growth(seconds)}}


def time_growth(seconds: list[float]) -> float | None:
    """Median of the last tenth over that of the first, less 1; None for too few chunks."""
    if len(seconds) < LEAST_TENTHS:
        return None
    tenth = len(seconds) // 10
    return statistics.median(seconds[-tenth:]) / statistics.median(seconds[:tenth]) - 1


def memory_bytes(device: torch.device) -> int:
    """What torch holds of the GPU; on a CPU what the process does, 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)
