"""A picture or a clip that a video begins with, from a file and at the video's size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rfengine.clip import ClipMode
from rfengine.config import EngineConfig
from rfengine.files import open_regular
from rfengine.grid import LatentGrid

if TYPE_CHECKING:
    from av import VideoFrame
    from numpy import ndarray

_PICTURES = "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"  # FFmpeg's names
_MOST_PIXELS = 2**25


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What the video begins with."""

    image: Path | None = None
    """A picture that the video begins with: PNG, JPEG, WebP, BMP or TIFF."""
    video: Path | None = None
    """A clip that the video continues, at the model's rate: MP4, MOV, Matroska, WebM, AVI or MPEG-TS."""
    start_mode: ClipMode | None = None
    """How it is taken: in whole chunks, latent by latent (frames), or in whole chunks with the rest clamped
    inside the first one that is made; clamped where nothing is given, frames in a rolling schedule."""
    resize: bool = False
    """Scale a picture or a clip of another size until it covers the video's, and cut what stands out."""


def check_start(options: StartOptions) -> None:
    """Raises ValueError for options that do not belong together."""
    if options.image is not None and options.video is not None:
        raise ValueError("--image and --video are given; give one of them")
    if options.image is None and options.video is None:
        for name, given in (("--start-mode", options.start_mode is not None), ("--resize", options.resize)):
            if given:
                raise ValueError(f"{name} is given without --image or --video, which it is for; give one")


def start_mode(options: StartOptions, config: EngineConfig) -> ClipMode:
    """How the picture or the clip is taken."""
    if options.start_mode is not None:
        return options.start_mode
    return "clamped" if config.schedule.rolling == "none" else "frames"


def start_frames(options: StartOptions, config: EngineConfig, grid: LatentGrid) -> ndarray | None:
    """The picture or the clip, uint8 [T, H, W, 3] at the size of `grid`; None where none is given.

    Raises ValueError for a file that is none, and for one of another size without resize.
    """
    if options.image is not None:
        return picture_of_size(options.image, grid, options.resize)[None]
    if options.video is None:
        return None
    return _of_size(options.video, _read_clip(options.video, config.fps), grid, options.resize)


def picture_of_size(path: Path, grid: LatentGrid, resize: bool) -> ndarray:
    """The picture of a file, uint8 [H, W, 3] at the size of `grid`. Raises ValueError as start_frames
    does."""
    return _of_size(path, [_read_picture(path)], grid, resize)[0]


def _of_size(path: Path, frames: list[ndarray], grid: LatentGrid, resize: bool) -> ndarray:
    """The frames, uint8 [T, H, W, 3], at the size of `grid`. Raises ValueError for others without resize."""
    import numpy

    size = frames[0].shape[:2]
    if size != (grid.height, grid.width):
        if not resize:
            raise ValueError(
                f"{path} is {size[1]} x {size[0]} pixels and the video {grid.width} x {grid.height}; give "
                "--resize to scale and cut it, or another --width and --height"
            )
        frames = [_covering(frame, grid.height, grid.width) for frame in frames]
    return numpy.stack(frames)


def _read_picture(path: Path) -> ndarray:
    """RGB, uint8 [H, W, 3], turned by quarters as the file says."""
    import av
    import numpy

    options = {
        "format_whitelist": _PICTURES, "protocol_whitelist": "none", "max_pixels": str(_MOST_PIXELS)
    }  # fmt: skip
    try:
        with open_regular(path) as file, av.open(file, options=options) as container:
            container.streams.video[0].codec_context.options = {
                "err_detect": "explode", "max_pixels": str(_MOST_PIXELS),
            }  # fmt: skip
            frame = next(container.decode(video=0))
    except (av.FFmpegError, OSError, IndexError, StopIteration) as error:
        reason = getattr(error, "strerror", None) or "nothing in it can be decoded"
        raise ValueError(
            f"{path} cannot be read as a picture ({reason}); give a PNG, JPEG, WebP, BMP or TIFF file"
        ) from error
    _refuse_alpha(path, frame)
    return numpy.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90).copy()


def _refuse_alpha(path: Path, frame: VideoFrame) -> None:
    if any(component.is_alpha for component in frame.format.components):
        raise ValueError(f"{path} is see-through ({frame.format.name}); lay it over a background")


def _read_clip(path: Path, fps: int) -> list[ndarray]:
    """Every frame of a clip, each RGB, uint8 [H, W, 3]. Raises ValueError for one at another rate."""
    import av

    from rfengine.evaluation.video_file import open_video

    video = open_video(path)
    with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
        rate = container.streams.video[0].average_rate
    if rate and abs(float(rate) - fps) > 0.01 * fps:
        raise ValueError(
            f"{path} has {float(rate):g} frames a second and the model {fps}; convert it to that rate"
        )
    return [frame for batch in video.batches() for frame in batch.numpy()]


def _covering(frame: ndarray, height: int, width: int) -> ndarray:
    """The frame scaled until it covers height x width, and its middle."""
    import av

    scale = max(height / frame.shape[0], width / frame.shape[1])
    sides = zip((height, width), frame.shape[:2], strict=True)
    rows, columns = (max(size, round(own * scale)) for size, own in sides)
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
    scaled = picture.reformat(columns, rows, interpolation="LANCZOS").to_ndarray()
    top, left = (rows - height) // 2, (columns - width) // 2
    return scaled[top : top + height, left : left + width]
