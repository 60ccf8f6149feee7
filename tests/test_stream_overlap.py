"""A stream that decodes a chunk beside the next one yields what a stream without overlap yields."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from rfengine import Pipeline, VideoStream
from rfengine.config import RuntimeConfig, ScheduleConfig
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import chunk_noise
from support.models import frames_of, small_pipeline, with_runtime

WAIT = 20.0  # seconds that a test waits for another thread at most


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def overlapped(plain: Pipeline) -> Pipeline:
    return with_runtime(plain, RuntimeConfig(overlap=True))


@pytest.mark.slow
def test_five_chunks_of_the_shipped_model_are_the_same_bit_for_bit() -> None:
    expected, overlapped = (
        Pipeline.from_pretrained("tiny", "cpu", runtime=RuntimeConfig(overlap=overlap)).stream(
            "a red circle", seed=3
        )
        for overlap in (False, True)
    )
    for chunk, other in zip(expected.take(5), overlapped.take(5), strict=True):
        assert chunk.index == other.index
        assert numpy.array_equal(chunk.frames, other.frames)
        assert torch.equal(expected.latents, overlapped.latents)


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def noted_threads(
    monkeypatch: pytest.MonkeyPatch, count: Callable[[], int] = torch.get_num_threads
) -> list[tuple[str, int]]:
    """Whether a chunk is denoised or decoded, and what `count` says at the begin of that."""
    seen: list[tuple[str, int]] = []

    def noting(owner: type, method: str, name: str) -> None:
        right = getattr(owner, method)

        def noted(*given: object, **named: object) -> object:
            seen.append((name, count()))
            return right(*given, **named)

        monkeypatch.setattr(owner, method, noted)

    noting(ChunkRunner, "advance", "denoise")
    noting(StreamingDecoder, "decode_frames", "decode")
    return seen


def test_decoding_and_denoising_share_the_threads_of_torch(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three denoise while one decodes; the first chunk has all, and the caller's are as they were."""
    seen = noted_threads(monkeypatch)
    pipeline = with_runtime(small_pipeline(), RuntimeConfig())
    assert pipeline._engine.queue.overlap  # by itself, since there are threads to share
    stream = pipeline.stream("a circle", seed=2)
    stream.advance()
    assert sorted(seen) == [("decode", 3), ("denoise", 3)]
    seen.clear()
    for chunk in stream.take(3):
        assert len(chunk.frames) and torch.get_num_threads() == 3
    # the second chunk was not begun ahead; those after it are, beside the decode of the one before
    assert [entry for entry in seen if entry[0] == "denoise"] == [("denoise", 3), *[("denoise", 2)] * 2]
    assert [entry for entry in seen if entry[0] == "decode"] == [("decode", 1)] * 3


@pytest.mark.parametrize(("count", "decoding", "denoising"), [(1, 1, 1), (2, 1, 1), (5, 2, 3)])
def test_threads_that_the_caller_sets_after_loading_are_shared(
    three_threads: None, monkeypatch: pytest.MonkeyPatch, count: int, decoding: int, denoising: int
) -> None:
    pipeline = with_runtime(small_pipeline(), RuntimeConfig())
    stream = pipeline.stream("a circle", seed=2)
    frames_of(stream, 3)
    torch.set_num_threads(count)
    stream.advance(ahead=False)  # what is ahead has the threads of before
    seen = noted_threads(monkeypatch)
    frames_of(stream, 3)
    pipeline.synchronize()
    assert sorted(seen) == sorted(
        [("denoise", count), *[("denoise", denoising)] * 3, *[("decode", decoding)] * 4]
    )
    assert torch.get_num_threads() == count


def test_a_thread_that_begins_meanwhile_has_all_threads_of_torch(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch gives a new thread of Python the number that was set last, by whichever thread."""

    def of_a_new_thread() -> int:
        deadline = time.monotonic() + 1
        while True:  # it is another number only while one is set
            with ThreadPoolExecutor(1) as executor:
                count = executor.submit(torch.get_num_threads).result()
            if count == 3 or time.monotonic() > deadline:
                return count

    stream = with_runtime(small_pipeline(), RuntimeConfig()).stream("a circle", seed=2)
    seen = noted_threads(monkeypatch, of_a_new_thread)
    frames_of(stream, 3)
    stream.close()
    assert len(seen) >= 6 and {count for _, count in seen} == {3}


def test_a_clip_is_decoded_with_all_threads_since_nothing_is_beside(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = with_runtime(small_pipeline(), RuntimeConfig())
    clip = frames_of(pipeline.stream("a circle"), 2)
    pipeline.synchronize()
    seen = noted_threads(monkeypatch)
    pipeline.stream("a circle", start_frames=clip)
    assert seen == [("decode", 3)] * 2


def test_threads_are_given_back_after_an_error(three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = with_runtime(small_pipeline(), RuntimeConfig()).stream("a circle", seed=2)
    stream.advance()
    calls = itertools.count()
    right = ChunkRunner.advance

    def fails(*given: object, **named: object) -> torch.Tensor:
        if next(calls):
            raise RuntimeError("the second fails, which is begun ahead")
        return right(*given, **named)

    monkeypatch.setattr(ChunkRunner, "advance", fails)
    with pytest.raises(RuntimeError, match="begun ahead"):
        stream.advance()
    assert torch.get_num_threads() == 3


def test_generate_and_call_are_the_same(plain: Pipeline, overlapped: Pipeline) -> None:
    expected = plain.generate("a circle", num_frames=40, seed=2).frames
    assert numpy.array_equal(overlapped.generate("a circle", num_frames=40, seed=2).frames, expected)
    for output in ("np", "latent"):
        expected = plain("a circle", num_frames=21, seed=2, output_type=output).frames
        assert numpy.array_equal(
            overlapped("a circle", num_frames=21, seed=2, output_type=output).frames, expected
        )


@pytest.mark.parametrize("mode", ["soft", "recache"])
def test_a_switch_shows_one_chunk_later(plain: Pipeline, overlapped: Pipeline, mode: str) -> None:
    expected, stream = plain.stream("a circle"), overlapped.stream("a circle")
    wanted, frames = [frames_of(expected, 5)], [frames_of(stream, 4)]  # its fifth chunk is there already
    for each in (expected, stream):
        each.set_prompt("a green square", mode)
    wanted.append(frames_of(expected, 3))
    frames.append(frames_of(stream, 4))
    assert numpy.array_equal(numpy.concatenate(frames), numpy.concatenate(wanted))


def test_a_hard_switch_drops_the_chunk_ahead(plain: Pipeline, overlapped: Pipeline) -> None:
    stream = overlapped.stream("a circle", seed=3)
    frames_of(stream, 4)
    stream.set_prompt("a green square", "hard")
    chunks = list(itertools.islice(stream, 4))
    assert [chunk.index for chunk in chunks] == [4, 5, 6, 7]
    expected = frames_of(plain.stream("a green square", seed=3), 4)
    assert numpy.array_equal(numpy.concatenate([chunk.frames for chunk in chunks]), expected)


@pytest.mark.parametrize("taken_after", [1, 2, 4])
def test_a_snapshot_holds_the_chunk_ahead_and_restores_with_and_without_overlap(
    plain: Pipeline, overlapped: Pipeline, taken_after: int
) -> None:
    expected = frames_of(plain.stream("a circle", seed=5), taken_after + 3)
    stream = overlapped.stream("a circle", seed=5)
    frames_of(stream, taken_after)
    snapshot = stream.snapshot()
    assert ("ahead.frames" in snapshot.tensors) == (taken_after > 1)
    tail = frames_of(stream, 3)
    assert numpy.array_equal(tail, expected[-len(tail) :])
    for pipe in (plain, overlapped, overlapped):
        restored = pipe.restore(snapshot)
        chunk = next(restored)
        assert chunk.index == taken_after and restored.latents is not None
        frames = chunk.frames.copy()
        chunk.frames[:] = 0  # what a caller does to his frames stays his
        assert numpy.array_equal(numpy.concatenate([frames, frames_of(restored, 2)]), tail)


def test_a_snapshot_without_the_latents_of_the_chunk_ahead_is_refused(overlapped: Pipeline) -> None:
    stream = overlapped.stream("a circle")
    frames_of(stream, 2)
    snapshot = stream.snapshot()
    tensors = {name: tensor for name, tensor in snapshot.tensors.items() if name != "window_latents"}
    with pytest.raises(ValueError, match="the snapshot lacks window_latents"):
        overlapped.restore(dataclasses.replace(snapshot, tensors=tensors))


def test_a_clip_is_continued_the_same(plain: Pipeline, overlapped: Pipeline) -> None:
    clip = frames_of(plain.stream("a circle"), 3)
    expected = frames_of(plain.stream("a circle", start_frames=clip), 3)
    assert numpy.array_equal(frames_of(overlapped.stream("a circle", start_frames=clip), 3), expected)


def test_streams_beside_each_other_are_the_same(plain: Pipeline, overlapped: Pipeline) -> None:
    expected = [frames_of(plain.stream("a circle", seed=seed), 4) for seed in (1, 2)]
    streams = [overlapped.stream("a circle", seed=seed) for seed in (1, 2)]
    pieces = [[next(stream).frames for stream in streams] for _ in range(4)]
    for number, frames in enumerate(expected):
        assert numpy.array_equal(numpy.concatenate([piece[number] for piece in pieces]), frames)


@pytest.mark.slow
def test_an_endless_stream_keeps_nothing_of_what_it_gave(plain: Pipeline) -> None:
    """Memory and Python objects are the same after 200 chunks of one step as after 40."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not report the memory of a process")

    def measured() -> tuple[int, int]:
        resident = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(resident.split()[1]) * 1024, len(gc.get_objects())

    one_step = dataclasses.replace(plain.config, schedule=ScheduleConfig(denoising_steps=(1000,)))
    config = dataclasses.replace(one_step, runtime=RuntimeConfig(overlap=True))
    stream = Pipeline(config, plain.model, plain.vae, plain.text_encoder, "small-0").stream("a circle")
    for _ in itertools.islice(stream, 40):
        pass
    resident, objects = measured()
    for _ in itertools.islice(stream, 160):
        pass
    later_resident, later_objects = measured()
    stream.close()
    assert later_resident - resident < 2**23  # less than the frames of these chunks
    assert abs(later_objects - objects) < 120  # kept chunks would be a tensor each at least


class FakeStream:
    """A CUDA stream of which the waits are recorded."""

    device = torch.device("cuda", 1)

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def own_stream(overlapped: Pipeline, monkeypatch: pytest.MonkeyPatch) -> tuple[Pipeline, list[str]]:
    """A pipeline that denoises on a CUDA stream of its own, and the log of what it does there."""
    log: list[str] = []
    caller = FakeStream("caller", log)
    denoise = ChunkRunner.advance

    @contextmanager
    def entered(stream: FakeStream | None) -> Iterator[None]:
        yield

    def advance(self, cache, plan, *others):
        log.append(f"denoise {plan.chunk}")
        return denoise(self, cache, plan, *others)

    def noise_of(seed: int, chunk: int, step: int, shape) -> torch.Tensor:
        if step == 0:
            log.append(f"draw {chunk}")
        return chunk_noise(seed, chunk, step, shape)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(ChunkRunner, "advance", advance)
    monkeypatch.setattr("rfengine.runtime.chunk_runner.chunk_noise", noise_of)
    pipe = with_runtime(overlapped, RuntimeConfig(overlap=True))
    pipe._engine = dataclasses.replace(pipe._engine, compute_stream=FakeStream("own", log))
    return pipe, log


def test_the_denoising_stream_comes_after_and_before_what_the_caller_launches(own_stream) -> None:
    pipe, log = own_stream
    stream = pipe.stream("a circle", seed=3)
    log.clear()
    next(stream)
    assert log == ["own waits for caller", "draw 0", "denoise 0", "draw 1", "caller waits for own"]


def test_noise_is_drawn_while_the_device_works_and_once(plain: Pipeline, own_stream) -> None:
    pipe, log = own_stream
    stream = pipe.stream("a circle", seed=3)
    frames = frames_of(stream, 3)
    drawn = [event for event in log if not event.endswith(("own", "caller"))]
    assert drawn == [
        "draw 0", "denoise 0", "draw 1", "denoise 1", "draw 2", "denoise 2", "draw 3", "denoise 3", "draw 4",
    ]  # fmt: skip
    stream.set_prompt("a green square", "hard")
    again = frames_of(stream, 2)
    stream.close()
    assert numpy.array_equal(frames, frames_of(plain.stream("a circle", seed=3), 3))
    assert numpy.array_equal(again, frames_of(plain.stream("a green square", seed=3), 2))


def test_without_a_stream_of_its_own_the_models_device_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, wherever the tensors are."""
    entered: list[object] = []

    @contextmanager
    def on_device(device: object) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", on_device)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        engine = SimpleNamespace(compute_stream=None, model=SimpleNamespace(device=device))
        with VideoStream._computing(SimpleNamespace(_engine=engine)):
            pass
    assert entered == [torch.device("cuda", 1), -1]


def test_a_chunk_is_decoded_while_the_next_is_denoised(
    plain: Pipeline, overlapped: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding chunk 1 waits for the start of chunk 2, which only an overlapped stream comes to."""
    third_begun = threading.Event()
    decode, denoise = StreamingDecoder.decode_frames, ChunkRunner.advance

    def decode_frames(self, latents, state, *layout):
        if state.frames == latents.shape[2]:
            assert third_begun.wait(WAIT)
        return decode(self, latents, state, *layout)

    def advance(self, cache, plan, *inputs):
        if plan.chunk == 2:
            third_begun.set()
        return denoise(self, cache, plan, *inputs)

    expected = frames_of(plain.stream("a circle"), 3)
    monkeypatch.setattr(StreamingDecoder, "decode_frames", decode_frames)
    monkeypatch.setattr(ChunkRunner, "advance", advance)
    assert numpy.array_equal(frames_of(overlapped.stream("a circle"), 3), expected)


def begun_by(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The chunks whose denoising is begun from now on."""
    begun, denoise = [], ChunkRunner.advance

    def advance(self, cache, plan, *inputs):
        begun.append(plan.chunk)
        return denoise(self, cache, plan, *inputs)

    monkeypatch.setattr(ChunkRunner, "advance", advance)
    return begun


def test_the_first_chunk_waits_for_no_other(overlapped: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, stream = begun_by(monkeypatch), overlapped.stream("a circle")
    next(stream)
    assert begun == [0]
    next(stream)
    assert begun == [0, 1, 2]
    stream.set_prompt("a square", "hard")
    next(stream)
    assert begun == [0, 1, 2, 0]


def test_a_finished_video_has_begun_nothing_more(
    overlapped: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begun_by(monkeypatch)
    overlapped.generate("a circle", num_frames=33)
    overlapped("a circle", num_frames=33)
    assert begun == [0, 1, 2, 0, 1, 2]


def test_steps_of_a_chunk_that_was_begun_cannot_be_watched(plain: Pipeline, overlapped: Pipeline) -> None:
    expected, stream = frames_of(plain.stream("a circle"), 4), overlapped.stream("a circle")
    frames = [next(stream).frames, next(stream).frames]
    for options in ({"on_step": lambda *_: None}, {"decode": False}):
        with pytest.raises(RuntimeError, match="chunk 2 was begun by the call before it; give that call"):
            stream.advance(**options)
    frames.append(stream.advance(ahead=False).frames)
    steps = []
    frames.append(stream.advance(on_step=lambda step, *_: steps.append(step)).frames)
    assert steps == [0, 1] and numpy.array_equal(numpy.concatenate(frames), expected)


def test_a_closed_stream_leaves_the_others_running(plain: Pipeline, overlapped: Pipeline) -> None:
    expected = frames_of(plain.stream("a circle"), 4)
    closed, other = overlapped.stream("a square"), overlapped.stream("a circle")
    frames = [next(other).frames, next(other).frames]
    frames_of(closed, 3)
    closed.close()
    closed.close()
    with pytest.raises(RuntimeError, match="the stream was closed in chunk 3"):
        next(closed)
    frames.append(frames_of(other, 2))
    assert numpy.array_equal(numpy.concatenate(frames), expected)


def test_an_error_of_the_decoder_is_raised_as_it_is_and_closes_the_stream(
    overlapped: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = StreamingDecoder.decode_frames

    def failing(self, latents, state, *layout):
        return decode(self, latents, state, *layout) if state.frames < 9 else 1 / 0

    monkeypatch.setattr(StreamingDecoder, "decode_frames", failing)
    stream = overlapped.stream("a circle")
    with pytest.raises(ZeroDivisionError):
        for _ in range(4):
            next(stream)
    for call in (lambda: next(stream), stream.snapshot, lambda: stream.set_prompt("a square")):
        with pytest.raises(RuntimeError, match="the stream was closed in chunk"):
            call()


def test_timings_say_what_a_chunk_cost_the_caller(overlapped: Pipeline) -> None:
    for chunk in overlapped.stream("a circle").take(3):
        timings = chunk.timings
        assert timings.denoise_ms > 0 and timings.decode_ms > 0
        assert timings.call_ms > 0


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_overlap_on_a_gpu_is_the_same_bit_for_bit(graphs: bool) -> None:
    frames = []
    for overlap in (False, True):
        runtime = RuntimeConfig(graphs=graphs, overlap=overlap, autotune=False)
        pipe = Pipeline.from_pretrained("tiny", device="cuda", runtime=runtime)
        stream = pipe.stream("a red circle", seed=3)
        frames.append(frames_of(stream, 8))
        snapshot = stream.snapshot()
        frames[-1] = numpy.concatenate([frames[-1], frames_of(pipe.restore(snapshot), 2)])
    assert numpy.array_equal(*frames)
