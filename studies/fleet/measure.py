"""Measure the server's own SessionService on `tiny`, and what its video takes on the network.

    python -m studies.fleet.measure                 # writes studies/fleet/results/tiny_1_thread.json
    python -m studies.fleet.measure --threads 2     # writes tiny_2_threads.json beside it
    python -m studies.fleet.measure --rounds 2 --chunks 20 --output try.json

Sessions run in one service as fast as they can, 1, 2 and 4 of them in alternation. Each encodes its chunks
as the server does. The times of one session alone are what the simulation draws from; those of several are
what its prediction is compared with (python -m studies.fleet.run --scenario tiny).
"""

from __future__ import annotations

import datetime
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import torch

from rfengine.cli.process import run_script
from rfengine.files import require_writable
from rfengine.limits import Entries, Range, check_options
from rfengine.pipeline import Pipeline
from rfengine.serving.events import Ended, SessionChunk, SessionEvent, SessionRequest
from rfengine.serving.options import ServiceOptions
from rfengine.serving.sessions import SessionService
from rfengine.serving.video_encoder import VideoEncoder
from studies.fleet.service_times import CHUNK_FRAMES, FIRST_FRAMES, FPS
from studies.toy.record import write_record

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT = "a large red circle moving slowly to the right over a cloudy sky"
HEIGHT, WIDTH = 480, 832  # pixels of wan-1.3b, for which the video of `tiny` is enlarged
_WAIT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Measure the sessions of `tiny` on this machine."""

    sessions: Annotated[tuple[int, ...], Entries(1, 8), Range(1, 64)] = (1, 2, 4)
    """Sessions at once, in alternation; 1 is always among them."""
    chunks: Annotated[int, Range(8, 10_000)] = 60
    """Chunks of each session in a round."""
    rounds: Annotated[int, Range(1, 100)] = 5
    """How often the numbers of sessions alternate."""
    threads: Annotated[int, Range(1, 64)] = 1
    """Of torch; with several the decoder runs beside the next chunk."""
    output: Path | None = None
    """Where the record is written; tiny_<threads> in the results of the study where nothing is given."""


@dataclass(slots=True)
class Encoding:
    """A consumer that encodes what it gets. delivered: when each fragment was there."""

    encoder: VideoEncoder
    delivered: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    ended: Event = field(default_factory=Event)
    fault: str | None = None

    def has_room(self) -> bool:
        return True

    def take(self, chunk: SessionChunk) -> None:
        self.bytes.append(len(self.encoder.encode(chunk.frames).data))
        self.delivered.append(time.perf_counter())

    def notify(self, event: SessionEvent) -> None:
        """Nothing that happens between chunks is measured."""

    def end(self, ended: Ended) -> None:
        self.encoder.close()
        self.fault = None if ended.fault is None else ended.fault.message
        self.ended.set()


@dataclass(slots=True)
class Turns:
    """An observer that keeps the seconds of every turn, in their order."""

    seconds: list[float] = field(default_factory=list)

    def admission(self, admitted: bool) -> None:
        """Every session is admitted."""

    def chunk(self, denoise_ms: float, decode_ms: float, turn_ms: float) -> None:
        self.seconds.append(turn_ms / 1e3)

    def session_end(self, reason: str) -> None:
        """Its consumer knows."""


def run(options: MeasureOptions) -> None:
    check_options(options)
    output = options.output or record_path(options.threads)
    require_writable(output, "--output")
    torch.set_num_threads(options.threads)  # before the engine decides whether it decodes beside a chunk
    pipeline, turns = Pipeline.from_pretrained("tiny"), Turns()
    counts = sorted({1, *options.sessions})
    service_options = ServiceOptions(max_sessions=max(counts), keep_every=0)
    service = SessionService(pipeline, service_options, turns)
    rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    try:
        _play(service, pipeline, 1, 8)  # what is built on first use
        for _ in range(options.rounds):
            for count in counts:
                turns.seconds.clear()
                rounds[count].append(
                    _play(service, pipeline, count, options.chunks) | {"turns": [*turns.seconds]}
                )
    finally:
        service.stop()
    record = _circumstances(options) | {"alone": _alone(rounds[1])}
    record["sessions"] = {str(count): _served(rounds[count]) for count in counts}
    record["network"] = {"tiny": _rate(rounds[1]), "enlarged": _enlarged(pipeline, options.chunks)}
    record["snapshot_bytes"] = snapshot_bytes(pipeline)
    write_record(output, record)
    print(output)


def record_path(threads: int) -> Path:
    """Where the record of so many threads is kept."""
    return RESULTS / f"tiny_{threads}_thread{'s' if threads > 1 else ''}.json"


def _play(service: SessionService, pipeline: Pipeline, count: int, chunks: int) -> dict[str, Any]:
    """`count` sessions from their start to their end: when each was opened, and its consumer."""
    config = pipeline.config
    frames = FIRST_FRAMES + CHUNK_FRAMES * (chunks - 1)
    consumers = [Encoding(VideoEncoder(config.fps, config.height, config.width)) for _ in range(count)]
    opened = []
    for seed, consumer in enumerate(consumers):
        opened.append(time.perf_counter())
        service.open(SessionRequest(PROMPT, seed, num_frames=frames), consumer)
    for consumer in consumers:
        if not consumer.ended.wait(_WAIT_S) or consumer.fault or len(consumer.delivered) != chunks:
            raise RuntimeError(
                f"a session of {chunks} chunks delivered {len(consumer.delivered)} within {_WAIT_S:g} s "
                f"({consumer.fault or 'no fault'}); measure again on an idle machine"
            )
    return {"opened": opened, "consumers": consumers}


def _alone(rounds: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Turns of one session alone by their chunk, and what passes between two turns: encoding, delivery and
    locks."""
    turns = [each["turns"] for each in rounds]
    outside = [
        interval - turn
        for each in rounds
        for interval, turn in zip(_intervals(each["consumers"][0]), each["turns"][1:], strict=True)
    ]
    return {
        "turn_0_s": [each[0] for each in turns], "turn_1_s": [each[1] for each in turns],
        "turn_later_s": [seconds for each in turns for seconds in each[2:]],
        "outside_s": [max(0.0, seconds) for seconds in outside],
    }  # fmt: skip


def _served(rounds: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What each session's client sees: seconds to the first fragment, and between two fragments while all
    sessions run; and the seconds of every turn."""
    firsts, between = [], []
    for each in rounds:
        consumers = each["consumers"]
        all_begun = max(consumer.delivered[0] for consumer in consumers)
        first_end = min(consumer.delivered[-1] for consumer in consumers)
        for opened, consumer in zip(each["opened"], consumers, strict=True):
            firsts.append(consumer.delivered[0] - opened)
            moments = [moment for moment in consumer.delivered if all_begun <= moment <= first_end]
            between += [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]
    turns = [seconds for each in rounds for seconds in each["turns"]]
    return {"first_fragment_s": firsts, "chunk_s": between, "turn_s": turns}


def _intervals(consumer: Encoding) -> list[float]:
    moments = consumer.delivered
    return [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]


def _rate(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Of the fragments of one session alone."""
    sizes = [size for each in rounds for size in each["consumers"][0].bytes]
    frames = sum(FIRST_FRAMES + CHUNK_FRAMES * (len(each["consumers"][0].bytes) - 1) for each in rounds)
    seconds = frames / FPS
    return {"bits_a_second": 8 * sum(sizes) / seconds, "chunk_bytes": sum(sizes) / len(sizes)}


def _enlarged(pipeline: Pipeline, chunks: int) -> dict[str, Any]:
    """The video of `tiny`, enlarged to the size of wan-1.3b: its bits, which are fewer than those of a video
    with the detail of that size, and the seconds of encoding each chunk on one core."""
    encoder = VideoEncoder(pipeline.config.fps, HEIGHT, WIDTH)
    sizes, times = [], []
    for chunk in pipeline.stream(PROMPT).take(min(chunks, 40)):
        frames = torch.from_numpy(chunk.frames).permute(0, 3, 1, 2).float()
        large = torch.nn.functional.interpolate(frames, (HEIGHT, WIDTH), mode="bilinear")
        pixels = large.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        started = time.perf_counter()
        sizes.append(len(encoder.encode(pixels).data))
        times.append(time.perf_counter() - started)
    seconds = (FIRST_FRAMES + CHUNK_FRAMES * (len(sizes) - 1)) / pipeline.config.fps
    return {"bits_a_second": 8 * sum(sizes) / seconds, "encode_s": times[1:]}


def snapshot_bytes(pipeline: Pipeline) -> int:
    """Of a snapshot of a stream in the steady state."""
    stream = pipeline.stream(PROMPT)
    for _ in stream.take(pipeline.config.cache.filling_chunks + 1):
        pass
    return sum(tensor.nbytes for tensor in stream.snapshot().tensors.values())


def _circumstances(options: MeasureOptions) -> dict[str, Any]:
    import av

    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m studies.fleet.measure --sessions {' '.join(map(str, options.sessions))} "
        f"--chunks {options.chunks} --rounds {options.rounds} --threads {options.threads}",
        "machine": f"{_processor()}, threads of torch: {torch.get_num_threads()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
        "chunks": options.chunks, "rounds": options.rounds,
    }  # fmt: skip


def _processor() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(run_script("studies.fleet.measure", MeasureOptions, run))
