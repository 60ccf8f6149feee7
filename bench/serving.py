"""What the server costs: its first fragment and its time for a chunk, at a client, beside the engine's own.

    python bench/serving.py --sessions 4 --chunks 60 --rounds 5
    python bench/serving.py --sessions 8 --chunks 60 --rounds 5 --replicas 2

The engine alone is streams of one pipeline that take turns in one process. The server is `rfengine serve` in
its own process, with WebSocket clients in another. Both make the same chunks, in alternation. With --replicas
a server with so many replicas stands beside one with a single engine, at the same load.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated
from urllib.error import URLError
from urllib.request import urlopen

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rfengine.cli.process import run_script
from rfengine.limits import Range, check_options

PROMPT = "a large red circle moving slowly to the right over a cloudy sky"
_START_S = 300.0
_FIRST_CHUNKS = 5  # of which a round has the median
_REST_S = 0.3  # before each: clients come to a server that waits


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Compare a server with the engine that it runs."""

    model: str = "tiny"
    """A checkpoint directory, or tiny."""
    sessions: Annotated[int, Range(1, 64)] = 4
    """Streams at once."""
    chunks: Annotated[int, Range(8, 10_000)] = 60
    """Chunks of each stream in a round."""
    rounds: Annotated[int, Range(1, 100)] = 5
    """How often the two alternate."""
    replicas: Annotated[int, Range(1, 64)] = 1
    """Compare a server of so many replicas with a single one, in place of the engine; needs rfengine[ray]."""


Pairs = list[tuple[float, float]]  # seconds of the engine alone, and at a client of the server


def run(options: ServingOptions) -> None:
    check_options(options)
    if options.replicas > 1:
        compare_replicas(options)
        return
    from rfengine import Pipeline

    pipeline = Pipeline.from_pretrained(options.model)
    sessions, chunks = options.sessions, options.chunks
    firsts: Pairs = []
    later: Pairs = []
    with tempfile.TemporaryDirectory() as directory, server_process(options, Path(directory)) as url:
        asyncio.run(served_chunk(url, sessions, 8))
        engine_chunk(pipeline, sessions, 8)
        for _ in range(options.rounds):
            firsts.append((engine_first(pipeline), asyncio.run(served_first(url))))
            later.append(
                (engine_chunk(pipeline, sessions, chunks), asyncio.run(served_chunk(url, sessions, chunks)))
            )
    report("first chunk", firsts)
    report(f"a chunk of {sessions} streams", later)


def compare_replicas(options: ServingOptions) -> None:
    """The time of a chunk at clients of a single server, and at as many of one with replicas.

    A server that rests while the other is measured still runs; that takes the same from both.
    """
    sides: list[list[list[float]]] = [[], []]
    with ExitStack() as stack:
        urls = []
        for replicas in (1, options.replicas):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            urls.append(stack.enter_context(server_process(options, directory, replicas)))
        for url in urls:
            asyncio.run(chunk_times(url, options.sessions, 8))
        for _ in range(options.rounds):
            for side, url in zip(sides, urls, strict=True):
                side.append(asyncio.run(chunk_times(url, options.sessions, options.chunks)))
    print(f"time of a chunk at each of {options.sessions} clients, median of {options.rounds} rounds:")
    for name, percent in (("median", 50), ("p95", 95)):
        single, several = ([percentile(times, percent) * 1e3 for times in side] for side in sides)
        ratio = statistics.median(theirs / ours for ours, theirs in zip(single, several, strict=True))
        print(
            f"{name}: single {statistics.median(single):.1f} ms ({min(single):.1f} to {max(single):.1f}), "
            f"{options.replicas} replicas {statistics.median(several):.1f} ms ({min(several):.1f} to "
            f"{max(several):.1f}), ratio {ratio:.3f}"
        )


async def chunk_times(url: str, sessions: int, chunks: int) -> list[float]:
    """Seconds between two chunks of a session, while all have begun and none has ended."""
    played = await asyncio.gather(*(play(url, seed, chunks) for seed in range(sessions)))
    begun, over = max(each[1] for each in played), min(each[2][-1] for each in played)
    return [
        later - earlier
        for _, _, moments in played
        for earlier, later in pairwise(moments)
        if begun <= earlier and later <= over
    ]


def percentile(times: list[float], percent: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def engine_first(pipeline) -> float:
    """From asking for a video to its first chunk, one stream alone."""
    times = []
    for _ in range(_FIRST_CHUNKS):
        time.sleep(_REST_S)
        started = time.perf_counter()
        next(pipeline.stream(PROMPT))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def served_first(url: str) -> float:
    times = []
    for _ in range(_FIRST_CHUNKS):
        await asyncio.sleep(_REST_S)
        times.append((await play(url, 0, 1))[0])
    return statistics.median(times)


def engine_chunk(pipeline, sessions: int, chunks: int) -> float:
    """Of each chunk after the first ones."""
    streams = [pipeline.stream(PROMPT, seed=seed) for seed in range(sessions)]
    for stream in streams:
        next(stream)
    started = time.perf_counter()
    for _ in range(chunks - 1):
        for stream in streams:
            next(stream)
    return (time.perf_counter() - started) / (sessions * (chunks - 1))


async def served_chunk(url: str, sessions: int, chunks: int) -> float:
    times = await asyncio.gather(*(play(url, seed, chunks) for seed in range(sessions)))
    begun = max(each[1] for each in times)  # every session has its first chunk
    made = sum(sum(moment > begun for moment in each[2]) for each in times)
    return (max(each[2][-1] for each in times) - begun) / made


async def play(url: str, seed: int, chunks: int) -> tuple[float, float, list[float]]:
    """Seconds to the first chunk, when it came, and when each later one came."""
    from websockets.asyncio.client import connect

    start = {"type": "session.start", "prompt": PROMPT, "seed": seed, "num_frames": 12 * chunks - 3}
    moments = []
    async with connect(url, max_size=None) as websocket:
        asked = time.perf_counter()
        await websocket.send(json.dumps(start))
        async for message in websocket:
            if isinstance(message, bytes):
                moments.append(time.perf_counter())
            elif json.loads(message)["type"] == "session.done":
                break
    return moments[0] - asked, moments[0], moments[1:]


@contextmanager
def server_process(options: ServingOptions, directory: Path, replicas: int = 1) -> Iterator[str]:
    """`rfengine serve` on a free port; gives the address of its WebSocket once every replica is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "rfengine.cli", "serve", "--model", options.model, "--port", port]
    command += ["--data-directory", str(directory), "--max-sessions", str(options.sessions + 1)]
    command += ["--replicas", str(replicas)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + _START_S
    try:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start; try {' '.join(command)}")
            try:
                with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
                    if json.load(answer).get("replicas", {"ready": 1})["ready"] == replicas:
                        break
            except (URLError, TimeoutError, ConnectionError):
                pass
            time.sleep(0.1)
        yield f"ws://127.0.0.1:{port}/v1/realtime/video"
    finally:
        process.terminate()
        process.wait(60)


def report(name: str, pairs: Pairs) -> None:
    alone, served = ([each * 1e3 for each in side] for side in zip(*pairs, strict=True))
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    print(
        f"{name}: engine {statistics.median(alone):.1f} ms ({min(alone):.1f} to {max(alone):.1f}), "
        f"server {statistics.median(served):.1f} ms ({min(served):.1f} to {max(served):.1f}), "
        f"ratio {ratio:.3f} (median of {len(pairs)} pairs)"
    )


if __name__ == "__main__":
    sys.exit(run_script("bench/serving.py", ServingOptions, run))
