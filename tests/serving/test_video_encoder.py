"""The encoder's stream as FFmpeg's demuxer and decoder see it, and as Chromium shows it."""

from __future__ import annotations

import base64
import io
import logging
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy
import pytest
import torch
from av.video.frame import PictureType

from rfengine.serving import video_encoder
from rfengine.serving.video_encoder import Fragment, FrameTable, SpareEncoder, VideoEncoder

HEIGHT, WIDTH = 48, 64
CHUNKS = (9, 12, 12, 12)  # frames of each


def ramps(count: int, first: int = 0) -> numpy.ndarray:
    """A grey ramp whose brightness says which frame of the session it is."""
    ramp = numpy.linspace(0, 60, WIDTH)[None, None, :, None]
    level = 3 * (first + numpy.arange(count)[:, None, None, None])
    return numpy.broadcast_to(ramp + level, (count, HEIGHT, WIDTH, 3)).astype(numpy.uint8)


def noise(count: int) -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=numpy.uint8)


def session(fps: float | Fraction = 16) -> tuple[VideoEncoder, list[Fragment]]:
    encoder = VideoEncoder(fps, HEIGHT, WIDTH, "libx264")
    return encoder, [encoder.encode(ramps(count, encoder.frames_encoded)) for count in CHUNKS]


def stream_of(init_segment: bytes, fragments: list[Fragment]) -> io.BytesIO:
    return io.BytesIO(init_segment + b"".join(fragment.data for fragment in fragments))


def decoded(file: io.BytesIO) -> list[tuple[Fraction, numpy.ndarray]]:
    """Time and pixels of each frame."""
    with av.open(file) as container:
        stream = container.streams.video[0]
        return [
            (frame.pts * stream.time_base, frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8].decode(), data[at : at + size]
        at += size


def unit_kinds(fragment: Fragment) -> list[int]:
    """The types of the NAL units in a fragment's mdat, which are after their lengths."""
    (_, moof), (_, mdat) = boxes(fragment.data)
    kinds, at = [], 8
    while at < len(mdat):
        kinds.append(mdat[at + 4] & 31)
        at += 4 + int.from_bytes(mdat[at : at + 4], "big")
    assert at == len(mdat) and moof
    return kinds


def test_init_segment_is_there_before_any_frame() -> None:
    assert [name for name, _ in boxes(VideoEncoder(16, HEIGHT, WIDTH).init_segment)] == ["ftyp", "moov"]


def test_fragment_is_one_moof_and_one_mdat_with_all_frames_of_its_chunk() -> None:
    _, fragments = session()
    for fragment, count in zip(fragments, CHUNKS, strict=True):
        (first, moof), (second, mdat) = boxes(fragment.data)
        table = FrameTable.of_moof(moof)
        assert (first, second, len(table.sizes), sum(table.sizes)) == ("moof", "mdat", count, len(mdat) - 8)
        assert table.keyframes == (True,) + (False,) * (count - 1)
    sequence_numbers = [int.from_bytes(fragment.data[20:24], "big") for fragment in fragments]
    assert sequence_numbers == [1, 2, 3, 4]


@pytest.mark.parametrize("code", [b"\0\0\1", b"\0\0\0\1"])
def test_unit_of_a_packet_is_stored_after_its_length_whatever_start_code_it_has(code: bytes) -> None:
    units = [b"\x06abc", b"\x65\0\0\3\0\xff", b"\x41z"]
    packet = b"".join(code + unit for unit in units)
    stored = b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)
    assert video_encoder._with_lengths(packet) == stored


@pytest.mark.parametrize("fps", [16, Fraction(24000, 1001), 7.5, 0.1, 1000, Fraction(999983, 999979)])
def test_init_segment_and_fragments_play_every_frame_at_its_exact_time(fps: float) -> None:
    encoder, fragments = session(fps)
    shown = decoded(stream_of(encoder.init_segment, fragments))
    assert [time for time, _ in shown] == [number / encoder.fps for number in range(sum(CHUNKS))]
    for (_, pixels), frame in zip(shown, ramps(sum(CHUNKS)), strict=True):
        assert numpy.abs(pixels.astype(int) - frame).mean() < 2


def test_fragment_says_when_it_plays() -> None:
    _, fragments = session()
    assert [fragment.start_frame for fragment in fragments] == [0, 9, 21, 33]
    assert [fragment.num_frames for fragment in fragments] == list(CHUNKS)
    assert [fragment.start_seconds for fragment in fragments] == [0, 0.5625, 1.3125, 2.0625]
    assert [fragment.seconds for fragment in fragments] == [0.5625, 0.75, 0.75, 0.75]


@pytest.mark.parametrize("taken", [[1, 2, 3], [3], [0, 2], [1, 3]])
def test_client_that_joins_late_or_misses_chunks_sees_the_others_at_their_times(taken: list[int]) -> None:
    encoder, fragments = session()
    received = [fragments[number] for number in taken]
    shown = decoded(stream_of(encoder.init_segment, received))
    numbers = [each.start_frame + n for each in received for n in range(each.num_frames)]
    assert [time for time, _ in shown] == [Fraction(number, 16) for number in numbers]
    for (_, pixels), number in zip(shown, numbers, strict=True):
        assert numpy.abs(pixels.astype(int) - ramps(1, number)[0]).mean() < 2


def flashes(count: int) -> numpy.ndarray:
    """Even pictures, each of another brightness."""
    levels = 40 * numpy.arange(count)[:, None, None, None] % 256
    return numpy.broadcast_to(levels, (count, HEIGHT, WIDTH, 3)).astype(numpy.uint8)


@pytest.mark.parametrize("frames", [numpy.concatenate([ramps(6), noise(6)]), flashes(12)])
def test_each_chunk_begins_with_its_only_keyframe_also_when_the_picture_jumps(frames: numpy.ndarray) -> None:
    encoder = VideoEncoder(16, HEIGHT, WIDTH)
    fragments = [encoder.encode(frames) for _ in range(3)]
    with av.open(stream_of(encoder.init_segment, fragments)) as container:
        kinds = [PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert kinds == (["I"] + ["P"] * 11) * 3
    for fragment in fragments:
        assert [kind for kind in unit_kinds(fragment) if kind in (1, 5)] == [5] + [1] * 11


def test_frames_are_stored_in_the_order_in_which_they_are_shown() -> None:
    encoder, fragments = session()
    with av.open(stream_of(encoder.init_segment, fragments)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [packet.dts for packet in packets] == [packet.pts for packet in packets]
        assert not container.streams.video[0].codec_context.has_b_frames


def test_stream_says_which_colours_it_has_and_has_them() -> None:
    encoder = VideoEncoder(16, HEIGHT, WIDTH)
    assert b"nclx\x00\x01\x00\x01\x00\x01\x00" in encoder.init_segment
    red = numpy.full((1, HEIGHT, WIDTH, 3), (200, 30, 40), dtype=numpy.uint8)
    with av.open(stream_of(encoder.init_segment, [encoder.encode(red)])) as container:
        (frame,) = container.decode(video=0)
    assert (frame.color_range, frame.color_primaries, frame.color_trc, frame.colorspace) == (1, 1, 1, 1)
    red, green, blue = numpy.array((200, 30, 40)) / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    wanted = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748)
    planes = frame.to_ndarray()
    chroma = planes[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
    stored = (planes[HEIGHT // 2, WIDTH // 2], *chroma[:, HEIGHT // 4, WIDTH // 4])
    assert numpy.abs(numpy.subtract(stored, wanted)).max() <= 1.5  # rounding, and a step of the codec


def test_sessions_of_one_size_have_the_same_init_segment_and_any_may_play_after_it() -> None:
    (first, fragments), (second, _) = session(), session()
    assert first.init_segment == second.init_segment
    assert b"Lavf" not in first.init_segment  # the version of FFmpeg, which another server may not have
    assert first.init_segment != VideoEncoder(16, HEIGHT, 2 * WIDTH).init_segment
    assert len(decoded(stream_of(second.init_segment, fragments))) == sum(CHUNKS)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(HEIGHT, WIDTH, "42"), (256, 256, "42"), (256, 272, "64")],  # Baseline of the fast preset, High
)
def test_mime_names_the_profile_and_level_that_the_stream_has(height: int, width: int, expected: str) -> None:
    encoder = VideoEncoder(16, height, width)
    head, profile, level = encoder.mime[:-7], encoder.mime[-7:-5], encoder.mime[-3:-1]
    assert (head, profile, encoder.mime[-1]) == ('video/mp4; codecs="avc1.', expected, '"')
    coder = av.CodecContext.create("h264", "r")
    coder.extradata = encoder.init_segment[encoder.init_segment.index(b"avcC") + 4 :]
    coder.open()
    assert int(level, 16) == coder.extradata[3] and coder.extradata[1] == int(expected, 16)


def test_larger_pictures_encode_in_several_threads_which_end_when_the_encoder_is_closed() -> None:
    before = len(os.listdir("/proc/self/task"))
    encoder = VideoEncoder(16, 736, 736)
    fragment = encoder.encode(numpy.zeros((2, 736, 736, 3), dtype=numpy.uint8))
    assert len(decoded(stream_of(encoder.init_segment, [fragment]))) == 2
    assert len(os.listdir("/proc/self/task")) > before
    encoder.close()
    assert len(os.listdir("/proc/self/task")) == before


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (40, 64, "40 x 64 pixels; height and width must be multiples of 16"),
        (64, 72, "64 x 72 pixels; height and width must be multiples of 16"),
        (63, 64, "63 x 64 pixels; .* must be even"),
        (64, 0, "width is 0 pixels"),
        (64, 32768, "width is 32768 pixels"),
        (64.0, 64, "height is 64.0 pixels"),
    ],
)
def test_size_that_cannot_be_encoded_is_refused(height: Any, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoEncoder(16, height, width)


def test_rate_and_codec_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="^fps is 0; give"):
        VideoEncoder(0, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="^codec is 'h265'; use 'auto', 'libx264' or 'h264_nvenc'"):
        VideoEncoder(16, HEIGHT, WIDTH, "h265")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (ramps(0), "has 0 frames; give at least one"),
        (ramps(2)[:, :16], r"give uint8 \[T, 48, 64, 3\]"),
        (ramps(2).astype(numpy.float32), r"float32 .*give uint8 \[T, 48, 64, 3\]"),
        (torch.zeros(2, HEIGHT, WIDTH, 3, dtype=torch.uint8), "torch tensor"),
    ],
)
def test_frames_of_another_kind_are_refused_and_the_session_continues(frames: Any, message: str) -> None:
    encoder = VideoEncoder(16, HEIGHT, WIDTH)
    first = encoder.encode(ramps(9))
    with pytest.raises(ValueError, match=message):
        encoder.encode(frames)
    second = encoder.encode(ramps(12, 9))
    assert second.start_frame == 9
    assert len(decoded(stream_of(encoder.init_segment, [first, second]))) == 21


def test_frames_may_be_a_view() -> None:
    encoder = VideoEncoder(16, HEIGHT, WIDTH)
    view = ramps(8)[::2, :, ::-1]
    shown = decoded(stream_of(encoder.init_segment, [encoder.encode(view)]))
    assert numpy.abs(numpy.stack([pixels for _, pixels in shown]).astype(int) - view).mean() < 2


def test_encoder_is_closed_by_an_error_in_the_middle_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = session()
    original, left = video_encoder.as_bt709_frame, [0, 1, 2]

    def fails_at_the_fourth(frame: numpy.ndarray) -> av.VideoFrame:
        if not left:
            raise MemoryError
        left.pop()
        return original(frame)

    monkeypatch.setattr(video_encoder, "as_bt709_frame", fails_at_the_fourth)
    with pytest.raises(MemoryError):
        encoder.encode(ramps(12))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="^the video encoder was closed after frame 45; start a new"):
        encoder.encode(ramps(12))


def test_error_of_the_codec_is_one_sentence_and_closes_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = session()

    def fails(frame: numpy.ndarray) -> av.VideoFrame:
        raise av.error.ExternalError(542398533, "Generic error in an external library")

    monkeypatch.setattr(video_encoder, "as_bt709_frame", fails)
    with pytest.raises(RuntimeError, match=r"^libx264 failed in the chunk after frame 45 \(Generic error"):
        encoder.encode(ramps(12))
    with pytest.raises(RuntimeError, match="was closed after frame 45"):
        encoder.encode(ramps(12))


def test_closing_twice_changes_nothing_and_encoding_after_it_is_an_error() -> None:
    encoder = VideoEncoder(16, HEIGHT, WIDTH)
    encoder.close()
    encoder.close()
    with pytest.raises(RuntimeError, match="was closed after frame 0; start a new session"):
        encoder.encode(ramps(9))


def test_spare_encoder_is_given_once_for_its_own_size_and_is_there_again_when_refilled() -> None:
    spare = SpareEncoder(16, HEIGHT, WIDTH)
    assert spare.take(HEIGHT, WIDTH) is None
    spare.refill()
    assert spare.take(HEIGHT, 2 * WIDTH) is None
    first = spare.take(HEIGHT, WIDTH)
    assert first is not None
    assert spare.take(HEIGHT, WIDTH) is None
    spare.refill()
    spare.refill()
    second = spare.take(HEIGHT, WIDTH)
    assert second is not first
    for encoder in (first, second):  # each is a session of its own
        assert len(decoded(stream_of(encoder.init_segment, [encoder.encode(ramps(9))]))) == 9


def test_spare_encoder_that_cannot_open_is_none_and_the_session_hears_why() -> None:
    spare = SpareEncoder(16, HEIGHT + 2, WIDTH)
    spare.refill()
    assert spare.take(HEIGHT + 2, WIDTH) is None
    with pytest.raises(ValueError, match="must be multiples of 16"):
        VideoEncoder(16, HEIGHT + 2, WIDTH)


@pytest.mark.parametrize("cuda", [False, True])
def test_auto_tries_nvenc_only_beside_a_cuda_device_and_takes_libx264_where_it_fails(
    cuda: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried, open_codec = [], video_encoder._open_codec

    def without_nvenc(name: str, *rest: Any) -> Any:
        tried.append(name)
        if name == "h264_nvenc":
            raise RuntimeError("h264_nvenc does not open")
        return open_codec(name, *rest)

    monkeypatch.setattr(video_encoder, "_open_codec", without_nvenc)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with caplog.at_level(logging.INFO, "rfengine.serving.video_encoder"):
        assert VideoEncoder(16, HEIGHT, WIDTH).codec == "libx264"
    assert tried == (["h264_nvenc", "libx264"] if cuda else ["libx264"])
    assert ("libx264 encodes the video: h264_nvenc does not open" in caplog.text) == cuda
    with pytest.raises(RuntimeError, match="h264_nvenc does not open"):
        VideoEncoder(16, HEIGHT, WIDTH, "h264_nvenc")


@pytest.mark.skipif(torch.cuda.is_available(), reason="NVENC may open beside a CUDA device")
def test_nvenc_that_does_not_open_is_an_error_where_it_was_asked_for() -> None:
    with pytest.raises(RuntimeError, match=r"^h264_nvenc does not open for 256 x 256 pixels \(.*; use the"):
        VideoEncoder(16, 256, 256, "h264_nvenc")


@pytest.mark.parametrize(
    "damage",
    [
        lambda moof: moof[:-1],
        lambda moof: moof[:40],
        lambda moof: moof[8:],
        lambda moof: moof.replace(b"trun", b"free"),
        lambda moof: moof.replace(b"moof", b"free"),
    ],
)
def test_moof_of_another_maker_is_refused(damage: Any) -> None:
    _, fragments = session()
    (_, moof), _ = boxes(fragments[0].data)
    with pytest.raises(ValueError, match="no moof of this encoder"):
        FrameTable.of_moof(damage(moof))


PLAY_IN_PAGE = """async ([mime, segments, seconds]) => {
    if (!MediaSource.isTypeSupported(mime)) return {supported: false};
    const video = document.querySelector("video"), source = new MediaSource();
    video.src = URL.createObjectURL(source);
    await new Promise(done => source.addEventListener("sourceopen", done, {once: true}));
    const buffer = source.addSourceBuffer(mime);
    for (const segment of segments) {
        buffer.appendBuffer(Uint8Array.from(atob(segment), letter => letter.charCodeAt(0)));
        await new Promise((done, fail) => {
            buffer.addEventListener("updateend", done, {once: true});
            video.addEventListener("error", () => fail(video.error.message), {once: true});
        });
    }
    const ranges = [...Array(buffer.buffered.length).keys()].map(
        at => [buffer.buffered.start(at), buffer.buffered.end(at)]);
    const canvas = document.createElement("canvas").getContext("2d"), colours = [];
    for (const second of seconds) {
        const presented = new Promise(done => video.requestVideoFrameCallback(done));
        video.currentTime = second;
        await presented;  // "seeked" may come before the picture does
        canvas.drawImage(video, 0, 0);
        colours.push([...canvas.getImageData(20, 20, 1, 1).data].slice(0, 3));
    }
    return {supported: true, ranges, colours};
}"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_chromium_plays_what_a_late_client_with_a_dropped_chunk_receives() -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    encoder = VideoEncoder(16, HEIGHT, WIDTH)
    # those that are received are not blue: Chromium's conversion takes blue by 2.0 where BT.709 has 2.112
    colours = [(0, 0, 0), (30, 40, 200), (200, 30, 40), (90, 90, 90), (220, 220, 30), (160, 210, 160)]
    fragments = [
        encoder.encode(numpy.full((12 if at else 9, HEIGHT, WIDTH, 3), colour, dtype=numpy.uint8))
        for at, colour in enumerate(colours)
    ]
    received = [encoder.init_segment, *(fragments[at].data for at in (2, 3, 5))]
    middles = [fragments[at].start_seconds + 0.4 for at in (2, 3, 5)]
    segments = [base64.b64encode(segment).decode() for segment in received]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.set_content("<video muted></video>")
        result = page.evaluate(PLAY_IN_PAGE, [encoder.mime, segments, middles])
        browser.close()
    assert result["supported"]
    assert result["ranges"] == [[1.3125, 2.8125], [3.5625, 4.3125]]
    shown = numpy.array(result["colours"])
    assert numpy.abs(shown - [colours[at] for at in (2, 3, 5)]).max() <= 4
