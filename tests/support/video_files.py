"""Small video files of every kind that people have, sound and unsound."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy
import torch
from torch import Tensor


def corner_clip(frames: int = 12, height: int = 32, width: int = 48) -> Tensor:
    """A grey picture whose top left corner is red, and a white bar that moves down."""
    video = torch.full((frames, height, width, 3), 60, dtype=torch.uint8)
    video[:, :8, :8] = torch.tensor((250, 0, 0), dtype=torch.uint8)
    for index in range(frames):
        video[index, 8 + index % (height - 12) : 12 + index % (height - 12), 16:] = 220
    return video


def encode(
    path: Path,
    video: Tensor,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    container: str | None = None,
    ratio: Fraction | None = None,
    degrees: int | None = None,
    transfer: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video file; ratio: of its pixels, degrees: how it is turned against the clock to be shown."""
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixels
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        if degrees is not None:
            stream.set_display_rotation(degrees)
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        for picture in video:
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24").reformat(format=pixels)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def encode_sound(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), numpy.float32), "fltp", "mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def decoded(path: Path) -> numpy.ndarray:
    """The frames of a video file, uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def chapters(path: Path) -> list[tuple[float, float, str]]:
    """Seconds from, seconds to, and title of each chapter."""
    with av.open(str(path)) as container:
        return [
            (*(float(each[end] * each["time_base"]) for end in ("start", "end")), each["metadata"]["title"])
            for each in container.chapters()
        ]


def boxes(path: Path) -> list[str]:
    """The names of the outermost boxes of an MP4."""
    data, names, at = path.read_bytes(), [], 0
    while at < len(data):
        names.append(data[at + 4 : at + 8].decode())
        at += int.from_bytes(data[at : at + 4], "big")
    return names
