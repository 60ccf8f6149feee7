"""A stream that goes back to a snapshot in its own memory, and prompts that change in several steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch

from rfengine import Pipeline
from rfengine.checkpoint.loader import save_weights
from rfengine.config import RuntimeConfig
from rfengine.prompt_blend import interpolated
from rfengine.prompts import WeightedText
from rfengine.snapshot import Snapshot
from support.models import frames_of, small_pipeline, with_runtime


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def overlapped() -> Pipeline:
    return with_runtime(small_pipeline(), RuntimeConfig(overlap=True))


@pytest.mark.parametrize("back_to", [0, 1, 4])
@pytest.mark.parametrize("kind", ["pipe", "overlapped"])
def test_a_rewound_stream_goes_on_as_from_the_snapshot(kind: str, back_to: int, request) -> None:
    pipe = request.getfixturevalue(kind)
    stream = pipe.stream("a circle", seed=3)
    for _ in range(back_to):
        next(stream)
    saved = stream.snapshot()
    after = frames_of(stream, 4)
    stream.set_prompt("a square", "recache")
    frames_of(stream, 2)
    keys = stream._cache.tensors()["keys"].data_ptr()
    stream.rewind(saved)
    assert stream.prompt == "a circle" and stream.index == back_to
    assert stream._cache.tensors()["keys"].data_ptr() == keys
    assert numpy.array_equal(frames_of(stream, 4), after)


def test_a_rewound_stream_takes_the_seed_of_the_snapshot(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle", seed=3)
    frames_of(stream, 2)
    saved = stream.snapshot()
    other = dataclasses.replace(saved, info=saved.info | {"seed": 4})
    stream.rewind(other)
    assert stream.seed == 4
    after = frames_of(stream, 2)
    assert numpy.array_equal(after, frames_of(pipe.restore(other), 2))
    assert not numpy.array_equal(after, frames_of(pipe.restore(saved), 2))


def test_a_refused_rewind_leaves_the_stream_as_it_was(pipe: Pipeline) -> None:
    stream, plain = pipe.stream("a circle", seed=3), pipe.stream("a circle", seed=3)
    frames_of(stream, 2), frames_of(plain, 2)
    larger = pipe.stream("a circle", height=64, width=64).snapshot()
    with pytest.raises(ValueError, match="the snapshot is of 64 x 64 pixels and the stream of 32 x 48"):
        stream.rewind(larger)
    saved = stream.snapshot()
    name = next(name for name in saved.tensors if name.startswith("decoder."))
    broken = dataclasses.replace(saved, tensors=saved.tensors | {name: torch.zeros(3)})
    with pytest.raises(ValueError, match="of the snapshot is"):
        stream.rewind(broken)
    assert numpy.array_equal(frames_of(stream, 2), frames_of(plain, 2))


@pytest.mark.parametrize("kind", ["linear", "spherical"])
def test_a_transition_is_at_its_fraction_before_each_chunk_and_ends_at_the_new_prompt(
    pipe: Pipeline, kind: str
) -> None:
    stream = pipe.stream("a circle", seed=3)
    old, new = (pipe._engine.encode_text(text) for text in ("a circle", "a green square"))
    stream.set_prompt("a green square", "soft", 3, kind)
    assert stream.prompt == "a green square" and torch.equal(stream._text_states, old)
    for step in (1, 2, 3, 3):
        next(stream)
        assert torch.equal(stream._text_states, interpolated(old, new, step / 3, kind))
    assert torch.equal(stream._text_states, new)


def test_a_chunk_of_a_transition_is_made_with_the_text_states_of_its_step(pipe: Pipeline) -> None:
    stream, plain = pipe.stream("a circle", seed=3), pipe.stream("a circle", seed=3)
    old, new = (pipe._engine.encode_text(text) for text in ("a circle", "a green square"))
    frames_of(stream, 2), frames_of(plain, 2)
    stream.set_prompt("a green square", transition_chunks=4)
    for part in (0.25, 0.5, 0.75, 1.0, 1.0):
        plain._set_text("", interpolated(old, new, part, "linear"))
        assert numpy.array_equal(next(stream).frames, next(plain).frames), part


def test_interpolations_differ_between_the_ends(pipe: Pipeline) -> None:
    streams = [pipe.stream("a circle", seed=3) for _ in range(2)]
    for stream, kind in zip(streams, ("linear", "spherical"), strict=True):
        stream.set_prompt("a green square", "soft", 2, kind)
    assert not numpy.array_equal(*(next(stream).frames for stream in streams))
    assert torch.equal(*((next(stream), stream._text_states)[1] for stream in streams))


def test_a_transition_within_a_transition_starts_at_the_present_states(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle", seed=3)
    old, new, last = (pipe._engine.encode_text(text) for text in ("a circle", "a square", "a green star"))
    stream.set_prompt("a square", transition_chunks=4)
    next(stream)
    stream.set_prompt("a green star", transition_chunks=2)
    next(stream)
    between = interpolated(interpolated(old, new, 0.25, "linear"), last, 0.5, "linear")
    assert torch.equal(stream._text_states, between)


MIX = (("a circle", 3), WeightedText("a longer text of a green square", 1))


def test_texts_with_weights_give_the_weighted_mean_of_their_states(pipe: Pipeline) -> None:
    stream = pipe.stream("a star", seed=3)
    stream.set_prompt(MIX)
    one, other = (pipe._engine.encode_text(text) for text in ("a circle", MIX[1].text))
    torch.testing.assert_close(stream._text_states, 0.75 * one + 0.25 * other)
    assert stream.prompt == "3 * a circle | 1 * a longer text of a green square"
    assert numpy.array_equal(frames_of(stream, 2), frames_of(pipe.stream(MIX, seed=3), 2))


@pytest.mark.parametrize("mode", ["soft", "recache", "hard"])
def test_one_text_with_a_weight_is_that_text(pipe: Pipeline, mode: str) -> None:
    streams = [pipe.stream("a circle", seed=3) for _ in range(2)]
    for stream, prompt in zip(streams, ("a square", [("a square", 0.2)]), strict=True):
        frames_of(stream, 2)
        stream.set_prompt(prompt, mode)
    assert streams[1].prompt == "a square"
    assert numpy.array_equal(*(frames_of(stream, 2) for stream in streams))


def test_a_wrong_text_among_several_leaves_the_stream_as_it_was(pipe: Pipeline) -> None:
    stream, plain = pipe.stream("a circle", seed=3), pipe.stream("a circle", seed=3)
    for wrong, message in (
        ([("a square", 1), (" ", 1)], "the prompt's text 2 ' ' is empty"),
        ([("a square", 0)], "the prompt's weight 1 is 0; it must be above 0"),
        ([], "the prompt has 0 texts"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.set_prompt(wrong, "hard")
    assert stream.prompt == "a circle"
    assert numpy.array_equal(frames_of(stream, 2), frames_of(plain, 2))


def test_words_that_a_model_does_not_know_are_warned_of_for_each_text(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    text = dataclasses.replace(pipe.config.text, known_words=("circle",))
    config = dataclasses.replace(pipe.config, text=text)
    knowing = Pipeline(config, pipe.model, pipe.vae, pipe.text_encoder, "small")
    knowing.stream([("a circle", 1), ("a cat", 1), ("a dog", 2)])
    assert [record.args[0] for record in caplog.records] == ["a cat", "a dog"]


def test_a_transition_of_one_chunk_is_a_plain_switch(pipe: Pipeline) -> None:
    streams = [pipe.stream("a circle", seed=3) for _ in range(2)]
    streams[0].set_prompt("a square")
    streams[1].set_prompt("a square", transition_chunks=1)
    assert numpy.array_equal(frames_of(streams[0], 2), frames_of(streams[1], 2))


@pytest.mark.parametrize("taken_after", [0, 2])
@pytest.mark.parametrize("interpolation", ["linear", "spherical"])
@pytest.mark.parametrize("kind", ["pipe", "overlapped"])
def test_a_snapshot_inside_a_transition_continues_bit_for_bit(
    kind: str, interpolation: str, taken_after: int, request, tmp_path
) -> None:
    pipe = request.getfixturevalue(kind)
    stream = pipe.stream("a circle", seed=3)
    next(stream)
    stream.set_prompt(MIX, "soft", 4, interpolation)
    for _ in range(taken_after):
        next(stream)
    saved = stream.snapshot()
    saved.save(tmp_path / "stream.safetensors")
    read = type(saved).load(tmp_path / "stream.safetensors")
    after = frames_of(stream, 4)
    assert numpy.array_equal(frames_of(pipe.restore(read), 4), after)
    stream.rewind(read)
    assert numpy.array_equal(frames_of(stream, 4), after)


def test_a_snapshot_without_a_transition_says_nothing_of_one(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle")
    stream.set_prompt("a square", transition_chunks=2)
    frames_of(stream, 2)
    saved = stream.snapshot()
    assert not {"transition_chunks", "transition_step", "interpolation"} & saved.info.keys()
    assert not {"text_start", "text_target"} & saved.tensors.keys()


def save_as_format_2(path: Path, snapshot: Snapshot, chunks_left: int) -> None:
    """A snapshot in a transition as it was written once: with the present states and the end, the chunks that
    are left, and slots and latents by chunk."""
    others = {name: each for name, each in snapshot.tensors.items() if name != "text_start"}
    latents = others.pop("window_latents").split(3, dim=2)
    others |= {f"window_latents.{chunk}": each.contiguous() for chunk, each in enumerate(latents)}
    later = ("first_timesteps", "rolling", "next_frame", "joint_chunks", "transition_step", "interpolation")
    info = {name: each for name, each in snapshot.info.items() if name not in later}
    held = info.pop("held")[::3]
    slots = [frame // 3 for frame in held]  # -1 stays
    info |= {"format": 2, "slot_chunks": slots, "transition_chunks": chunks_left}
    save_weights(path, others, {"snapshot": json.dumps(info)})


def test_an_older_snapshot_inside_a_transition_goes_on_to_the_same_end(
    pipe: Pipeline, tmp_path: Path
) -> None:
    stream = pipe.stream("a circle", seed=3)
    old, new = (pipe._engine.encode_text(text) for text in ("a circle", "a green square"))
    stream.set_prompt("a green square", transition_chunks=4)
    next(stream)
    save_as_format_2(tmp_path / "old.safetensors", stream.snapshot(), chunks_left=3)
    restored = pipe.restore(Snapshot.load(tmp_path / "old.safetensors"))
    assert restored.prompt == "a green square"
    for part in (0.5, 0.75):
        next(restored)
        torch.testing.assert_close(restored._text_states, old + part * (new - old))
    next(restored)
    assert torch.equal(restored._text_states, new)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transition_step": 4}, "transition_step is 4 of 4 transition_chunks"),
        ({"transition_step": -1}, "the snapshot's transition_step is -1; it must be at least 0"),
        ({"transition_step": None}, "the snapshot's transition_step is None; it must be an integer"),
        ({"transition_step": 0}, "the snapshot has 'text_start', which this stream has not"),
        ({"interpolation": "cubic"}, "the snapshot's interpolation is 'cubic'; use 'linear' or 'spherical'"),
        ({"transition_chunks": 0}, "the snapshot's transition_chunks is 0; it must be at least 1"),
    ],
)
def test_a_snapshot_of_a_transition_that_cannot_be_is_refused(
    pipe: Pipeline, values: dict, message: str
) -> None:
    stream = pipe.stream("a circle")
    stream.set_prompt("a square", transition_chunks=4)
    frames_of(stream, 2)
    saved = stream.snapshot()
    with pytest.raises(ValueError, match=message):
        pipe.restore(dataclasses.replace(saved, info=saved.info | values))
    without = {name: each for name, each in saved.tensors.items() if name != "text_start"}
    with pytest.raises(ValueError, match="the snapshot lacks text_start"):
        pipe.restore(dataclasses.replace(saved, tensors=without))
    info = {name: each for name, each in saved.info.items() if name != "transition_chunks"}
    with pytest.raises(ValueError, match="transition_step is 2 of 0 transition_chunks"):
        pipe.restore(dataclasses.replace(saved, info=info))


def test_a_switch_ends_a_transition(pipe: Pipeline) -> None:
    stream, plain = pipe.stream("a circle", seed=3), pipe.stream("a circle", seed=3)
    stream.set_prompt("a green square", transition_chunks=5)
    for each in (stream, plain):
        each.set_prompt("a star", "hard")
    assert numpy.array_equal(frames_of(stream, 3), frames_of(plain, 3))


@pytest.mark.parametrize(
    ("mode", "chunks", "message"),
    [
        ("hard", 2, "transition_chunks is 2 and mode is 'hard'; a transition is 'soft'"),
        ("recache", 2, "transition_chunks is 2 and mode is 'recache'"),
        ("soft", 0, "transition_chunks is 0; it must be at least 1"),
        ("soft", 1001, "transition_chunks is 1001; it must be at most 1000"),
        ("soft", 1.5, "transition_chunks is 1.5; it must be an integer"),
    ],
)
def test_a_transition_that_cannot_be_is_refused(pipe: Pipeline, mode: str, chunks: int, message: str) -> None:
    stream = pipe.stream("a circle")
    with pytest.raises(ValueError, match=message):
        stream.set_prompt("a square", mode, chunks)
    assert stream.prompt == "a circle"


def test_a_stream_says_whether_a_chunk_is_ahead_and_whether_steps_can_be_watched(
    pipe: Pipeline, overlapped: Pipeline
) -> None:
    plain, ahead = pipe.stream("a circle"), overlapped.stream("a circle")
    assert plain.runs_op_by_op and not ahead.runs_op_by_op
    for stream in (plain, ahead):
        frames_of(stream, 2)
    assert not plain.is_ahead and ahead.is_ahead
    assert plain.index == ahead.index == 2
