"""Video files: what is written plays, and a failure leaves nothing under the final name."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch

from rfengine.ops.reference import frame_pack
from rfengine.video import Video, VideoWriter, frame_rate, pixels_from_frames
from support.small_disk import small_files
from support.video_files import boxes, chapters, decoded

HEIGHT, WIDTH = 32, 48


def some_frames(count: int) -> numpy.ndarray:
    """A grey ramp that grows brighter by 4 in every frame."""
    ramp = numpy.linspace(0, 100, WIDTH)[None, None, :, None] + 4 * numpy.arange(count)[:, None, None, None]
    return numpy.broadcast_to(ramp, (count, HEIGHT, WIDTH, 3)).astype(numpy.uint8)


def noisy_frames(count: int) -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=numpy.uint8)


def shown_by_bt709(path: Path) -> numpy.ndarray:
    """The middle pixel of the first frame, RGB, reckoned from the luma and chroma that the file holds."""
    with av.open(str(path)) as container:
        planes = next(container.decode(video=0)).to_ndarray()
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    chroma = planes[height:].reshape(2, height // 2, width // 2)[:, height // 4, width // 4]
    luma = (planes[height // 2, width // 2] - 16.0) / 219
    blue_difference, red_difference = (chroma - 128.0) / 224
    red, blue = luma + 1.5748 * red_difference, luma + 1.8556 * blue_difference
    green = (luma - 0.2126 * red - 0.0722 * blue) / 0.7152
    return 255 * numpy.array([red, green, blue])


@pytest.fixture
def small_disk() -> Iterator[None]:
    with small_files(16 * 1024):
        yield


def test_saved_video_plays_with_every_frame_at_its_rate(tmp_path: Path) -> None:
    frames = some_frames(21)
    Video(frames, 16).save(tmp_path / "a.mp4")
    shown = decoded(tmp_path / "a.mp4")
    assert shown.shape == frames.shape
    assert numpy.abs(shown.astype(int) - frames).mean() < 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name) == (16, "h264")
        assert float(container.duration) / av.time_base == pytest.approx(21 / 16, abs=0.02)


@pytest.mark.parametrize(("height", "width"), [(480, 832), (720, 1280)])
@pytest.mark.parametrize(
    "colour",
    [(200, 30, 40), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (250, 240, 10)],
)
def test_colours_are_those_of_bt709(
    colour: tuple[int, int, int], height: int, width: int, tmp_path: Path
) -> None:
    Video(numpy.full((1, height, width, 3), colour, dtype=numpy.uint8), 16).save(tmp_path / "a.mp4")
    # a level of luma is 1.16 and one of chroma 2.11 in blue; half of each is what rounding them takes
    assert numpy.abs(shown_by_bt709(tmp_path / "a.mp4") - colour).max() < 0.5 * (1.17 + 2.12)


def test_file_says_which_colours_it_has_in_its_stream_and_in_its_index(tmp_path: Path) -> None:
    Video(some_frames(3), 16).save(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    # primaries, transfer and matrix 1 (BT.709), and the flag of the full range not set
    assert data[data.index(b"colr") + 4 :].startswith(b"nclx\x00\x01\x00\x01\x00\x01\x00")
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
        head = bytes(container.streams.video[0].codec_context.extradata)
    coder = av.CodecContext.create("h264", "r")  # which sees the stream alone, without the container
    coder.extradata = head
    (frame,) = coder.decode(av.Packet(packets[0])) or coder.decode(None)[:1]
    assert (frame.color_range, frame.color_primaries, frame.color_trc, frame.colorspace) == (1, 1, 1, 1)


@pytest.mark.parametrize("fps", [16, Fraction(30000, 1001)])
def test_chapters_begin_with_the_frames_written_next(fps: Fraction, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, fps, HEIGHT, WIDTH) as writer:
        writer.begin_chapter("a circle over a wall")
        writer.write(some_frames(9))
        writer.begin_chapter("has no frame")
        writer.begin_chapter("円が動く | né")
        writer.write(some_frames(12))
        writer.write(some_frames(3))
        writer.begin_chapter("has no frame either")
    expected = [(0, 9, "a circle over a wall"), (9, 24, "円が動く | né")]
    for (start, end, title), (first, last, name) in zip(chapters(path), expected, strict=True):
        assert title == name
        # the file counts milliseconds
        assert (start, end) == pytest.approx((first / float(fps), last / float(fps)), abs=6e-4)
    assert len(decoded(path)) == 24
    order = boxes(path)
    assert order.index("moov") < order.index("mdat")


def test_first_chapter_after_the_first_frame_is_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH) as writer:
        writer.write(some_frames(4))
        with pytest.raises(RuntimeError, match="has 4 frames and no chapter; begin one before the first"):
            writer.begin_chapter("late")
        writer.write(some_frames(4))
    assert chapters(tmp_path / "a.mp4") == [] and len(decoded(tmp_path / "a.mp4")) == 8


def test_title_is_cut_at_a_whole_character_and_chapters_may_be_many(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH) as writer:
        for number in range(300):  # MP4's own list ends at 255
            writer.begin_chapter(f"{number:03}{'é' * 200}")
            writer.write(some_frames(1))
    found = chapters(tmp_path / "a.mp4")
    assert [title for _, _, title in found] == [f"{number:03}{'é' * 126}" for number in range(300)]


def test_index_stands_before_the_pictures(tmp_path: Path) -> None:
    Video(noisy_frames(30), 16).save(tmp_path / "a.mp4")
    order = boxes(tmp_path / "a.mp4")
    assert order.index("moov") < order.index("mdat")


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (16, Fraction(16)),
        (numpy.int64(16), Fraction(16)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (Fraction(30000, 1001), Fraction(30000, 1001)),
        (numpy.float32(59.94), Fraction(60000, 1001)),
        (7.5, Fraction(15, 2)),
        (0.1, Fraction(1, 10)),
        (29.9, Fraction(299, 10)),
        (1000, Fraction(1000)),
    ],
)
def test_rate_is_written_as_a_fraction(fps: float, rate: Fraction, tmp_path: Path) -> None:
    Video(some_frames(3), fps).save(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.duration * stream.time_base) == (rate, 3 / rate)
        times = [frame.pts * stream.time_base for frame in container.decode(video=0)]
    assert times == [number / rate for number in range(3)]


@pytest.mark.parametrize(
    "fps",
    [0, -1, float("nan"), float("inf"), 1001, 1e-9, Fraction(10**9, 10**9 - 1), "16", None, True, 16j],
)
def test_rate_that_no_file_can_have_is_refused(fps: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^fps is .*; give "):
        frame_rate(fps)
    with pytest.raises(ValueError, match=r"^fps is .*; give "):
        VideoWriter(tmp_path / "a.mp4", fps, HEIGHT, WIDTH)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (63, 96, "63 x 96 pixels; .* must be even: crop or pad them, such as to 62 x 96"),
        (64, 95, "64 x 95 pixels; .* must be even: crop or pad them, such as to 64 x 94"),
        (1, 1, "1 x 1 pixels; .* must be even: crop or pad them, such as to 2 x 2"),
        (16, 20000, "width is 20000 pixels; an MP4 .* has from 2 to 16384"),
        (0, 16, "height is 0 pixels; an MP4 .* has from 2 to 16384"),
        (16.5, 16, "height is 16.5 pixels"),
    ],
)
def test_size_that_no_file_can_have_is_refused_with_its_reason(
    height: Any, width: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / "a.mp4", 16, height, width)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (some_frames(0), "has 0 frames; give at least one"),
        (some_frames(2) / numpy.float32(255), "float32 .*; values from 0 to 1 are times 255"),
        (some_frames(2).astype(numpy.int64), r"int64 .*give uint8 \[T, H, W, 3\]"),
        (some_frames(2)[0], r"\(32, 48, 3\); give uint8 \[T, H, W, 3\]"),
        (numpy.array(3, dtype=numpy.uint8), r"uint8 \(\); give uint8 \[T, H, W, 3\]"),
        (torch.zeros(2, 32, 48, 3, dtype=torch.uint8), r"torch tensor; .*frames\.cpu\(\)\.numpy\(\)"),
        (list(some_frames(2)), r"of type list; .*numpy\.stack"),
        (None, "of type NoneType; give uint8"),
    ],
)
def test_frames_of_another_kind_are_refused_with_what_to_give(
    frames: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Video(frames, 16).save(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_frames_may_be_a_view(tmp_path: Path) -> None:
    frames = some_frames(8)
    for number, view in enumerate((frames[..., ::-1], frames[::2], frames[:, 8:24, 4:40])):
        Video(view, 16).save(tmp_path / f"{number}.mp4")
        shown = decoded(tmp_path / f"{number}.mp4")
        assert shown.shape == view.shape and numpy.abs(shown.astype(int) - view).mean() < 3


def test_two_writers_of_one_path_each_write_a_whole_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    first, second = (VideoWriter(path, 16, HEIGHT, WIDTH) for _ in range(2))
    for frame in some_frames(6):
        first.write(frame[None])
        second.write(noisy_frames(5))
    second.close()
    assert len(decoded(path)) == 30
    first.close()
    assert numpy.abs(decoded(path).astype(int) - some_frames(6)).mean() < 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a:b.mp4", "file:a.mp4", "%d.mp4", "с пробелом.mp4", "\udcff.mp4"])
def test_name_is_taken_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Video(some_frames(1), 16).save(name)
    assert [path.name for path in Path().iterdir()] == [name]


def test_frames_may_come_in_pieces(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH) as writer:
        for count in (9, 0, 12):
            writer.write(some_frames(count))
        assert writer.frames_written == 21
    assert len(decoded(tmp_path / "a.mp4")) == 21


def test_nothing_has_the_final_name_before_the_end(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH) as writer:
        writer.write(some_frames(9))
        assert not (tmp_path / "a.mp4").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_error_inside_leaves_nothing_and_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    with pytest.raises(KeyError), VideoWriter(path, 16, HEIGHT, WIDTH) as writer:
        writer.write(noisy_frames(60))
        raise KeyError
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_file_closed_before_an_error_plays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH) as writer:
        writer.write(some_frames(9))
        writer.close()
        raise KeyboardInterrupt
    assert len(decoded(tmp_path / "a.mp4")) == 9


def test_older_file_of_that_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"older")
    Video(some_frames(3), 16).save(tmp_path / "a.mp4")
    assert len(decoded(tmp_path / "a.mp4")) == 3


@pytest.mark.parametrize(
    # refused when the index takes its place before the pictures, when the file is finished, and while frames
    # are written
    "count",
    [13, 24, 400],
)
def test_disk_that_is_full_is_one_clear_error_and_leaves_nothing(
    count: int, tmp_path: Path, small_disk: None
) -> None:
    with (
        pytest.raises(RuntimeError, match=r"a\.mp4 could not be written \(File too large, \d+ KiB free\)"),
        VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH) as writer,
    ):
        writer.write(noisy_frames(count))
    assert list(tmp_path.iterdir()) == []


def test_directory_that_disappeared_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    writer = VideoWriter(tmp_path / "gone" / "a.mp4", 16, HEIGHT, WIDTH)
    (tmp_path / "gone").rmdir()
    with pytest.raises(RuntimeError, match=r"a\.mp4 could not be written"):
        writer.write(noisy_frames(200))


def test_video_without_frames_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="0 frames"), VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH):
        pass
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_changes_nothing_and_writing_after_it_is_an_error(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH) as writer:
        writer.write(some_frames(3))
        writer.close()
        writer.close()
        with pytest.raises(RuntimeError, match="is closed"):
            writer.write(some_frames(3))
    assert len(decoded(tmp_path / "a.mp4")) == 3


def test_frames_of_another_size_or_dtype_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH) as writer:
        writer.write(some_frames(3))
        for wrong in (some_frames(1)[:, :16], some_frames(1)[..., :1], some_frames(1).astype(numpy.float32)):
            with pytest.raises(ValueError, match=r"give uint8 \[T, 32, 48, 3\]"):
                writer.write(wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/a.mp4", "no of a.mp4 does not exist"),
        ("a.gif", r"name it .*a\.mp4"),
        ("dir.mp4", "no ordinary file"),
        ("..", r"does not end in \.mp4; name it .*\.mp4"),
        ("a\0.mp4", r"no file can have the name .*a\\x00\.mp4"),
        ("a" * 252 + ".mp4", "no file can have the name .* of at most 255 bytes"),
        ("\ud800.mp4", "no file can have the name .* encoding of the file system"),
    ],
)
def test_path_that_no_video_can_have_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / name, 16, HEIGHT, WIDTH)


def test_device_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "full.mp4").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="no ordinary file"):
        VideoWriter(tmp_path / "full.mp4", 16, HEIGHT, WIDTH)


def test_frames_survive_the_way_to_pixels_and_back() -> None:
    frames = noisy_frames(5)
    pixels = pixels_from_frames(frames)
    assert pixels.shape == (1, 3, 5, HEIGHT, WIDTH) and pixels.abs().max() <= 1
    assert numpy.array_equal(frame_pack(pixels[0]).numpy(), frames)


@pytest.mark.parametrize("wrong", [noisy_frames(1)[0], noisy_frames(1)[..., :2], noisy_frames(1) / 255])
def test_clip_of_another_shape_or_dtype_is_refused(wrong: numpy.ndarray) -> None:
    with pytest.raises(ValueError, match=r"give uint8 \[T, H, W, 3\]"):
        pixels_from_frames(wrong)
