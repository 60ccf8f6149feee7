"""VideoEncoder: the chunks of a session as fragments of one MP4 (H.264), each complete once it is encoded.
SpareEncoder: one that is open before a session asks for it."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from threading import Lock
from typing import TYPE_CHECKING, Literal

import torch

from rfengine.limits import check_value
from rfengine.video import BT709, FROM_16_TO_235, as_bt709_frame, check_frames, check_size, frame_rate

if TYPE_CHECKING:
    from av import VideoCodecContext
    from numpy import ndarray

logger = logging.getLogger(__name__)

CodecName = Literal["auto", "libx264", "h264_nvenc"]

_SIDE_MULTIPLE = 16  # pixels: H.264 codes squares of this side, and so does every model's grid
_TICKS_PER_FRAME_TERM = 1000  # a rate of n/d has n * 1000 ticks a second and d * 1000 a frame: whole numbers
_PIXELS_PER_THREAD = 1 << 19  # below it one thread takes less than 2 ms a frame
_MOST_THREADS = 4
_NEVER = str(1 << 30)  # frames between keyframes, but for the one that begins each chunk

_PIXELS_OF_A_FAST_PRESET = 1 << 16  # below it bytes do not matter, and ultrafast takes half the time
# one packet for each frame at once: no B frames, no frames looked ahead at
_OPTIONS = {
    "libx264": {"preset": "veryfast", "tune": "zerolatency", "crf": "18", "g": _NEVER, "sc_threshold": "0"},
    "h264_nvenc": {
        "preset": "p4", "tune": "ull", "rc": "constqp", "qp": "20", "bf": "0", "g": _NEVER,
        "no-scenecut": "1", "forced-idr": "1", "zerolatency": "1", "delay": "0",
    },
}  # fmt: skip

# boxes of ISO/IEC 14496-12 up to the table of frames: moof, mfhd, traf, tfhd, tfdt and trun, each with its
# size and name first
_MOOF = struct.Struct(">I4s I4sII I4s I4sIII I4sIQ I4sIIi")
_TICKS_FIELD = 12  # of _MOOF: the duration of a frame
BOX_HEADER = struct.Struct(">I4s")  # bytes of the box, header included, and its name
_MFHD_BYTES, _TFHD_BYTES, _TFDT_BYTES = 16, 20, 20
_TRUN_BYTES = 20  # without its table
_ENTRY_BYTES = 8  # of a frame: size and flags
_TFHD_FLAGS = 0x020008  # offsets count from the moof; the duration of a frame is given
_TFDT_VERSION_1 = 0x01000000  # time in 64 bits
_TRUN_FLAGS = 0x000601  # offset of the data, and the size and flags of each frame
_KEY_FRAME, _OTHER_FRAME = 0x02000000, 0x01010000  # depends on no other; depends on others, no sync sample


@dataclass(frozen=True, slots=True)
class Fragment:
    """One chunk of a session: a moof and its mdat, which play after the init segment alone.

    start_frame counts the frames of the session from 0.
    """

    data: bytes
    start_frame: int
    num_frames: int
    fps: Fraction

    @property
    def start_seconds(self) -> float:
        """When its first frame is shown, from the start of the session."""
        return float(self.start_frame / self.fps)

    @property
    def seconds(self) -> float:
        """How long its frames are shown."""
        return float(self.num_frames / self.fps)


@dataclass(frozen=True, slots=True)
class FrameTable:
    """What the moof of a Fragment says of its frames: their bytes, which are keyframes, and how long each is
    shown, in ticks of the init segment's time scale."""

    sizes: tuple[int, ...]
    keyframes: tuple[bool, ...]
    frame_ticks: int

    @classmethod
    def of_moof(cls, moof: bytes) -> FrameTable:
        """Raises ValueError unless `moof` is one that VideoEncoder made."""
        fields = _MOOF.unpack_from(moof) if len(moof) >= _MOOF.size else ()
        count = (len(moof) - _MOOF.size) // _ENTRY_BYTES
        if fields[:2] != (len(moof), b"moof") or fields[-4:-1] != (b"trun", _TRUN_FLAGS, count):
            raise ValueError(f"the {len(moof)} bytes are no moof of this encoder; give a file that it made")
        entries = struct.unpack_from(f">{2 * count}I", moof, _MOOF.size)
        return cls(entries[::2], tuple(flags == _KEY_FRAME for flags in entries[1::2]), fields[_TICKS_FIELD])


@dataclass(frozen=True, slots=True)
class _Sample:
    """One encoded frame as MP4 stores it."""

    data: bytes
    is_keyframe: bool


class VideoEncoder:
    """Encodes the chunks of one session; its timestamps continue from chunk to chunk.

    The init segment is the same for all sessions of one size, rate and codec. It and any later run of
    fragments are a valid file, so that a client may join late or miss chunks. After an error inside `encode`
    the encoder is closed. One thread at a time uses it.

    codec: the one that runs. mime: of the stream, for MediaSource.isTypeSupported. frames_encoded: so far.
    """

    def __init__(self, fps: float | Fraction, height: int, width: int, codec: CodecName = "auto") -> None:
        """auto: NVENC where there is a CUDA device and NVENC opens, else libx264.

        Raises ValueError for a size or rate that cannot be encoded, RuntimeError when the codec cannot open.
        """
        check_value("codec", codec, CodecName)
        self.fps = frame_rate(fps)
        check_size(height, width)
        if height % _SIDE_MULTIPLE or width % _SIDE_MULTIPLE:
            raise ValueError(
                f"frames are {height} x {width} pixels; height and width must be multiples of "
                f"{_SIDE_MULTIPLE}: choose another size"
            )
        self._size = (height, width)
        self.frames_encoded = 0
        self._fragments = 0
        self.codec, self._coder, self.init_segment = _open(codec, self.fps, height, width)
        self.mime = f'video/mp4; codecs="{_codec_string(self.init_segment)}"'

    def encode(self, frames: ndarray) -> Fragment:
        """Encode the next frames, uint8 [T, H, W, 3], RGB, as one fragment that begins with a keyframe.

        Raises ValueError for frames of another shape or dtype, RuntimeError when the encoder is closed or
        fails; then it is closed.
        """
        from av import FFmpegError

        if self._coder is None:
            raise RuntimeError(
                f"the video encoder was closed after frame {self.frames_encoded}; start a new session"
            )
        check_frames(frames, *self._size)
        if not len(frames):
            raise ValueError("the chunk has 0 frames; give at least one")
        try:
            samples = [
                self._encode_frame(frame, self.frames_encoded + number) for number, frame in enumerate(frames)
            ]
            if not samples[0].is_keyframe:
                raise RuntimeError(f"{self.codec} began a chunk without a keyframe; use another codec")
            data = _fragment(self._fragments + 1, self.frames_encoded, self.fps, samples)
        except FFmpegError as error:
            self.close()
            raise RuntimeError(
                f"{self.codec} failed in the chunk after frame {self.frames_encoded} "
                f"({error.strerror}); start a new session"
            ) from error
        except BaseException:  # its timestamps would no longer be those of the frames
            self.close()
            raise
        fragment = Fragment(data, self.frames_encoded, len(frames), self.fps)
        self.frames_encoded += len(frames)
        self._fragments += 1
        return fragment

    def _encode_frame(self, frame: ndarray, number: int) -> _Sample:
        from av.video.frame import PictureType

        picture = as_bt709_frame(frame)
        picture.pts = number
        picture.pict_type = PictureType.I if number == self.frames_encoded else PictureType.NONE
        packets = self._coder.encode(picture)
        if len(packets) != 1:
            raise RuntimeError(
                f"{self.codec} returned {len(packets)} packets for frame {number}, not one; use another codec"
            )
        return _Sample(_with_lengths(bytes(packets[0])), packets[0].is_keyframe)

    def close(self) -> None:
        """Free the codec; every later `encode` is an error. Closing twice changes nothing."""
        self._coder = None


class SpareEncoder:
    """One encoder of a size that most sessions have, opened before a session asks for it: opening one takes
    milliseconds, and NVENC far more. Any thread may call any method.
    """

    def __init__(self, fps: float | Fraction, height: int, width: int) -> None:
        """Opens nothing yet."""
        self._size = (fps, height, width)
        self._lock = Lock()
        self._encoder: VideoEncoder | None = None

    def take(self, height: int, width: int) -> VideoEncoder | None:
        """The spare encoder, where there is one and it has that size."""
        if (height, width) != self._size[1:]:
            return None
        with self._lock:
            encoder, self._encoder = self._encoder, None
        return encoder

    def refill(self) -> None:
        """Open one where there is none. A failure is left to the session that opens its own then."""
        if self._encoder is not None:
            return
        with suppress(ValueError, RuntimeError):
            encoder = VideoEncoder(*self._size)
            with self._lock:
                self._encoder = self._encoder or encoder


def _open(codec: CodecName, rate: Fraction, height: int, width: int) -> tuple[str, VideoCodecContext, bytes]:
    """The name of the codec that runs, the open codec and the init segment."""
    if codec == "auto" and torch.cuda.is_available():
        try:
            return "h264_nvenc", *_open_codec("h264_nvenc", rate, height, width)
        except RuntimeError as error:  # data centre GPUs may have no encoder, and others limit their sessions
            logger.info("libx264 encodes the video: %s", error)
    name = "libx264" if codec == "auto" else codec
    return name, *_open_codec(name, rate, height, width)


def _open_codec(name: str, rate: Fraction, height: int, width: int) -> tuple[VideoCodecContext, bytes]:
    """The open codec and the init segment, which FFmpeg's muxer writes for it.

    The fragments are ours: the muxer ends a fragment when the next chunk comes, a chunk too late. Raises
    RuntimeError when the codec cannot open.
    """
    import av
    from av.codec.codec import UnknownCodecError

    file = io.BytesIO()
    options = {
        "movflags": "+empty_moov+default_base_moof",
        "video_track_timescale": str(rate.numerator * _TICKS_PER_FRAME_TERM),
        "fflags": "+bitexact",  # no version of FFmpeg and no date
    }
    try:
        with av.open(file, "w", format="mp4", container_options=options) as container:
            stream = container.add_stream(name, rate=rate)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            few = height * width <= _PIXELS_OF_A_FAST_PRESET
            faster = {"preset": "ultrafast"} if few and name == "libx264" else {}
            stream.options = _OPTIONS[name] | faster
            coder = stream.codec_context
            coder.thread_count = min(_MOST_THREADS, 1 + height * width // _PIXELS_PER_THREAD)
            coder.color_range = FROM_16_TO_235
            coder.color_primaries = coder.color_trc = coder.colorspace = BT709
            container.start_encoding()
            init_segment = file.getvalue()  # before the end of the file, which has no place in a stream
    except (av.FFmpegError, UnknownCodecError) as error:
        reason = getattr(error, "strerror", None) or "this FFmpeg was built without it"
        raise RuntimeError(
            f"{name} does not open for {height} x {width} pixels ({reason}); use the codec libx264 or "
            "another size"
        ) from error
    return coder, init_segment


def _codec_string(init_segment: bytes) -> str:
    """Profile, constraints and level as RFC 6381 writes them, from the decoder configuration (avcC)."""
    at = init_segment.index(b"avcC") + len(b"avcC")
    return f"avc1.{init_segment[at + 1 : at + 4].hex()}"


def _with_lengths(packet: bytes) -> bytes:
    """The NAL units of a packet, each after its length as MP4 stores them instead of after a start code."""
    units = [unit.rstrip(b"\0") for unit in packet.split(b"\0\0\1")[1:]]  # no unit ends in a zero byte
    return b"".join(part for unit in units for part in (struct.pack(">I", len(unit)), unit))


def _fragment(sequence: int, start_frame: int, fps: Fraction, samples: Sequence[_Sample]) -> bytes:
    table_bytes = _ENTRY_BYTES * len(samples)
    moof_bytes = _MOOF.size + table_bytes
    frame_ticks = fps.denominator * _TICKS_PER_FRAME_TERM
    head = _MOOF.pack(
        *(moof_bytes, b"moof"),
        *(_MFHD_BYTES, b"mfhd", 0, sequence & 0xFFFFFFFF),
        *(moof_bytes - BOX_HEADER.size - _MFHD_BYTES, b"traf"),
        *(_TFHD_BYTES, b"tfhd", _TFHD_FLAGS, 1, frame_ticks),
        *(_TFDT_BYTES, b"tfdt", _TFDT_VERSION_1, start_frame * frame_ticks),
        *(_TRUN_BYTES + table_bytes, b"trun", _TRUN_FLAGS, len(samples), moof_bytes + BOX_HEADER.size),
    )
    table = [
        struct.pack(">II", len(sample.data), _KEY_FRAME if sample.is_keyframe else _OTHER_FRAME)
        for sample in samples
    ]
    mdat_bytes = BOX_HEADER.size + sum(len(sample.data) for sample in samples)
    return b"".join(
        (head, *table, BOX_HEADER.pack(mdat_bytes, b"mdat"), *(sample.data for sample in samples))
    )
