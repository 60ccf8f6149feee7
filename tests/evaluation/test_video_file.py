"""Video files: measured as they are shown, or refused in one sentence; memory holds a batch of frames."""

from __future__ import annotations

import gc
import os
import random
import socket
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from rfengine.evaluation import video_file
from rfengine.evaluation.video_file import declared_bytes, open_video
from rfengine.evaluation.video_frames import frames_at_once
from rfengine.video import Video
from support.distortions import textured_clip
from support.video_files import corner_clip, encode, encode_sound


def shown(path: Path) -> Tensor:
    video = open_video(path)
    frames = torch.cat(list(video.batches()))
    assert frames.shape == (video.count, video.height, video.width, 3) and frames.dtype == torch.uint8
    return frames


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_video(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and ";" in text, text
    return text.removeprefix(str(path))


def test_what_was_written_is_read_back_as_often_as_asked(tmp_path: Path) -> None:
    frames = textured_clip(40)
    Video(frames.numpy(), 16).save(tmp_path / "a.mp4")
    found = shown(tmp_path / "a.mp4")
    assert found.shape == frames.shape and torch.equal(found, shown(tmp_path / "a.mp4"))
    assert float((found.float() - frames.float()).abs().mean()) < 4


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mkv", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("ten_bits.mp4", "libx264", "yuv420p10le"),
        ("full_range.mp4", "libx264", "yuvj420p"),
        ("all_colours.mp4", "libx264", "yuv444p"),
        ("%03d.mp4", "libx264", "yuv420p"),
        ("-i.mp4", "libx264", "yuv420p"),
        ("http:a.mp4", "libx264", "yuv420p"),
    ],
)
def test_containers_and_pixel_formats_show_the_same_picture(
    tmp_path: Path, name: str, codec: str, pixels: str
) -> None:
    video = corner_clip()
    found = shown(encode(tmp_path / name, video, codec, pixels))
    assert found.shape == video.shape
    assert float((found.float() - video.float()).abs().mean()) < 8


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3), (-90, 3)])
def test_a_turned_video_is_measured_as_it_is_shown(tmp_path: Path, degrees: int, turns: int) -> None:
    video = corner_clip()
    found = shown(encode(tmp_path / "a.mp4", video, degrees=degrees)).float()
    assert float((found - video.rot90(turns, (1, 2)).float()).abs().mean()) < 8


def test_what_cannot_be_measured_is_named_with_the_reason(tmp_path: Path) -> None:
    video = corner_clip()
    assert "turn it before" in refused(encode(tmp_path / "tilted.mp4", video, degrees=45))
    assert "pixels of 4:3" in refused(encode(tmp_path / "wide.mp4", video, ratio=Fraction(4, 3)))
    assert "see-through" in refused(encode(tmp_path / "vp9.webm", video, "libvpx-vp9", "yuva420p"))
    assert "see-through (argb)" in refused(encode(tmp_path / "rle.mov", video, "qtrle", "argb"))
    assert "PQ (HDR)" in refused(encode(tmp_path / "hdr.mp4", video, pixels="yuv420p10le", transfer=16))
    assert "no picture" in refused(encode_sound(tmp_path / "sound.mp4"))
    (tmp_path / "empty.mp4").touch()
    assert "is empty (0 bytes)" in refused(tmp_path / "empty.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    assert "cannot be read as a video" in refused(tmp_path / "broken.mp4")
    assert "cannot be read as a video (No such file" in refused(tmp_path / "no.mp4")


def test_a_change_of_size_is_named_with_its_frame(tmp_path: Path) -> None:
    parts = [encode(tmp_path / f"{width}.ts", corner_clip(width=width)).read_bytes() for width in (48, 64)]
    (tmp_path / "joined.mp4").write_bytes(b"".join(parts))
    assert "changes its size at frame 12 from 48 x 32 to 64 x 32" in refused(tmp_path / "joined.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "faststart.mp4", "a.mkv", "a.webm", "a.avi"])
@pytest.mark.parametrize("kept", [0.4, 0.7, 0.98])
def test_a_cut_file_is_refused_and_a_short_one_is_not(tmp_path: Path, name: str, kept: float) -> None:
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    options = {"movflags": "faststart"} if name == "faststart.mp4" else None
    path = encode(tmp_path / name, textured_clip(30), codec, options=options)
    assert open_video(path).count == 30
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    refused(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_flipped_bits_end_in_a_sentence_or_in_whole_frames(tmp_path: Path, name: str) -> None:
    path = encode(tmp_path / name, textured_clip(16))
    whole, draw, refusals = path.read_bytes(), random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        for place in draw.choices(range(len(whole)), k=4):
            damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            shown(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
            refusals += 1
    assert refusals > 10


def test_damage_in_the_middle_is_not_painted_over(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", textured_clip(30), options={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    middle = len(content) * 3 // 4
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n"),
        ("joined.mp4", "ffconcat version 1.0\nfile '{other}'\n"),
        ("session.mp4", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"),
        ("dash.mp4", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>'),
    ],
)
def test_a_list_that_names_another_video_is_refused_though_it_is_there(
    tmp_path: Path, name: str, text: str
) -> None:
    other = encode(tmp_path / "other.ts", corner_clip())
    (tmp_path / name).write_text(text.format(other=other))
    assert "cannot be read as a video" in refused(tmp_path / name)


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "device"])
def test_what_is_no_ordinary_file_is_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name has to be short
    path = Path("a.mp4")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    refused(path)


def test_a_movie_whose_pictures_lie_in_another_file_does_not_open_it(tmp_path: Path) -> None:
    """The data reference of the movie is made to say "not in this file, but there"."""
    path = encode(tmp_path / "a.mov", corner_clip())
    content = path.read_bytes()
    own = b"url \x00\x00\x00\x01"  # the flag: the pictures lie in this file
    assert content.count(own) == 1
    path.write_bytes(content.replace(own, b"url \x00\x00\x00\x00"))
    try:
        shown(path)
    except ValueError as error:
        assert str(error).startswith(str(path))


def test_limits_of_size_and_length_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1, 2, video_file.MOST_SIDE + 2, 3, dtype=torch.uint8)
    assert "16386 x 2; use at most 16384 pixels a side" in refused(
        encode(tmp_path / "wide.mov", wide, "png", "rgb24")
    )
    path = encode(tmp_path / "a.mp4", corner_clip(12))
    monkeypatch.setattr(video_file, "MOST_FRAMES", 11)
    assert "more than 11 frames" in refused(path)
    monkeypatch.setattr(video_file, "MOST_PIXELS", 1000)
    assert "and 1000 a frame" in refused(path)


def test_a_file_that_changes_between_two_passes_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", corner_clip())
    video = open_video(path)
    encode(path, corner_clip(20))
    with pytest.raises(ValueError, match="has changed while it was read"):
        list(video.batches())


def test_decoded_frames_are_let_go_without_a_garbage_collection(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", corner_clip(40), degrees=90)
    gc.collect()
    gc.disable()
    try:
        for _ in open_video(path).batches():
            pass
        alive = sum(type(found) is av.VideoFrame for found in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= 1  # the first one of `open_video`, whose side data were asked


def test_memory_holds_a_batch_of_frames_however_long_the_video(tmp_path: Path) -> None:
    height = width = 512
    path = encode(
        tmp_path / "a.mp4", torch.zeros(1, height, width, 3, dtype=torch.uint8).expand(48, -1, -1, -1)
    )
    video = open_video(path)
    at_once = frames_at_once(height, width)
    sizes = [len(batch) for batch in video.batches()]
    assert at_once == 16 and sizes == [16] * 3
    tracemalloc.start()  # numpy's pictures are counted by it
    for _ in video.batches():
        pass
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 * at_once * height * width * 3


# The length that a container states: whole files have it, cut ones lack bytes of it


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi"])
def test_a_whole_file_is_as_long_as_it_says(tmp_path: Path, name: str) -> None:
    path = encode(tmp_path / name, corner_clip(), "mpeg4")
    with path.open("rb") as file:
        assert declared_bytes(file) == path.stat().st_size and file.tell() == 0


def test_what_states_no_length_has_none_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"", b"text", bytes(40), b"\x00\x00\x00\x01moov" + bytes(8), b"\x1a\x45\xdf\xa3\x01"):
        path.write_bytes(content)
        with path.open("rb") as file:
            assert declared_bytes(file) == 0


def test_what_follows_the_last_box_does_not_count(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", corner_clip())
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\x00\x00\x10\x00note")
    with path.open("rb") as file:
        assert declared_bytes(file) == size
