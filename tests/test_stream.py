import dataclasses
import itertools
import threading
from functools import partial

import numpy
import pytest
import torch

from rfengine import Pipeline
from rfengine.config import CacheConfig, RuntimeConfig
from rfengine.stream import Snapshot
from support.models import GRID, frames_of, small_pipeline, with_runtime

WAIT = 60.0  # seconds that a test waits for another thread at most


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


def test_the_first_chunk_has_nine_frames_and_every_later_one_twelve(pipe):
    chunks = list(itertools.islice(pipe.stream("a circle"), 4))
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12, 12]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    for chunk in chunks:
        assert chunk.frames.dtype == numpy.uint8 and chunk.frames.shape[1:] == (GRID.height, GRID.width, 3)
        timings = chunk.timings
        assert timings.denoise_ms > 0 and timings.decode_ms > 0
        assert timings.call_ms >= timings.denoise_ms + timings.decode_ms


def test_the_same_seed_gives_the_same_frames_whatever_ran_beside_it(pipe):
    alone = frames_of(pipe.stream("a circle", seed=7), 4)
    stream, other = pipe.stream("a circle", seed=7), pipe.stream("a square", seed=8)
    interleaved = []
    for _ in range(4):
        torch.randn(13)
        interleaved.append(next(stream).frames)
        next(other)
    assert numpy.array_equal(numpy.concatenate(interleaved), alone)
    for changed in (pipe.stream("a circle", seed=8), pipe.stream("a square", seed=7)):
        assert not numpy.array_equal(next(changed).frames, alone[:9])


@pytest.mark.parametrize("mode", ["soft", "recache", "hard"])
def test_a_new_prompt_changes_what_follows_and_nothing_before(pipe, mode):
    plain = frames_of(pipe.stream("a circle"), 6)
    stream = pipe.stream("a circle")
    before = frames_of(stream, 4)
    stream.set_prompt("a green square", mode)
    assert stream.prompt == "a green square"
    after = frames_of(stream, 2)
    assert numpy.array_equal(before, plain[: len(before)])
    assert not numpy.array_equal(after[-12:], plain[-12:])


def test_the_same_prompt_again_changes_nothing_when_soft(pipe):
    plain, stream = frames_of(pipe.stream("a circle"), 6), pipe.stream("a circle")
    before = frames_of(stream, 4)
    stream.set_prompt("a circle", "soft")
    assert numpy.array_equal(numpy.concatenate([before, frames_of(stream, 2)]), plain)


def test_take_gives_so_many_chunks_and_the_stream_goes_on(pipe):
    stream = pipe.stream("a circle")
    assert [chunk.index for chunk in stream.take(2)] == [0, 1]
    assert next(stream).index == 2


def test_a_hard_switch_keeps_the_memory_that_graphs_were_recorded_with(pipe):
    stream = pipe.stream("a circle")
    frames_of(stream, 4)
    tensors = stream._cache.tensors() | stream._decoder_state.tensors()
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    stream.set_prompt("a green square", "hard")
    frames_of(stream, 2)
    after = stream._cache.tensors() | stream._decoder_state.tensors()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places


def test_a_hard_switch_equals_a_new_stream(pipe):
    stream = pipe.stream("a circle", seed=3)
    frames_of(stream, 4)
    stream.set_prompt("a green square", "hard")
    chunk = next(stream)
    assert chunk.index == 4 and len(chunk.frames) == 9
    assert numpy.array_equal(chunk.frames, next(pipe.stream("a green square", seed=3)).frames)


def test_recache_differs_from_soft(pipe):
    results = []
    for mode in ("soft", "recache"):
        stream = pipe.stream("a circle")
        frames_of(stream, 4)
        stream.set_prompt("a green square", mode)
        results.append(frames_of(stream, 1))
    assert not numpy.array_equal(*results)


def test_an_unknown_mode_is_refused_and_the_stream_goes_on(pipe):
    stream = pipe.stream("a circle")
    with pytest.raises(ValueError, match="mode is 'gentle'"):
        stream.set_prompt("a square", "gentle")
    assert stream.prompt == "a circle" and len(next(stream).frames) == 9


@pytest.mark.parametrize("taken_after", [0, 1, 3, 5])
@pytest.mark.parametrize(
    "cache", [CacheConfig(alpha=0.9), CacheConfig(sink="frozen", positions="absolute", window_frames=12)]
)
def test_a_snapshot_continues_bit_for_bit(taken_after, cache, tmp_path):
    pipe = small_pipeline(cache)
    plain = frames_of(pipe.stream("a circle", seed=5), taken_after + 3)
    stream = pipe.stream("a circle", seed=5)
    for _ in range(taken_after):
        next(stream)
    stream.snapshot().save(tmp_path / "stream.safetensors")
    restored = pipe.restore(Snapshot.load(tmp_path / "stream.safetensors"))
    tail = frames_of(restored, 3)
    assert numpy.array_equal(tail, plain[-len(tail) :])
    assert numpy.array_equal(frames_of(stream, 3), tail)


def test_two_branches_go_on_from_one_snapshot(pipe):
    stream = pipe.stream("a circle")
    frames_of(stream, 4)
    snapshot = stream.snapshot()
    left, right = pipe.restore(snapshot), pipe.restore(snapshot)
    right.set_prompt("a green square", "recache")
    changed = frames_of(right, 2)
    assert numpy.array_equal(frames_of(left, 2), frames_of(stream, 2))
    assert not numpy.array_equal(changed, frames_of(pipe.restore(snapshot), 2))


def test_a_restored_stream_can_switch_its_prompt_like_the_first(pipe):
    stream = pipe.stream("a circle")
    frames_of(stream, 5)
    restored = pipe.restore(stream.snapshot())
    for each in (stream, restored):
        each.set_prompt("a green square", "recache")
    assert numpy.array_equal(frames_of(stream, 2), frames_of(restored, 2))


def test_a_snapshot_of_another_model_or_setting_is_refused(pipe):
    snapshot = pipe.stream("a circle").snapshot()
    with pytest.raises(
        ValueError, match="the snapshot's fingerprint is 'small-0', this pipeline's is 'small-1'"
    ):
        small_pipeline(seed=1).restore(snapshot)
    with pytest.raises(ValueError, match="the snapshot's cache is"):
        small_pipeline(CacheConfig(alpha=0.5)).restore(snapshot)
    with pytest.raises(ValueError, match="the snapshot's decoder is 'tiny', this pipeline's is 'full'"):
        pipe.restore(dataclasses.replace(snapshot, info=snapshot.info | {"decoder": "tiny"}))
    with pytest.raises(ValueError, match="the snapshot's format is 99"):
        pipe.restore(dataclasses.replace(snapshot, info=snapshot.info | {"format": 99}))


def test_a_file_that_is_no_snapshot_is_refused(tmp_path):
    from rfengine.checkpoint.loader import save_weights

    save_weights(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no stream"):
        Snapshot.load(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError):
        Snapshot.load(tmp_path / "broken.safetensors")


def test_a_clip_is_continued_in_whole_chunks(pipe):
    clip = frames_of(pipe.stream("a circle"), 3)
    stream = pipe.stream("a circle", start_frames=clip)
    chunk = next(stream)
    assert chunk.index == 3 and len(chunk.frames) == 12
    shortened = pipe.stream("a circle", start_frames=clip[:30])
    assert next(shortened).index == 2


def test_a_continued_clip_is_what_the_next_chunk_sees(pipe):
    clip = frames_of(pipe.stream("a circle"), 2)
    after_clip = next(pipe.stream("a circle", start_frames=clip)).frames
    after_other = next(pipe.stream("a circle", start_frames=255 - clip)).frames
    assert not numpy.array_equal(after_clip, after_other)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (numpy.zeros((8, 32, 48, 3), numpy.uint8), "the clip has 8 frames; at least 9"),
        (numpy.zeros((9, 32, 32, 3), numpy.uint8), "resize the clip"),
        (numpy.zeros((9, 32, 48), numpy.uint8), "give uint8"),
        (numpy.zeros((9, 32, 48, 3), numpy.float32), "give uint8"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(pipe, clip, message):
    with pytest.raises(ValueError, match=message):
        pipe.stream("a circle", start_frames=clip)


def test_a_stream_that_failed_inside_a_chunk_is_closed(pipe):
    stream = pipe.stream("a circle")
    next(stream)
    with pytest.raises(ZeroDivisionError):
        stream.advance(on_step=lambda *_: 1 / 0)
    for call in (lambda: next(stream), stream.snapshot, lambda: stream.set_prompt("a square")):
        with pytest.raises(RuntimeError, match="the stream was closed in chunk 1"):
            call()


def test_another_size_streams_too(pipe):
    assert next(pipe.stream("a circle", height=16, width=80)).frames.shape == (9, 16, 80, 3)
    with pytest.raises(ValueError, match="width is 50 pixels; it must be a multiple of 16, such as 48"):
        pipe.stream("a circle", width=50)


@pytest.mark.parametrize("mode", ["soft", "recache"])
def test_a_switch_that_fails_half_way_closes_the_stream(monkeypatch, mode):
    pipe = small_pipeline()
    stream = pipe.stream("a circle")
    frames_of(stream, 6)
    place = (pipe.model, "text_keys_values") if mode == "soft" else (pipe.model, "context_pass")
    monkeypatch.setattr(*place, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.set_prompt("a green square", mode)
    with pytest.raises(RuntimeError, match="the stream was closed"):
        next(stream)


def test_a_prompt_that_cannot_be_encoded_changes_nothing(pipe):
    plain, stream = frames_of(pipe.stream("a circle"), 3), pipe.stream("a circle")
    first = next(stream).frames
    with pytest.raises(ValueError, match="empty"):
        stream.set_prompt("  ", "recache")
    assert numpy.array_equal(numpy.concatenate([first, frames_of(stream, 2)]), plain)


def test_a_snapshot_of_another_precision_or_with_parts_missing_is_refused(pipe):
    stream = pipe.stream("a circle")
    frames_of(stream, 3)
    snapshot = stream.snapshot()
    with pytest.raises(ValueError, match="the snapshot's dtype is 'torch.bfloat16'"):
        pipe.restore(dataclasses.replace(snapshot, info=snapshot.info | {"dtype": "torch.bfloat16"}))
    info = {name: value for name, value in snapshot.info.items() if name not in ("seed", "index")}
    with pytest.raises(ValueError, match="the snapshot lacks seed, index"):
        pipe.restore(dataclasses.replace(snapshot, info=info))
    tensors = {name: tensor for name, tensor in snapshot.tensors.items() if name != "window_latents"}
    with pytest.raises(ValueError, match="the snapshot lacks window_latents"):
        pipe.restore(dataclasses.replace(snapshot, tensors=tensors))


def test_a_stream_is_decoded_from_its_start_or_never(pipe):
    stream = pipe.stream("a circle")
    assert stream.advance(decode=False).frames.shape[0] == 0
    assert stream.latents.shape[2] == 3
    with pytest.raises(RuntimeError, match="chunk 0 was not decoded"):
        next(stream)
    assert stream.advance(decode=False).index == 1


def in_threads(*calls) -> list:
    """What the calls return, each run in a thread of its own at the same time."""
    start, results = threading.Barrier(len(calls)), {}

    def run(number: int) -> None:
        start.wait(WAIT)
        results[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    return [results[number] for number in range(len(calls))]


def test_streams_of_one_pipeline_in_several_threads_are_what_they_are_alone(pipe):
    alone = [frames_of(pipe.stream("a circle", seed=seed), 5) for seed in range(3)]
    for overlap in (False, True):
        shared = with_runtime(pipe, RuntimeConfig(overlap=overlap))

        def stream(seed: int, of: Pipeline = shared) -> numpy.ndarray:
            return frames_of(of.stream("a circle", seed=seed), 5)

        calls = [partial(stream, seed) for seed in range(3)]
        for found, expected in zip(in_threads(*calls), alone, strict=True):
            assert numpy.array_equal(found, expected)


def test_threads_that_share_a_stream_get_each_chunk_once(pipe):
    alone = [chunk.frames for chunk in pipe.stream("a circle").take(6)]
    stream = pipe.stream("a circle")
    taken = in_threads(*[lambda: [next(stream) for _ in range(2)]] * 3)
    chunks = sorted(itertools.chain(*taken), key=lambda chunk: chunk.index)
    assert [chunk.index for chunk in chunks] == list(range(6))
    for chunk, expected in zip(chunks, alone, strict=True):
        assert numpy.array_equal(chunk.frames, expected)


def test_a_stream_that_is_called_from_its_own_step_says_so(pipe):
    stream = pipe.stream("a circle")
    with pytest.raises(RuntimeError, match="chunk 0 of the stream is being made; call the stream once"):
        stream.advance(lambda *step: next(stream) and None)
    other = pipe.stream("a circle")
    chunk = pipe.stream("a circle").advance(lambda *step: other.advance() and None)
    assert numpy.array_equal(chunk.frames, next(pipe.stream("a circle")).frames)


def test_a_step_may_give_latents_that_were_made_in_inference_mode(pipe):
    def halved(step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return latents / 2

    stream = pipe.stream("a circle")
    stream.advance(halved)
    assert not stream.latents.is_inference() and next(stream).index == 1
