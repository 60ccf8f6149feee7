"""A fault at any stage of a session ends that session or its command alone, with a typed fault, and what it
held is free for the next one."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import pytest
import torch

from rfengine import Pipeline
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.models.dit import WanDiT
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.text_encoder import TextEncoder
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import (
    Branch,
    ChangePrompt,
    Command,
    CommandFailed,
    Consumer,
    Ended,
    KeepPoint,
    Moved,
    PointKept,
    PromptApplied,
    Seek,
    SessionChunk,
    SessionRequest,
    SessionState,
)
from rfengine.serving.options import ServiceOptions
from rfengine.serving.points import KeptPoints
from rfengine.serving.realtime.live_video import LiveVideo
from rfengine.serving.realtime.outbox import Outbox
from rfengine.serving.realtime.protocol import ErrorMessage, SessionDone
from rfengine.serving.session import Session
from rfengine.serving.sessions import SessionService
from rfengine.serving.video_encoder import VideoEncoder
from rfengine.snapshot import Snapshot
from rfengine.stream import VideoStream
from support.models import small_pipeline
from support.sessions import Collected, eventually, opened, running_service

CHUNKS = 5  # of each session that runs beside the faulty one
SECRET = "/srv/secret/weights.safetensors"  # in the message of every injected error


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> Callable[[int], list[numpy.ndarray]]:
    """The chunks of a seed that has the pipeline to itself."""

    @functools.cache
    def chunks(seed: int) -> list[numpy.ndarray]:
        return [chunk.frames for chunk in pipe.stream("a circle", seed=seed).take(CHUNKS)]

    return chunks


def request(seed: int = 0, chunks: int | None = CHUNKS, **fields: object) -> SessionRequest:
    frames = None if chunks is None else 12 * chunks - 3
    return SessionRequest("a circle", seed, num_frames=frames, **fields)


class Injection:
    """Raises an error in the calls of functions that belong to one session's turns, once it is `armed`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._turn_of: Session | None = None
        self.session: Session | None = None
        self.armed = False
        self.count = 0  # errors raised
        for name in ("turn", "park", "release"):
            self._follow(name)

    def _follow(self, name: str) -> None:
        original = getattr(Session, name)

        def followed(session: Session, *arguments: object) -> object:
            outer, self._turn_of = self._turn_of, session
            try:
                return original(session, *arguments)
            finally:
                self._turn_of = outer

        self._monkeypatch.setattr(Session, name, followed)

    def into(
        self, owner: type, name: str, error: type[Exception] = RuntimeError, call: int = 1, late: bool = False
    ) -> None:
        """Fail from the given call on, as counted while armed; late: when its work is done."""
        original, calls = getattr(owner, name), 0

        def failing(instance: object, *arguments: object, **named: object) -> object:
            nonlocal calls
            if not self.armed or self._turn_of is None or self._turn_of is not self.session:
                return original(instance, *arguments, **named)
            calls += 1
            if calls >= call and not late:
                self.fail(error)
            result = original(instance, *arguments, **named)
            if calls >= call:
                self.fail(error)
            return result

        self._monkeypatch.setattr(owner, name, failing)

    def fail(self, error: type[Exception]) -> None:
        self.count += 1
        raise error(f"injected into {SECRET}")


class WithoutTraceback(logging.Filter):
    """A record that pytest keeps would keep the frames of the error, and with them the failed stream."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = None
        return True


@pytest.fixture
def injection(monkeypatch: pytest.MonkeyPatch) -> Iterator[Injection]:
    loggers = [logging.getLogger(f"rfengine.serving.{name}") for name in ("session", "sessions")]
    forget = WithoutTraceback()
    for logger in loggers:
        logger.addFilter(forget)
    yield Injection(monkeypatch)
    for logger in loggers:
        logger.removeFilter(forget)


def open_faulty(
    service: SessionService, injection: Injection, wanted: SessionRequest, consumer: Consumer
) -> Session:
    """The session into which is injected; no turn is taken before this is known."""
    with service._changed:
        session = service.open(wanted, consumer)
        consumer.session = injection.session = session
    return session


@contextmanager
def neighbours(
    service: SessionService, alone: Callable[[int], list[numpy.ndarray]]
) -> Iterator[list[Collected]]:
    """Two sessions that are part of the way when the block begins and must come out as each does alone."""
    consumers = [Collected(room=2) for _ in range(2)]
    for seed, consumer in enumerate(consumers, 1):
        opened(service, request(seed), consumer)
        consumer.wait(SessionChunk, 2)
    yield consumers
    for seed, consumer in enumerate(consumers, 1):
        consumer.room = None
        service.wake()
        assert consumer.ended() == Ended("finished", CHUNKS)
        assert numpy.array_equal(consumer.frames(), numpy.concatenate(alone(seed)))


def release(service: SessionService, consumers: list[Collected]) -> None:
    """Let the neighbours run from now on, turn by turn with the faulty session."""
    for consumer in consumers:
        consumer.room = None
    service.wake()


def assert_plain(fault: Fault | None, code: str) -> None:
    """A typed fault that says nothing of the server's inside."""
    assert fault is not None and fault.code == code
    assert fault.message and "Traceback" not in fault.message and SECRET not in fault.message


def assert_freed(session: Session, stream: weakref.ref | None = None) -> None:
    """The session holds nothing, and nothing holds its stream."""
    eventually(lambda: session.released)
    assert session.state is SessionState.CLOSED
    assert not session.resident and session.points.nbytes == 0 and not session.commands
    if stream is not None:
        gc.collect()
        assert stream() is None


def assert_opens(service: SessionService, alone: Callable[[int], list[numpy.ndarray]]) -> None:
    """The next session has its place and is what it is alone."""
    consumer = Collected()
    opened(service, request(3, chunks=2), consumer)
    assert consumer.ended() == Ended("finished", 2)
    assert numpy.array_equal(consumer.frames(), numpy.concatenate(alone(3)[:2]))


STAGES = {
    "first step": (WanDiT, "forward_chunk", 1, False),
    "second step": (WanDiT, "forward_chunk", 2, False),
    "after the last step": (WanDiT, "forward_chunk", 2, True),
    "eviction": (StreamingKVCache, "begin_chunk", 1, False),
    "after eviction": (StreamingKVCache, "begin_chunk", 1, True),
    "context pass": (WanDiT, "context_pass", 1, False),
    "after the context pass": (WanDiT, "context_pass", 1, True),
    "commit": (StreamingKVCache, "commit", 1, False),
    "decode": (StreamingDecoder, "decode_frames", 1, False),
    "after decode": (StreamingDecoder, "decode_frames", 1, True),
    "automatic snapshot": (VideoStream, "snapshot", 1, False),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_inside_a_chunk_closes_its_session_alone(
    pipe: Pipeline, alone: Callable, injection: Injection, stage: str
) -> None:
    owner, name, call, late = STAGES[stage]
    injection.into(owner, name, RuntimeError, call, late)
    consumer = Collected(room=4)  # the window is full then, so that the next chunk evicts
    with running_service(pipe, max_sessions=3) as service, neighbours(service, alone) as others:
        session = open_faulty(service, injection, request(keep_every=1), consumer)
        consumer.wait(SessionChunk, 4)
        stream = weakref.ref(session._stream)
        injection.armed = True
        consumer.room = None
        release(service, others)
        ended = consumer.ended()
        assert (ended.reason, ended.chunks) == ("failed", 4)
        assert_plain(ended.fault, "chunk_failed")
        assert injection.count == 1
        assert numpy.array_equal(consumer.frames(), numpy.concatenate(alone(0)[:4]))
        assert_freed(session, stream)
        assert_opens(service, alone)


@pytest.mark.parametrize(
    ("owner", "name", "error", "code"),
    [
        (TextEncoder, "encode", RuntimeError, "chunk_failed"),
        (TextEncoder, "encode", torch.OutOfMemoryError, "out_of_memory"),
        (StreamingKVCache, "__init__", torch.OutOfMemoryError, "out_of_memory"),
        (StreamingDecoder, "decoder_state", MemoryError, "out_of_memory"),
    ],
)
def test_a_fault_at_the_start_closes_its_session_alone(
    pipe: Pipeline, alone: Callable, injection: Injection, owner: type, name: str, error: type, code: str
) -> None:
    injection.into(owner, name, error)
    injection.armed = True
    consumer = Collected()
    with running_service(pipe, max_sessions=3) as service, neighbours(service, alone) as others:
        session = open_faulty(service, injection, request(), consumer)
        release(service, others)
        ended = consumer.ended()
        assert (ended.reason, ended.chunks, consumer.log) == ("failed", 0, [ended])
        assert_plain(ended.fault, code)
        assert_freed(session)
        assert_opens(service, alone)


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("second step", torch.OutOfMemoryError),
        ("decode", torch.OutOfMemoryError),
        ("automatic snapshot", MemoryError),
    ],
)
def test_a_session_that_runs_out_of_memory_says_so_and_a_smaller_one_runs(
    pipe: Pipeline, alone: Callable, injection: Injection, stage: str, error: type
) -> None:
    owner, name, call, late = STAGES[stage]
    injection.into(owner, name, error, call, late)
    consumer, small = Collected(room=1), Collected()
    with running_service(pipe, max_sessions=3) as service, neighbours(service, alone) as others:
        session = open_faulty(service, injection, request(keep_every=1), consumer)
        consumer.wait(SessionChunk)
        injection.armed = True
        consumer.room = None
        release(service, others)
        fault = consumer.ended().fault
        assert_plain(fault, "out_of_memory")
        assert (fault.status, fault.retryable) == (503, True)
        assert_freed(session)
        opened(service, request(3, 2, height=16, width=16), small)
        assert small.ended() == Ended("finished", 2)
        assert small.frames().shape == (21, 16, 16, 3)
    assert service.lost is None


COMMAND_FAULTS = {
    "text encoder of a soft prompt": (TextEncoder, "encode", ChangePrompt("x", "a square")),
    "text encoder of a hard prompt": (TextEncoder, "encode", ChangePrompt("x", "a square", "hard")),
    "text encoder of a transition": (TextEncoder, "encode", ChangePrompt("x", "a square", "soft", 3)),
    "rewind of a seek": (VideoStream, "rewind", Seek("x", 0)),
    "rewind of a branch": (VideoStream, "rewind", Branch("x", 0, "a square")),
}
CODES = {
    RuntimeError: "command_failed",
    torch.OutOfMemoryError: "out_of_memory",
    MemoryError: "out_of_memory",
}


@pytest.mark.parametrize(
    ("case", "error"),
    [(case, RuntimeError) for case in COMMAND_FAULTS]
    + [("text encoder of a soft prompt", error) for error in (torch.OutOfMemoryError, MemoryError)],
)
def test_a_command_that_fails_changes_nothing(
    pipe: Pipeline, alone: Callable, injection: Injection, case: str, error: type
) -> None:
    owner, name, command = COMMAND_FAULTS[case]
    injection.into(owner, name, error)
    consumer = Collected(room=2)
    with running_service(pipe, max_sessions=3) as service, neighbours(service, alone) as others:
        session = open_faulty(service, injection, request(), consumer)
        consumer.wait(SessionChunk, 2)
        service.submit(session, KeepPoint("keep"))
        consumer.wait(PointKept)
        injection.armed = True
        service.submit(session, command)
        (failed,) = consumer.wait(CommandFailed)
        injection.armed = False
        consumer.room = None
        release(service, others)
        assert failed.event_id == "x"
        assert_plain(failed.fault, CODES[error])
        assert consumer.ended() == Ended("finished", CHUNKS)
        assert not consumer.of(PromptApplied) and not consumer.of(Moved)
        assert numpy.array_equal(consumer.frames(), numpy.concatenate(alone(0)))
        assert_freed(session)
        assert_opens(service, alone)


def test_an_error_of_the_device_in_a_command_is_one_of_the_whole_engine(
    pipe: Pipeline, injection: Injection
) -> None:
    injection.into(TextEncoder, "encode", torch.AcceleratorError)
    consumer, other, reported = Collected(room=1), Collected(room=1), []
    service = SessionService(pipe, ServiceOptions(), on_lost=reported.append)
    opened(service, request(1), other)
    session = open_faulty(service, injection, request(), consumer)
    for each in (consumer, other):
        each.wait(SessionChunk)
    injection.armed = True
    service.submit(session, ChangePrompt("x", "a square"))
    assert_plain(other.ended().fault, "engine_lost")
    assert consumer.ended().reason == "failed"
    eventually(lambda: len(reported) == 1)
    assert service.lost and not service.ready
    service.stop(5)


LOST_COMMANDS = {
    "recache": (WanDiT, "recache", ChangePrompt("x", "a square", "recache"), False),
    "after recache": (WanDiT, "recache", ChangePrompt("x", "a square", "recache"), True),
    "text of the model": (WanDiT, "text_keys_values", ChangePrompt("x", "a square"), False),
    "after a restart": (StreamingKVCache, "reset", ChangePrompt("x", "a square", "hard"), True),
    "load of a seek": (StreamingKVCache, "load", Seek("x", 0), False),
    "after the load of a seek": (StreamingKVCache, "load", Seek("x", 0), True),
    "text encoder of a branch": (TextEncoder, "encode", Branch("x", 0, "a square"), False),
    "recache of a branch": (WanDiT, "recache", Branch("x", 0, "a square", "recache"), False),
    "snapshot": (StreamingKVCache, "tensors", KeepPoint("x"), False),
}


@pytest.mark.parametrize("case", LOST_COMMANDS)
def test_a_command_that_fails_half_way_closes_its_session_alone(
    pipe: Pipeline, alone: Callable, injection: Injection, case: str
) -> None:
    owner, name, command, late = LOST_COMMANDS[case]
    consumer = Collected(room=4)
    with running_service(pipe, max_sessions=3) as service, neighbours(service, alone) as others:
        session = open_faulty(service, injection, request(), consumer)
        consumer.wait(SessionChunk, 4)
        service.submit(session, KeepPoint("keep"))
        consumer.wait(PointKept)
        stream = weakref.ref(session._stream)
        injection.into(owner, name, late=late)
        injection.armed = True
        service.submit(session, command)
        release(service, others)
        ended = consumer.ended()
        assert (ended.reason, ended.chunks) == ("failed", 4)
        assert_plain(ended.fault, "chunk_failed")
        assert not consumer.of(PromptApplied) and not consumer.of(Moved)
        assert_freed(session, stream)
        assert_opens(service, alone)


def live_video(most_bytes: int = 2**30, policy: str = "pause") -> tuple[LiveVideo, Outbox]:
    outbox = Outbox(policy, most_bytes, 1e9, lambda: None, lambda: None)
    return LiveVideo("rt_x", VideoEncoder(16, 32, 48), outbox, None, None, lambda milliseconds: None), outbox


def failing_at(call: int, function: Callable) -> Callable:
    """The function, which raises at that call and later."""
    calls = 0

    def failing(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise RuntimeError(f"injected into {SECRET}")
        return function(*arguments)

    return failing


@pytest.mark.parametrize(("stage", "call"), [("encode", 1), ("encode", 3), ("encode", CHUNKS), ("outbox", 2)])
def test_a_chunk_that_cannot_be_encoded_or_queued_closes_its_session_alone(
    pipe: Pipeline, alone: Callable, stage: str, call: int
) -> None:
    (video, outbox), (other, other_outbox) = live_video(), live_video()
    owner, name = {"encode": (video._encoder, "encode"), "outbox": (outbox, "put_media")}[stage]
    setattr(owner, name, failing_at(call, getattr(owner, name)))
    with running_service(pipe, max_sessions=4) as service, neighbours(service, alone) as others:
        session = service.open(request(), video)
        beside = service.open(request(3), other)
        release(service, others)
        eventually(lambda: outbox.finished and other_outbox.finished)
        assert_freed(session)
        assert_freed(beside)
        assert_opens(service, alone)
    sent = [outbox.take() for _ in range(len(outbox._waiting))]
    assert isinstance(sent[-2], ErrorMessage) and isinstance(sent[-1], SessionDone)
    assert_plain(Fault(sent[-2].code, sent[-2].message), "delivery_failed")
    assert sent[-2].fatal and (sent[-1].reason, sent[-1].stopped) == ("failed", True)
    assert sum(hasattr(entry, "data") for entry in sent) == call - 1
    assert video._encoder._coder is None  # its memory is free
    encoder = VideoEncoder(16, 32, 48)
    waiting = [other_outbox.take() for _ in range(len(other_outbox._waiting))]
    assert [entry.data for entry in waiting if hasattr(entry, "data")] == [
        encoder.encode(frames).data for frames in alone(3)
    ]


def test_an_event_that_cannot_be_queued_closes_its_session_alone(pipe: Pipeline, alone: Callable) -> None:
    video, outbox = live_video()
    outbox.put = failing_at(2, outbox.put)
    with running_service(pipe, max_sessions=3) as service, neighbours(service, alone) as others:
        session = service.open(request(chunks=None, keep_every=1), video)
        release(service, others)
        eventually(lambda: outbox.finished)
        assert_freed(session)
        assert_plain(session.fault, "delivery_failed")
        assert_opens(service, alone)


def test_a_consumer_that_fails_at_the_end_keeps_no_place(pipe: Pipeline, alone: Callable) -> None:
    video, outbox = live_video()
    outbox.finish = failing_at(1, outbox.finish)
    with running_service(pipe, max_sessions=1) as service:
        session = service.open(request(chunks=1), video)
        eventually(lambda: not any(service.counts().values()))
        assert_freed(session)
        assert_opens(service, alone)


def test_a_fault_while_a_paused_session_is_parked_closes_it_alone(
    pipe: Pipeline, alone: Callable, injection: Injection
) -> None:
    injection.into(StreamingKVCache, "tensors", MemoryError)
    consumer = Collected(room=2)
    with running_service(pipe, max_sessions=3, park_s=0.05) as service, neighbours(service, alone) as others:
        session = open_faulty(service, injection, request(), consumer)
        consumer.wait(SessionChunk, 2)
        injection.armed = True
        service.pause(session)
        release(service, others)
        assert_plain(consumer.ended().fault, "out_of_memory")
        assert_freed(session)
        assert_opens(service, alone)


def test_a_session_that_gives_its_place_and_fails_leaves_it_to_the_other(
    pipe: Pipeline, alone: Callable, injection: Injection
) -> None:
    injection.into(StreamingKVCache, "tensors", MemoryError)
    consumer, other = Collected(room=2), Collected()
    with running_service(pipe, memory_bytes=pipe.stream_bytes()) as service:
        session = open_faulty(service, injection, request(), consumer)
        consumer.wait(SessionChunk, 2)
        service.pause(session)
        injection.armed = True
        opened(service, request(1), other)
        assert other.ended() == Ended("finished", CHUNKS)
        assert numpy.array_equal(other.frames(), numpy.concatenate(alone(1)))
        assert_plain(consumer.ended().fault, "out_of_memory")
        assert_freed(session)


def test_a_fault_while_a_parked_session_is_restored_closes_it_alone(
    pipe: Pipeline, alone: Callable, injection: Injection
) -> None:
    injection.into(StreamingKVCache, "load", torch.OutOfMemoryError)
    consumer = Collected(room=2)
    with running_service(pipe, max_sessions=3, park_s=0.01) as service, neighbours(service, alone) as others:
        session = open_faulty(service, injection, request(), consumer)
        consumer.wait(SessionChunk, 2)
        service.pause(session)
        eventually(lambda: not session.resident)
        injection.armed = True
        consumer.room = None
        service.resume(session)
        release(service, others)
        assert_plain(consumer.ended().fault, "out_of_memory")
        assert_freed(session)
        assert_opens(service, alone)


@pytest.mark.parametrize("ending", ["stopped", "finished"])
def test_a_fault_while_a_session_is_released_keeps_no_place(
    pipe: Pipeline, alone: Callable, injection: Injection, ending: str
) -> None:
    injection.into(VideoStream, "close")
    consumer = Collected(room=2)
    with running_service(pipe, max_sessions=3) as service, neighbours(service, alone) as others:
        session = open_faulty(service, injection, request(), consumer)
        consumer.wait(SessionChunk, 2)
        injection.armed = True
        if ending == "stopped":
            service.close(session)
        consumer.room = None
        release(service, others)
        consumer.ended()
        assert injection.count == 1
        assert_freed(session)
        assert_opens(service, alone)


def test_a_paused_session_whose_place_is_taken_keeps_its_state_when_a_command_finds_no_memory(
    pipe: Pipeline, alone: Callable
) -> None:
    consumer, other = Collected(room=2), Collected(room=1)
    commands: list[Command] = [KeepPoint("keep"), ChangePrompt("new", "a square"), Seek("back", 0)]
    with running_service(pipe, memory_bytes=pipe.stream_bytes()) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk, 2)
        service.pause(session)
        beside = opened(service, request(1), other)
        other.wait(SessionChunk)
        for number, command in enumerate(commands, 1):
            service.submit(session, command)
            failed = consumer.wait(CommandFailed, number)[-1]
            assert failed.event_id == command.event_id
            assert (failed.fault.code, failed.fault.retryable) == ("no_memory", True)
        service.close(beside)
        other.ended()
        consumer.room = None
        service.resume(session)
        assert consumer.ended() == Ended("finished", CHUNKS)
        assert numpy.array_equal(consumer.frames(), numpy.concatenate(alone(0)))


def test_a_drain_during_the_last_chunk_ends_the_session_and_the_engine_goes_on(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = Collected()
    with running_service(pipe) as service:
        advance = Session._advance

        def draining(session: Session) -> None:
            advance(session)
            if session.chunks == CHUNKS:
                with service._changed:
                    service._draining = True
                    service._begin_draining(session, "draining")

        monkeypatch.setattr(Session, "_advance", draining)
        opened(service, request(), consumer)
        assert consumer.ended().chunks == CHUNKS
        assert service._threads[0].is_alive()


def test_a_seek_that_is_refused_for_its_branch_changes_nothing(
    pipe: Pipeline, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfengine.serving.points.MOST_BRANCHES", 1)
    consumer = Collected(room=1)
    with running_service(pipe) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk)
        service.submit(session, KeepPoint("keep"))
        consumer.wait(PointKept)
        consumer.room = 2
        service.wake()
        consumer.wait(SessionChunk, 2)
        service.submit(session, Branch("more", 0, seed=5))
        (failed,) = consumer.wait(CommandFailed)
        assert failed.fault.code == "too_many_branches"
        consumer.room = None
        service.wake()
        consumer.ended()
    assert numpy.array_equal(consumer.frames(), numpy.concatenate(alone(0)))


def test_a_session_reports_the_fault_of_its_last_chunk(pipe: Pipeline) -> None:
    class LastFails(Collected):
        def take(self, chunk: SessionChunk) -> None:
            if chunk.number == CHUNKS - 1:
                eventually(lambda: self.session.released)  # its end is put already
                raise RuntimeError(f"injected into {SECRET}")
            super().take(chunk)

    consumer = LastFails()
    with running_service(pipe, delivery_threads=2) as service:
        opened(service, request(), consumer)
        ended = consumer.ended()
    assert ended.reason == "failed"
    assert_plain(ended.fault, "delivery_failed")


def test_a_client_that_is_too_slow_is_no_error_of_the_server(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    video, outbox = live_video(most_bytes=1000, policy="disconnect")
    with running_service(pipe) as service:
        session = service.open(request(chunks=None), video)
        eventually(lambda: outbox.finished)
        assert (session.reason, session.fault.code) == ("slow_client", "slow_client")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_point_that_is_refused_drops_no_other() -> None:
    def snapshot(nbytes: int) -> Snapshot:
        return Snapshot({"cache": torch.zeros(nbytes, dtype=torch.uint8)}, {"prompt": "a circle"})

    points = KeptPoints(most_bytes=100, keep_every=1)
    for index in range(3):
        assert points.keep(snapshot(30), index, (), automatic=True)[1] == []
    with pytest.raises(
        ServiceError, match="the snapshot has 71 bytes and those that are kept have 90 of 100"
    ):
        points.keep(snapshot(71), 3, (), automatic=False)
    assert points.nbytes == 90 and points.keep_every == 1
    kept, dropped = points.keep(snapshot(70), 3, (), automatic=False)
    assert (kept.snapshot_id, dropped, points.nbytes) == (3, [1, 2], 100)


def test_a_paused_session_that_is_resumed_while_it_gives_its_place_goes_on(
    pipe: Pipeline, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumers = [Collected(room=2), Collected(room=2), Collected()]
    make_room, resident = SessionService._make_room, Session.resident.fget
    looked_at: list[Session] | None = None

    def watched(service: SessionService, session: Session) -> object:
        nonlocal looked_at
        looked_at = []
        try:
            return make_room(service, session)
        finally:
            looked_at = None

    def resumed(session: Session) -> bool:
        """Its client resumes it after it was chosen, before it has given its place."""
        if looked_at is not None and session is sessions[0]:
            looked_at.append(session)
            if len(looked_at) == 2 and session.state is SessionState.PAUSED:
                service.resume(session)
        return resident(session)

    with running_service(pipe, memory_bytes=2 * pipe.stream_bytes()) as service:
        sessions = [opened(service, request(seed), consumers[seed]) for seed in (0, 1)]
        for consumer, session in zip(consumers, sessions, strict=False):
            consumer.wait(SessionChunk, 2)
            service.pause(session)
            consumer.room = None
        monkeypatch.setattr(SessionService, "_make_room", watched)
        monkeypatch.setattr(Session, "resident", property(resumed))
        opened(service, request(2), consumers[2])
        for seed in (0, 2):
            assert consumers[seed].ended() == Ended("finished", CHUNKS)
            assert numpy.array_equal(consumers[seed].frames(), numpy.concatenate(alone(seed)))
