"""Recording: a whole session in one file that grows as it runs, and MP4 files made of parts of it."""

from __future__ import annotations

import io
import os
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from rfengine.files import replaced
from rfengine.limits import as_integer, shown
from rfengine.serving.video_encoder import BOX_HEADER, Fragment, FrameTable

_MOST_INIT_BYTES = 1 << 20  # a real one has less than a KiB


class ByteBudget:
    """Bytes on disk that several recordings have together; any thread may use it."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.used = 0
        self._lock = Lock()

    def take(self, count: int) -> bool:
        """Whether so many bytes more fit, which then are taken."""
        with self._lock:
            fits = self.used + count <= self.most_bytes
            self.used += count if fits else 0
        return fits

    def give(self, count: int) -> None:
        """Give bytes back."""
        with self._lock:
            self.used -= count


class Recording:
    """The fragments of a session in one file, each written as it comes; the file plays at any moment.

    A full disk or a budget that is used up ends the recording and never the session: `fault` says why then,
    in a sentence without the path, and later fragments are left out. One thread at a time uses it.

    num_bytes and num_frames: in the file so far. Who removes the file gives num_bytes back to the budget.
    """

    def __init__(self, path: Path, init_segment: bytes, budget: ByteBudget) -> None:
        """Make the file, which must not exist; where that fails `fault` says why."""
        self.fault: str | None = None
        self.num_bytes = 0
        self.num_frames = 0
        self._budget = budget
        self._file: io.FileIO | None = None
        try:
            self._file = io.FileIO(path, "xb")
        except OSError as error:
            self._end(error.strerror)
            return
        self._append(init_segment)

    def append(self, fragment: Fragment) -> None:
        """Write the next fragment, whole or not at all. Raises RuntimeError after `close`."""
        if self.fault is not None:
            return
        if self._file is None:
            raise RuntimeError(f"the recording was closed after {self.num_frames} frames; open another")
        if self._append(fragment.data):
            self.num_frames += fragment.num_frames

    def close(self) -> None:
        """End the file. Closing twice changes nothing."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()
        except OSError as error:  # a network file system may report a full disk as late as here
            self._end(error.strerror)

    def _append(self, data: bytes) -> bool:
        """Whether `data` is in the file; where it is not, the recording has ended."""
        if not self._budget.take(len(data)):
            self._end(f"all recordings have their {self._budget.most_bytes} bytes")
            return False
        rest = memoryview(data)
        try:
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):  # who reads the file leaves out a fragment that is not whole
                self._file.truncate(self.num_bytes)
            self._budget.give(len(data))
            self._end(error.strerror)
            return False
        self.num_bytes += len(data)
        return True

    def _end(self, reason: str) -> None:
        self.fault = self.fault or (
            f"the recording ended after {self.num_frames} frames ({reason}) and what was recorded is kept; "
            "free space or raise the limit, and start a new session"
        )
        self.close()


@dataclass(frozen=True, slots=True)
class _Part:
    """A whole fragment of a file: where it lies, and its frames in recording order."""

    offset: int
    start_frame: int
    num_frames: int


def write_mp4(source: Path, target: Path, ranges: Sequence[tuple[int, int]] | None = None) -> None:
    """Write frames of a recording as an ordinary MP4 with its index first, without encoding them again.

    The recording may still grow: its fragments that are whole are read. ranges: frames [start, stop) in
    recording order, each starting where a chunk does; they are joined to one video with continuous
    timestamps. None takes all. Nothing is at `target` until the file is whole. Messages hold no path.
    Raises ValueError for a recording that cannot be read or a range it does not have, RuntimeError when it
    has no frame yet or the file cannot be written.
    """
    from av import FFmpegError

    try:
        file = source.open("rb")
    except OSError as error:
        raise ValueError(f"the recording cannot be read ({error.strerror}); choose another") from error
    with file:
        init_segment, parts = _scan(file)
        if not parts:
            raise RuntimeError("the recording has no frame yet; wait for the first chunk")
        chosen = [(part, part.num_frames) for part in parts] if ranges is None else _chosen(parts, ranges)
        try:
            with replaced(target) as partial:
                _remux(file, init_segment, chosen, partial)
        except (OSError, FFmpegError) as error:
            reason = error.strerror or type(error).__name__
            with suppress(OSError):  # the directory itself may be gone
                reason += f", {shutil.disk_usage(target.parent).free // 2**10} KiB free"
            raise RuntimeError(
                f"the MP4 could not be written ({reason}); free space or choose another place"
            ) from error


def _scan(file: BinaryIO) -> tuple[bytes, list[_Part]]:
    """The init segment and the fragments that are whole."""
    parts: list[_Part] = []
    init_segment, num_frames = b"", 0
    moof: tuple[int, FrameTable] | None = None
    for kind, offset, num_bytes in _boxes(file):
        if kind == b"mdat" and moof is not None:
            parts.append(_Part(moof[0], num_frames, len(moof[1].sizes)))
            num_frames += len(moof[1].sizes)
        moof = None
        if kind == b"moof":
            moof = offset, FrameTable.of_moof(_read(file, offset, num_bytes))
        elif not parts and kind in (b"ftyp", b"moov") and num_bytes <= _MOST_INIT_BYTES:
            init_segment += _read(file, offset, num_bytes)
    if init_segment[4:8] != b"ftyp":
        raise ValueError("the file is no recording of a session; choose another")
    return init_segment, parts


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and bytes of each box of a file that is whole."""
    size, offset = os.fstat(file.fileno()).st_size, 0
    while offset + BOX_HEADER.size <= size:
        num_bytes, kind = BOX_HEADER.unpack(_read(file, offset, BOX_HEADER.size))
        if num_bytes < BOX_HEADER.size or offset + num_bytes > size:
            return
        yield kind, offset, num_bytes
        offset += num_bytes


def _read(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)


def _chosen(parts: list[_Part], ranges: Sequence[tuple[int, int]]) -> list[tuple[_Part, int]]:
    """The fragments of the ranges in order, each with how many of its frames are taken."""
    if not ranges:
        raise ValueError("ranges is empty; give at least one range of frames, or None for all")
    starts = [part.start_frame for part in parts]
    num_frames = starts[-1] + parts[-1].num_frames
    chosen = []
    for given in ranges:
        start, stop = _bounds(given)
        if not 0 <= start < stop <= num_frames:
            raise ValueError(
                f"the range [{start}, {stop}) is not within the {num_frames} frames of the recording; give a "
                "start and a larger stop, which is not part of it"
            )
        at = bisect_left(starts, start)
        if at == len(starts) or starts[at] != start:
            raise ValueError(
                f"the range [{start}, {stop}) starts within a chunk; start it at frame {starts[at - 1]}, "
                "where the chunk does"
            )
        chosen += [
            (part, min(part.num_frames, stop - part.start_frame))
            for part in parts[at : bisect_left(starts, stop)]
        ]
    return chosen


def _bounds(given: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise ValueError(f"a range is {shown(given)}; give the start and the stop of each")
    return as_integer("start", given[0]), as_integer("stop", given[1])


def _remux(file: BinaryIO, init_segment: bytes, chosen: list[tuple[_Part, int]], target: Path) -> None:
    import av

    beginning = init_segment + b"".join(_moof_and_mdat(file, chosen[0][0]))
    # with its protocol named, since a colon in a name would be the end of another
    name, options = f"file:{target}", {"movflags": "+faststart"}
    with (
        av.open(io.BytesIO(beginning), format="mp4") as recorded,
        av.open(name, "w", format="mp4", container_options=options) as output,
    ):
        time_base = recorded.streams.video[0].time_base
        stream = output.add_stream_from_template(recorded.streams.video[0])
        ticks = 0
        for part, count in chosen:
            moof, mdat = _moof_and_mdat(file, part)
            table, at = FrameTable.of_moof(moof), BOX_HEADER.size
            for size, is_keyframe in zip(table.sizes[:count], table.keyframes, strict=False):
                packet = av.Packet(mdat[at : at + size])
                packet.stream, packet.time_base, packet.is_keyframe = stream, time_base, is_keyframe
                packet.pts = packet.dts = ticks
                packet.duration = table.frame_ticks
                output.mux(packet)
                at += size
                ticks += table.frame_ticks


def _moof_and_mdat(file: BinaryIO, part: _Part) -> tuple[bytes, bytes]:
    moof_bytes, _ = BOX_HEADER.unpack(_read(file, part.offset, BOX_HEADER.size))
    mdat_bytes, _ = BOX_HEADER.unpack(_read(file, part.offset + moof_bytes, BOX_HEADER.size))
    return _read(file, part.offset, moof_bytes), _read(file, part.offset + moof_bytes, mdat_bytes)
