"""LiveVideo: what a client is told of each event, and where the chunks of a branch are in the recording."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from rfengine.serving.errors import Fault
from rfengine.serving.events import (
    CommandFailed,
    Ended,
    Moved,
    PointDropped,
    PointKept,
    PromptApplied,
    SessionChunk,
    SessionState,
    StateChanged,
)
from rfengine.serving.realtime.hls import HlsPlaylist
from rfengine.serving.realtime.live_video import ChunkLine, LiveVideo
from rfengine.serving.realtime.outbox import Media, Outbox
from rfengine.serving.recording import ByteBudget, Recording, write_mp4
from rfengine.serving.video_encoder import VideoEncoder
from support.outcome import frame_count

FRAMES = numpy.zeros((12, 32, 48, 3), numpy.uint8)


class Parts:
    """A live video with all that it feeds."""

    def __init__(self, directory: Path, most_bytes: int = 10**7) -> None:
        encoder = VideoEncoder(16, 32, 48)
        self.outbox = Outbox("pause", 10**7, 100.0, lambda: None, lambda: None)
        self.path = directory / "recording.mp4"
        self.recording = Recording(self.path, encoder.init_segment, ByteBudget(most_bytes))
        self.hls = HlsPlaylist(16)
        self.encode_ms: list[float] = []
        self.video = LiveVideo("rt_1", encoder, self.outbox, self.recording, self.hls, self.encode_ms.append)

    def chunk(self, number: int, index: int, branch_id: int = 0) -> None:
        self.video.take(
            SessionChunk(FRAMES, number, index, branch_id, "a circle", ("e",), (), ("e",), 3, 1.5, 2.5)
        )

    def sent(self) -> list:
        return list(iter(self.outbox.take, None))


def test_a_chunk_reaches_the_client_the_recording_and_the_playlist(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.chunk(0, 0)
    parts.chunk(1, 1)
    first, second = parts.sent()
    assert isinstance(first, Media)
    metadata = second.metadata
    assert (metadata.transport_chunk_index, metadata.generation_chunk_index, metadata.branch_id) == (1, 1, 0)
    assert (metadata.num_frames, metadata.byte_length) == (12, len(second.data))
    assert (metadata.start_seconds, metadata.snapshot_id, metadata.prompt) == (0.75, 3, "a circle")
    assert metadata.started_event_ids == metadata.completed_event_ids == ["e"]
    assert (metadata.denoise_ms, metadata.decode_ms) == (1.5, 2.5)
    assert metadata.encode_ms == round(parts.encode_ms[1], 3) > 0
    assert parts.recording.num_frames == 24
    assert "segment-1.m4s" in parts.hls.playlist()
    parts.video.end(Ended("finished", 2))
    assert "ENDLIST" in parts.hls.playlist()
    assert frame_count(parts.path) == 24


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            StateChanged(SessionState.PAUSED, "e"),
            {"type": "session.state", "state": "paused", "event_id": "e"},
        ),
        (
            PromptApplied("e", 4, 1),
            {"type": "session.interaction.applied", "event_id": "e", "chunk_index": 4, "branch_id": 1},
        ),
        (
            PointKept(2, 5, 1, "a circle", True, None),
            {"type": "session.snapshot.kept", "snapshot_id": 2, "chunk_index": 5, "branch_id": 1,
             "prompt": "a circle", "automatic": True, "event_id": None},
        ),
        (PointDropped(2), {"type": "session.snapshot.dropped", "snapshot_id": 2}),
        (
            Moved("e", 2, 5, 3, 1, "a circle", 9),
            {"type": "session.moved", "event_id": "e", "snapshot_id": 2, "chunk_index": 5, "branch_id": 3,
             "parent_branch_id": 1, "prompt": "a circle", "seed": 9},
        ),
        (
            CommandFailed("e", Fault("unknown_snapshot", "no such", 404)),
            {"type": "error", "event_id": "e", "code": "unknown_snapshot", "message": "no such",
             "retryable": False, "fatal": False},
        ),
    ],
)  # fmt: skip
def test_each_event_has_its_message(tmp_path: Path, event: object, expected: dict) -> None:
    parts = Parts(tmp_path)
    parts.video.notify(event)
    (message,) = parts.sent()
    assert message.model_dump() == {"request_id": "rt_1"} | expected
    parts.video.end(Ended("stopped", 0))


def test_the_end_says_why_and_a_fault_comes_before_it(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.video.end(Ended("failed", 7, Fault("chunk_failed", "it failed", 500, True)))
    error, done = parts.sent()
    assert (error.code, error.retryable, error.fatal) == ("chunk_failed", True, True)
    assert (done.chunks, done.stopped, done.reason) == (7, True, "failed")
    assert parts.outbox.finished


def test_a_recording_that_ends_early_is_reported_once_and_the_video_goes_on(tmp_path: Path) -> None:
    parts = Parts(tmp_path, most_bytes=1500)
    for number in range(4):
        parts.chunk(number, number)
    sent = parts.sent()
    errors = [each for each in sent if not isinstance(each, Media)]
    assert [(error.code, error.fatal) for error in errors] == [("recording_ended", False)]
    assert str(tmp_path) not in errors[0].message
    assert len(sent) == 5
    parts.video.end(Ended("finished", 4))


def test_a_branch_is_taken_out_of_the_recording_from_the_start_of_the_video(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    for number in range(4):
        parts.chunk(number, number)  # frames 0 to 48
    parts.video.notify(Moved("e", 0, 2, 1, 0, "a", 0))
    for number in range(4, 6):
        parts.chunk(number, number - 2, 1)  # chunks 2 and 3 of branch 1: frames 48 to 72
    parts.video.notify(Moved("f", 1, 3, 2, 1, "a", 0))
    parts.chunk(6, 3, 2)  # chunk 3 of branch 2, which left branch 1: frames 72 to 84
    parts.video.notify(Moved("g", 2, 4, 0, None, "a", 0))
    parts.chunk(7, 4, 0)  # back on the first branch
    line = parts.video.line
    assert line.ranges(0) == [(0, 12), (12, 24), (24, 36), (36, 48), (84, 96)]
    assert line.ranges(1) == [(0, 12), (12, 24), (48, 60), (60, 72)]
    assert line.ranges(2) == [(0, 12), (12, 24), (48, 60), (72, 84)]
    assert line.ranges(9) == []
    parts.video.end(Ended("stopped", 8))
    write_mp4(parts.path, tmp_path / "branch.mp4", line.ranges(2))
    assert frame_count(tmp_path / "branch.mp4") == 48


def test_a_branch_without_chunks_of_its_own_is_its_parent_up_to_there() -> None:
    line = ChunkLine()
    for index in range(4):
        line.add(0, index, 12 * index, 12 * index + 12)
    line.fork(1, 0, 2)
    assert line.ranges(1) == [(0, 12), (12, 24)]
