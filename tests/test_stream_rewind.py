"""A stream that goes back to a snapshot in its own memory, and prompts that change in several steps."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch

from rfengine import Pipeline
from rfengine.config import RuntimeConfig
from rfengine.stream import VideoStream
from support.models import small_pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def overlapped() -> Pipeline:
    pipe = small_pipeline()
    config = dataclasses.replace(pipe.config, runtime=RuntimeConfig(overlap=True))
    return Pipeline(config, pipe.model, pipe.vae, pipe.text_encoder, "small")


def frames_of(stream: VideoStream, chunks: int) -> numpy.ndarray:
    return numpy.concatenate([next(stream).frames for _ in range(chunks)])


@pytest.mark.parametrize("back_to", [0, 1, 4])
@pytest.mark.parametrize("kind", ["pipe", "overlapped"])
def test_a_rewound_stream_goes_on_as_from_the_snapshot(kind: str, back_to: int, request) -> None:
    pipe = request.getfixturevalue(kind)
    stream = pipe.stream("a circle", seed=3)
    frames_of(stream, back_to) if back_to else None
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


def test_a_transition_goes_in_equal_steps_and_ends_at_the_new_prompt(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle", seed=3)
    old = pipe._engine.encode_text("a circle")
    new = pipe._engine.encode_text("a green square")
    stream.set_prompt("a green square", transition_chunks=3)
    assert stream.prompt == "a green square"
    for part in (1 / 3, 2 / 3, 1.0, 1.0):
        next(stream)
        torch.testing.assert_close(stream._text_states, old + part * (new - old))
    assert torch.equal(stream._text_states, new)


def test_a_transition_of_one_chunk_is_a_plain_switch(pipe: Pipeline) -> None:
    streams = [pipe.stream("a circle", seed=3) for _ in range(2)]
    streams[0].set_prompt("a square")
    streams[1].set_prompt("a square", transition_chunks=1)
    assert numpy.array_equal(frames_of(streams[0], 2), frames_of(streams[1], 2))


@pytest.mark.parametrize("kind", ["pipe", "overlapped"])
def test_a_snapshot_inside_a_transition_continues_bit_for_bit(kind: str, request, tmp_path) -> None:
    pipe = request.getfixturevalue(kind)
    stream = pipe.stream("a circle", seed=3)
    next(stream)
    stream.set_prompt("a green square", transition_chunks=4)
    frames_of(stream, 2)
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
    assert "transition_chunks" not in saved.info and "text_target" not in saved.tensors


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
