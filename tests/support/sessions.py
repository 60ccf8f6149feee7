"""A consumer that keeps what its session gives it, and services of a small pipeline, for tests of serving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Event

import numpy

from rfengine import Pipeline
from rfengine.serving.events import Ended, SessionChunk, SessionEvent, SessionRequest
from rfengine.serving.options import ServiceOptions
from rfengine.serving.session import Session
from rfengine.serving.sessions import SessionService

WAIT = 60.0  # seconds that a test waits for another thread at most


class Collected:
    """Keeps chunks, events and the end in `log`, in their order. room: how many chunks it takes in all."""

    def __init__(self, room: int | None = None) -> None:
        self.log: list[SessionChunk | SessionEvent | Ended] = []
        self.room = room
        self.session: Session | None = None
        self.failing: Exception | None = None
        self.gate = Event()  # chunks are taken while it is set
        self.gate.set()
        self._changed = Condition()

    def has_room(self) -> bool:
        return self.room is None or (self.session is not None and self.session.chunks < self.room)

    def take(self, chunk: SessionChunk) -> None:
        self.gate.wait(WAIT)
        if self.failing is not None:
            raise self.failing
        self._add(chunk)

    def notify(self, event: SessionEvent) -> None:
        self._add(event)

    def end(self, ended: Ended) -> None:
        self._add(ended)

    def _add(self, entry: SessionChunk | SessionEvent | Ended) -> None:
        with self._changed:
            self.log.append(entry)
            self._changed.notify_all()

    def of(self, kind: type) -> list:
        """The entries of one kind so far."""
        with self._changed:
            return [entry for entry in self.log if isinstance(entry, kind)]

    @property
    def chunks(self) -> list[SessionChunk]:
        return self.of(SessionChunk)

    def frames(self, count: int | None = None) -> numpy.ndarray:
        return numpy.concatenate([chunk.frames for chunk in self.chunks[:count]])

    def wait(self, kind: type, count: int = 1, seconds: float = WAIT) -> list:
        """The entries of one kind, once there are so many."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: sum(isinstance(entry, kind) for entry in self.log) >= count, seconds
            )
        assert done, f"only {len(self.of(kind))} of {count} {kind.__name__} came: {self.log[-5:]}"
        return self.of(kind)

    def ended(self) -> Ended:
        return self.wait(Ended)[0]


def opened(service: SessionService, request: SessionRequest, consumer: Collected) -> Session:
    """A session whose consumer counts exactly what it has room for."""
    consumer.session = service.open(request, consumer)
    service.wake()
    return consumer.session


@contextmanager
def running_service(pipeline: Pipeline, **options: object) -> Iterator[SessionService]:
    """A service, which is stopped at the end and must have nothing left."""
    service = SessionService(pipeline, ServiceOptions(**{"keep_every": 0, **options}))
    try:
        yield service
    finally:
        service.stop(WAIT)
    assert not any(service.counts().values())
    assert not any(thread.is_alive() for thread in service._threads)


def eventually(true: Callable[[], bool], seconds: float = WAIT) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)
