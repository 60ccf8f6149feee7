"""Recording and write_mp4: what is in the files, and what happens when they cannot be written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
import pytest

from rfengine.serving.recording import ByteBudget, Recording, write_mp4
from rfengine.serving.video_encoder import Fragment, VideoEncoder
from support.small_disk import small_files
from support.video_files import boxes

HEIGHT, WIDTH = 32, 48
CHUNKS = (9, 12, 12, 12, 12)  # frames of each; they start at 0, 9, 21, 33 and 45
LEVELS = 4  # of grey, between one frame of the session and the next
PLENTY = 1 << 30


def session(
    fps: float | Fraction = 16, chunks: tuple[int, ...] = CHUNKS
) -> tuple[VideoEncoder, list[Fragment]]:
    """Grey frames, each brighter than the one before it."""
    encoder = VideoEncoder(fps, HEIGHT, WIDTH, "libx264")
    fragments = []
    for count in chunks:
        levels = LEVELS * (encoder.frames_encoded + numpy.arange(count)) % 240
        frames = numpy.broadcast_to(levels[:, None, None, None], (count, HEIGHT, WIDTH, 3))
        fragments.append(encoder.encode(frames.astype(numpy.uint8)))
    return encoder, fragments


def recorded(path: Path, fps: float | Fraction = 16) -> Path:
    encoder, fragments = session(fps)
    recording = Recording(path, encoder.init_segment, ByteBudget(PLENTY))
    for fragment in fragments:
        recording.append(fragment)
    recording.close()
    assert recording.fault is None
    return path


def shown(path: Path) -> tuple[list[Fraction], list[int]]:
    """The times of the frames of a file, and the number in the session that each shows."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            (frame.pts * stream.time_base, frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    return [time for time, _ in frames], [round(pixels.mean() / LEVELS) for _, pixels in frames]


@pytest.fixture
def small_disk() -> Iterator[int]:
    with small_files(2500) as most_bytes:
        yield most_bytes


def test_recording_plays_at_any_moment_with_all_frames_that_were_appended(tmp_path: Path) -> None:
    encoder, fragments = session()
    recording = Recording(tmp_path / "a.mp4", encoder.init_segment, ByteBudget(PLENTY))
    for fragment in fragments:
        recording.append(fragment)
        times, numbers = shown(tmp_path / "a.mp4")
        assert numbers == list(range(recording.num_frames))
        assert times == [Fraction(number, 16) for number in numbers]
        assert recording.num_bytes == (tmp_path / "a.mp4").stat().st_size
    assert recording.num_frames == sum(CHUNKS)


def test_recording_that_reaches_its_limit_ends_with_a_whole_file_and_says_so(tmp_path: Path) -> None:
    encoder, fragments = session()
    limit = len(encoder.init_segment) + sum(len(fragment.data) for fragment in fragments[:3]) - 1
    recording = Recording(tmp_path / "a.mp4", encoder.init_segment, ByteBudget(limit))
    for fragment in fragments:
        recording.append(fragment)
    recording.close()
    assert recording.fault is not None and recording.num_frames == 21
    assert recording.fault.startswith(
        f"the recording ended after 21 frames (all recordings have their {limit} bytes)"
    )
    assert shown(tmp_path / "a.mp4")[1] == list(range(21))
    assert (tmp_path / "a.mp4").stat().st_size == recording.num_bytes <= limit


def test_recording_may_have_exactly_its_limit(tmp_path: Path) -> None:
    encoder, fragments = session(chunks=(9,))
    budget = ByteBudget(len(encoder.init_segment) + len(fragments[0].data))
    recording = Recording(tmp_path / "a.mp4", encoder.init_segment, budget)
    recording.append(fragments[0])
    assert recording.fault is None and recording.num_frames == 9
    assert budget.used == budget.most_bytes == recording.num_bytes


def test_full_disk_ends_the_recording_without_an_error_and_keeps_what_is_whole(
    tmp_path: Path, small_disk: int
) -> None:
    encoder, fragments = session()
    recording = Recording(tmp_path / "a.mp4", encoder.init_segment, ByteBudget(PLENTY))
    for fragment in fragments:
        recording.append(fragment)
    recording.close()
    assert recording.fault is not None and 0 < recording.num_frames < sum(CHUNKS)
    assert "(File too large)" in recording.fault and str(tmp_path) not in recording.fault
    assert (tmp_path / "a.mp4").stat().st_size == recording.num_bytes < small_disk
    assert shown(tmp_path / "a.mp4")[1] == list(range(recording.num_frames))


def test_file_that_cannot_be_made_is_a_fault_and_no_error(tmp_path: Path) -> None:
    encoder, fragments = session(chunks=(9,))
    (tmp_path / "there.mp4").write_bytes(b"older")
    for name, reason in (("no/a.mp4", "No such file or directory"), ("there.mp4", "File exists")):
        recording = Recording(tmp_path / name, encoder.init_segment, ByteBudget(PLENTY))
        recording.append(fragments[0])
        recording.close()
        assert recording.fault is not None and recording.num_frames == 0
        assert f"after 0 frames ({reason})" in recording.fault and str(tmp_path) not in recording.fault
    assert (tmp_path / "there.mp4").read_bytes() == b"older"


def test_closing_twice_changes_nothing_and_appending_after_it_is_an_error(tmp_path: Path) -> None:
    encoder, fragments = session(chunks=(9, 12))
    recording = Recording(tmp_path / "a.mp4", encoder.init_segment, ByteBudget(PLENTY))
    recording.append(fragments[0])
    recording.close()
    recording.close()
    with pytest.raises(RuntimeError, match="the recording was closed after 9 frames"):
        recording.append(fragments[1])
    assert recording.fault is None and shown(tmp_path / "a.mp4")[1] == list(range(9))


@pytest.mark.parametrize("fps", [16, Fraction(24000, 1001), 7.5])
def test_whole_recording_becomes_an_mp4_with_its_index_first_and_the_same_pictures(
    fps: float, tmp_path: Path
) -> None:
    source = recorded(tmp_path / "a.mp4", fps)
    write_mp4(source, tmp_path / "b.mp4")
    names = boxes(tmp_path / "b.mp4")
    assert names.index("moov") < names.index("mdat") and "moof" not in names
    times, numbers = shown(tmp_path / "b.mp4")
    assert numbers == list(range(sum(CHUNKS)))
    rate = Fraction(fps)
    assert times == [number / rate for number in numbers]
    with av.open(str(source)) as before, av.open(str(tmp_path / "b.mp4")) as after:
        stream = after.streams.video[0]
        assert (stream.average_rate, stream.duration * stream.time_base) == (rate, sum(CHUNKS) / rate)
        colours = stream.codec_context
        assert (colours.color_range, colours.color_primaries, colours.colorspace) == (1, 1, 1)
        pairs = [
            (bytes(p), bytes(q)) for p, q in zip(before.demux(video=0), after.demux(video=0), strict=True)
        ]
    assert all(first == second for first, second in pairs)  # not encoded again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("ranges", "numbers"),
    [
        ([(0, 57)], range(57)),
        ([(0, 9), (33, 57)], [*range(9), *range(33, 57)]),
        ([(9, 15), (33, 40), (45, 46)], [*range(9, 15), *range(33, 40), 45]),
        ([(33, 45), (0, 21)], [*range(33, 45), *range(21)]),
        ([(21, 34)], range(21, 34)),
        ([(45, 46)], [45]),
    ],
)
def test_ranges_are_joined_to_one_video_without_gaps(
    ranges: list[tuple[int, int]], numbers: Any, tmp_path: Path
) -> None:
    write_mp4(recorded(tmp_path / "a.mp4"), tmp_path / "b.mp4", ranges)
    times, seen = shown(tmp_path / "b.mp4")
    assert seen == list(numbers)
    assert times == [Fraction(at, 16) for at in range(len(seen))]
    with av.open(str(tmp_path / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base == Fraction(len(seen), 16)


def test_each_joined_range_can_be_reached_by_its_keyframe(tmp_path: Path) -> None:
    write_mp4(recorded(tmp_path / "a.mp4"), tmp_path / "b.mp4", [(0, 9), (33, 57)])
    with av.open(str(tmp_path / "b.mp4")) as container:
        keys = [
            at for at, packet in enumerate(container.demux(video=0)) if packet.is_keyframe and packet.size
        ]
        assert keys == [0, 9, 21]
        container.seek(int(10 / 16 * av.time_base))
        first = next(container.decode(video=0))
        assert first.pts * first.time_base == Fraction(9, 16)


def test_recording_of_several_encoders_is_counted_in_its_own_order(tmp_path: Path) -> None:
    (encoder, first), (_, second) = session(chunks=(9, 12)), session(chunks=(9, 12))
    recording = Recording(tmp_path / "a.mp4", encoder.init_segment, ByteBudget(PLENTY))
    for fragment in (*first, *second):
        recording.append(fragment)
    write_mp4(tmp_path / "a.mp4", tmp_path / "b.mp4", [(9, 30)])
    times, numbers = shown(tmp_path / "b.mp4")
    assert numbers == [*range(9, 21), *range(9)]
    assert times == [Fraction(at, 16) for at in range(21)]


@pytest.mark.parametrize("cut", [1, 4, 9, 100, 300])
def test_growing_recording_gives_its_whole_fragments(cut: int, tmp_path: Path) -> None:
    source = recorded(tmp_path / "a.mp4")
    _, fragments = session()
    with source.open("ab") as file:
        file.write(fragments[0].data[:cut])
    write_mp4(source, tmp_path / "b.mp4")
    assert shown(tmp_path / "b.mp4")[1] == list(range(sum(CHUNKS)))
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - cut - 1)
    write_mp4(source, tmp_path / "b.mp4")
    assert shown(tmp_path / "b.mp4")[1] == list(range(45))


def test_recording_without_a_frame_is_an_error_of_state(tmp_path: Path) -> None:
    Recording(tmp_path / "a.mp4", session(chunks=())[0].init_segment, ByteBudget(PLENTY)).close()
    with pytest.raises(RuntimeError, match="^the recording has no frame yet; wait"):
        write_mp4(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], "ranges is empty"),
        ([(0, 9), (10, 21)], r"range \[10, 21\) starts within a chunk; start it at frame 9"),
        ([(50, 57)], "starts within a chunk; start it at frame 45"),
        ([(0, 58)], r"\[0, 58\) is not within the 57 frames"),
        ([(57, 58)], "not within the 57 frames"),
        ([(-9, 9)], "not within the 57 frames"),
        ([(9, 9)], "not within the 57 frames"),
        ([(21, 9)], "not within the 57 frames"),
        ([(0, 9.5)], "^stop is 9.5; it must be an integer"),
        ([(0, 9, 21)], r"a range is \(0, 9, 21\)"),
        ([9], "a range is 9"),
    ],
)
def test_range_that_the_recording_does_not_have_is_refused(ranges: Any, message: str, tmp_path: Path) -> None:
    source = recorded(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=message):
        write_mp4(source, tmp_path / "b.mp4", ranges)
    assert list(tmp_path.iterdir()) == [source]


def test_file_that_is_no_recording_is_refused_without_naming_it(tmp_path: Path) -> None:
    for name, content in (("a.mp4", b""), ("b.mp4", b"\0\0\0\x10free" + bytes(8)), ("c.mp4", bytes(64))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="^the file is no recording of a session; choose another$"):
            write_mp4(tmp_path / name, tmp_path / "out.mp4")
    for absent in (tmp_path / "no.mp4", tmp_path):
        with pytest.raises(ValueError, match="^the recording cannot be read") as caught:
            write_mp4(absent, tmp_path / "out.mp4")
        assert str(tmp_path) not in str(caught.value)


def test_failed_mp4_leaves_nothing_and_keeps_the_older_file(tmp_path: Path, small_disk: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (PLENTY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    source = recorded(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"older")
    resource.setrlimit(resource.RLIMIT_FSIZE, (small_disk, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    message = r"^the MP4 could not be written \(File too large, \d+ KiB free\); free space or choose another"
    with pytest.raises(RuntimeError, match=message) as caught:
        write_mp4(source, tmp_path / "b.mp4")
    assert str(tmp_path) not in str(caught.value)
    assert (tmp_path / "b.mp4").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_missing_directory_of_the_mp4_is_one_clear_error(tmp_path: Path) -> None:
    source = recorded(tmp_path / "a.mp4")
    with pytest.raises(RuntimeError, match=r"^the MP4 could not be written \(No such file or directory"):
        write_mp4(source, tmp_path / "no" / "b.mp4")
