"""Video files of strangers, decoded frame by frame, and again for every metric: memory holds one batch.

Only the containers listed are opened, by what they hold and not by their name, and they open nothing else: no
playlist, no other file, no network. A file is measured as it is meant to be shown, or it is refused.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch
from torch import Tensor

from rfengine.evaluation.video_frames import Frames, frames_at_once
from rfengine.files import open_regular

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MOST_SIDE = 16384  # pixels
MOST_PIXELS = 2**25  # of a frame; 7680 x 4320 has a little less
MOST_FRAMES = 100_000  # features of all frames are held, about 6 KB for each

_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts"  # FFmpeg's names
_TRANSFERS = {16: "PQ", 18: "HLG"}  # of ISO/IEC 23091-2: brighter than a picture of 8 bits can show
_ONE = 1 << 16  # of the numbers of a display matrix
_MATROSKA = (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67")  # the header and the segment
_BOXES = {
    b"ftyp", b"styp", b"sidx", b"moov", b"moof", b"mdat", b"mfra", b"meta", b"udta", b"uuid", b"free",
    b"skip", b"wide", b"pnot",
}  # fmt: skip
_ADVICE = "give an MP4, MOV, Matroska, WebM, AVI or MPEG-TS file"


class _Turn(NamedTuple):
    """What a step across and a step down the stored picture become when it is shown: (x, y), y downwards."""

    across: tuple[int, ...]
    down: tuple[int, ...]


_UPRIGHT = _Turn((_ONE, 0), (0, _ONE))


def open_video(path: Path) -> Frames:
    """Decode a video file once, to know that it can be measured, and how many frames it has; `batches`
    decodes it again, and raises ValueError when it has changed since.

    Raises ValueError, with the reason, for one that is damaged or empty, has no picture, changes its size,
    has pixels that are not square or see-through, or is larger than MOST_SIDE, MOST_PIXELS or MOST_FRAMES,
    and for anything that is no ordinary file.
    """
    count, size, rotation, turn, times = 0, (0, 0), 0, _UPRIGHT, []
    with _opened(path) as file:
        for frame in _decoded(path, file):
            if count == 0:
                size, rotation, turn = (frame.height, frame.width), frame.rotation, _checked_turn(path, frame)
            if (frame.height, frame.width) != size:
                raise ValueError(
                    f"{path} changes its size at frame {count} from {size[1]} x {size[0]} to "
                    f"{frame.width} x {frame.height}; give videos of one size each"
                )
            if frame.rotation != rotation:
                raise ValueError(f"{path} is turned at frame {count}; give videos that stay as they are")
            count += 1
            times += [] if frame.time is None else [frame.time]
            if count > MOST_FRAMES:
                raise ValueError(f"{path} has more than {MOST_FRAMES} frames; give it in parts")
        if not count:
            raise ValueError(f"{path} has 0 frames; give a video with some")
        height, width = size if turn.across[0] else size[::-1]
        stamp = _stamp(file)
    return Frames(
        count, height, width, lambda: _batches(path, turn, stamp, frames_at_once(height, width)),
        tuple(times) if len(times) == count else (),
    )  # fmt: skip


def _batches(path: Path, turn: _Turn, stamp: tuple[int, ...], at_once: int) -> Iterator[Tensor]:
    """uint8 [B, H, W, 3], RGB, turned as the file says."""
    from av.video.reformatter import VideoReformatter

    reformatter, held = VideoReformatter(), []
    with _opened(path) as file:
        if _stamp(file) != stamp:
            raise ValueError(f"{path} has changed while it was read; give it again")
        for frame in _decoded(path, file):
            picture = reformatter.reformat(frame, format="rgb24").to_ndarray()
            held.append(_turned(torch.from_numpy(picture), turn))
            if len(held) == at_once:
                yield torch.stack(held)
                held = []
    if held:
        yield torch.stack(held)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open; whatever FFmpeg or the disk says of it becomes one ValueError."""
    import av

    try:
        with open_regular(path) as file:
            yield file
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path} cannot be read as a video ({reason}); {_ADVICE}") from error


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _decoded(path: Path, file: BinaryIO) -> Iterator[VideoFrame]:
    import av

    size, declared = os.fstat(file.fileno()).st_size, declared_bytes(file)
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); {_ADVICE}")
    if declared > size:
        raise ValueError(f"{path} ends after {size} of its {declared} bytes; get it again")
    # "none" is no protocol: what the file names stays closed
    options = {
        "format_whitelist": _CONTAINERS,
        "protocol_whitelist": "none",
        "max_pixels": str(MOST_PIXELS),
    }
    with av.open(file, options=options, metadata_errors="replace") as container:
        stream = _picture_stream(path, container)
        # an error is one: without these, damaged parts are painted over
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MOST_PIXELS)}
        index = 0
        for packet in container.demux(stream):
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise ValueError(f"{path} is damaged at frame {index}; get it again")
                yield frame
                index += 1


def _picture_stream(path: Path, container: InputContainer) -> VideoStream:
    """The first stream of moving pictures, which is checked as far as its header goes."""
    from av.stream import Disposition

    streams = [
        stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise ValueError(f"{path} has no picture; give a video file")
    stream = streams[0]
    if stream.codec_context is None:
        raise ValueError(f"{path} is of a codec that is not known here; convert it to H.264")
    _check_size(path, stream.codec_context.height, stream.codec_context.width)
    if stream.codec_context.color_trc in _TRANSFERS:
        name = _TRANSFERS[stream.codec_context.color_trc]
        raise ValueError(f"{path} has the brightness of {name} (HDR); convert it to BT.709")
    ratio = stream.sample_aspect_ratio
    if ratio and ratio != 1:
        raise ValueError(
            f"{path} has pixels of {ratio.numerator}:{ratio.denominator}, not square ones; scale it to those"
        )
    if stream.metadata.get("alpha_mode") == "1":
        raise ValueError(f"{path} is see-through (it has an alpha channel); lay it over a background")
    return stream


def _check_size(path: Path, height: int, width: int) -> None:
    if max(height, width) > MOST_SIDE or height * width > MOST_PIXELS:
        raise ValueError(
            f"{path} is {width} x {height}; use at most {MOST_SIDE} pixels a side and {MOST_PIXELS} a frame"
        )


def _checked_turn(path: Path, frame: VideoFrame) -> _Turn:
    """How the first frame is to be shown, after a check of what only a decoded frame tells.

    The side data of a frame keep it in memory until the next garbage collection: they are asked once.
    """
    _check_size(path, frame.height, frame.width)
    if any(component.is_alpha for component in frame.format.components):
        raise ValueError(f"{path} is see-through ({frame.format.name}); lay it over a background")
    found = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return _UPRIGHT
    numbers = struct.unpack("=9i", bytes(found))  # rows of three, the third for perspective
    turn = _Turn(numbers[0:2], numbers[3:5])
    steps = sorted(abs(step) for step in turn.across + turn.down)
    if steps != [0, 0, _ONE, _ONE] or turn.across[0] * turn.down[0] + turn.across[1] * turn.down[1]:
        raise ValueError(f"{path} is shown by the matrix {numbers}, no turn by quarters; turn it before")
    return turn


def _turned(picture: Tensor, turn: _Turn) -> Tensor:
    """The stored picture [H, W, 3] as it is shown."""
    if turn.across[0] == 0:
        picture = picture.transpose(0, 1)
    steps = (turn.across[1] + turn.down[1], turn.across[0] + turn.down[0])  # of the rows and of the columns
    return picture.flip([axis for axis, step in enumerate(steps) if step < 0])


def declared_bytes(file: BinaryIO) -> int:
    """The end of the last part that an MP4, Matroska or AVI file states the length of; 0 where none does.

    So a file that was cut off differs from a short one. Files above a gigabyte have several RIFF chunks, and
    live recordings leave lengths open. The file is read where lengths stand, and is at its start afterwards.
    """
    size, end = os.fstat(file.fileno()).st_size, 0
    while end < size:
        file.seek(end)
        length = _part_bytes(file.read(16))
        if length == 0:
            break
        end += length
    file.seek(0)
    return end


def _part_bytes(head: bytes) -> int:
    """The length that a RIFF chunk, a Matroska element or an MP4 box states in its head, 0 for none."""
    if head[:4] == b"RIFF":
        length = 8 + int.from_bytes(head[4:8], "little")
        return length + length % 2
    if head[:4] in _MATROSKA:
        more = 8 - head[4].bit_length() if len(head) > 4 else 8  # bytes of the number after its first
        unknown = (1 << 7 * (more + 1)) - 1
        value = int.from_bytes(head[4 : 5 + more], "big") & unknown
        return 5 + more + value if len(head) >= 5 + more and more < 8 and value != unknown else 0
    length, least = int.from_bytes(head[:4], "big"), 8
    if length == 1:
        length, least = int.from_bytes(head[8:16], "big"), 16
    return length if head[4:8] in _BOXES and length >= least else 0  # 0 means up to the end of the file
