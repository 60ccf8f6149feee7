"""A session shows what its receipts say, whatever a client does in whatever order: a plain stream that
follows them is the same bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from rfengine import Pipeline
from rfengine.config import RuntimeConfig
from rfengine.serving.errors import ServiceError
from rfengine.serving.events import (
    Branch,
    ChangePrompt,
    Command,
    CommandFailed,
    Ended,
    KeepPoint,
    Moved,
    PointKept,
    PromptApplied,
    Seek,
    SessionChunk,
    SessionEvent,
    SessionRequest,
)
from rfengine.serving.session import Session
from rfengine.serving.sessions import SessionService
from rfengine.snapshot import Snapshot
from support.models import small_pipeline, with_runtime
from support.sessions import Collected, eventually, opened, running_service

FIRST_PROMPT = "a circle"
PROMPTS = ("a square", "a star", "  ")  # the last is none
SEEDS = (None, 0, 7)
MOST_ACTIONS = 12


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "ahead"])
def service(plain: Pipeline, request: pytest.FixtureRequest) -> Iterator[SessionService]:
    """Of the same model, as it is, and with the next chunk begun before one is handed out."""
    pipeline = with_runtime(plain, RuntimeConfig(overlap=request.param))
    with running_service(pipeline, park_s=0.0) as running:
        yield running


# What a client does

Action = tuple[str, object]  # its name, and what it is done with


def commands() -> some.SearchStrategy[Command]:
    """Commands whose ids are given when they are sent."""
    modes, prompts = some.sampled_from(("soft", "recache", "hard")), some.sampled_from(PROMPTS)
    number = some.integers(0, 5)
    return some.one_of(
        some.builds(ChangePrompt, some.just(""), prompts, modes),
        some.builds(ChangePrompt, some.just(""), prompts, some.just("soft"), some.integers(2, 4)),
        some.builds(KeepPoint, some.just("")),
        some.builds(Seek, some.just(""), number),
        some.builds(Branch, some.just(""), number, some.none() | prompts, modes, some.sampled_from(SEEDS)),
    )


def actions() -> some.SearchStrategy[list[Action]]:
    """send: each command is sent at once, and not waited for. together: no turn is taken between them.
    run: so many chunks more may be made. wait: until they are. park: pause, until nothing is resident."""
    one = some.one_of(
        some.tuples(some.just("send"), some.lists(commands(), min_size=1, max_size=2)),
        some.tuples(some.just("together"), some.lists(commands(), min_size=2, max_size=4)),
        some.tuples(some.just("run"), some.integers(1, 3)),
        some.tuples(some.sampled_from(("wait", "pause", "resume", "park")), some.none()),
    )
    return some.lists(one, min_size=2, max_size=MOST_ACTIONS)


class Client:
    """Does the actions on a session of its own, and keeps what it sent."""

    def __init__(self, service: SessionService, keep_every: int) -> None:
        self.service = service
        self.seen = Collected(room=1)
        request = SessionRequest(FIRST_PROMPT, seed=3, keep_every=keep_every)
        self.session: Session = opened(service, request, self.seen)
        self.sent: dict[str, Command] = {}
        self.began_ahead: set[int] = set()  # points that hold a chunk which was begun before them

    def do(self, name: str, value: object) -> None:
        match name:
            case "send":
                self._send(value)
            case "together":
                with self.service._changed:
                    self._send(value)
            case "run":
                self.seen.room += value
                self.service.wake()
            case "wait":
                self._resume()
                self.seen.wait(SessionChunk, self.seen.room)
            case "resume":
                self._resume()
            case "pause" | "park":
                with suppress(ServiceError):  # it is paused
                    self.service.pause(self.session)
                if name == "park":
                    eventually(lambda: not self.session.resident and not self.session.commands)

    def _send(self, wanted: list[Command]) -> None:
        for command in wanted:
            event_id = f"e{len(self.sent)}"
            self.sent[event_id] = dataclasses.replace(command, event_id=event_id)
            self.service.submit(self.session, self.sent[event_id])

    def _resume(self) -> None:
        with suppress(ServiceError):  # it runs
            self.service.resume(self.session)

    def finish(self) -> list[SessionChunk | SessionEvent]:
        """Two chunks more, which show all that was sent; returns what the client was given."""
        self._resume()
        self.seen.wait(SessionChunk, self.seen.room)
        eventually(lambda: not self.session.commands)
        self.seen.room += 2
        self.service.wake()
        self.seen.wait(SessionChunk, self.seen.room)
        points = self.session.points._points.items()
        self.began_ahead = {number for number, each in points if "ahead.frames" in each.snapshot.tensors}
        self.service.close(self.session)
        assert self.seen.ended() == Ended("stopped", self.seen.room)
        return self.seen.log[:-1]


class Reference:
    """Makes the same video from the receipts alone, with a pipeline that computes nothing ahead.

    began_ahead: the points that hold a chunk of their old seed, since it was begun before they were kept.
    """

    def __init__(self, pipe: Pipeline, sent: dict[str, Command], began_ahead: set[int]) -> None:
        self._pipe, self._sent, self._began_ahead = pipe, sent, began_ahead
        self._stream = pipe.stream(FIRST_PROMPT, seed=3)
        self._next_seed: int | None = None  # from the chunk after the next one on
        self._points: dict[int, tuple[Snapshot, int | None, int]] = {}  # and the seed to come, the branch
        self._branch = 0
        self._tips = [0]
        self._applied: list[str] = []  # since the last chunk

    def follow(self, entry: SessionChunk | SessionEvent) -> None:
        match entry:
            case PromptApplied():
                self._change_prompt(entry)
            case PointKept():
                assert entry.chunk_index == self._stream.index and entry.branch_id == self._branch
                self._points[entry.snapshot_id] = self._stream.snapshot(), self._next_seed, self._branch
            case Moved():
                self._move(entry)
            case SessionChunk():
                self._make(entry)

    def _change_prompt(self, receipt: PromptApplied) -> None:
        assert (receipt.chunk_index, receipt.branch_id) == (self._stream.index, self._branch)
        command = self._sent[receipt.event_id]
        chunks = command.transition_chunks if isinstance(command, ChangePrompt) else 1
        self._stream.set_prompt(command.prompt, command.mode, chunks)
        if command.mode == "hard":  # nothing is ahead of a cut
            self._take_seed()
        self._applied.append(receipt.event_id)

    def _take_seed(self) -> None:
        if self._next_seed is not None:
            self._stream.seed, self._next_seed = self._next_seed, None

    def _move(self, receipt: Moved) -> None:
        command = self._sent[receipt.event_id]
        assert command.snapshot_id == receipt.snapshot_id
        saved, self._next_seed, branch = self._points[receipt.snapshot_id]
        seed = command.seed if isinstance(command, Branch) else None
        if seed is not None and receipt.snapshot_id in self._began_ahead:
            self._next_seed = seed
        elif seed is not None:
            saved = dataclasses.replace(saved, info=saved.info | {"seed": seed})
        self._stream = self._pipe.restore(saved)
        assert receipt.chunk_index == self._stream.index
        assert receipt.seed == (self._stream.seed if self._next_seed is None else self._next_seed)
        if isinstance(command, Branch) or self._tips[branch] != self._stream.index:
            self._tips.append(self._stream.index)
            branch = len(self._tips) - 1
        self._branch = branch
        assert receipt.branch_id == branch
        self._applied.clear()

    def _make(self, chunk: SessionChunk) -> None:
        made = next(self._stream)
        self._take_seed()
        assert (chunk.index, chunk.branch_id) == (made.index, self._branch)
        assert chunk.prompt == self._stream.prompt
        assert chunk.started == tuple(self._applied)
        assert set(chunk.started) <= {*chunk.active, *chunk.completed}
        assert numpy.array_equal(chunk.frames, made.frames)
        self._tips[self._branch] = made.index + 1
        self._applied.clear()


def check(service: SessionService, plain: Pipeline, wanted: list[Action], keep_every: int) -> None:
    client = Client(service, keep_every)
    try:
        for name, value in wanted:
            client.do(name, value)
        log = client.finish()
    finally:
        service.close(client.session)
    assert_every_command_is_answered(client.sent, log)
    reference = Reference(plain, client.sent, client.began_ahead)
    for entry in log:
        reference.follow(entry)


def assert_every_command_is_answered(
    sent: dict[str, Command], log: list[SessionChunk | SessionEvent]
) -> None:
    answered: dict[str, set[type]] = {event_id: set() for event_id in sent}
    for entry in log:
        if isinstance(entry, PromptApplied | PointKept | Moved | CommandFailed) and entry.event_id:
            answered[entry.event_id].add(type(entry))
    for event_id, command in sent.items():
        done = {ChangePrompt: PromptApplied, KeepPoint: PointKept, Seek: Moved, Branch: Moved}[type(command)]
        assert done in answered[event_id] or CommandFailed in answered[event_id], command


fast = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
soak = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
interleavings = given(wanted=actions(), keep_every=some.sampled_from((0, 0, 2)))


@fast
@interleavings
def test_a_session_shows_what_its_receipts_say(
    service: SessionService, plain: Pipeline, wanted: list[Action], keep_every: int
) -> None:
    check(service, plain, wanted, keep_every)


@pytest.mark.soak
@soak
@interleavings
def test_five_hundred_sessions_show_what_their_receipts_say(
    service: SessionService, plain: Pipeline, wanted: list[Action], keep_every: int
) -> None:
    check(service, plain, wanted, keep_every)
