"""Video: uint8 frames with their rate, and VideoWriter, which streams frames into an MP4 file."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy import ndarray


def frames_from_pixels(pixels: Tensor) -> ndarray:
    """Decoder output [1, 3, T, H, W] in [-1, 1] to RGB frames, uint8 [T, H, W, 3]: clamped, rounded to
    nearest."""
    scaled = (pixels[0].float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def pixels_from_frames(frames: ndarray) -> Tensor:
    """RGB frames, uint8 [T, H, W, 3], to the VAE's pixels [1, 3, T, H, W] in [-1, 1], float32.

    Raises ValueError for any other shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or str(frames.dtype) != "uint8":
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; give uint8 [T, H, W, 3], RGB")
    return (torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5) - 1


@dataclass(frozen=True, slots=True)
class Video:
    """A finished video: frames uint8 [T, H, W, 3], RGB, at `fps` frames per second."""

    frames: ndarray
    fps: int

    def save(self, path: str | Path) -> None:
        """Write an MP4 (H.264). Raises ValueError when the directory is missing, RuntimeError when writing
        fails."""
        height, width = self.frames.shape[1:3]
        with VideoWriter(path, self.fps, height, width) as writer:
            writer.write(self.frames)


class VideoWriter:
    """Writes an MP4 (H.264) beside `path` and gives it its name at the end.

    Leaving the `with` block by an exception drops the file, unless `close()` was called before: what was
    written up to then plays. frames_written counts what the file holds so far.
    """

    def __init__(self, path: str | Path, fps: int, height: int, width: int) -> None:
        """Raises ValueError when the directory is missing, or `path` is no name for an MP4."""
        self.path = Path(path)
        check_video_path(self.path)
        import av

        self.frames_written = 0
        self._size = (height, width)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._container = av.open(
            str(self._partial), "w", format="mp4"
        )  # the file is made by the first frame
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps))
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "18", "preset": "medium"}
        self._open = True

    def write(self, frames: ndarray) -> None:
        """Append frames, uint8 [T, H, W, 3], RGB.

        Raises ValueError for frames of another shape or dtype, RuntimeError when the file is closed or cannot
        be written; then nothing is left of it.
        """
        from av import FFmpegError, VideoFrame

        if frames.shape[1:] != (*self._size, 3) or str(frames.dtype) != "uint8":
            height, width = self._size
            raise ValueError(
                f"frames are {frames.dtype} {frames.shape}; give uint8 [T, {height}, {width}, 3]"
            )
        if not self._open:
            raise RuntimeError(f"{self.path} is closed; open another VideoWriter for more frames")
        try:
            for frame in frames:
                self._container.mux(self._stream.encode(VideoFrame.from_ndarray(frame, format="rgb24")))
                self.frames_written += 1
        except (OSError, FFmpegError) as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Finish the file and give it its name; what was there under that name is replaced.

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
        raise ValueError(
            f"the video is to be {path}, which does not end in .mp4; name it {path.with_suffix('.mp4')}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"the directory {path.parent} of {path.name} does not exist; create it first")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} exists and is no ordinary file; choose another name")
