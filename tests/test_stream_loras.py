"""Streams whose LoRAs change between two chunks: what they yield is what a computation by hand yields."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch

from rfengine import Lora, Pipeline, VideoStream
from rfengine.config import CacheConfig, RuntimeConfig, ScheduleConfig
from rfengine.runtime.adapted_weights import AdaptedWeights
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.runtime.rolling_runner import runner_of
from rfengine.snapshot import Snapshot
from support.loras import ALPHA, LAYERS, RANK, pairs, write_lora
from support.models import SMALL, frames_of, small_pipeline, with_runtime
from support.tape import taped_programs

BEFORE, AFTER = 4, 3  # chunks around the change; after four the window is full
SCALE = 0.8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(folder / f"{seed}.safetensors", pairs(SMALL, seed=seed)) for seed in range(2)]


def changed_by_hand(pipe: Pipeline, stream: VideoStream, layers: Sequence[str]) -> None:
    """Set the weights of the model, and make anew all that was computed of those before."""
    for layer, (down, up) in pairs(SMALL, layers).items():
        weight = pipe.model.get_parameter(f"{layer}.weight").data
        weight.copy_(torch.addmm(weight, up, down, alpha=SCALE * ALPHA / RANK))
    runner = runner_of(pipe.model, pipe.config.schedule, graphs=False)
    stream._engine = dataclasses.replace(stream._engine, runner=runner)
    stream._set_text(stream.prompt, stream._text_states)


@pytest.mark.parametrize(
    "layers",
    [LAYERS, ["blocks.0.cross_attn.k"], ["blocks.1.cross_attn.v"], ["text_embedding.2"], ["time_embedding.0"],
     ["time_projection.1"], ["blocks.0.self_attn.q"], ["blocks.1.ffn.0"], ["head.head"]],
)  # fmt: skip
def test_after_a_swap_a_stream_is_what_it_is_with_weights_set_by_hand(
    tmp_path: Path, layers: Sequence[str]
) -> None:
    path = write_lora(tmp_path / "a.safetensors", pairs(SMALL, layers))
    by_hand, swapped, plain = (small_pipeline() for _ in range(3))
    streams = [pipe.stream("a circle", seed=3) for pipe in (by_hand, swapped, plain)]
    expected, found, unchanged = (frames_of(stream, BEFORE) for stream in streams)
    assert numpy.array_equal(found, expected) and numpy.array_equal(found, unchanged)
    with torch.no_grad():
        changed_by_hand(by_hand, streams[0], layers)
    swapped.set_loras([Lora(path, SCALE)])
    expected, found, unchanged = (frames_of(stream, AFTER) for stream in streams)
    assert numpy.array_equal(found, expected) and not numpy.array_equal(found, unchanged)
    swapped.set_loras([])
    fresh = [frames_of(pipe.stream("a circle", seed=3), BEFORE) for pipe in (swapped, plain)]
    assert numpy.array_equal(*fresh)


@pytest.mark.parametrize(
    ("schedule", "cache"),
    [
        (
            ScheduleConfig(denoising_steps=(1000, 500), first_steps=(1000, 700, 300), first_chunks=6),
            CacheConfig(),
        ),
        (
            ScheduleConfig(denoising_steps=(1000, 500), rolling="joint"),
            CacheConfig(window_frames=15, joint_frames=6),
        ),
        (
            ScheduleConfig(denoising_steps=(1000, 500), rolling="causal"),
            CacheConfig(window_frames=15, joint_frames=6),
        ),
    ],
)
def test_after_a_swap_other_schedules_are_what_they_are_with_weights_set_by_hand(
    files: list[Path], schedule: ScheduleConfig, cache: CacheConfig
) -> None:
    pipes = [small_pipeline(cache, schedule=schedule) for _ in range(2)]
    streams = [pipe.stream("a circle", seed=3) for pipe in pipes]
    assert numpy.array_equal(*(frames_of(stream, BEFORE) for stream in streams))
    with torch.no_grad():
        changed_by_hand(pipes[0], streams[0], LAYERS)
    pipes[1].set_loras([Lora(files[0], SCALE)])
    assert numpy.array_equal(*(frames_of(stream, AFTER) for stream in streams))


def test_a_swap_during_a_change_of_the_prompt(files: list[Path]) -> None:
    by_hand, swapped = small_pipeline(), small_pipeline()
    streams = [pipe.stream("a circle", seed=3) for pipe in (by_hand, swapped)]
    for stream in streams:
        next(stream)
        stream.set_prompt("a green square", transition_chunks=4)
        next(stream)
    with torch.no_grad():
        changed_by_hand(by_hand, streams[0], LAYERS)
    swapped.set_loras([Lora(files[0], SCALE)])
    assert numpy.array_equal(*(frames_of(stream, 5) for stream in streams))


@pytest.mark.parametrize("mode", ["soft", "recache", "hard"])
def test_the_prompt_is_switched_after_a_swap_as_with_the_lora_from_the_start(
    files: list[Path], mode: str
) -> None:
    swapped, loaded = small_pipeline(), small_pipeline()
    loaded.set_loras(files[:1])
    streams = [pipe.stream("a circle", seed=3) for pipe in (swapped, loaded)]
    for stream in streams:
        frames_of(stream, BEFORE)
    swapped.set_loras(files[:1])
    for stream in streams:
        stream.set_prompt("a green square", mode)
    same = numpy.array_equal(*(frames_of(stream, AFTER) for stream in streams))
    assert same == (mode == "hard")  # the window of the others was made without it


def test_recache_gives_the_window_the_new_weights(files: list[Path]) -> None:
    pipe = small_pipeline()
    stream = pipe.stream("a circle", seed=3)
    frames_of(stream, BEFORE)
    snapshot = stream.snapshot()
    pipe.set_loras(files[:1])
    stream.set_prompt(stream.prompt, "recache")
    recached = frames_of(stream, AFTER)
    pipe.set_loras([])
    kept = pipe.restore(snapshot)
    pipe.set_loras(files[:1])
    assert not numpy.array_equal(recached, frames_of(kept, AFTER))


def test_a_clip_is_continued_under_the_loras_of_now(files: list[Path]) -> None:
    clip = frames_of(small_pipeline().stream("a circle"), 3)
    swapped, loaded = small_pipeline(), small_pipeline()
    early = swapped.stream("a circle", seed=3)
    for pipe in (swapped, loaded):
        pipe.set_loras(files[:1])
    late = loaded.stream("a circle", seed=3)
    for stream in (early, late):
        stream.continue_from(clip)
    assert numpy.array_equal(frames_of(early, 2), frames_of(late, 2))


def test_with_overlap_a_swap_shows_one_chunk_later(files: list[Path]) -> None:
    plain, overlapped = small_pipeline(), with_runtime(small_pipeline(), RuntimeConfig(overlap=True))
    streams = [pipe.stream("a circle", seed=3) for pipe in (plain, overlapped)]
    expected = [frames_of(streams[0], BEFORE + 1)]
    found = [frames_of(streams[1], BEFORE)]
    assert streams[1].is_ahead
    for pipe in (plain, overlapped):
        pipe.set_loras(files[:1])
    expected.append(frames_of(streams[0], AFTER))
    found.append(frames_of(streams[1], AFTER + 1))
    assert numpy.array_equal(numpy.concatenate(expected), numpy.concatenate(found))


def test_recorded_programs_read_the_new_weights(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With tapes of ops in place of CUDA graphs, which play back without any Python of the model."""
    tapes = taped_programs(monkeypatch)
    results, recorded = [], []
    for graphs in (False, True):
        pipe = small_pipeline()
        engine = pipe._engine
        runner = ChunkRunner(pipe.model, engine.runner.schedule, graphs)
        pipe._engine = dataclasses.replace(
            engine, runner=runner, adapted=AdaptedWeights(runner, engine.turns, None)
        )
        stream = pipe.stream("a circle", seed=3)
        frames = [frames_of(stream, 8)]
        recorded.append(len(tapes))
        for loras in ([Lora(files[0], SCALE)], [Lora(files[0], -0.5), files[1]], []):
            pipe.set_loras(loras)
            frames.append(frames_of(stream, 2))
        results.append(numpy.concatenate(frames))
    assert recorded[0] == 0 and recorded[1] == len(tapes) == 1  # played back from then on
    assert numpy.array_equal(*results)


def test_a_running_stream_takes_a_swap_between_two_chunks(files: list[Path]) -> None:
    pipe, chunks = small_pipeline(), 8
    made: list[numpy.ndarray] = []
    begun = threading.Event()

    def run() -> None:
        for chunk in pipe.stream("a circle", seed=3).take(chunks):
            made.append(chunk.frames)
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(20)
    pipe.set_loras([Lora(files[0], SCALE)])
    thread.join()
    found = numpy.concatenate(made)

    def switched(after: int) -> numpy.ndarray:
        reference = small_pipeline()
        stream = reference.stream("a circle", seed=3)
        first = frames_of(stream, after)
        reference.set_loras([Lora(files[0], SCALE)])
        return numpy.concatenate([first, frames_of(stream, chunks - after)])

    assert any(numpy.array_equal(found, switched(after)) for after in range(1, chunks))


def test_other_pipelines_and_their_streams_see_nothing_of_a_swap(files: list[Path]) -> None:
    one, other, alone = (small_pipeline() for _ in range(3))
    stream, expected = other.stream("a circle", seed=3), alone.stream("a circle", seed=3)
    frames = [frames_of(stream, 2)]
    one.set_loras(files)
    frames.append(frames_of(stream, 3))
    assert numpy.array_equal(numpy.concatenate(frames), frames_of(expected, 5))


@pytest.fixture
def pipe(files: list[Path]) -> Pipeline:
    pipe = small_pipeline()
    pipe.set_loras([Lora(files[0], SCALE), Lora(files[1], 0)])
    return pipe


@pytest.fixture
def taken(pipe: Pipeline) -> tuple[Snapshot, numpy.ndarray]:
    """A snapshot under a LoRA and what comes after it."""
    stream = pipe.stream("a circle", seed=3)
    frames_of(stream, BEFORE)
    return stream.snapshot(), frames_of(stream, AFTER)


def test_a_snapshot_is_continued_under_the_same_loras_wherever_their_files_are(
    pipe: Pipeline, taken: tuple[Snapshot, numpy.ndarray], tmp_path: Path
) -> None:
    snapshot, expected = taken
    snapshot.save(tmp_path / "stream.safetensors")
    loaded = Snapshot.load(tmp_path / "stream.safetensors")
    assert numpy.array_equal(frames_of(pipe.restore(loaded), AFTER), expected)
    other = small_pipeline()
    other.set_loras([Lora(write_lora(tmp_path / "elsewhere", pairs(SMALL), "peft"), SCALE)])
    assert numpy.array_equal(frames_of(other.restore(loaded), AFTER), expected)


def test_a_snapshot_is_refused_under_other_loras(
    pipe: Pipeline, taken: tuple[Snapshot, numpy.ndarray], files: list[Path]
) -> None:
    snapshot, expected = taken
    stream = pipe.stream("a circle", seed=4)
    next(stream)
    way_out = "restore it with the same LoRAs at the same scales"
    for loras, present in (
        ([], "none"),
        ([files[0]], r"0.safetensors at 1.0 \([0-9a-f]{8}\)"),
        ([files[1]], r"1.safetensors at 1.0 \([0-9a-f]{8}\)"),
        ([Lora(files[0], SCALE), files[1]], r"0.safetensors at 0.8 .*, 1.safetensors at 1.0 .*"),
    ):
        pipe.set_loras(loras)
        stated = r"the LoRAs of the snapshot are 0.safetensors at 0.8 \([0-9a-f]{8}\)"
        message = rf"^{stated}, those of this pipeline are {present}; {way_out}$"
        for call in (pipe.restore, stream.rewind):
            with pytest.raises(ValueError, match=message):
                call(snapshot)
    plain = small_pipeline().stream("a circle", seed=4).snapshot()
    assert "loras" not in plain.info
    with pytest.raises(ValueError, match="of the snapshot are none, those of this pipeline are 0.saf"):
        pipe.restore(plain)
    pipe.set_loras([Lora(files[0], SCALE)])
    stream.rewind(snapshot)
    assert numpy.array_equal(frames_of(stream, AFTER), expected)


@pytest.mark.parametrize(
    "value", [None, "a", 3, [1], [None], ["a"], ["a b"], ["a b c"], [" " * 3], ["x" * 10**5]]
)
def test_a_snapshot_with_wrong_loras_is_refused_in_one_sentence(
    pipe: Pipeline, taken: tuple[Snapshot, numpy.ndarray], value: object
) -> None:
    snapshot = dataclasses.replace(taken[0], info=taken[0].info | {"loras": value})
    with pytest.raises(ValueError, match="snapshot") as error:
        pipe.restore(snapshot)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_a_snapshot_between_a_swap_and_the_next_chunk_continues_as_the_stream_does(files: list[Path]) -> None:
    pipe = small_pipeline()
    stream = pipe.stream("a circle", seed=3)
    frames_of(stream, BEFORE)
    pipe.set_loras(files[:1])
    restored = pipe.restore(stream.snapshot())
    assert numpy.array_equal(frames_of(restored, AFTER), frames_of(stream, AFTER))


def test_loras_change_from_a_callback_between_two_chunks_of_generate(files: list[Path]) -> None:
    pipe, reference = small_pipeline(), small_pipeline()
    video = pipe.generate(
        "a circle", num_frames=33, seed=3, on_chunk=lambda chunk: pipe.set_loras(files[: chunk.index + 1])
    )
    stream = reference.stream("a circle", seed=3)
    frames = []
    for count in range(3):
        reference.set_loras(files[:count])
        frames.append(next(stream).frames)
    assert numpy.array_equal(video.frames, numpy.concatenate(frames))


def test_with_any_loras_a_snapshot_goes_on_as_the_stream_does_under_which_they_change(
    files: list[Path],
) -> None:
    pipe = small_pipeline()
    stream, other = pipe.stream("a circle", seed=4), pipe.stream("a square", seed=4)
    frames_of(stream, BEFORE)
    snapshot = stream.snapshot()
    pipe.set_loras([Lora(files[0], SCALE)])
    expected = frames_of(stream, AFTER)
    other.rewind(snapshot, any_loras=True)
    for continued in (pipe.restore(snapshot, any_loras=True), other):
        assert numpy.array_equal(frames_of(continued, AFTER), expected)
