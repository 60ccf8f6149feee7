"""HlsPlaylist: what its text says, what it keeps, and that FFmpeg plays it."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
import pytest

from rfengine.serving.realtime.hls import HlsPlaylist
from rfengine.serving.video_encoder import Fragment, VideoEncoder

HEIGHT, WIDTH = 32, 48


def fragments(count: int, fps: float | Fraction = 16) -> list[Fragment]:
    """Fragments without pictures: 9 frames, then 12 each."""
    rate = Fraction(fps)
    return [
        Fragment(b"%d" % number, 12 * number - 3 if number else 0, 12 if number else 9, rate)
        for number in range(count)
    ]


def playlist_of(count: int, most_segments: int = 4) -> HlsPlaylist:
    playlist = HlsPlaylist(16, most_segments)
    for fragment in fragments(count):
        playlist.add(fragment)
    return playlist


def test_playlist_names_the_init_segment_and_each_segment_with_its_duration() -> None:
    assert playlist_of(3).playlist() == (
        "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n"
        '#EXT-X-INDEPENDENT-SEGMENTS\n#EXT-X-MAP:URI="init.mp4"\n'
        "#EXTINF:0.562500,\nsegment-0.m4s\n"
        "#EXTINF:0.750000,\nsegment-1.m4s\n"
        "#EXTINF:0.750000,\nsegment-2.m4s\n"
    )


def test_playlist_before_the_first_segment_names_none() -> None:
    assert HlsPlaylist(16).playlist().endswith('#EXT-X-MAP:URI="init.mp4"\n')


def test_window_slides_and_its_numbers_continue() -> None:
    text = playlist_of(10).playlist()
    assert "#EXT-X-MEDIA-SEQUENCE:6\n" in text
    assert [line for line in text.splitlines() if line.endswith(".m4s")] == [
        f"segment-{number}.m4s" for number in range(6, 10)
    ]


def test_segment_that_left_the_playlist_is_kept_for_as_long_again() -> None:
    playlist = playlist_of(30)
    assert [playlist.segment(number) for number in (-1, 0, 20)] == [None] * 3
    assert [playlist.segment(number) for number in range(21, 30)] == [b"%d" % n for n in range(21, 30)]
    assert playlist.segment(30) is None


def test_end_is_said_once_and_nothing_may_follow() -> None:
    playlist = playlist_of(2)
    assert "#EXT-X-ENDLIST" not in playlist.playlist()
    playlist.end()
    playlist.end()
    assert playlist.playlist().count("#EXT-X-ENDLIST\n") == 1
    with pytest.raises(RuntimeError, match="ended after 2 segments"):
        playlist.add(fragments(3)[2])
    assert playlist.segment(1) == b"1"


@pytest.mark.parametrize(
    ("fps", "target", "duration"),
    [(4, 3, "3.000000"), (10, 2, "1.200000"), (Fraction(30000, 1001), 1, "0.400400"), (60, 1, "0.200000")],
)
def test_target_duration_is_at_least_every_segment_and_never_changes(
    fps: float, target: int, duration: str
) -> None:
    playlist = HlsPlaylist(fps)
    for fragment in fragments(20, fps):
        playlist.add(fragment)
        assert f"#EXT-X-TARGETDURATION:{target}\n" in playlist.playlist()
    assert f"#EXTINF:{duration},\n" in playlist.playlist()


@pytest.mark.parametrize(("fps", "shown"), [(16, 4), (60, 15), (4, 3)])
def test_live_playlist_is_never_shorter_than_three_target_durations(fps: int, shown: int) -> None:
    playlist = HlsPlaylist(fps, most_segments=1)
    for fragment in fragments(40, fps):
        playlist.add(fragment)
    assert playlist.playlist().count(".m4s") == shown


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        (fragments(4)[3], "begins at frame 33 and the playlist continues at 21"),
        (fragments(2)[1], "begins at frame 9 and the playlist continues at 21"),
        (
            Fragment(b"", 21, 13, Fraction(16)),
            "has 13 frames at 16 a second; the playlist takes up to 12 at 16",
        ),
        (Fragment(b"", 21, 0, Fraction(16)), "has 0 frames at 16"),
        (Fragment(b"", 21, 12, Fraction(24)), "12 frames at 24 a second"),
    ],
)
def test_fragment_that_does_not_continue_the_playlist_is_refused(fragment: Fragment, message: str) -> None:
    playlist = playlist_of(2)
    before = playlist.playlist()
    with pytest.raises(ValueError, match=message):
        playlist.add(fragment)
    assert playlist.playlist() == before


@pytest.mark.parametrize("numbers", [(0, 8), (16, 0), (16, 1001), (16, 2.5), (16, 8, 0)])
def test_numbers_that_no_playlist_can_have_are_refused(numbers: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"^(fps|most_segments|longest_frames) is "):
        HlsPlaylist(*numbers)


def test_readers_see_whole_playlists_while_one_thread_adds() -> None:
    playlist, done, faults = HlsPlaylist(16, 4), threading.Event(), []
    lengths = [1 + number % 12 for number in range(3000)]  # frames of each, by which a reader knows it

    def read() -> None:
        while not done.is_set():
            lines = playlist.playlist().splitlines()
            for duration, name in zip(lines[6::2], lines[7::2], strict=True):
                number = int(name.removeprefix("segment-").removesuffix(".m4s"))
                if duration != f"#EXTINF:{lengths[number] / 16:.6f},":
                    faults.append(lines)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number, length in enumerate(lengths):
        playlist.add(Fragment(b"%d" % number, sum(lengths[:number]), length, Fraction(16)))
        if playlist.segment(number) != b"%d" % number:
            faults.append([number])
    done.set()
    for reader in readers:
        reader.join()
    assert faults == []


def test_ffmpeg_plays_the_window_from_its_first_frame_to_its_last(tmp_path: Path) -> None:
    encoder, playlist = VideoEncoder(16, HEIGHT, WIDTH), HlsPlaylist(16, 5)
    for number in range(8):
        level = 20 * number
        playlist.add(
            encoder.encode(numpy.full((12 if number else 9, HEIGHT, WIDTH, 3), level, dtype=numpy.uint8))
        )
    playlist.end()
    (tmp_path / "init.mp4").write_bytes(encoder.init_segment)
    for number in range(3, 8):
        (tmp_path / f"segment-{number}.m4s").write_bytes(playlist.segment(number))
    (tmp_path / "live.m3u8").write_text(playlist.playlist())
    with av.open(str(tmp_path / "live.m3u8"), options={"allowed_extensions": "ALL"}) as container:
        stream = container.streams.video[0]
        frames = [(frame.pts * stream.time_base, frame.to_ndarray()) for frame in container.decode(video=0)]
    # FFmpeg's hls demuxer keeps the times of the segments
    assert [time for time, _ in frames] == [Fraction(number, 16) for number in range(33, 93)]
    levels = [planes[HEIGHT // 2, WIDTH // 2] for _, planes in frames[::12]]
    assert numpy.abs(numpy.array(levels) - [16 + 219 * 20 * number / 255 for number in range(3, 8)]).max() < 2
