"""Pictures and clips that `rfengine generate` begins with."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy
import pytest
from PIL import Image

from rfengine.checkpoint.systems import configured
from rfengine.cli.generate import GenerateOptions, run
from rfengine.cli.start import StartOptions, start_frames, start_mode
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS
from rfengine.video import Video

TINY = PRESETS["tiny"]
GRID = LatentGrid.of(TINY)
PROMPT = "a large red circle moving slowly to the right over a cloudy sky"


def picture(height: int = 64, width: int = 64) -> numpy.ndarray:
    """Red above, blue below, a green stripe at the left."""
    frame = numpy.zeros((height, width, 3), numpy.uint8)
    frame[: height // 2, :, 0], frame[height // 2 :, :, 2] = 250, 250
    frame[:, : width // 8] = (0, 250, 0)
    return frame


def saved(path: Path, frame: numpy.ndarray, **options: object) -> Path:
    Image.fromarray(frame).save(path, **options)
    return path


def read(path: Path, resize: bool = False) -> numpy.ndarray:
    return start_frames(StartOptions(image=path, resize=resize), TINY, GRID)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff"])
def test_a_picture_is_read(name: str, tmp_path: Path) -> None:
    frames = read(saved(tmp_path / name, picture()))
    assert frames.shape == (1, 64, 64, 3) and frames.dtype == numpy.uint8
    for row, column, colour in ((10, 40, 0), (50, 40, 2), (30, 3, 1)):
        assert frames[0, row, column].argmax() == colour and frames[0, row, column].max() > 200


def test_a_picture_is_turned_as_the_camera_says(tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    image.save(tmp_path / "a.png", exif=exif)
    frame = read(tmp_path / "a.png")[0]
    assert [frame[row, column].argmax() for row, column in ((40, 10), (40, 50), (3, 30))] == [2, 0, 1]


def test_a_picture_of_another_size_is_scaled_and_cut_when_asked(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", picture(100, 400))
    with pytest.raises(ValueError, match="a.png is 400 x 100 pixels and the video 64 x 64; give --resize"):
        read(path)
    frame = read(path, resize=True)[0]
    assert frame.shape == (64, 64, 3)  # its middle, without the stripe
    assert frame[:28].argmax(-1).max() == 0 and frame[36:].argmax(-1).min() == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a picture"),
        (b"no picture at all", "cannot be read as a picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "cannot be read as a picture"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "cannot be read as a picture"),
    ],
)
def test_a_file_that_is_no_picture_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_absent_cut_or_see_through_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read(tmp_path / "absent.png")
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), numpy.uint8)
    whole = saved(tmp_path / "whole.png", noise).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read(tmp_path / "cut.png")
    Image.fromarray(picture()).convert("RGBA").save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match="is see-through"):
        read(tmp_path / "clear.png")


def clip(path: Path, frames: int = 13, fps: int = 16) -> Path:
    Video(numpy.stack([picture()] * frames), Fraction(fps)).save(path)
    return path


def test_a_clip_is_read_whole(tmp_path: Path) -> None:
    frames = start_frames(StartOptions(video=clip(tmp_path / "a.mp4")), TINY, GRID)
    assert frames.shape == (13, 64, 64, 3) and frames[5, 10, 40].argmax() == 0


@pytest.mark.parametrize(("fps", "message"), [(25, "has 25 frames a second and the model 16; convert it")])
def test_a_clip_of_another_rate_is_refused(fps: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        start_frames(StartOptions(video=clip(tmp_path / "a.mp4", fps=fps)), TINY, GRID)


def test_the_mode_follows_the_schedule_where_none_is_given() -> None:
    rolling = configured(TINY, "rolling-forcing")
    assert start_mode(StartOptions(), TINY) == "clamped" and start_mode(StartOptions(), rolling) == "frames"
    assert start_mode(StartOptions(start_mode="chunks"), rolling) == "chunks"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"image": "a.png", "video": "a.mp4"}, "--image and --video are given"),
        ({"resize": True}, "--resize is given without --image or --video"),
        ({"start_mode": "frames"}, "--start-mode is given without --image or --video"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(start: dict, message: str, tmp_path: Path) -> None:
    paths = {
        name: tmp_path / value if isinstance(value, str) and "." in value else value
        for name, value in start.items()
    }
    with pytest.raises(ValueError, match=message):
        run(GenerateOptions(prompt=PROMPT, output=tmp_path / "out.mp4", start=StartOptions(**paths)))
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("system", [None, "memrope", "wave-forcing-4-step", "causal-forcing-2-step"])
def test_a_video_begins_with_its_picture(system: str | None, tmp_path: Path) -> None:
    import av

    made = tmp_path / "red.mp4"
    run(GenerateOptions(prompt=PROMPT, output=made, seconds=1.0, seed=3))
    with av.open(str(made)) as container:
        last = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][-1]
    path = saved(tmp_path / "last.png", last)
    out = tmp_path / "out.mp4"
    options = GenerateOptions(
        prompt=PROMPT, output=out, seconds=1.0, seed=5, system=system, start=StartOptions(image=path)
    )
    run(options)
    with av.open(str(out)) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 16
    assert abs(frames[0] - last.astype(int)).mean() < 30  # the same circle at the same place
