"""Streams of every system: snapshots at any chunk, hard switches, the beginning with a picture or a clip."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch

from rfengine import Pipeline
from rfengine.config import CacheConfig, RuntimeConfig, ScheduleConfig
from rfengine.prompt_script import PromptScript
from rfengine.stream import Snapshot
from rfengine.video import pixels_from_frames
from support.models import GRID, small_pipeline, with_runtime
from support.systems import SYSTEMS


def pipeline_of(name: str, overlap: bool = False) -> Pipeline:
    cache, schedule = SYSTEMS[name]
    return with_runtime(small_pipeline(cache, schedule=schedule), RuntimeConfig(overlap=overlap))


def switch(stream, chunk: int) -> None:
    """What happens to a stream before chunk `chunk`: a soft transition over three chunks."""
    if chunk == 3:
        stream.set_prompt("a green square", transition_chunks=3)


def frames_of(stream, start: int, end: int) -> list[numpy.ndarray]:
    frames = []
    for chunk in range(start, end):
        switch(stream, chunk)
        # with overlap a chunk that is ahead has the old prompt already, and a restored stream has none ahead
        frames.append(stream.advance(ahead=chunk != 2).frames)
    return frames


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_snapshot_at_any_chunk_continues_bit_for_bit(name: str, overlap: bool, tmp_path) -> None:
    pipe = pipeline_of(name, overlap)
    end = pipe.config.cache.filling_chunks + 5
    expected = frames_of(pipe.stream("a circle", seed=5), 0, end)
    stream = pipe.stream("a circle", seed=5)
    for chunk in range(end - 1):
        snapshot = stream.snapshot()
        if chunk == end // 2:
            snapshot.save(tmp_path / "stream.safetensors")
            snapshot = Snapshot.load(tmp_path / "stream.safetensors")
        restored = pipe.restore(snapshot)
        following = frames_of(restored, chunk, min(chunk + 2, end))
        assert all(map(numpy.array_equal, following, expected[chunk:])), chunk
        frames_of(stream, chunk, chunk + 1)
    stream.rewind(snapshot)
    assert numpy.array_equal(next(stream).frames, expected[end - 2])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_hard_switch_equals_a_new_stream(name: str) -> None:
    pipe = pipeline_of(name)
    stream = pipe.stream("a circle", seed=5)
    frames_of(stream, 0, pipe.config.cache.filling_chunks + 2)
    stream.set_prompt("a red square", "hard")
    expected = pipe.stream("a red square", seed=5)
    for _ in range(3):
        assert numpy.array_equal(next(stream).frames, next(expected).frames)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if not name.startswith("similarity")])
def test_a_recache_changes_what_follows_and_is_in_a_snapshot(name: str) -> None:
    pipe = pipeline_of(name)
    streams = [pipe.stream("a circle", seed=5) for _ in range(2)]
    for stream, mode in zip(streams, ("soft", "recache"), strict=True):
        frames_of(stream, 0, pipe.config.cache.filling_chunks)
        stream.set_prompt("a red square", mode)
    restored = pipe.restore(streams[1].snapshot())
    soft, recached, again = (
        numpy.concatenate([next(each).frames for _ in range(2)]) for each in (*streams, restored)
    )
    assert numpy.array_equal(recached, again)
    assert not numpy.array_equal(recached, soft)


def test_a_window_whose_frames_the_device_alone_knows_is_not_recached() -> None:
    """And the stream goes on under its prompt."""
    pipe = pipeline_of("similarity")
    stream, other = pipe.stream("a circle"), pipe.stream("a circle")
    next(stream), next(other)
    message = "cannot be recomputed where eviction is by similarity"
    with pytest.raises(ValueError, match=message):
        stream.set_prompt("a red square", "recache")
    assert stream.prompt == "a circle" and numpy.array_equal(next(stream).frames, next(other).frames)
    with pytest.raises(ValueError, match=message):
        PromptScript.parse("2 start a\n2 recache b").plan(pipe.config)


@pytest.mark.parametrize("held", [[-1] * 12, [0, 1, 2, *range(3, 12)], [1, 0, 2, *range(9, 18)]])
def test_frames_that_no_device_can_have_chosen_are_refused(held: list[int]) -> None:
    pipe = pipeline_of("similarity")
    stream = pipe.stream("a circle")
    for _ in range(6):
        next(stream)
    snapshot = stream.snapshot()
    own = snapshot.tensors["cache.device_held"]
    pipe.restore(snapshot)
    snapshot.tensors["cache.device_held"] = torch.tensor(held[: len(own)], dtype=torch.int64)
    with pytest.raises(
        ValueError, match="device_held of the saved cache is .*, which cannot be before frame 18"
    ):
        pipe.restore(snapshot)


@pytest.mark.parametrize("rolling", ["joint", "causal"])
def test_what_a_pass_shows_stays_as_it_was(rolling: str) -> None:
    schedule = ScheduleConfig(denoising_steps=(1000, 750, 500), rolling=rolling)
    pipe = small_pipeline(CacheConfig(3, 15, "frozen", 3, joint_frames=9), schedule=schedule)
    stream, plain, kept = pipe.stream("a circle"), pipe.stream("a circle"), []
    stream.advance(
        on_step=lambda number, timestep, latents: kept.append((timestep, latents, latents.clone()))
    )
    plain.advance()
    assert all(torch.equal(latents, copy) for _, latents, copy in kept)
    assert torch.equal(kept[-1][1], stream.latents) and torch.equal(stream.latents, plain.latents)
    assert [timestep for timestep, _, _ in kept] == sorted(
        (timestep for timestep, _, _ in kept), reverse=True
    )
    changed = pipe.stream("a circle")
    changed.advance(on_step=lambda number, timestep, latents: torch.zeros_like(latents))
    assert not changed.latents.any()


PICTURE = numpy.random.default_rng(0).integers(0, 256, (1, GRID.height, GRID.width, 3), numpy.uint8)
CLIP = numpy.random.default_rng(1).integers(0, 256, (14, GRID.height, GRID.width, 3), numpy.uint8)


@pytest.mark.parametrize("name", ["ema", "memory", "one step", "first chunk of one frame"])
@pytest.mark.parametrize("mode", ["frames", "clamped"])
def test_one_picture_begins_a_stream(name: str, mode: str) -> None:
    pipe = pipeline_of(name)
    stream = pipe.stream("a circle", start_frames=PICTURE, start_mode=mode)
    restored = pipe.restore(stream.snapshot())
    chunks = list(itertools.islice(stream, 3))
    clamped = mode == "clamped" and pipe.config.cache.first_chunk > 1
    size = pipe.config.cache.chunk_frames
    assert [len(chunk.frames) for chunk in chunks] == [4 * size - 3 * clamped, 4 * size, 4 * size]
    assert chunks[0].index == (0 if clamped else 1)
    other = pipe.stream("a circle", start_frames=255 - PICTURE, start_mode=mode)
    for chunk in chunks:
        assert numpy.array_equal(chunk.frames, next(restored).frames)
        assert not numpy.array_equal(chunk.frames, next(other).frames)


def test_a_clamped_picture_is_shown_as_the_vae_keeps_it() -> None:
    pipe = pipeline_of("ema")
    stream = pipe.stream("a circle", start_frames=PICTURE, start_mode="clamped")
    frames = next(stream).frames
    latents = pipe.vae.encode(pixels_from_frames(PICTURE))
    assert torch.allclose(stream.latents[:, :, :1], latents, atol=1e-5)
    kept = pipe.vae.decode(latents)[0].clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 3, 0)
    assert abs(frames[:1].astype(int) - kept.numpy().astype(int)).max() <= 1


@pytest.mark.parametrize(("mode", "index", "given"), [("chunks", 1, 0), ("frames", 4, 0), ("clamped", 1, 1)])
def test_a_clip_of_any_length_begins_a_stream(mode: str, index: int, given: int) -> None:
    """14 frames hold 4 latents: one whole chunk of three, and one."""
    pipe = pipeline_of("ema")
    stream = pipe.stream("a circle", start_frames=CLIP, start_mode=mode)
    assert stream.index == index
    assert stream.snapshot().info.get("given_frames", 0) == given
    assert len(next(stream).frames) == 12


@pytest.mark.parametrize(
    ("name", "frames", "mode", "message"),
    [
        ("ema", PICTURE, "chunks", "the clip has 1 frames; at least 9 are needed"),
        ("ema", PICTURE, "whole", "mode is 'whole'; use chunks, frames, clamped"),
        ("ema", PICTURE[:, :16], "frames", r"the clip is \(16, 48\) pixels and the stream is \(32, 48\)"),
        ("rolling", PICTURE, "clamped", "a rolling schedule has no chunk of its own to clamp frames in"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused(name, frames, mode, message) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_of(name).stream("a circle", start_frames=frames, start_mode=mode)


def test_a_continued_stream_is_continued_once() -> None:
    stream = pipeline_of("ema").stream("a circle", start_frames=PICTURE, start_mode="clamped")
    with pytest.raises(RuntimeError, match="continue a clip with a new stream"):
        stream.continue_from(PICTURE, "clamped")


@pytest.mark.parametrize("name", ["first chunk of one frame", "first chunk of four frames", "rolling"])
def test_a_video_has_the_frames_that_were_asked_for(name: str) -> None:
    pipe = pipeline_of(name)
    for count in (1, 2, 13, 14, 30):
        assert pipe.generate("a circle", num_frames=count).frames.shape[0] == count
        first, size = pipe.config.cache.first_chunk, pipe.config.cache.chunk_frames
        latents = 1 + -(-(count - 1) // 4)
        chunks = pipe.chunk_count(count)
        assert first + (chunks - 1) * size >= latents and (
            chunks == 1 or first + (chunks - 2) * size < latents
        )


@pytest.mark.parametrize("name", ["four steps first", "rolling", "wave"])
def test_every_step_is_called_back_once(name: str) -> None:
    pipe, seen = pipeline_of(name), []
    pipe(
        "a circle", num_frames=40, callback_on_step_end=lambda pipe, step, timestep, state: seen.append(step)
    )
    assert seen == list(range(len(seen)))
    cache, schedule = SYSTEMS[name]
    chunks = pipe.chunk_count(40)
    if schedule.rolling == "none":
        assert len(seen) == len(schedule.first_steps) + (chunks - 1) * len(schedule.denoising_steps)
    else:
        assert len(seen) == chunks + len(schedule.denoising_steps) - 1


def test_systems_of_another_schedule_refuse_each_others_snapshots() -> None:
    snapshot = pipeline_of("four steps first").stream("a circle").snapshot()
    with pytest.raises(ValueError, match="the snapshot's first_timesteps is"):
        pipeline_of("one step").restore(snapshot)


def test_a_cache_that_is_replaced_needs_its_schedule() -> None:
    with pytest.raises(ValueError, match="joint_frames is 4 and rolling is 'none'"):
        small_pipeline(CacheConfig(2, 13, "frozen", 3, joint_frames=4))
