"""The bytes that torch's allocator of the CPU has given out, as its own profiler reports them, in the phases
of a pipeline."""

from __future__ import annotations

import bisect
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rfengine.grid import LatentGrid
from rfengine.pipeline import Pipeline
from rfengine.stream import VideoStream


def peaks_of(phases: dict[str, Callable[[], object]]) -> dict[str, int]:
    """Run the phases one after the other; the most that was taken in each, counted from the first on.

    What is there before counts nothing, and what is freed of it less than nothing: run all in one go.
    """
    marks = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for name, run in phases.items():
            with torch.profiler.record_function(f"phase {name}"):
                run()
            marks.append(name)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    spans = {
        event["name"].removeprefix("phase "): (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["name"].startswith("phase ") and event.get("ph") == "X"
    }
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return {name: _most(changes, *spans[name]) for name in marks}


def _most(changes: list[tuple[float, int]], start: float, stop: float) -> int:
    """The most that is taken between two times."""
    levels = list(itertools.accumulate((size for _, size in changes), initial=0))
    times = [time for time, _ in changes]
    return max(levels[bisect.bisect_left(times, start) : bisect.bisect_right(times, stop) + 1])


def peaks_of_pipeline(load: Callable[[], Pipeline], prompt: str) -> dict[str, int]:
    """Those of a MemoryPlan, of a pipeline that `load` makes: everything runs as from_pretrained and stream
    run it."""
    made: dict[str, object] = {}

    def opening() -> None:
        pipeline = made["pipeline"]
        grid = LatentGrid.of(pipeline.config)
        made["stream"] = VideoStream(pipeline._engine, grid, prompt, made.pop("states"), 0)

    def chunks(count: int) -> None:
        for _ in range(count):
            made["chunk"] = made["stream"].advance(ahead=False)

    def encoding() -> None:
        made["states"] = made["pipeline"]._engine.encode_text(prompt)

    return peaks_of(
        {
            "loading": lambda: made.update(pipeline=load()),
            "encoding": encoding,
            "opening": opening,
            "first chunk": lambda: chunks(1),
            "steady chunk": lambda: chunks(made["pipeline"].config.cache.filling_chunks + 1),
            "prompt switch": lambda: made["stream"].set_prompt(prompt),
        }
    )
