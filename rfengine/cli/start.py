"""A picture or a clip that a video begins with, from a file and at the video's size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rfengine.clip import ClipMode, ClipParts, clip_parts
from rfengine.config import EngineConfig
from rfengine.costs.memory import require_frames_fit
from rfengine.files import open_regular
from rfengine.grid import LatentGrid

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image

_PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # Pillow's names
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # that become RGB without a choice
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


def start_parts(options: StartOptions, frames: ndarray, config: EngineConfig) -> ClipParts:
    """How the frames of start_frames are taken. Raises ValueError where the model cannot begin so."""
    return clip_parts(len(frames), start_mode(options, config), config)


def start_frames(options: StartOptions, config: EngineConfig, grid: LatentGrid) -> ndarray | None:
    """The picture or the clip, uint8 [T, H, W, 3] at the size of `grid`; None where none is given.

    Raises ValueError for a file that is none, and for one of another size without resize.
    """
    if options.image is not None:
        return picture_of_size(options.image, grid, options.resize)[None]
    if options.video is None:
        return None
    return _read_clip(options.video, config.fps, grid, options.resize)


def picture_of_size(path: Path, grid: LatentGrid, resize: bool) -> ndarray:
    """The picture of a file, uint8 [H, W, 3] at the size of `grid`. Raises ValueError as start_frames
    does."""
    picture = _read_picture(path)
    _check_size(path, picture.height, picture.width, grid, resize)
    return _covering(picture, grid)


def _check_size(path: Path, height: int, width: int, grid: LatentGrid, resize: bool) -> None:
    if not resize and (height, width) != (grid.height, grid.width):
        raise ValueError(
            f"{path} is {width} x {height} pixels and the video {grid.width} x {grid.height}; give "
            "--resize to scale and cut it, or another --width and --height"
        )


def _covering(picture: Image, grid: LatentGrid) -> ndarray:
    """The largest middle part of the picture that has the shape of the grid, at its size; uint8 [H, W, 3]."""
    import numpy
    from PIL import Image, ImageOps

    size = (grid.width, grid.height)
    fitting = picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    return numpy.asarray(fitting)


def _read_picture(path: Path) -> Image:
    """In RGB, upright."""
    from PIL import Image, ImageOps

    with _decoding(path), open_regular(path) as file:
        picture = Image.open(file, formats=_PICTURES)
        fault = _fault_of(picture)
        if not fault:
            picture.load()
            picture = ImageOps.exif_transpose(picture)
    if fault:
        raise ValueError(f"{path} {fault}")
    return _as_rgb(path, picture)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Whatever a decoder says of a damaged file becomes one ValueError, and its warnings are left out."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a picture ({reason}); give a PNG, JPEG, WebP, BMP or TIFF file"
        ) from error


def _fault_of(picture: Image) -> str:
    """Why a file is not decoded, by its header; empty where it is."""
    if picture.width * picture.height > _MOST_PIXELS:
        return f"has {picture.width} x {picture.height} pixels; give a picture of at most {_MOST_PIXELS}"
    count = getattr(picture, "n_frames", 1)
    if count > 1 and picture.format != "MPO":  # whose other pictures are previews, or for the other eye
        return f"holds {count} pictures; give a file of one, or a clip with --video"
    return ""


def _as_rgb(path: Path, picture: Image) -> Image:
    import numpy
    from PIL import Image

    if picture.mode.startswith("I;16"):
        wide = numpy.asarray(picture).astype(numpy.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(numpy.uint8)).convert("RGB")
    if picture.mode not in _MODES:
        raise ValueError(f"{path} has the colours {picture.mode}; convert it to RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"{path} is see-through; lay it over a background")
    return picture.convert("RGB")


def _read_clip(path: Path, fps: int, grid: LatentGrid, resize: bool) -> ndarray:
    """Every frame of a clip, at the size of `grid`, uint8 [T, H, W, 3]; one at a time is held at its own."""
    import numpy
    from PIL import Image

    from rfengine.evaluation.video_file import open_video

    clip = open_video(path)
    _check_size(path, clip.height, clip.width, grid, resize)
    _check_times(path, clip.times, fps)
    require_frames_fit(clip.count, grid, instead="give the end of the clip")
    frames = numpy.empty((clip.count, grid.height, grid.width, 3), numpy.uint8)
    pictures = (picture for batch in clip.batches() for picture in batch.numpy())
    for place, picture in enumerate(pictures):
        frames[place] = _covering(Image.fromarray(picture), grid)
    return frames


def _check_times(path: Path, times: tuple[float, ...], fps: int) -> None:
    """Raises ValueError for a clip at another rate than the model's, and for one whose rate changes."""
    if len(times) < 2 or times[-1] <= times[0]:
        return
    rate = (len(times) - 1) / (times[-1] - times[0])
    if abs(rate - fps) > 0.01 * fps:
        raise ValueError(
            f"{path} has {rate:.4g} frames a second and the model {fps}; convert it to that rate"
        )
    for number, time in enumerate(times):
        if abs((time - times[0]) * rate - number) > 0.5:
            raise ValueError(
                f"{path} shows frame {number} at {time - times[0]:.3f} s, where {fps} frames a second have "
                f"it at {number / fps:.3f} s; convert it to a constant rate"
            )
