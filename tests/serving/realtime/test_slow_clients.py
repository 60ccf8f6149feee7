"""A client that reads slowly, or not at all, costs a bounded queue and its own session, nothing more."""

from __future__ import annotations

import io
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import av
import httpx2
import pytest

from rfengine import Pipeline
from rfengine.serving.options import ServiceOptions
from rfengine.serving.realtime.endpoint import RealtimeEndpoint, RealtimeLimits
from rfengine.serving.realtime.outbox import Media, Outbox
from rfengine.serving.sessions import SessionService
from rfengine.serving.video_encoder import VideoEncoder
from support.models import small_pipeline
from support.realtime import BareClient, realtime_client
from support.servers import RunningServer, running_server
from support.sessions import eventually

LIMITS = RealtimeLimits(queue_bytes=40_000, queue_seconds=60.0, flush_s=0.5)
LARGEST = 16_000  # bytes of a chunk of this model
CHUNKS = 8  # of the session that runs beside


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def server(pipe: Pipeline, tmp_path_factory) -> Iterator[RunningServer]:
    data = tmp_path_factory.mktemp("slow") / "data"
    service = ServiceOptions(keep_every=0, max_sessions=4)
    with running_server(pipe, data, service=service, realtime=LIMITS) as running:
        # what the kernel holds for a client counts too, and by default that is megabytes
        for listener in running.server.servers[0].sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(server: RunningServer) -> Iterator[None]:
    yield
    eventually(lambda: not endpoint(server).connections and not endpoint(server).outboxes)
    eventually(lambda: not any(service_of(server).counts().values()))
    eventually(lambda: not server.server.server_state.connections)


def endpoint(server: RunningServer) -> RealtimeEndpoint:
    return server.app.state.endpoint


def service_of(server: RunningServer) -> SessionService:
    return server.app.state.service


@contextmanager
def reading(client: BareClient, bytes_a_second: int) -> Iterator[None]:
    """Let the client read at that rate."""
    stopped = threading.Event()

    def read() -> None:
        while bytes_a_second and not stopped.wait(1 / bytes_a_second):
            client.read(1)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@contextmanager
def slow_session(server: RunningServer, policy: str, **fields: object) -> Iterator[tuple[BareClient, Outbox]]:
    eventually(lambda: not endpoint(server).outboxes)  # the session before has ended
    with BareClient(server) as client:
        client.start(slow_client=policy, **fields)
        eventually(lambda: len(endpoint(server).outboxes) == 1)
        yield client, next(iter(endpoint(server).outboxes))


def play_beside(server: RunningServer) -> tuple[list[bytes], float]:
    """The chunks of a session whose client reads, and the median seconds between them."""
    with realtime_client(server) as client:
        client.start(seed=5, num_frames=12 * CHUNKS - 3)
        assert client.finish()["reason"] == "finished"
    gaps = [after - before for before, after in zip(client.arrivals, client.arrivals[1:], strict=False)]
    return [data for _, data in client.chunks], statistics.median(gaps)


def encoded_alone(pipe: Pipeline) -> list[bytes]:
    encoder = VideoEncoder(pipe.config.fps, pipe.config.height, pipe.config.width)
    chunks = [encoder.encode(chunk.frames).data for chunk in pipe.stream("a circle", seed=5).take(CHUNKS)]
    return [encoder.init_segment + chunks[0], *chunks[1:]]


def decoded(media: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(media)) as container:
        return list(container.decode(video=0))


def of_kind(entries: list, kind: str) -> list[dict]:
    return [entry for entry in entries if isinstance(entry, dict) and entry["type"] == kind]


@pytest.mark.parametrize("bytes_a_second", [0, 1])
@pytest.mark.parametrize("policy", ["pause", "drop", "disconnect"])
def test_a_slow_client_holds_a_bounded_queue_and_nobody_else(
    server: RunningServer,
    pipe: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    bytes_a_second: int,
) -> None:
    waited: list[int] = []  # bytes, after each chunk that the slow client was to get
    put_media = Outbox.put_media

    def noted(outbox: Outbox, media: Media) -> None:
        put_media(outbox, media)
        if media.metadata.prompt == "a slow circle":
            waited.append(outbox.waiting[0])

    monkeypatch.setattr(Outbox, "put_media", noted)
    _, usual_gap = play_beside(server)
    with (
        slow_session(server, policy, prompt="a slow circle") as (client, outbox),
        reading(client, bytes_a_second),
    ):
        eventually(lambda: outbox.waiting[0] >= LIMITS.queue_bytes or outbox.finished)
        chunks, gap = play_beside(server)
    assert chunks == encoded_alone(pipe)
    assert gap < 10 * usual_gap + 0.1
    # a chunk may be made while there is room for one, and MOST_UNDELIVERED are on their way
    assert LIMITS.queue_bytes <= max(waited) < LIMITS.queue_bytes + 3 * LARGEST


def test_a_paused_session_goes_on_without_a_gap_once_its_client_reads(server: RunningServer) -> None:
    with slow_session(server, "pause", num_frames=12 * 40 - 3) as (client, outbox):
        eventually(lambda: not outbox.has_room())
        made = service_of(server)._sessions[0].chunks
        time.sleep(0.3)
        assert service_of(server)._sessions[0].chunks <= made + 2
        entries = client.read_to_the_end()
    metadata = of_kind(entries, "video.chunk_metadata")
    assert [each["transport_chunk_index"] for each in metadata] == list(range(40))
    assert {each["dropped_chunks"] for each in metadata} == {0}
    media = [entry for entry in entries if isinstance(entry, bytes)]
    assert [each["byte_length"] for each in metadata] == [len(data) for data in media]
    assert len(decoded(b"".join(media))) == 12 * 40 - 3
    assert entries[-1]["type"] == "session.done" and client.close_code == 1000


def test_a_client_that_lets_chunks_drop_resumes_at_a_keyframe_and_knows_how_many(
    server: RunningServer,
) -> None:
    counted = dropped_total(server)
    with slow_session(server, "drop", num_frames=12 * 60 - 3) as (client, outbox):
        eventually(lambda: outbox.dropped >= 10)
        entries = client.read_to_the_end()
    metadata = of_kind(entries, "video.chunk_metadata")
    media = [entry for entry in entries if isinstance(entry, bytes)]
    indices = [each["transport_chunk_index"] for each in metadata]
    before = [0, *[index + 1 for index in indices]]
    assert [each["dropped_chunks"] for each in metadata] == [
        index - expected for index, expected in zip(indices, before, strict=False)
    ]
    assert indices[0] == 0 and indices[-1] == 59
    left_out = 60 - len(indices)
    assert left_out == outbox.dropped >= 10
    assert dropped_total(server) - counted == left_out
    first = next(number for number, each in enumerate(metadata) if each["dropped_chunks"])
    init_segment = media[0][: media[0].index(b"moof") - 4]
    for kept in (media[first:], media):  # a decoder that begins there, and one that went over the gap
        frames = decoded(b"".join(kept) if kept is media else init_segment + b"".join(kept))
        assert len(frames) == sum(each["num_frames"] for each in metadata[-len(kept) :])
        assert frames[0].key_frame
    start = metadata[first]["start_seconds"]
    assert decoded(init_segment + media[first])[0].time == pytest.approx(start)


def assert_let_go(server: RunningServer) -> None:
    """The server keeps no connection although the client keeps its end, and has not read its last bytes."""
    eventually(lambda: not endpoint(server).connections, 20)
    eventually(lambda: not server.server.server_state.connections, 20)


def dropped_total(server: RunningServer) -> float:
    text = httpx2.get(f"{server.url}/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith("rfengine_dropped_chunks_total ")]
    return float(line.split()[1])


def test_a_client_that_is_to_be_disconnected_is_told_why_where_it_still_reads(server: RunningServer) -> None:
    with slow_session(server, "disconnect") as (client, outbox):
        eventually(lambda: outbox.finished)
        entries = client.read_to_the_end()
    error, done = entries[-2:]
    assert (error["type"], error["code"], error["fatal"]) == ("error", "slow_client", True)
    assert (done["type"], done["reason"]) == ("session.done", "slow_client")
    assert client.close_code == 1011


def test_a_client_that_is_disconnected_and_never_reads_keeps_no_connection(server: RunningServer) -> None:
    with slow_session(server, "disconnect") as (_, outbox):
        eventually(lambda: outbox.finished)
        assert_let_go(server)


def test_a_client_that_takes_nothing_for_long_is_ended_and_keeps_no_connection(
    pipe: Pipeline, tmp_path
) -> None:
    service = ServiceOptions(keep_every=0, idle_s=0.5)
    with running_server(pipe, tmp_path / "data", service=service, realtime=LIMITS) as server:
        for listener in server.server.servers[0].sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with slow_session(server, "pause") as (_, outbox):
            eventually(lambda: outbox.finished)
            assert_let_go(server)


def test_an_ended_session_is_sent_whole_to_a_client_that_reads_slowly(server: RunningServer) -> None:
    frames = 9 + 12 * 7
    with BareClient(server) as client:
        client.start(num_frames=frames, slow_client="pause")
        entries: list = []
        while not client.has_ended:  # what waits at the end takes longer than flush_s
            time.sleep(0.05)
            entries += client.read(2000)
    messages = [entry for entry in entries if isinstance(entry, dict)]
    assert sum(message.get("num_frames", 0) for message in messages if "byte_length" in message) == frames
    assert messages[-1]["type"] == "session.done" and messages[-1]["reason"] == "finished"
    assert client.close_code == 1000
