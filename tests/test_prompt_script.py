"""Scripts: what a line says, where scenes begin, and that they are played there."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfengine import Pipeline
from rfengine.clip import clip_parts
from rfengine.config import CacheConfig, RuntimeConfig
from rfengine.limits import shown
from rfengine.prompt_script import MOST_SCENES, PromptScript, Scene, ScriptPlan, play
from rfengine.prompts import WeightedText
from rfengine.video import MOST_SECONDS, nearest_frame
from support.models import small_config, small_pipeline, with_runtime

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "story.txt"


# The text


def test_lines_are_scenes() -> None:
    script = PromptScript.parse(
        "# a story\n\n"
        "4\tstart a red circle: soft light\r\n"
        "  2.5  cut  soft  # of a text  \n"
        "3 soft cut\n"
        "3 soft:4 2 * a | b\n"
        "3 soft:2:spherical 5 birds * 2\n"
        ".5 recache a\u2028b"
    )
    assert script.scenes == (
        Scene(4, "a red circle: soft light"),
        Scene(2.5, "soft  # of a text", "hard"),
        Scene(3, "cut", "soft"),
        Scene(3, (WeightedText("a", 2.0), WeightedText("b")), "soft", 4),
        Scene(3, "5 birds * 2", "soft", 2, "spherical"),
        Scene(0.5, "a\u2028b", "recache"),
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("3", "it has 1 of 3 columns; write seconds, how the scene begins"),
        ("3 cut", "it has 2 of 3 columns; write seconds"),
        ("a red circle moves", "'a' is no number of seconds; write seconds"),
        ("3s cut a circle", "'3s' is no number of seconds; write seconds"),
        ("3 a red circle", "no scene begins with 'a'; write seconds"),
        ("3 fade a circle", "no scene begins with 'fade'; write seconds"),
        ("3 hard a circle", "no scene begins with 'hard'; write seconds"),
        ("3 cut:2 a circle", "no scene begins with 'cut:2'; write seconds"),
        ("3 soft: a circle", "no scene begins with 'soft:'; write seconds"),
        ("3 soft:2:cubic a circle", "no scene begins with 'soft:2:cubic'; write seconds"),
        ("3 soft:0 a circle", "transition_chunks is 0; it must be at least 1"),
        ("3 soft:1001 a circle", "transition_chunks is 1001; it must be at most 1000"),
        ("0 cut a circle", "seconds is 0.0; give a scene a positive length"),
        ("-1 cut a circle", "seconds is -1.0; give a scene a positive length"),
        ("nan cut a circle", "seconds is nan; it must be a finite number"),
        ("1e9 cut a circle", "seconds is 1000000000.0; it must be at most 86400"),
        ("3 cut a |", "the prompt's text 2 '' is empty"),
        ("3 cut 0 * a | b", "the prompt's weight 1 is 0.0; it must be above 0"),
        ("3 cut a\0b", "the prompt has a NUL at character 2"),
        ("3 cut " + 10_001 * "a", "the prompt has 10001 characters; give at most 10000"),
    ],
)
def test_wrong_line_is_named_with_its_number_and_text(line: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        PromptScript.parse(f"# a story\n3 start a circle\n\n{line}\n3 nothing of this", "story.txt")
    message = str(caught.value)
    assert message.startswith(f"line 4 of story.txt, {shown(line)}: ")
    assert reason in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "story.txt: the script has 0 scenes; give at least one and at most 10000"),
        ("\n# 3 start a circle\n", "story.txt: the script has 0 scenes"),
        (
            "3 soft:2 a circle",
            "story.txt: scene 1 on line 1, 'a circle', begins with soft:2, and nothing is before it; "
            "write start",
        ),
        ("3 cut a circle\n3 cut a square", "story.txt: scene 1 on line 1, 'a circle', begins with cut"),
        (
            "3 start a circle\n3 start a square",
            "story.txt: scene 2 on line 2, 'a square', begins with start, as only the first does",
        ),
        ("1 start a circle\n" + MOST_SCENES * "1 cut a\n", "the script has 10001 scenes"),
    ],
)
def test_script_that_is_none_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptScript.parse(text, "story.txt")


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\n|"), min_size=1, max_size=20).filter(
    lambda text: text == text.strip()
)
WEIGHTS = st.floats(0, 1e6, exclude_min=True)
PROMPTS = TEXTS | st.lists(st.builds(WeightedText, TEXTS, WEIGHTS), min_size=2, max_size=4).map(tuple)
SECONDS = st.floats(0, MOST_SECONDS, exclude_min=True)
CHUNKS, KINDS = st.integers(1, 1000), st.sampled_from(["linear", "spherical"])
FOLLOWING = st.builds(Scene, SECONDS, PROMPTS, st.just("soft"), CHUNKS, KINDS) | st.builds(
    Scene, SECONDS, PROMPTS, st.sampled_from(["hard", "recache", "soft"])
)


@given(st.builds(Scene, SECONDS, PROMPTS), st.lists(FOLLOWING, max_size=4))
def test_script_that_is_written_is_read_again(first: Scene, others: list[Scene]) -> None:
    script = PromptScript((first, *others))
    assert PromptScript.parse(script.text()) == script


@given(st.text(max_size=60))
def test_any_text_is_a_script_or_refused(text: str) -> None:
    try:
        script = PromptScript.parse(f"1 start a\n{text}")
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert PromptScript.parse(script.text()) == script


@pytest.mark.parametrize("text", ["a | b", " a", "a\nb", "a\n"])
def test_text_that_no_line_can_hold_is_not_written(text: str) -> None:
    script = PromptScript((Scene(1, "a circle"), Scene(1, [(text, 1), ("b", 1)], "hard")))
    with pytest.raises(ValueError, match="scene 2 has the text .*; one in a script has no |, no line break"):
        script.text()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{dir}/none.txt", "does not exist"),
        ("{dir}", "is a directory"),
        ("/dev/zero", "is a device"),
        ("{dir}/latin.txt", "is not UTF-8"),
    ],
)
def test_file_that_cannot_be_read_is_one_sentence(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"1 start n\xe9")
    with pytest.raises(ValueError, match=message):
        PromptScript.read(path.format(dir=tmp_path))


# Where scenes begin: 16 frames a second; chunks have 12 frames, and the first of a video 9


def plan_of(*lines: str) -> ScriptPlan:
    return PromptScript.parse("\n".join(lines)).plan(small_config())


def places(plan: ScriptPlan) -> list[tuple[int, int]]:
    return [(scene.first_frame, scene.num_chunks) for scene in plan.scenes]


@pytest.mark.parametrize(
    ("seconds", "begins"),
    [
        (0.5, 9),  # frame 8
        (0.5625, 9),
        (0.6, 21),  # frame 9.6
        (1.3125, 21),
        (1.34, 21),  # frame 21.44, which is nearest to 21
        (1.35, 33),
    ],
)
def test_scene_begins_at_the_first_chunk_at_or_after_its_frame(seconds: float, begins: int) -> None:
    for transition in ("soft", "cut", "recache"):
        plan = plan_of(f"{seconds} start a", f"2 {transition} b")
        assert plan.scenes[1].first_frame == begins
        assert plan.num_frames == round((seconds + 2) * 16)


def test_times_are_sums_of_decimal_fractions() -> None:
    # in binary 1.1 + 0.8 is above 1.9; at 30 frames a second frame 57 begins a chunk at 1.9
    config = dataclasses.replace(small_config(), fps=30)
    script = PromptScript((Scene(1.1, "a"), Scene(0.8, "b", "soft"), Scene(1, "c", "soft")))
    assert places(script.plan(config)) == [(0, 3), (33, 2), (57, 3)]


def test_chunks_are_counted_from_a_cut_again() -> None:
    plan = plan_of("1 start a", "1 cut b", "2 soft:2 c", "1 cut d", "1 recache e")
    # boundaries: 0 9 21 | 30 42 | 54 66 | 75 87 | 99, for the frames 0, 16, 32, 64, 80 and 96
    assert places(plan) == [(0, 2), (21, 2), (42, 2), (66, 2), (87, 1)]
    assert plan.num_frames == 96 and plan.num_chunks == 9
    assert [scene.number for scene in plan.scenes] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("first", [None, 1, 4])
def test_plan_of_one_scene_has_the_chunks_of_its_frames(first: int | None) -> None:
    pipe = small_pipeline(CacheConfig(first_chunk_frames=first))
    for seconds in (0.01, 0.1, 0.5, 0.5625, 0.6, 1.3, 5, 7.7):
        plan = PromptScript((Scene(seconds, "a"),)).plan(pipe.config)
        assert plan.num_chunks == pipe.chunk_count(plan.num_frames)


def test_first_chunk_of_another_length_is_that_after_a_cut_too() -> None:
    script = PromptScript.parse("1 start a\n1 cut b\n1 soft c")
    # boundaries: 0 1 13 25 | 26 38, for the frames 0, 16 and 32
    assert places(script.plan(small_config(CacheConfig(first_chunk_frames=1)))) == [(0, 3), (25, 2), (38, 1)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["2 start a", "0.05 cut b", "2 cut c"],
            "scene 2 on line 2, 'b', lasts 0.05 seconds and no chunk begins in it; give it 0.75 seconds",
        ),
        (
            ["0.5 start a", "0.05 soft b"],
            "scene 2 on line 2, 'b', lasts 0.05 seconds and no chunk",
        ),
        (
            ["0.5 start a", "0.05 cut b"],
            "scene 2 on line 2, 'b', lasts 0.05 seconds and no chunk",
        ),
        (
            ["2 start a", "1.5 soft:3 b", "2 cut c"],
            "scene 2 on line 2, 'b', lasts 1.5 seconds, which is 2 chunks, and its transition takes 3; give "
            "it more seconds, or soft:2",
        ),
        (["80000 start a", "6400.5 cut b"], "the script lasts 86400.5 seconds; a video has at most 86400"),
    ],
)
def test_plan_that_cannot_be_is_one_sentence(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(*lines)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.75, 0.76, 0.8, 1.0, 2.3]) | st.floats(0.75, 9),
            st.sampled_from(["hard", "soft", "recache"]),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_scene_as_long_as_a_chunk_has_one_and_begins_within_a_chunk_of_its_time(
    scenes: list, is_begun: bool
) -> None:
    script = PromptScript((Scene(0.75, "a"), *(Scene(seconds, "b", mode) for seconds, mode in scenes)))
    plan, time = script.plan(small_config(), is_begun), Fraction(0)
    for planned in plan.scenes:
        assert planned.num_chunks >= 1
        assert 0 <= planned.first_frame - nearest_frame(time, 16) < 12
        time += Fraction(repr(planned.scene.seconds))


def test_after_chunks_all_are_of_one_length_until_a_cut() -> None:
    script = PromptScript.parse("0.75 start a\n0.75 soft b\n2 cut c\n2 recache d")
    assert places(script.plan(small_config())) == [(0, 2), (21, 1), (33, 3), (66, 2)]
    assert places(script.plan(small_config(), is_begun=True)) == [(0, 1), (12, 1), (24, 3), (57, 3)]


# Playing


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "overlap"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return with_runtime(small_pipeline(), RuntimeConfig(overlap=request.param))


def test_script_is_played_where_it_is_planned(pipe: Pipeline) -> None:
    lines = ["1 start a circle", "1 cut a square", "2 soft:2:spherical 2 * a star | a dog", "1 recache a cat"]
    plan = plan_of(*lines)
    stream = pipe.stream("a circle", seed=4)
    played = [(scene.number, chunk.frames) for scene, chunk in play(stream, plan)]
    # the same by hand: a chunk at a time, with nothing ahead of a change
    plain, expected = pipe.stream("a circle", seed=4), []
    changes = {
        2: ("a square", "hard"),
        4: ((("a star", 2), ("a dog", 1)), "soft", 2, "spherical"),
        6: ("a cat", "recache"),
    }
    for index in range(8):
        if index in changes:
            plain.set_prompt(*changes[index])
        expected.append(plain.advance(ahead=False).frames)
    assert [number for number, _ in played] == [1, 1, 2, 2, 3, 3, 4, 4]
    for index, ((_, frames), own) in enumerate(zip(played, expected, strict=True)):
        assert numpy.array_equal(frames, own), index
    firsts = numpy.cumsum([0, *(len(frames) for _, frames in played)])
    assert [int(firsts[index]) for index in (0, 2, 4, 6)] == [scene.first_frame for scene in plan.scenes]
    assert firsts[-2] < plan.num_frames <= firsts[-1]


@pytest.mark.parametrize(
    ("mode", "count"), [("chunks", 9), ("chunks", 33), ("frames", 1), ("clamped", 14), ("clamped", 5)]
)
def test_scenes_after_a_clip_begin_where_they_are_planned(pipe: Pipeline, mode: str, count: int) -> None:
    clip = numpy.random.default_rng(1).integers(0, 256, (count, 32, 48, 3), dtype=numpy.uint8)
    is_begun = bool(clip_parts(count, mode, pipe.config).prefilled)
    script = PromptScript.parse("0.75 start a circle\n0.75 soft a star\n0.75 cut a square\n1 recache a cat")
    plan, frames = script.plan(pipe.config, is_begun), {}
    stream = pipe.stream("a circle", start_frames=clip, start_mode=mode)
    made = 0
    for scene, chunk in play(stream, plan):
        assert frames.setdefault(scene.number, made) <= made
        made += len(chunk.frames)
    assert frames == {scene.number: scene.first_frame for scene in plan.scenes}
    assert is_begun == (count != 5) and made - 12 < plan.num_frames <= made


def test_a_script_is_played_on_a_stream_that_was_restored(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle")
    next(stream)
    restored = pipe.restore(stream.snapshot())
    script = PromptScript.parse("0.75 start a circle\n0.75 soft a star")
    with pytest.raises(RuntimeError, match="is at chunk 1 of 'a circle'; play the script on a new one of 'a"):
        next(play(restored, script.plan(pipe.config)))
    lengths = [len(chunk.frames) for _, chunk in play(restored, script.plan(pipe.config, is_begun=True))]
    assert lengths == [12, 12]


def test_script_is_played_on_a_new_stream_of_its_first_prompt_alone(pipe: Pipeline) -> None:
    plan = plan_of("1 start a circle", "1 cut a square")
    begun = pipe.stream("a circle")
    next(begun)
    for stream, message in (
        (begun, "the stream is at chunk 1 of 'a circle'; play the script on a new one of 'a circle'"),
        (pipe.stream("a star"), "the stream is at chunk 0 of 'a star'; play the script on a new one"),
    ):
        with pytest.raises(RuntimeError, match=message):
            next(play(stream, plan))


def test_example_is_a_script_of_every_transition() -> None:
    script = PromptScript.read(EXAMPLE)
    assert [scene.transition for scene in script.scenes] == ["start", "cut", "soft:3", "recache"]
    assert [len(scene.prompt) for scene in script.scenes if not isinstance(scene.prompt, str)] == [2]
