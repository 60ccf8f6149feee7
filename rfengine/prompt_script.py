"""PromptScript: the scenes of one video, a line each in a text file, and how they are played.

    # seconds  begins with  shows
    4          start        a red circle over a grey wall
    3          cut          a blue square over a sandy beach
    5          soft:4       a green square over a sandy beach
    4          recache      3 * a green square | 1 * a green star

Three columns with white space between them; empty lines and lines that begin with # are skipped. The first
scene begins with `start`, every other as VideoStream.set_prompt has it: `cut` (its mode "hard"), `soft`,
`recache`; `soft:N` takes N chunks from the old text to the new, on a straight line, or as `soft:N:spherical`.
The rest of the line is the text, or several between `|`, each after its weight and a star or of weight 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rfengine.config import EngineConfig
from rfengine.files import read_text, text_lines
from rfengine.grid import LatentGrid
from rfengine.limits import Range, as_number, shown
from rfengine.prompt_blend import Interpolation, checked_chunks
from rfengine.prompts import Prompt, PromptMode, check_prompt, parse_prompt, prompt_line, weighted_texts
from rfengine.video import MOST_SECONDS, frame_count, nearest_frame

if TYPE_CHECKING:
    from rfengine.frame_chunk import FrameChunk
    from rfengine.stream import VideoStream

CheckText = Callable[[str], None]

MOST_SCENES = 10_000
_MOST_BYTES = 64 * 2**20  # of a file
_MODES: dict[str, PromptMode | None] = {"start": None, "cut": "hard", "soft": "soft", "recache": "recache"}
_WORDS = {mode: word for word, mode in _MODES.items()}
_EXPECTED = (
    "write seconds, how the scene begins (start for the first; cut, soft, soft:CHUNKS or recache for others) "
    "and its text, such as '3 soft:4 a red circle'"
)


@dataclass(frozen=True, slots=True)
class Scene:
    """A part of a video with a prompt of its own.

    seconds: its length. mode, transition_chunks, interpolation: how it begins, as VideoStream.set_prompt has
    them; the first scene of a script has no mode. line: the line of its file, from 1, or None without a file;
    errors name it and no comparison counts it. Raises ValueError for a value that cannot be.
    """

    seconds: float
    prompt: Prompt
    mode: PromptMode | None = None
    transition_chunks: int = 1
    interpolation: Interpolation = "linear"
    line: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if as_number("seconds", self.seconds, Range(high=MOST_SECONDS)) <= 0:
            raise ValueError(f"seconds is {self.seconds}; give a scene a positive length")
        weighted_texts(self.prompt)
        checked_chunks(self.mode or "hard", self.transition_chunks, self.interpolation)

    @property
    def transition(self) -> str:
        """The second column of its line."""
        word = _WORDS[self.mode]
        if self.interpolation == "spherical":
            return f"{word}:{self.transition_chunks}:spherical"
        return word if self.transition_chunks == 1 else f"{word}:{self.transition_chunks}"


@dataclass(frozen=True, slots=True)
class PlannedScene:
    """A scene in its video: number from 1, the first frame, and the chunks, which are the stream's."""

    scene: Scene
    number: int
    first_frame: int
    num_chunks: int


@dataclass(frozen=True, slots=True)
class ScriptPlan:
    """The scenes of a video of `num_frames` frames at the chunks of one model; the last one may go beyond.

    is_begun: chunks are before it, so that its first one is like any other.
    """

    scenes: tuple[PlannedScene, ...]
    num_frames: int
    is_begun: bool = False

    @property
    def num_chunks(self) -> int:
        return sum(planned.num_chunks for planned in self.scenes)


@dataclass(frozen=True, slots=True)
class PromptScript:
    """The scenes of one video, in order. Raises ValueError without a scene, for more than MOST_SCENES, for a
    first one that has a mode, and for another that has none."""

    scenes: tuple[Scene, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.scenes) <= MOST_SCENES:
            raise ValueError(
                f"the script has {len(self.scenes)} scenes; give at least one and at most {MOST_SCENES}"
            )
        for number, scene in enumerate(self.scenes, 1):
            if number == 1 and scene.mode is not None:
                raise ValueError(
                    f"{_name(scene, number)}, begins with {scene.transition}, and nothing is before it; "
                    "write start"
                )
            if number > 1 and scene.mode is None:
                raise ValueError(
                    f"{_name(scene, number)}, begins with start, as only the first does; write cut, soft or "
                    "recache"
                )

    @classmethod
    def read(cls, path: str | Path, check_text: CheckText = check_prompt) -> PromptScript:
        """The script of a UTF-8 file. Raises ValueError as parse does, and for a file that cannot be read."""
        return cls.parse(read_text(Path(path), _MOST_BYTES), str(path), check_text)

    @classmethod
    def parse(
        cls, text: str, source: str = "the script", check_text: CheckText = check_prompt
    ) -> PromptScript:
        """The script that a text is.

        source: what errors call it. check_text: raises ValueError for a text that no scene can have. Raises
        ValueError with number and text of the first line that is wrong, and for what PromptScript refuses.
        """
        scenes = []
        for number, line in enumerate(map(str.strip, text_lines(text)), 1):
            if line and not line.startswith("#"):
                try:
                    scenes.append(_scene(line, number))
                    for each in weighted_texts(scenes[-1].prompt):
                        check_text(each.text)
                except ValueError as error:
                    raise ValueError(f"line {number} of {source}, {shown(line)}: {error}") from error
        try:
            return cls(tuple(scenes))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def text(self) -> str:
        """The text that parse reads as this script. Raises ValueError for a prompt that no line can hold."""
        lines = []
        for number, scene in enumerate(self.scenes, 1):
            for each in weighted_texts(scene.prompt):
                if each.text != each.text.strip() or "|" in each.text or "\n" in each.text:
                    raise ValueError(
                        f"scene {number} has the text {shown(each.text)}; one in a script has no |, no line "
                        "break and no white space around it"
                    )
            seconds = repr(float(scene.seconds)).removesuffix(".0")
            lines.append(f"{seconds} {scene.transition} {prompt_line(scene.prompt)}\n")
        return "".join(lines)

    def plan(self, config: EngineConfig, is_begun: bool = False) -> ScriptPlan:
        """Where the scenes begin in a video of the model: each at the first chunk boundary at or after the
        frame of its time, which is the sum of the seconds before it.

        is_begun: the stream is not at the start of its video, so that all chunks have one length. After a cut
        they are counted from a new start, whose first is of another. Raises ValueError where all scenes are
        too long, a scene gets no chunk, or one has fewer than its transition, and as check_recache does.
        """
        grid, cache = LatentGrid.of(config), config.cache
        if any(scene.mode == "recache" for scene in self.scenes):
            cache.check_recache()
        ends = list(accumulate(Fraction(repr(float(scene.seconds))) for scene in self.scenes))
        if ends[-1] > MOST_SECONDS:
            raise ValueError(
                f"the script lasts {float(ends[-1]):g} seconds; a video has at most {MOST_SECONDS}, a day"
            )
        num_frames = frame_count(config.fps, float(ends[-1]))
        times = [0, *(nearest_frame(end, config.fps) for end in ends[:-1]), num_frames]  # in frames
        begins: list[tuple[int, int]] = []  # of each scene and of the end: frame and chunk
        later_chunk = cache.chunk_frames * grid.temporal_stride
        first_chunk = later_chunk if is_begun else grid.pixel_frames(cache.first_chunk)
        cut_frame = cut_chunk = 0
        for time, scene in zip_longest(times, self.scenes):
            later = max(0, -(-(time - cut_frame - first_chunk) // later_chunk))
            chunks = 0 if time <= cut_frame else 1 + later
            frame = cut_frame + (first_chunk + later * later_chunk if chunks else 0)
            begins.append((frame, cut_chunk + chunks))
            if scene is not None and scene.mode == "hard":
                cut_frame, cut_chunk = begins[-1]
                first_chunk = grid.pixel_frames(cache.first_chunk)
        planned = tuple(
            PlannedScene(scene, number, frame, end - chunk)
            for number, (scene, (frame, chunk), (_, end)) in enumerate(
                zip(self.scenes, begins, begins[1:], strict=False), 1
            )
        )
        longest = max(grid.pixel_frames(cache.first_chunk), later_chunk)
        for each in planned:
            _check_length(each, longest / config.fps)
        return ScriptPlan(planned, num_frames, is_begun)


def _scene(line: str, number: int) -> Scene:
    columns = line.split(maxsplit=2)
    if len(columns) < 3:
        raise ValueError(f"it has {len(columns)} of 3 columns; {_EXPECTED}")
    length, transition, text = columns
    try:
        seconds = float(length)
    except ValueError as error:
        raise ValueError(f"{shown(length)} is no number of seconds; {_EXPECTED}") from error
    match = re.fullmatch(r"(start|cut|soft|recache)|soft:([0-9]{1,9})(:spherical)?", transition)
    if match is None:
        raise ValueError(f"no scene begins with {shown(transition)}; {_EXPECTED}")
    interpolation = "spherical" if match[3] else "linear"
    mode, chunks = _MODES[match[1] or "soft"], int(match[2] or 1)
    return Scene(seconds, parse_prompt(text), mode, chunks, interpolation, number)


def _name(scene: Scene, number: int) -> str:
    """What errors call a scene: its number, its line and its text."""
    line = "" if scene.line is None else f" on line {scene.line}"
    return f"scene {number}{line}, {shown(prompt_line(scene.prompt))}"


def _check_length(planned: PlannedScene, chunk_seconds: float) -> None:
    """Raises ValueError where a scene has no chunk, or fewer than its transition."""
    scene, chunks = planned.scene, planned.num_chunks
    name = f"{_name(scene, planned.number)}, lasts {scene.seconds:g} seconds"
    if not chunks:
        raise ValueError(
            f"{name} and no chunk begins in it; give it {chunk_seconds:g} seconds, which a chunk has"
        )
    if scene.transition_chunks > chunks:
        raise ValueError(
            f"{name}, which is {chunks} chunks, and its transition takes {scene.transition_chunks}; give it "
            f"more seconds, or soft:{chunks}"
        )


def play(stream: VideoStream, plan: ScriptPlan) -> Iterator[tuple[PlannedScene, FrameChunk]]:
    """The chunks of a script, each with its scene; frames beyond plan.num_frames are the last chunk's.

    stream: of the first scene's prompt, at the start of its video unless plan.is_begun, as with a clip before
    it; it is ahead inside a scene alone, so that a scene begins where it is planned with overlap too. Raises
    RuntimeError for a stream that is elsewhere or has another prompt, and as VideoStream does.
    """
    first = prompt_line(plan.scenes[0].scene.prompt)
    if stream.prompt != first or stream.is_ahead or stream.is_at_start == plan.is_begun:
        raise RuntimeError(
            f"the stream is at chunk {stream.index} of {shown(stream.prompt)}; play the script on a new one "
            f"of {shown(first)}, or with chunks before it on a plan that is_begun"
        )
    for planned in plan.scenes:
        scene = planned.scene
        if scene.mode is not None:
            stream.set_prompt(scene.prompt, scene.mode, scene.transition_chunks, scene.interpolation)
        for chunk in stream.take(planned.num_chunks):
            yield planned, chunk
