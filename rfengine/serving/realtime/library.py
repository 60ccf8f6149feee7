"""RecordingLibrary: the recordings and HLS playlists of realtime sessions, by the session's id."""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.realtime.live_video import LiveVideo
from rfengine.serving.recording import ByteBudget, Recording, write_mp4

_LEAST_BYTES = 2**20  # for a recording to begin
_SEGMENT_LIFE_S = 60.0  # after the session, for players that are behind
_MOST_UNRECORDED = 16  # ended sessions that have segments alone


@dataclass(slots=True)
class _Entry:
    owner: str | None
    video: LiveVideo
    path: Path | None
    recording: Recording | None
    ended_at: float | None = None


class RecordingLibrary:
    """Recordings in one directory that belongs to this process; what an earlier one left is removed.

    most_bytes: of all recordings; the oldest ended ones are removed for new ones. life_s: of a recording
    after its session. owner, in all methods: the name of the key, None without keys; others find nothing.
    """

    def __init__(self, directory: Path, most_bytes: int, life_s: float) -> None:
        self._directory, self._life_s = directory, life_s
        self._budget = ByteBudget(most_bytes)
        self._lock = Lock()
        self._entries: dict[str, _Entry] = {}
        self._exports: dict[Path, int] = {}  # their bytes in the budget
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # a directory was a replica's

    def new_recording(self, request_id: str, init_segment: bytes) -> tuple[Path, Recording]:
        """A file for a session that begins. Raises ServiceError where no room is left."""
        self.sweep(_LEAST_BYTES)
        if self._budget.most_bytes - self._budget.used < _LEAST_BYTES:
            raise ServiceError(self._quota())
        path = self._directory / f"{request_id}.mp4"
        return path, Recording(path, init_segment, self._budget)

    def _quota(self) -> Fault:
        used, most = self._budget.used, self._budget.most_bytes
        message = f"recordings have {used} of {most} bytes; start without record, or try again later"
        return Fault("recording_quota", message, 507, True, 60)

    def add(
        self, owner: str | None, video: LiveVideo, path: Path | None, recording: Recording | None
    ) -> None:
        """Offer the video of a session."""
        self.sweep()
        with self._lock:
            self._entries[video.request_id] = _Entry(owner, video, path, recording)

    def end(self, request_id: str) -> None:
        """The session has ended; its recording stays for a while, and its last segments for a shorter one."""
        with self._lock:
            entry = self._entries.get(request_id)
            if entry is not None:
                entry.ended_at = time.monotonic()
        self.sweep()

    def forget(self, request_id: str) -> None:
        """The session was refused, so there is no video."""
        with self._lock:
            entry = self._entries.pop(request_id, None)
        if entry is not None and entry.recording is not None:
            entry.recording.close()
            self._remove_file(entry)

    def _remove_file(self, entry: _Entry) -> None:
        with suppress(OSError):
            entry.path.unlink(missing_ok=True)
        self._budget.give(entry.recording.num_bytes)

    def video(self, request_id: str, owner: str | None) -> LiveVideo:
        """Raises ServiceError where the owner has no such session."""
        return self._entry(request_id, owner).video

    def _entry(self, request_id: str, owner: str | None) -> _Entry:
        with self._lock:
            entry = self._entries.get(request_id)
        if entry is None or entry.owner != owner:
            raise ServiceError(Fault("not_found", "no such session, or it is long over", status=404))
        return entry

    def export(self, request_id: str, owner: str | None, branch_id: int | None) -> Path:
        """An MP4 of what is recorded so far, or of one branch, in a file to be given to `discard`."""
        entry = self._entry(request_id, owner)
        if entry.path is None:
            message = "the session is not recorded; start it with record: true"
            raise ServiceError(Fault("not_recorded", message, status=404))
        ranges = None if branch_id is None else entry.video.line.ranges(branch_id)
        if ranges == []:
            raise ServiceError(Fault("unknown_branch", f"branch {branch_id} has no chunk", status=404))
        room = entry.recording.num_bytes
        self.sweep(room, entry)
        if not self._budget.take(room):
            raise ServiceError(self._quota())
        target = self._directory / f"{request_id}-{secrets.token_hex(8)}.mp4"
        try:
            write_mp4(entry.path, target, ranges)
        except (RuntimeError, ValueError) as error:
            self._budget.give(room)
            raise ServiceError(Fault("export_failed", str(error), 503, True, 1)) from error
        with self._lock:
            self._exports[target] = room
        return target

    def discard(self, path: Path) -> None:
        """Remove an exported file."""
        with suppress(OSError):
            path.unlink(missing_ok=True)
        with self._lock:
            self._budget.give(self._exports.pop(path, 0))

    def sweep(self, room: int = 0, spared: _Entry | None = None) -> None:
        """Remove recordings that are over their time, and the oldest ended ones until `room` bytes are free;
        `spared` is not one of them."""
        now = time.monotonic()
        with self._lock:
            ended = [
                (each.ended_at, name)
                for name, each in self._entries.items()
                if each.ended_at is not None and each is not spared
            ]
            unrecorded = [name for _, name in sorted(ended) if self._entries[name].recording is None]
            for ended_at, name in sorted(ended):
                entry = self._entries[name]
                if entry.recording is None:
                    over = now - ended_at > _SEGMENT_LIFE_S or name in unrecorded[:-_MOST_UNRECORDED]
                else:
                    full = self._budget.used + room > self._budget.most_bytes
                    over = full or now - ended_at > self._life_s
                if over:
                    del self._entries[name]
                if over and entry.recording is not None:
                    self._remove_file(entry)
