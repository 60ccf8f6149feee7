"""LiveVideo: the consumer of a realtime session, which encodes its chunks once for all who get them: the
client's outbox, the recording, and the HLS playlist."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from threading import Lock

from rfengine.serving.errors import Fault
from rfengine.serving.events import (
    CommandFailed,
    Ended,
    Moved,
    PointDropped,
    PointKept,
    PromptApplied,
    PromptQueued,
    SessionChunk,
    SessionEvent,
    StateChanged,
)
from rfengine.serving.realtime.hls import HlsPlaylist
from rfengine.serving.realtime.outbox import Media, Outbox
from rfengine.serving.realtime.protocol import (
    ChunkMetadata,
    ErrorMessage,
    InteractionApplied,
    InteractionQueued,
    Message,
    SessionDone,
    SessionMoved,
    SessionStateChanged,
    SnapshotDropped,
    SnapshotKept,
)
from rfengine.serving.recording import Recording
from rfengine.serving.video_encoder import VideoEncoder

# of each event, whose fields are the message's
_MESSAGES: dict[type, type[Message]] = {
    StateChanged: SessionStateChanged,
    PromptQueued: InteractionQueued,
    PromptApplied: InteractionApplied,
    PointKept: SnapshotKept,
    PointDropped: SnapshotDropped,
    Moved: SessionMoved,
}


class ChunkLine:
    """Where the chunks of each branch are in the recording, so that one branch can be taken out of it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._parents: dict[int, tuple[int, int]] = {}  # branch: its parent, and the first index of its own
        self._chunks: dict[tuple[int, int], tuple[int, int]] = {}  # (branch, index): frames [start, stop)

    def fork(self, branch_id: int, parent_id: int, chunk_index: int) -> None:
        """A branch begins."""
        with self._lock:
            self._parents.setdefault(branch_id, (parent_id, chunk_index))

    def add(self, branch_id: int, index: int, start: int, stop: int) -> None:
        """A chunk is in the recording as frames [start, stop)."""
        with self._lock:
            self._chunks[branch_id, index] = (start, stop)

    def ranges(self, branch_id: int) -> list[tuple[int, int]]:
        """The frames of a branch from the start of the video, in order; empty for an unknown one."""
        with self._lock:
            chunks, before = [], 2**63
            branch: int | None = branch_id
            while branch is not None:
                own = [index for owner, index in self._chunks if owner == branch and index < before]
                chunks += [self._chunks[branch, index] for index in sorted(own, reverse=True)]
                parent, first = self._parents.get(branch, (None, 0))
                before, branch = min(before, first), parent
        return chunks[::-1]


class LiveVideo:
    """One session's video on its way out. take, notify and end are called one after the other.

    on_encode: gets the milliseconds of each chunk's encoding.
    """

    def __init__(
        self,
        request_id: str,
        encoder: VideoEncoder,
        outbox: Outbox,
        recording: Recording | None,
        hls: HlsPlaylist | None,
        on_encode: Callable[[float], None],
    ) -> None:
        self.request_id = request_id
        self.mime = encoder.mime
        self.init_segment = encoder.init_segment
        self.hls = hls
        self.line = ChunkLine()
        self._encoder = encoder
        self._outbox = outbox
        self._recording = recording
        self._on_encode = on_encode
        self._reported_fault = False

    def has_room(self) -> bool:
        """Whether the client's outbox has room."""
        return self._outbox.has_room()

    def take(self, chunk: SessionChunk) -> None:
        """Encode a chunk and hand it on."""
        started = time.perf_counter()
        fragment = self._encoder.encode(chunk.frames)
        encode_ms = (time.perf_counter() - started) * 1e3
        self._on_encode(encode_ms)
        if self._recording is not None:
            self._recording.append(fragment)
            self._report_recording()
            if self._recording.fault is None:
                stop = fragment.start_frame + fragment.num_frames
                self.line.add(chunk.branch_id, chunk.index, fragment.start_frame, stop)
        if self.hls is not None:
            self.hls.add(fragment)
        metadata = ChunkMetadata(
            request_id=self.request_id,
            transport_chunk_index=chunk.number,
            generation_chunk_index=chunk.index,
            branch_id=chunk.branch_id,
            num_frames=fragment.num_frames,
            byte_length=len(fragment.data),
            start_seconds=fragment.start_seconds,
            prompt=chunk.prompt,
            started_event_ids=list(chunk.started),
            active_event_ids=list(chunk.active),
            completed_event_ids=list(chunk.completed),
            snapshot_id=chunk.snapshot_id,
            dropped_chunks=0,
            denoise_ms=round(chunk.denoise_ms, 3),
            decode_ms=round(chunk.decode_ms, 3),
            encode_ms=round(encode_ms, 3),
        )
        self._outbox.put_media(Media(metadata, fragment.data, fragment.seconds))

    def _report_recording(self) -> None:
        """Tell the client once that its recording has ended before its video."""
        fault = self._recording.fault
        if fault is not None and not self._reported_fault:
            self._reported_fault = True
            self._outbox.put(self._error(Fault("recording_ended", fault, 507, False), None, fatal=False))

    def notify(self, event: SessionEvent) -> None:
        """Queue what happened as a message."""
        if isinstance(event, Moved) and event.parent_branch_id is not None:
            self.line.fork(event.branch_id, event.parent_branch_id, event.chunk_index)
        self._outbox.put(self._message(event))

    def _message(self, event: SessionEvent) -> Message:
        if isinstance(event, CommandFailed):
            return self._error(event.fault, event.event_id, fatal=False)
        return _MESSAGES[type(event)](request_id=self.request_id, **asdict(event))

    def _error(self, fault: Fault, event_id: str | None, fatal: bool) -> ErrorMessage:
        return error_message(fault, self.request_id, event_id, fatal)

    def end(self, ended: Ended) -> None:
        """Close what is open and queue the last messages."""
        self._encoder.close()
        if self._recording is not None:
            self._recording.close()
        if self.hls is not None:
            self.hls.end()
        done = SessionDone(
            request_id=self.request_id,
            chunks=ended.chunks,
            stopped=ended.reason != "finished",
            reason=ended.reason,
        )
        error = () if ended.fault is None else (self._error(ended.fault, None, fatal=True),)
        self._outbox.finish((*error, done))


def error_message(fault: Fault, request_id: str | None, event_id: str | None, fatal: bool) -> ErrorMessage:
    """The message of a fault."""
    return ErrorMessage(
        request_id=request_id,
        event_id=event_id,
        code=fault.code,
        message=fault.message,
        retryable=fault.retryable,
        fatal=fatal,
    )
