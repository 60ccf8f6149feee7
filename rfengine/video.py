"""Video: uint8 frames with their rate, and VideoWriter, which streams frames into an MP4 file."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from numbers import Integral, Rational, Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfengine.files import partial_path
from rfengine.limits import as_integer, as_number, shown

if TYPE_CHECKING:
    from av import VideoFrame
    from numpy import ndarray

DEFAULT_NUM_FRAMES = 81
MOST_SECONDS = 86_400  # of one video: a day
_MOST_PIXELS = 16384  # a side; libx264 opens no larger one
_MOST_FPS = 1000
_MOST_NAME_BYTES = 255  # as Linux has it
_MOST_TITLE_BYTES = 255  # of a chapter: its length is a byte in the list that MP4 players read
_LARGEST_TERM = 1_000_000  # of a rate as a fraction; MP4 counts time in 32 bits
_TELEVISION_RATES = tuple(Fraction(whole * 1000, 1001) for whole in (24, 30, 48, 60, 120))

# numbers of ITU-T H.273, which are those of FFmpeg: primaries, transfer and matrix of BT.709
BT709 = 1
FROM_16_TO_235, _FROM_0_TO_255 = 1, 2  # FFmpeg's names of the ranges are tv and pc
_PIXELS_OF_A_THREAD = 1 << 17  # below it starting one thread a core takes longer than the conversion
_EXACT_BILINEAR = 0x2 | 0x40000  # SWS_BILINEAR | SWS_ACCURATE_RND of libswscale


def pixels_from_frames(frames: ndarray) -> Tensor:
    """RGB frames, uint8 [T, H, W, 3], to the VAE's pixels [1, 3, T, H, W] in [-1, 1], float32.

    Raises ValueError for any other shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or str(frames.dtype) != "uint8":
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; give uint8 [T, H, W, 3], RGB")
    return (torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5) - 1


def frame_count(fps: int, seconds: float | None = None, num_frames: int | None = None) -> int:
    """Frames of a video of `seconds` or `num_frames`; DEFAULT_NUM_FRAMES where neither is given.

    Raises ValueError for both, for less than a frame, and for more than a day.
    """
    if seconds is not None and num_frames is not None:
        raise ValueError(
            f"seconds is {shown(seconds)} and num_frames is {shown(num_frames)}; give one of them"
        )
    most = MOST_SECONDS * fps
    if seconds is None:
        count = DEFAULT_NUM_FRAMES if num_frames is None else as_integer("num_frames", num_frames)
        if count < 1:
            raise ValueError(f"num_frames is {shown(count)}; a video has at least one frame")
        if count > most:
            raise ValueError(
                f"num_frames is {shown(count)}; a video has at most {most}, a day at {fps} a second, and a "
                "stream has no end"
            )
        return count
    length = as_number("seconds", seconds)
    if length <= 0:
        raise ValueError(f"seconds is {length}; give a positive length, or use a stream for an endless one")
    if length > MOST_SECONDS:
        raise ValueError(
            f"seconds is {length}; a video has at most {MOST_SECONDS}, a day, and a stream has no end"
        )
    return max(1, nearest_frame(Fraction(repr(float(length))), fps))


def nearest_frame(seconds: Fraction, fps: int) -> int:
    """The frame at a time; of two that are as near, the later one."""
    return math.floor(seconds * fps + Fraction(1, 2))


@dataclass(frozen=True, slots=True)
class Video:
    """A finished video: frames uint8 [T, H, W, 3], RGB, at `fps` frames per second."""

    frames: ndarray
    fps: float | Fraction

    def save(self, path: str | Path) -> None:
        """Write an MP4 (H.264).

        Raises ValueError when the directory is missing and for frames or a rate that no MP4 can have,
        RuntimeError when writing fails.
        """
        check_frames(self.frames)
        if not len(self.frames):
            raise ValueError(f"the video for {path} has 0 frames; give at least one")
        height, width = self.frames.shape[1:3]
        with VideoWriter(path, self.fps, height, width) as writer:
            writer.write(self.frames)


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as the fraction that a file holds; 23.976 and 29.97 are 24000/1001 and 30000/1001.

    Raises ValueError for what is no number, above 1000, or too small or too long a fraction for an MP4.
    """
    if isinstance(fps, bool) or not isinstance(fps, Real):
        raise ValueError(f"fps is {fps!r}; give a number such as 16, 23.976 or Fraction(30000, 1001)")
    if not 0 < fps <= _MOST_FPS:  # NaN is neither
        raise ValueError(f"fps is {fps}; give frames per second above 0 and up to {_MOST_FPS}")
    if isinstance(fps, Rational):
        rate = Fraction(int(fps.numerator), int(fps.denominator))
    else:
        rate = _nearest_rate(float(fps))
    if not rate or max(rate.numerator, rate.denominator) > _LARGEST_TERM:
        raise ValueError(
            f"fps is {fps}; give a fraction of whole numbers up to {_LARGEST_TERM}, or at least 0.001"
        )
    return rate


def _nearest_rate(fps: float) -> Fraction:
    """A television rate where `fps` is one with two to six decimals, else the nearest simple fraction."""
    for rate in _TELEVISION_RATES:
        if any(abs(fps - round(float(rate), decimals)) < 1e-5 for decimals in range(2, 7)):
            return rate
    return Fraction(fps).limit_denominator(1001)


def check_frames(frames: ndarray, height: int | None = None, width: int | None = None) -> None:
    """Raises ValueError for anything but uint8 [T, height, width, 3] of NumPy, with what to give instead."""
    import numpy

    wanted = f"give uint8 [T, {height or 'H'}, {width or 'W'}, 3], RGB, as a NumPy array"
    if isinstance(frames, Tensor):
        raise ValueError(f"frames are a torch tensor; {wanted}, such as frames.cpu().numpy()")
    if not isinstance(frames, numpy.ndarray):
        raise ValueError(f"frames are of type {type(frames).__name__}; {wanted}, such as numpy.stack(frames)")
    shape = (height or frames.shape[1], width or frames.shape[2], 3) if frames.ndim == 4 else None
    if frames.dtype != numpy.uint8 or frames.shape[1:] != shape:
        scale = "; values from 0 to 1 are times 255 and rounded" if frames.dtype.kind == "f" else ""
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; {wanted}{scale}")


def check_size(height: int, width: int) -> None:
    """Raises ValueError for a size that no MP4 (H.264) can have."""
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, Integral) or not 0 < side <= _MOST_PIXELS:
            raise ValueError(f"{name} is {side} pixels; an MP4 (H.264) has from 2 to {_MOST_PIXELS}")
    if height % 2 or width % 2:
        even = " x ".join(str(max(2, side // 2 * 2)) for side in (height, width))
        raise ValueError(
            f"frames are {height} x {width} pixels; H.264 as players take it (4:2:0) stores a colour for two "
            f"by two pixels, so height and width must be even: crop or pad them, such as to {even}"
        )


def as_bt709_frame(frame: ndarray) -> VideoFrame:
    """RGB uint8 [H, W, 3] as a picture in the colours that the file is tagged with."""
    from av import VideoFrame

    few = frame.shape[0] * frame.shape[1] <= _PIXELS_OF_A_THREAD
    return VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p",
        src_colorspace=BT709,
        dst_colorspace=BT709,
        src_color_range=_FROM_0_TO_255,
        dst_color_range=FROM_16_TO_235,
        interpolation=_EXACT_BILINEAR,
        threads=1 if few else None,
    )


class VideoWriter:
    """Writes an MP4 (H.264, colours by BT.709) beside `path` and renames it at the end.

    Several writers of one path have a file each, and the last to end keeps the name. Leaving
    the `with` block by an exception drops the file, unless `close()` was called before: what was written up
    to then plays, with the chapters that began. frames_written counts what the file holds so far.
    """

    def __init__(self, path: str | Path, fps: float | Fraction, height: int, width: int) -> None:
        """Raises ValueError when the directory is missing, `path` is no name for an MP4, or no MP4 has this
        rate or size."""
        self.path = Path(path)
        check_video_path(self.path)
        rate = frame_rate(fps)
        check_size(height, width)
        import av

        self.frames_written = 0
        self._size, self._rate = (height, width), rate
        self._chapters: dict[int, str] = {}  # titles by the first frame
        self._partial = partial_path(self.path)
        # the file is made by the first frame; the index before the pictures, so that players start at once;
        # with its protocol named, since a colon in a name would be the end of another
        self._container = av.open(
            f"file:{self._partial}", "w", format="mp4", options={"movflags": "+faststart"}
        )
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "18", "preset": "medium"}
        coder = self._stream.codec_context
        coder.color_range = FROM_16_TO_235
        coder.color_primaries = coder.color_trc = coder.colorspace = BT709
        self._open = True

    def write(self, frames: ndarray) -> None:
        """Append frames, uint8 [T, H, W, 3], RGB.

        Raises ValueError for frames of another shape or dtype, RuntimeError when the file is closed or cannot
        be written; then nothing is left of it.
        """
        from av import FFmpegError

        check_frames(frames, *self._size)
        if not self._open:
            raise RuntimeError(f"{self.path} is closed; open another VideoWriter for more frames")
        try:
            for frame in frames:
                self._container.mux(self._stream.encode(as_bt709_frame(frame)))
                self.frames_written += 1
        except (OSError, FFmpegError) as error:
            raise self._failure(error) from error

    def begin_chapter(self, title: str) -> None:
        """Begin a chapter with the frame that is written next; one ends where the next begins, or the video.

        Of a title the first 255 bytes in UTF-8 are kept, to a whole character. A chapter without a frame is
        left out. Raises RuntimeError for a first chapter after the first frame, since in an MP4 one begins
        where the one before it ends.
        """
        if self.frames_written and not self._chapters:
            raise RuntimeError(
                f"{self.path} has {self.frames_written} frames and no chapter; begin one before the first"
            )
        self._chapters[self.frames_written] = title.encode()[:_MOST_TITLE_BYTES].decode(errors="ignore")

    def _mark_chapters(self) -> None:
        """Give the container its chapters, which an MP4 takes until its end is written."""
        starts = [frame for frame in self._chapters if frame < self.frames_written]
        chapters = [
            {
                "id": number,
                "start": start,
                "end": end,
                "time_base": 1 / self._rate,
                "metadata": {"title": self._chapters[start]},
            }
            for number, (start, end) in enumerate(pairwise([*starts, self.frames_written]))
        ]
        if chapters:
            self._container.set_chapters(chapters)

    def close(self) -> None:
        """Finish the file and rename it to `path`, replacing what was there.

        Raises RuntimeError when no frame was written or the file cannot be; then nothing is left of it.
        """
        from av import FFmpegError

        if not self._open:
            return
        if not self.frames_written:
            self.abort()
            raise RuntimeError(f"{self.path} has 0 frames; write at least one before it is closed")
        try:
            self._container.mux(self._stream.encode(None))
            self._mark_chapters()
            self._container.close()
            with open(self._partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._partial, self.path)
        except (OSError, FFmpegError) as error:
            raise self._failure(error) from error
        self._open = False

    def _failure(self, error: Exception) -> RuntimeError:
        """Drops the file and says why, with the space that was left when it failed."""
        reason = getattr(error, "strerror", None) or str(error)
        with suppress(OSError):  # the directory itself may be gone
            reason += f", {shutil.disk_usage(self.path.parent).free // 2**10} KiB free"
        self.abort()
        return RuntimeError(
            f"{self.path} could not be written ({reason}); free space or choose another place"
        )

    def abort(self) -> None:
        """Drop what was written: nothing stays under the hidden name, and the final name is left alone."""
        from av import FFmpegError

        self._open = False
        with suppress(OSError, FFmpegError):  # a disk that is full refuses the end of the file as well
            self._container.close()
        with suppress(OSError):  # a file system that has become read-only keeps it
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._open:
            self.abort()


def check_video_path(path: Path) -> None:
    """Raises ValueError unless `path` ends in .mp4, its directory exists and no other thing has its name."""
    if path.suffix.lower() != ".mp4":
        named = path.with_suffix(".mp4") if path.name else path / "video.mp4"
        raise ValueError(f"the video is to be {path}, which does not end in .mp4; name it {named}")
    if not _is_name(path):
        raise ValueError(
            f"no file can have the name {str(path)[-60:]!r}; choose one of at most {_MOST_NAME_BYTES} bytes, "
            "without NUL and in the encoding of the file system"
        )
    if not path.parent.is_dir():
        raise ValueError(f"the directory {path.parent} of {path.name} does not exist; create it first")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} exists and is no ordinary file; choose another name")


def _is_name(path: Path) -> bool:
    try:
        return b"\0" not in os.fsencode(path) and len(os.fsencode(path.name)) <= _MOST_NAME_BYTES
    except UnicodeEncodeError:
        return False
