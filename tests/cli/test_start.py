"""Pictures and clips that `rfengine generate` begins with."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy
import pytest
from PIL import Image

from rfengine import Pipeline
from rfengine.checkpoint.systems import configured
from rfengine.cli.generate import GenerateOptions, run
from rfengine.cli.start import StartOptions, start_frames, start_mode
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS
from rfengine.video import Video
from support.video_files import chapters, decoded

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


# What is stored of a picture that is shown upright with each orientation of EXIF.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: numpy.rot90(upright),
    7: lambda upright: numpy.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: numpy.rot90(upright, -1),
}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_and_mirrored_as_the_camera_says(
    orientation: int, name: str, tmp_path: Path
) -> None:
    upright = picture()
    image = Image.fromarray(numpy.ascontiguousarray(STORED[orientation](upright)))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif)
    assert abs(read(tmp_path / name)[0].astype(int) - upright).mean() < 4


@pytest.mark.parametrize(
    "options",
    [{"dpi": (300, 300)}, {"compression": "jpeg"}, {"compression": "tiff_lzw"}, {"description": "a"}],
)
def test_tags_of_a_tiff_are_no_damage(options: dict, tmp_path: Path) -> None:
    frame = read(saved(tmp_path / "a.tiff", picture(), **options))[0]
    assert abs(frame.astype(int) - picture()).mean() < 4


def test_grey_of_16_bits_keeps_its_brightness(tmp_path: Path) -> None:
    grey = numpy.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(grey.astype(numpy.uint16)).save(tmp_path / name)
        frame = read(tmp_path / name)[0].astype(float)
        assert abs(frame - grey[..., None] / 257).max() <= 0.51


def test_a_thin_picture_is_cut_before_it_is_scaled(tmp_path: Path) -> None:
    for height, width in ((1, 60000), (60000, 2)):
        frame = read(saved(tmp_path / "a.png", numpy.full((height, width, 3), 90, numpy.uint8)), True)[0]
        assert frame.shape == (64, 64, 3) and (frame == 90).all()


def test_a_picture_of_another_size_is_scaled_and_cut_when_asked(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", picture(100, 400))
    with pytest.raises(ValueError, match="a.png is 400 x 100 pixels and the video 64 x 64; give --resize"):
        read(path)
    frame = read(path, resize=True)[0]
    assert frame.shape == (64, 64, 3)  # its middle, without the stripe
    assert frame[:28].argmax(-1).max() == 0 and frame[36:].argmax(-1).min() == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n" + bytes(40), b"#EXTM3U\nfile:///etc/passwd\n"],
)
def test_a_file_that_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a picture") as caught:
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
    opaque = Image.fromarray(picture()).convert("RGBA")
    for name in ("opaque.png", "opaque.tiff", "opaque.webp"):
        opaque.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert numpy.array_equal(read(tmp_path / name)[0], picture())
    clear = opaque.copy()
    clear.putpixel((5, 5), (255, 0, 0, 254))
    clear.save(tmp_path / "clear.png")
    palette = Image.fromarray(picture()).quantize(8)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((40, 10)))
    for name in ("clear.png", "palette.png"):
        with pytest.raises(ValueError, match="is see-through; lay it over a background"):
            read(tmp_path / name)
    palette.save(tmp_path / "palette.png")
    assert abs(read(tmp_path / "palette.png")[0].astype(int) - picture()).mean() < 8


def test_a_picture_of_print_of_several_or_too_large_is_refused(tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    image.convert("CMYK").save(tmp_path / "print.jpg")
    image.save(tmp_path / "moving.png", save_all=True, append_images=[Image.fromarray(picture()[::-1])])
    image.save(tmp_path / "pages.tiff", save_all=True, append_images=[image, image])
    Image.new("1", (2**13, 2**13)).save(tmp_path / "large.png")
    for name, message in (
        ("print.jpg", "print.jpg has the colours CMYK; convert it to RGB"),
        ("moving.png", "moving.png holds 2 pictures; give a file of one, or a clip with --video"),
        ("pages.tiff", "pages.tiff holds 3 pictures; give a file of one"),
        ("large.png", "large.png has 8192 x 8192 pixels; give a picture of at most 33554432"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, resize=True)


def clip(path: Path, fps: int = 16) -> Path:
    Video(numpy.stack([picture()] * 13), Fraction(fps)).save(path)
    return path


def test_a_clip_is_read_whole(tmp_path: Path) -> None:
    frames = start_frames(StartOptions(video=clip(tmp_path / "a.mp4")), TINY, GRID)
    assert frames.shape == (13, 64, 64, 3) and frames[5, 10, 40].argmax() == 0


def test_a_clip_is_read_whatever_its_name_and_its_title(tmp_path: Path) -> None:
    with (
        av.open(str(clip(tmp_path / "a.mp4"))) as container,
        av.open(str(tmp_path / "b.mp4"), "w") as titled,
    ):
        titled.metadata["title"] = "Jose-title"
        stream = titled.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                titled.mux(packet)
    odd = tmp_path / "http:clip a:b.mp4"
    odd.write_bytes((tmp_path / "b.mp4").read_bytes().replace(b"Jose-title", b"Jos\xe9\xff-titl"))
    assert b"Jos\xe9" in odd.read_bytes()
    assert start_frames(StartOptions(video=odd), TINY, GRID).shape == (13, 64, 64, 3)


def test_a_clip_of_another_size_is_scaled_frame_by_frame(tmp_path: Path) -> None:
    Video(numpy.stack([picture(128, 256)] * 5), 16).save(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="a.mp4 is 256 x 128 pixels and the video 64 x 64; give --resize"):
        start_frames(StartOptions(video=tmp_path / "a.mp4"), TINY, GRID)
    frames = start_frames(StartOptions(video=tmp_path / "a.mp4", resize=True), TINY, GRID)
    assert frames.shape == (5, 64, 64, 3)
    assert frames[:, :28].argmax(-1).max() == 0 and frames[:, 36:].argmax(-1).min() == 2


def test_a_clip_whose_rate_changes_is_refused(tmp_path: Path) -> None:
    times = [*range(0, 120, 10), 750]  # milliseconds: 16 frames a second on average
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width = stream.height = 64
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in times:
            frame = av.VideoFrame.from_ndarray(picture(), format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    message = r"a.mkv shows frame 1 at 0.010 s, where 16 frames a second have it at 0.062 s; convert it to a"
    with pytest.raises(ValueError, match=message):
        start_frames(StartOptions(video=tmp_path / "a.mkv"), TINY, GRID)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"start_mode": "chunks"}, "the clip has 1 frames; at least 9 are needed, one whole chunk; mode 'fr"),
        (
            {"start_mode": "clamped", "system": "rolling-forcing"},
            "a rolling schedule has no chunk of its own",
        ),
    ],
)
def test_a_picture_that_a_model_cannot_begin_with_is_refused_before_it_is_loaded(
    start: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: 1 / 0)
    options = StartOptions(image=saved(tmp_path / "a.png", picture()), start_mode=start["start_mode"])
    with pytest.raises(ValueError, match=message):
        run(
            GenerateOptions(
                prompt=PROMPT, output=tmp_path / "out.mp4", start=options, system=start.get("system")
            )
        )


@pytest.mark.parametrize("system", [None, "rolling-forcing"])
def test_a_script_after_a_picture_has_all_its_chapters(system: str | None, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text(f"0.75 start {PROMPT}\n0.75 cut {PROMPT.replace('red', 'blue')}\n")
    start = StartOptions(image=saved(tmp_path / "a.png", picture()), start_mode=None if system else "frames")
    run(GenerateOptions(script=tmp_path / "s.txt", output=tmp_path / "out.mp4", start=start, system=system))
    assert [part[:2] for part in chapters(tmp_path / "out.mp4")] == [(0, 0.75), (0.75, 1.5)]


def test_a_clip_of_another_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 25 frames a second and the model 16; convert it"):
        start_frames(StartOptions(video=clip(tmp_path / "a.mp4", fps=25)), TINY, GRID)


def test_the_mode_follows_the_schedule_where_none_is_given() -> None:
    rolling = configured(TINY, "rolling-forcing")
    assert start_mode(StartOptions(), TINY) == "clamped" and start_mode(StartOptions(), rolling) == "frames"
    assert start_mode(StartOptions(start_mode="chunks"), rolling) == "chunks"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"image": Path("a.png"), "video": Path("a.mp4")}, "--image and --video are given"),
        ({"resize": True}, "--resize is given without --image or --video"),
        ({"start_mode": "frames"}, "--start-mode is given without --image or --video"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(start: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(GenerateOptions(prompt=PROMPT, output=tmp_path / "out.mp4", start=StartOptions(**start)))
    assert not (tmp_path / "out.mp4").exists()


@pytest.fixture(scope="module")
def last_frame(tmp_path_factory: pytest.TempPathFactory) -> numpy.ndarray:
    """Of a video of PROMPT, uint8 [H, W, 3]."""
    path = tmp_path_factory.mktemp("begun") / "red.mp4"
    run(GenerateOptions(prompt=PROMPT, output=path, seconds=1.0, seed=3))
    return decoded(path)[-1]


@pytest.mark.parametrize("system", [None, "memrope", "wave-forcing-4-step", "causal-forcing-2-step"])
def test_a_video_begins_with_its_picture(
    system: str | None, last_frame: numpy.ndarray, tmp_path: Path
) -> None:
    """Its first frame is 3 to 6 from the picture, of 255, and 51 to 54 in a video without it."""
    distances = []
    for image in (saved(tmp_path / "last.png", last_frame), None):
        out = tmp_path / "out.mp4"
        start = StartOptions(image=image)
        run(GenerateOptions(prompt=PROMPT, output=out, seconds=1.0, seed=5, system=system, start=start))
        frames = decoded(out).astype(int)
        assert len(frames) == 16
        distances.append(abs(frames[0] - last_frame).mean())
    assert distances[0] < 12 and distances[1] > 40
