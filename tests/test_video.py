"""Video files: what is written plays, and a failure leaves nothing under the final name."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import av
import numpy
import pytest
import torch

from rfengine.video import Video, VideoWriter, frames_from_pixels, pixels_from_frames

HEIGHT, WIDTH = 32, 48


def some_frames(count: int) -> numpy.ndarray:
    """A grey ramp that grows brighter by 4 in every frame."""
    ramp = numpy.linspace(0, 100, WIDTH)[None, None, :, None] + 4 * numpy.arange(count)[:, None, None, None]
    return numpy.broadcast_to(ramp, (count, HEIGHT, WIDTH, 3)).astype(numpy.uint8)


def noisy_frames(count: int) -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=numpy.uint8)


def decoded(path: Path) -> numpy.ndarray:
    with av.open(str(path)) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 16 KiB meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
    "count", [24, 400]
)  # refused when the file is finished, and while frames are written
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
    ("name", "told"),
    [
        ("no/a.mp4", "no of a.mp4 does not exist"),
        ("a.gif", r"name it .*a\.mp4"),
        ("dir.mp4", "no ordinary file"),
    ],
)
def test_path_that_no_video_can_have_is_refused(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(ValueError, match=told):
        VideoWriter(tmp_path / name, 16, HEIGHT, WIDTH)


def test_device_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "full.mp4").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="no ordinary file"):
        VideoWriter(tmp_path / "full.mp4", 16, HEIGHT, WIDTH)


def test_pixels_are_clamped_and_rounded_to_the_nearest_level() -> None:
    pixels = (
        torch.tensor([-2.0, -1.0, 0.0, 0.6 / 127.5 - 1, 1.0, 3.0])
        .reshape(1, 1, 1, 1, 6)
        .expand(1, 3, 1, 1, 6)
    )
    assert frames_from_pixels(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 1, 255, 255]


def test_frames_survive_the_way_to_pixels_and_back() -> None:
    frames = noisy_frames(5)
    pixels = pixels_from_frames(frames)
    assert pixels.shape == (1, 3, 5, HEIGHT, WIDTH) and pixels.abs().max() <= 1
    assert numpy.array_equal(frames_from_pixels(pixels), frames)


@pytest.mark.parametrize("wrong", [noisy_frames(1)[0], noisy_frames(1)[..., :2], noisy_frames(1) / 255])
def test_clip_of_another_shape_or_dtype_is_refused(wrong: numpy.ndarray) -> None:
    with pytest.raises(ValueError, match=r"give uint8 \[T, H, W, 3\]"):
        pixels_from_frames(wrong)
