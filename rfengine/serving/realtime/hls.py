"""HlsPlaylist: the last seconds of a session as segments for HTTP Live Streaming (RFC 8216), in memory."""

from __future__ import annotations

import math
import threading
from collections import deque
from fractions import Fraction
from typing import TYPE_CHECKING

from rfengine.limits import Range, as_integer
from rfengine.video import frame_rate

if TYPE_CHECKING:
    from rfengine.serving.video_encoder import Fragment

_VERSION = 7  # of the playlist, as fragmented MP4 needs it at least
_PLAYABLE_TARGETS = 3  # a live playlist is at least so many target durations long (RFC 8216, 6.2.2)
_MOST_SEGMENTS = 1000


class HlsPlaylist:
    """A sliding window over the fragments of a session. One thread adds, any number read.

    The playlist names `init.mp4` and `segment-N.m4s`, relative to its own address; N counts from 0. Segments
    that left the playlist are kept for as long again, since a player that has an older one may ask for them.
    Memory is bounded by 2 * most_segments + 1 fragments, more only where these are shorter than what a player
    needs.
    """

    def __init__(self, fps: float | Fraction, most_segments: int = 8, longest_frames: int = 12) -> None:
        """longest_frames: of any segment; the target duration, which may never change, is reckoned from it.

        Raises ValueError for a rate or number that no playlist can have.
        """
        self._fps = frame_rate(fps)
        self._longest_frames = as_integer("longest_frames", longest_frames, Range(1))
        longest = self._longest_frames / self._fps
        self._target_seconds = max(1, math.ceil(longest))
        shown = as_integer("most_segments", most_segments, Range(1, _MOST_SEGMENTS))
        self._most_shown = max(shown, math.ceil(_PLAYABLE_TARGETS * self._target_seconds / longest))
        self._kept: deque[Fragment] = deque(maxlen=2 * self._most_shown + 1)
        self._count = 0  # of fragments that were ever added
        self._next_frame: int | None = None
        self._ended = False
        self._lock = threading.Lock()

    def add(self, fragment: Fragment) -> None:
        """Append the next fragment.

        Raises ValueError for one that is too long, of another rate or not the next, RuntimeError after
        `end`.
        """
        if fragment.fps != self._fps or not 0 < fragment.num_frames <= self._longest_frames:
            raise ValueError(
                f"the fragment has {fragment.num_frames} frames at {fragment.fps} a second; the playlist "
                f"takes up to {self._longest_frames} at {self._fps}: make it with these"
            )
        with self._lock:
            if self._ended:
                raise RuntimeError(f"the playlist ended after {self._count} segments; open another")
            if self._next_frame is not None and fragment.start_frame != self._next_frame:
                raise ValueError(
                    f"the fragment begins at frame {fragment.start_frame} and the playlist continues at "
                    f"{self._next_frame}; add every fragment in order"
                )
            self._next_frame = fragment.start_frame + fragment.num_frames
            self._kept.append(fragment)
            self._count += 1

    def end(self) -> None:
        """No segment will follow: a player stops at the last one. Ending twice changes nothing."""
        with self._lock:
            self._ended = True

    def playlist(self) -> str:
        """The m3u8 text as it is now; before the first segment it has none."""
        with self._lock:
            shown = list(self._kept)[-self._most_shown :]
            count, ended = self._count, self._ended
        first = count - len(shown)
        lines = [
            "#EXTM3U",
            f"#EXT-X-VERSION:{_VERSION}",
            f"#EXT-X-TARGETDURATION:{self._target_seconds}",
            f"#EXT-X-MEDIA-SEQUENCE:{first}",
            "#EXT-X-INDEPENDENT-SEGMENTS",
            '#EXT-X-MAP:URI="init.mp4"',
        ]
        for number, fragment in enumerate(shown, first):
            lines += [f"#EXTINF:{fragment.seconds:.6f},", f"segment-{number}.m4s"]
        lines += ["#EXT-X-ENDLIST"] * ended
        return "\n".join(lines) + "\n"

    def segment(self, number: int) -> bytes | None:
        """The bytes of segment-N.m4s; None for one that is no longer or not yet there."""
        with self._lock:
            at = number - (self._count - len(self._kept))
            return self._kept[at].data if 0 <= at < len(self._kept) else None
