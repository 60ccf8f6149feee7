"""Outbox: what waits to be sent to one client, bounded in bytes, in seconds of video and in messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.realtime.protocol import ChunkMetadata, Message, SlowClient

_MOST_EVENTS = 1000  # without a chunk; a client that reads has a few
_SLOW = Fault("slow_client", "the client reads too slowly; read faster, or let chunks be dropped", 408, True)


@dataclass(frozen=True, slots=True)
class Media:
    """One chunk to be sent: its description, and its fragment."""

    metadata: ChunkMetadata
    data: bytes
    seconds: float


class Outbox:
    """A queue between the threads that make a video and the task that sends it.

    policy, where more waits than most_bytes or most_seconds: "pause" has no room, so no chunk is made; "drop"
    leaves out the chunks that wait longest, and each starts with a keyframe; "disconnect" raises ServiceError
    in put. on_ready: called on the putting thread when there is something for a consumer who found nothing.
    on_room: called on the taking thread when there is room again.
    """

    def __init__(
        self,
        policy: SlowClient,
        most_bytes: int,
        most_seconds: float,
        on_ready: Callable[[], None],
        on_room: Callable[[], None],
    ) -> None:
        self.policy = policy
        self.dropped = 0  # chunks in all
        self.finished = False  # nothing is put any more
        self._most_bytes, self._most_seconds = most_bytes, most_seconds
        self._on_ready, self._on_room = on_ready, on_room
        self._lock = Lock()
        self._waiting: deque[Media | Message] = deque()
        self._bytes, self._seconds, self._events, self._chunks = 0, 0.0, 0, 0
        self._dropped_now = 0
        self._closed = False

    @property
    def waiting(self) -> tuple[int, int]:
        """Bytes and chunks that wait."""
        return self._bytes, self._chunks

    def has_entries(self) -> bool:
        """Whether take would give something, or nothing comes any more."""
        return bool(self._waiting) or self.finished

    def has_room(self) -> bool:
        """Whether another chunk may be made for this client."""
        return self.policy != "pause" or not self._is_full()

    def _is_full(self) -> bool:
        return self._bytes >= self._most_bytes or self._seconds >= self._most_seconds

    def put(self, message: Message) -> None:
        """Queue a message. Raises ServiceError where a client that reads nothing has too many."""
        with self._lock:
            if self._closed:
                return
            if self._events >= _MOST_EVENTS:
                raise ServiceError(_SLOW)
            self._events += 1
            self._waiting.append(message)
        self._on_ready()

    def put_media(self, media: Media) -> None:
        """Queue a chunk. Raises ServiceError where the policy is to disconnect and the queue is full."""
        with self._lock:
            if self._closed:
                return
            if self._is_full() and self.policy == "disconnect":
                raise ServiceError(_SLOW)
            while self._is_full() and self.policy == "drop" and self._chunks:
                self._drop_oldest()
            self._waiting.append(media)
            self._count(media, 1)
        self._on_ready()

    def _drop_oldest(self) -> None:
        oldest = next(each for each in self._waiting if isinstance(each, Media))
        self._waiting.remove(oldest)
        self._count(oldest, -1)
        self.dropped += 1
        self._dropped_now += 1

    def _count(self, media: Media, sign: int) -> None:
        self._bytes += sign * len(media.data)
        self._seconds += sign * media.seconds
        self._chunks += sign

    def finish(self, last: tuple[Message, ...]) -> None:
        """Queue the last messages, whatever waits."""
        with self._lock:
            self.finished = True
            if self._closed:
                return
            self._waiting.extend(last)
            self._events += len(last)
        self._on_ready()

    def close(self) -> None:
        """Drop what waits, and all that is put from now on: nobody takes it, nor is called any more."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._bytes, self._seconds, self._events, self._chunks = 0, 0.0, 0, 0
            self._on_ready = self._on_room = _do_nothing

    def take(self) -> Media | Message | None:
        """What was put first; None where nothing waits. A chunk says how many were left out before it."""
        with self._lock:
            if not self._waiting:
                return None
            entry = self._waiting.popleft()
            if not isinstance(entry, Media):
                self._events -= 1
                return entry
            was_full = self._is_full()
            self._count(entry, -1)
            dropped, self._dropped_now = self._dropped_now, 0
            has_room = was_full and not self._is_full()
        if has_room:
            self._on_room()
        if not dropped:
            return entry
        metadata = entry.metadata.model_copy(update={"dropped_chunks": dropped})
        return Media(metadata, entry.data, entry.seconds)


def _do_nothing() -> None:
    return
