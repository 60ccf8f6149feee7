"""Outbox: what each policy does with a client that does not read."""

from __future__ import annotations

import pytest

from rfengine.serving.errors import ServiceError
from rfengine.serving.realtime.outbox import Media, Outbox
from rfengine.serving.realtime.protocol import ChunkMetadata, SessionPong, SlowClient


def media(number: int, size: int = 100, seconds: float = 0.5) -> Media:
    metadata = ChunkMetadata(
        request_id="rt", transport_chunk_index=number, generation_chunk_index=number, branch_id=0,
        num_frames=8, byte_length=size, start_seconds=number * seconds, prompt="a", started_event_ids=[],
        active_event_ids=[], completed_event_ids=[], snapshot_id=None, dropped_chunks=0, denoise_ms=1.0,
        decode_ms=1.0, encode_ms=1.0,
    )  # fmt: skip
    return Media(metadata, bytes(size), seconds)


class Noted:
    """An outbox of at most 250 bytes and 2 seconds, and how often it called."""

    def __init__(self, policy: SlowClient, most_bytes: int = 250, most_seconds: float = 2.0) -> None:
        self.ready = self.room = 0
        self.outbox = Outbox(policy, most_bytes, most_seconds, self.on_ready, self.on_room)

    def on_ready(self) -> None:
        self.ready += 1

    def on_room(self) -> None:
        self.room += 1


def taken(outbox: Outbox) -> list[tuple[int, int]]:
    """The numbers of all chunks that wait, and how many were left out before each."""
    found = []
    while (entry := outbox.take()) is not None:
        if isinstance(entry, Media):
            found.append((entry.metadata.transport_chunk_index, entry.metadata.dropped_chunks))
    return found


def test_entries_come_out_in_their_order() -> None:
    noted = Noted("pause")
    pong = SessionPong()
    for number in range(2):
        noted.outbox.put_media(media(number))
        noted.outbox.put(pong)
    assert noted.ready == 4 and noted.outbox.waiting == (200, 2)
    entries = [noted.outbox.take() for _ in range(5)]
    assert [getattr(getattr(each, "metadata", each), "type", None) for each in entries] == [
        "video.chunk_metadata", "session.pong", "video.chunk_metadata", "session.pong", None,
    ]  # fmt: skip
    assert noted.outbox.waiting == (0, 0)


@pytest.mark.parametrize(("size", "seconds", "fits"), [(100, 0.1, 3), (1, 0.5, 4), (1000, 0.1, 1)])
def test_pause_has_no_room_once_bytes_or_seconds_are_used_up(size: int, seconds: float, fits: int) -> None:
    noted = Noted("pause")
    for number in range(fits):
        assert noted.outbox.has_room()
        noted.outbox.put_media(media(number, size, seconds))
    assert not noted.outbox.has_room()
    noted.outbox.take()
    assert noted.outbox.has_room() and noted.room == 1
    noted.outbox.take()
    assert noted.room == 1
    assert noted.outbox.dropped == 0


def test_drop_leaves_out_the_oldest_and_says_so_with_the_next() -> None:
    noted = Noted("drop")
    for number in range(10):
        assert noted.outbox.has_room()
        noted.outbox.put_media(media(number))
        assert noted.outbox.waiting[0] <= 300
    noted.outbox.put(SessionPong())
    assert noted.outbox.dropped == 7
    assert taken(noted.outbox) == [(7, 7), (8, 0), (9, 0)]
    noted.outbox.put_media(media(10))
    assert taken(noted.outbox) == [(10, 0)]


def test_drop_keeps_a_chunk_that_is_larger_than_the_queue() -> None:
    noted = Noted("drop")
    noted.outbox.put_media(media(0, size=1000))
    noted.outbox.put_media(media(1, size=1000))
    assert taken(noted.outbox) == [(1, 1)]


def test_disconnect_refuses_the_chunk_that_does_not_fit() -> None:
    noted = Noted("disconnect")
    for number in range(3):
        assert noted.outbox.has_room()
        noted.outbox.put_media(media(number))
    with pytest.raises(ServiceError) as caught:
        noted.outbox.put_media(media(3))
    assert caught.value.fault.code == "slow_client"


@pytest.mark.parametrize("policy", ["pause", "drop", "disconnect"])
def test_messages_are_bounded_too(policy: SlowClient) -> None:
    noted = Noted(policy)
    for _ in range(1000):
        noted.outbox.put(SessionPong())
    with pytest.raises(ServiceError) as caught:
        noted.outbox.put(SessionPong())
    assert caught.value.fault.code == "slow_client"
    noted.outbox.take()
    noted.outbox.put(SessionPong())


def test_the_last_messages_find_room_in_a_full_outbox() -> None:
    noted = Noted("disconnect", most_bytes=1)
    noted.outbox.put_media(media(0))
    for _ in range(1000):
        noted.outbox.put(SessionPong())
    assert not noted.outbox.finished
    noted.outbox.finish((SessionPong(),))
    assert noted.outbox.finished and noted.outbox.has_entries()
    assert sum(1 for _ in iter(noted.outbox.take, None)) == 1002
    assert noted.outbox.has_entries()  # nothing comes any more, which a waiting sender must see
