"""Sessions that are dropped in the middle of a chunk leave no memory, file, thread or task behind."""

from __future__ import annotations

import asyncio
import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.websockets import WebSocket
from websockets.frames import Opcode

from rfengine import Pipeline
from rfengine.serving.events import Branch, ChangePrompt, KeepPoint, SessionRequest
from rfengine.serving.options import ServiceOptions
from rfengine.serving.realtime.endpoint import RealtimeLimits
from rfengine.serving.realtime.hls import HlsPlaylist
from rfengine.serving.realtime.live_video import LiveVideo
from rfengine.serving.realtime.outbox import Outbox
from rfengine.serving.recording import ByteBudget, Recording
from rfengine.serving.session import Session
from rfengine.serving.sessions import SessionService
from rfengine.serving.video_encoder import VideoEncoder
from support.models import small_pipeline
from support.realtime import BareClient, realtime_client
from support.resources import Resources, resources
from support.servers import RunningServer, running_server
from support.sessions import eventually, running_service

WARM_UP, SETTLED, ROUND = 30, 20, 10  # sessions before the first measurement, and between some
LEAST_SCATTER = 2 * 2**20  # bytes; a stream of this model has 400 KiB, and an encoder more
counts = pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.soak)])


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


class Dropping:
    """Opens sessions whose clients go away; `number` chooses when, over all the stages of a session."""

    def __init__(self, service: SessionService, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service = service
        self._directory = directory
        self._drop_at: tuple[int, int] | None = None  # chunk and step
        self._session: Session | None = None
        watch = Session._stop_where_cancelled

        def dropped(session: Session, step: int, timestep: float, latents: object) -> None:
            if session is self._session and (session.chunks, step) == self._drop_at:
                service.close(session)
            watch(session, step, timestep, latents)

        monkeypatch.setattr(Session, "_stop_where_cancelled", dropped)

    def __call__(self, number: int) -> None:
        pipe = self.service.pipeline
        encoder = VideoEncoder(pipe.config.fps, pipe.config.height, pipe.config.width)
        outbox = Outbox("drop", 2**20, 3.0, lambda: None, self.service.wake)
        path = self._directory / f"{number}.mp4"
        recording = Recording(path, encoder.init_segment, ByteBudget(2**30)) if number % 2 else None
        hls = HlsPlaylist(pipe.config.fps) if number % 3 else None
        video = LiveVideo("rt_leak", encoder, outbox, recording, hls, lambda milliseconds: None)
        self._drop_at = (number % 5, number % 2) if number % 4 else None
        with self.service._changed:
            self._session = session = self.service.open(SessionRequest("a circle", number), video)
            if number % 3 == 1:
                self.service.submit(session, KeepPoint("keep"))
                self.service.submit(session, ChangePrompt("change", "a square", "recache"))
                self.service.submit(session, Branch("branch", 0, "a star", seed=1))
        if self._drop_at is None:
            self._leave(session, number // 4 % 3)
        eventually(lambda: outbox.finished)
        path.unlink(missing_ok=True)

    def _leave(self, session: Session, how: int) -> None:
        if how:
            eventually(lambda: session.chunks >= how)
            self.service.pause(session)
        if how == 2:
            eventually(lambda: not session.resident)
        self.service.close(session)


def assert_nothing_grows(
    drop: Callable[[int], None], count: int, loop: asyncio.AbstractEventLoop | None = None
) -> None:
    """Drop sessions until all is there that a process keeps for good, then `count` more.

    Memory scatters from round to round; what all that follow gain is held to the scatter of the first.
    """
    rounds: list[Resources] = []
    for number in range(WARM_UP + SETTLED + count):
        if number >= WARM_UP and number % ROUND == 0:
            rounds.append(resources(loop))
        drop(number)
    rounds.append(resources(loop))
    settled, last = rounds[: 1 + SETTLED // ROUND], rounds[-3:]
    for name in ("files", "threads", "tasks"):
        assert max(getattr(each, name) for each in last) <= max(getattr(each, name) for each in settled), name
    before, after = ([each.memory_bytes for each in some] for some in (settled, last))
    allowed = LEAST_SCATTER + max(before) - min(before)
    assert statistics.median(after) - statistics.median(before) < allowed, (before, after)


@counts
def test_sessions_dropped_in_a_service_leave_nothing(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    with running_service(pipe, park_s=0.0, keep_every=1) as service:
        drop = Dropping(service, tmp_path, monkeypatch)

        def one(number: int) -> None:
            drop(number)
            eventually(lambda: not service._sessions)

        assert_nothing_grows(one, count)


def vanish(server: RunningServer, number: int) -> None:
    """Connect, and break the connection off at the stage that the number says."""
    fields = {
        "seed": number,
        "record": number % 2 == 1,
        "hls": number % 3 == 1,
        "keep_every": number % 4,
        "slow_client": ("pause", "drop", "disconnect")[number % 3],
    }
    with BareClient(server) as client:
        stage = number % 7
        if stage == 0:  # before it has started
            client.vanish()
            return
        client.start(**fields)
        if stage == 1:
            client.vanish()
            return
        if stage == 2:
            client.send({"type": "session.interaction", "interaction": {"event": {"prompt": "a square"}}})
        if stage == 3:
            client.send({"type": "session.pause"})
        entries: list[dict | bytes] = []
        while sum(isinstance(entry, bytes) for entry in entries) < (0 if stage == 3 else stage - 2):
            entries += client.read(4096)
        if stage == 4:  # as a browser closes
            client.send_frame(Opcode.CLOSE, b"\x03\xe9")
        client.vanish()


def assert_idle(server: RunningServer) -> None:
    endpoint, service = server.app.state.endpoint, server.app.state.service
    eventually(lambda: not server.server.server_state.connections and not endpoint.connections)
    eventually(lambda: not service._sessions and not server.server.server_state.tasks)
    eventually(lambda: endpoint.opening is None or endpoint.opening.done())


@counts
def test_sessions_whose_clients_vanish_leave_nothing(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("rfengine.serving.realtime.endpoint._REFILL_S", 0.0)
    options = {"service": ServiceOptions(park_s=0.0), "realtime": RealtimeLimits(flush_s=0.5)}
    with running_server(pipe, tmp_path / "data", file_life_s=0.0, **options) as server:

        def one(number: int) -> None:
            vanish(server, number)
            assert_idle(server)

        assert_nothing_grows(one, count, server.server.servers[0].get_loop())


def test_a_recording_of_a_client_that_vanished_keeps_nothing_of_its_connection(
    pipe: Pipeline, tmp_path: Path
) -> None:
    with running_server(pipe, tmp_path / "data") as server:
        endpoint = server.app.state.endpoint
        with BareClient(server) as client:
            client.start(record=True, slow_client="pause")
            eventually(lambda: len(endpoint.outboxes) == 1)
            outbox = next(iter(endpoint.outboxes))
            eventually(lambda: outbox.waiting[1] >= 2)
            client.vanish()
        assert_idle(server)
        assert len(endpoint.library._entries) == 1
        assert outbox.waiting == (0, 0) and not outbox._waiting
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, WebSocket)]


def test_sessions_that_are_refused_leave_no_file_and_no_recording(pipe: Pipeline, tmp_path: Path) -> None:
    service = ServiceOptions(max_sessions=1)
    with running_server(pipe, tmp_path / "data", service=service) as server, realtime_client(server) as first:
        first.start()

        def refused() -> None:
            with realtime_client(server) as client:
                client.send("session.start", prompt="a circle", record=True, hls=True)
                assert client.until("error")["code"] == "too_many_sessions"
            eventually(lambda: len(server.server.server_state.connections) == 1)

        refused()
        before = resources()
        for _ in range(10):
            refused()
        eventually(lambda: resources().files <= before.files)  # a socket is closed after its connection
        assert not server.app.state.endpoint.library._entries
        assert not list((tmp_path / "data" / "recordings").iterdir())
