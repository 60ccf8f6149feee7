"""Decoding beside the caller: on a thread, and on CUDA streams that a recording stands in for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy
import pytest
import torch
from torch import Tensor

from rfengine.config import VAEConfig
from rfengine.models.decoder import reset_state
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import DecoderState, WanVAE
from rfengine.ops import REFERENCE_OPS
from rfengine.runtime import decode_worker
from rfengine.runtime.decode_worker import DecodedFrames, DecodeQueue, DecodeWorker, StreamFrames
from support.models import GRID, SMALL, noise_of
from support.tape import Tape

CPU = torch.device("cpu")
WAIT = 20.0  # seconds that a test waits for another thread at most


class AddingDecoder:
    """A chunk's frames are the sum of all latents so far: any mistake of order or of state shows."""

    capturable_frames = 3

    def __init__(self) -> None:
        self.calls = 0
        self.running = 0
        self.most_running = 0
        self.gate: threading.Event | None = None

    def decoder_state(self, batch, height, width, dtype, device) -> DecoderState:
        return DecoderState({"sum": torch.zeros(height, width, dtype=dtype)})

    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        raise AssertionError("a worker asks for frames")

    def decode_frames(self, latents: Tensor, state: DecoderState) -> Tensor:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if self.gate is not None:
            assert self.gate.wait(WAIT)
        self.calls += 1
        state.slots["sum"] += latents.sum((0, 1, 2))
        frames = 1 if state.frames == 0 else latents.shape[2]
        state.frames += latents.shape[2]
        self.running -= 1
        return state.slots["sum"].to(torch.uint8)[None, :, :, None].repeat(frames, 1, 1, 3)


class FailingDecoder(AddingDecoder):
    """Fails in its second call, with one and the same error."""

    def __init__(self) -> None:
        super().__init__()
        self.error = ZeroDivisionError("the decoder is broken")
        self.failures = 0

    def decode_frames(self, latents: Tensor, state: DecoderState) -> Tensor:
        if self.calls == 1:
            self.failures += 1
            raise self.error
        return super().decode_frames(latents, state)


def latents_of(value: float) -> Tensor:
    return torch.full((1, 1, 3, 2, 2), value / 3)


def values_of(*pending: Future[DecodedFrames] | StreamFrames) -> list[int]:
    return [int(each.result().frames[0, 0, 0, 0]) for each in pending]


def on_thread(decoder: AddingDecoder, depth: int = 2) -> tuple[DecodeWorker, DecoderState]:
    worker = DecodeWorker(decoder, DecodeQueue(CPU, overlap=True), depth)
    return worker, worker.new_state(1, 2, 2, torch.float32)


@pytest.mark.parametrize("overlap", [False, True])
def test_frames_come_in_the_order_of_the_chunks(overlap: bool) -> None:
    worker = DecodeWorker(AddingDecoder(), DecodeQueue(CPU, overlap))
    state = worker.new_state(1, 2, 2, torch.float32)
    pending = [worker.submit(latents_of(value), state) for value in (1, 2, 3, 4)]
    assert values_of(*pending) == [1, 3, 6, 10]  # frames that are taken late are still those of their chunk
    assert values_of(*pending) == [1, 3, 6, 10]
    assert [len(each.result().frames) for each in pending] == [1, 3, 3, 3]
    assert pending[0].result().frames.dtype == numpy.uint8 and pending[0].result().milliseconds > 0
    worker.wait()
    assert state.frames == 12 and pending[-1].done()


def test_no_more_than_the_depth_is_in_flight() -> None:
    decoder = AddingDecoder()
    decoder.gate = threading.Event()
    worker, state = on_thread(decoder, depth=2)
    for value in (1, 2):
        worker.submit(latents_of(value), state)
    third = threading.Thread(target=worker.submit, args=(latents_of(3), state))
    third.start()
    third.join(0.2)
    assert third.is_alive() and decoder.calls == 0
    decoder.gate.set()
    third.join(WAIT)
    worker.wait()
    assert not third.is_alive() and decoder.calls == 3 and decoder.most_running == 1


def test_a_decode_runs_beside_its_caller() -> None:
    decoder = AddingDecoder()
    decoder.gate = threading.Event()
    worker, state = on_thread(decoder)
    pending = worker.submit(latents_of(5), state)
    assert not pending.done()  # the decoder waits for what the caller does now
    decoder.gate.set()
    assert values_of(pending) == [5]


def test_a_queue_is_idle_once_every_stream_is_decoded() -> None:
    decoder, queue = AddingDecoder(), DecodeQueue(CPU, overlap=True)
    decoder.gate = threading.Event()
    workers = [DecodeWorker(decoder, queue) for _ in range(2)]
    for worker in workers:
        worker.submit(latents_of(1), worker.new_state(1, 2, 2, torch.float32))
    waiting = threading.Thread(target=queue.synchronize)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and decoder.calls == 0
    decoder.gate.set()
    waiting.join(WAIT)
    assert not waiting.is_alive() and decoder.calls == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_decodes_on_a_thread_of_its_own() -> None:
    decoder, queue = AddingDecoder(), DecodeQueue(CPU, overlap=True)
    worker = DecodeWorker(decoder, queue)
    assert values_of(worker.submit(latents_of(1), worker.new_state(1, 2, 2, torch.float32))) == [1]
    child = os.fork()
    if not child:
        signal.alarm(int(WAIT))  # ends a child that waits for the thread of its parent
        found = None
        try:
            worker = DecodeWorker(decoder, queue)
            found = values_of(worker.submit(latents_of(2), worker.new_state(1, 2, 2, torch.float32)))
        finally:
            os._exit(0 if found == [2] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_streams_of_one_queue_are_decoded_one_after_the_other() -> None:
    decoder, queue = AddingDecoder(), DecodeQueue(CPU, overlap=True)
    workers = [DecodeWorker(decoder, queue) for _ in range(3)]
    states = [worker.new_state(1, 2, 2, torch.float32) for worker in workers]
    pending = [worker.submit(latents_of(7), state) for worker, state in zip(workers, states, strict=True)]
    assert values_of(*pending) == [7, 7, 7] and decoder.most_running == 1
    workers[0].close()
    assert values_of(workers[1].submit(latents_of(1), states[1])) == [8]


def begun(decoder: AddingDecoder) -> None:
    """Return once the decoder is inside of a call, before its gate."""
    deadline = time.monotonic() + WAIT
    while not decoder.running:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_caller_that_decodes_waits_for_the_thread_of_the_queue() -> None:
    """The decoder's buffers are those of all streams."""
    decoder, queue = AddingDecoder(), DecodeQueue(CPU, overlap=True)
    decoder.gate = threading.Event()
    workers = [DecodeWorker(decoder, queue) for _ in range(2)]
    states = [worker.new_state(1, 2, 2, torch.float32) for worker in workers]
    pending = workers[0].submit(latents_of(1), states[0])
    begun(decoder)
    with ThreadPoolExecutor(1) as caller:
        alone = caller.submit(workers[1].submit, latents_of(2), states[1], False)
        time.sleep(0.2)
        decoder.gate.set()
        assert values_of(pending, alone.result()) == [1, 2]
    assert decoder.most_running == 1


def test_a_caller_that_decodes_is_told_of_an_error_before() -> None:
    decoder = FailingDecoder()
    decoder.gate = threading.Event()
    worker, state = on_thread(decoder, depth=4)
    for value in (1, 2):
        worker.submit(latents_of(value), state)
    begun(decoder)
    with ThreadPoolExecutor(1) as caller:
        alone = caller.submit(worker.submit, latents_of(3), state, False)
        time.sleep(0.2)
        decoder.gate.set()
        with pytest.raises(ZeroDivisionError):
            alone.result()
    assert decoder.failures == 1 and decoder.calls == 1 and state.frames == 3


@pytest.mark.parametrize("taken", [False, True])
def test_an_error_comes_out_as_it_is_and_ends_the_worker(taken: bool) -> None:
    decoder = FailingDecoder()
    worker, state = on_thread(decoder, depth=4)
    first, second = (worker.submit(latents_of(value), state) for value in (1, 2))
    assert values_of(first) == [1]
    if taken:
        with pytest.raises(ZeroDivisionError) as caught:
            second.result()
        assert caught.value is decoder.error
    deadline = time.monotonic() + WAIT
    while not second.done():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for call in (lambda: worker.submit(latents_of(3), state), second.result, worker.wait):
        with pytest.raises(ZeroDivisionError) as caught:
            call()
        assert caught.value is decoder.error
    assert decoder.calls == 1 and state.frames == 3


def test_what_is_queued_behind_an_error_is_not_decoded() -> None:
    decoder = FailingDecoder()
    decoder.gate = threading.Event()
    worker, state = on_thread(decoder, depth=4)
    pending = [worker.submit(latents_of(value), state) for value in (1, 2, 3)]
    decoder.gate.set()
    assert values_of(pending[0]) == [1]
    for failed in pending[1:]:
        with pytest.raises(ZeroDivisionError):
            failed.result()
    assert decoder.calls == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_latents_that_are_not_finite_are_an_error(overlap: bool) -> None:
    worker = DecodeWorker(AddingDecoder(), DecodeQueue(CPU, overlap))
    state = worker.new_state(1, 2, 2, torch.float32)
    with pytest.raises(RuntimeError, match="the latents of a chunk are not finite"):
        worker.submit(latents_of(float("nan")), state).result()


def test_closing_waits_for_the_decode_that_runs_and_drops_the_rest() -> None:
    decoder = AddingDecoder()
    decoder.gate = threading.Event()
    worker, state = on_thread(decoder)
    first, second = (worker.submit(latents_of(value), state) for value in (1, 2))
    while not decoder.running:
        time.sleep(0.001)
    closing = threading.Thread(target=worker.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    decoder.gate.set()
    closing.join(WAIT)
    worker.close()
    assert values_of(first) == [1] and decoder.calls == 1 and second.done()
    with pytest.raises(RuntimeError, match="the decode worker is closed"):
        worker.submit(latents_of(3), state)


def test_a_worker_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="depth is 0; at least one decode is in flight"):
        DecodeWorker(AddingDecoder(), DecodeQueue(CPU), depth=0)


# CUDA, recorded


class Recording:
    """Streams and events that note in `log` what is asked of them, and which streams are current then."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.caller = self.stream_class()("caller")
        self.current: list[object] = [self.caller]
        self.named = iter(("decode", "copy"))

    def stream_class(self) -> type:
        log = self.log

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def __repr__(self) -> str:
                return self.name

            def wait_stream(self, other: object) -> None:
                log.append((self.name, "waits for", str(other)))

            def synchronize(self) -> None:
                log.append(("host", "waits for", self.name))

        return Stream

    def new_stream(self, device: torch.device, priority: int = 0) -> object:
        return type(self.caller)(next(self.named))

    def event_class(self) -> type:
        recording = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                recording.log.append((str(stream), "records"))

            def query(self) -> bool:
                return False  # the device is always behind

            def synchronize(self) -> None:
                recording.log.append(("host", "waits for", "event"))

            def elapsed_time(self, other: object) -> float:
                return 4.0

        return Event

    @contextmanager
    def entered(self, stream: object | None) -> Iterator[None]:
        self.current.append(stream or self.current[-1])
        yield
        self.current.pop()

    def queue(self, graphs: bool = False) -> DecodeQueue:
        queue = DecodeQueue(torch.device("cuda", 0), overlap=True, graphs=graphs)
        assert queue.thread is None
        return queue


class TapedCall:
    """CapturedCall that tapes ops: recording leaves no trace, and a replay runs no Python of the decoder."""

    def __init__(self, function, restore, device, pool=None) -> None:
        assert restore is None
        self.pool = pool
        self.tape = Tape()
        with self.tape:
            self.results = function()
        self.tape.undo()

    def replay(self) -> tuple[Tensor, Tensor]:
        self.tape.play()
        return self.results


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    made = Recording()

    def moved(self: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        made.log.append(("copy to", str(device), *map(str, made.current[-2:])))
        return self.clone()

    monkeypatch.setattr(torch.cuda, "Stream", made.new_stream)
    monkeypatch.setattr(torch.cuda, "Event", made.event_class())
    monkeypatch.setattr(torch.cuda, "stream", made.entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.caller)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda self, stream: made.log.append((str(stream), "keeps latents"))
    )
    monkeypatch.setattr(decode_worker, "_pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(decode_worker, "_moved", moved)
    monkeypatch.setattr(decode_worker, "CapturedCall", TapedCall)
    monkeypatch.setattr(decode_worker, "graph_pool", object)
    return made


def on_stream(recording: Recording, decoder: AddingDecoder, depth: int = 2, graphs: bool = False):
    queue = recording.queue(graphs)
    queue.device = CPU  # where the latents of these tests are
    worker = DecodeWorker(decoder, queue, depth)
    return worker, worker.new_state(1, 2, 2, torch.float32)


def test_a_decode_follows_the_denoising_and_its_result_the_decode(recording: Recording) -> None:
    worker, state = on_stream(recording, AddingDecoder())
    assert recording.log == [("caller", "waits for", "decode")]  # a state can be loaded at once
    recording.log.clear()
    pending = worker.submit(latents_of(3), state)
    assert recording.log == [
        ("decode", "waits for", "caller"), ("decode", "keeps latents"), ("decode", "records"),
        ("decode", "records"),
    ]  # fmt: skip
    recording.log.clear()
    assert not pending.done() and values_of(pending) == [3] and pending.result().milliseconds == 4.0
    assert recording.log == [("host", "waits for", "event")] and pending.done()


def test_the_denoising_never_waits_for_a_copy_to_another_gpu(recording: Recording) -> None:
    decoder = AddingDecoder()
    worker = DecodeWorker(decoder, recording.queue())
    state = decoder.decoder_state(1, 2, 2, torch.float32, "cpu")
    recording.log.clear()
    assert values_of(worker.submit(latents_of(3), state)) == [3]
    assert recording.log[:4] == [
        ("decode", "waits for", "caller"), ("copy", "waits for", "caller"), ("copy", "keeps latents"),
        ("copy to", "cuda:0", "copy", "decode"),
    ]  # fmt: skip
    assert ("caller", "waits for", "decode") not in recording.log


def test_pinned_buffers_are_used_again_and_frames_stay_what_they_were(recording: Recording) -> None:
    worker, state = on_stream(recording, AddingDecoder(), depth=2)
    pending = [worker.submit(latents_of(1), state) for _ in range(6)]
    buffers = {buffer.data_ptr() for buffer in worker._on_stream._buffers}
    later = [worker.submit(latents_of(1), state) for _ in range(2)]
    assert {buffer.data_ptr() for buffer in worker._on_stream._buffers} == buffers
    assert values_of(*pending, *later) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_steady_decodes_are_recorded_once_and_replayed(recording: Recording) -> None:
    plain, graphed = AddingDecoder(), AddingDecoder()
    frames = []
    for decoder, graphs in ((plain, False), (graphed, True)):
        worker, state = on_stream(recording, decoder, graphs=graphs)
        frames.append(values_of(*(worker.submit(latents_of(value), state) for value in range(1, 7))))
        assert state.frames == 18
        reset_state(state)  # a hard switch of the prompt: the graph reads the same tensors
        frames[-1] += values_of(*(worker.submit(latents_of(value), state) for value in range(3, 6)))
    assert frames[0] == frames[1] == [1, 3, 6, 10, 15, 21, 3, 7, 12]
    assert plain.calls == 9
    assert graphed.calls == 4  # the first chunk of each video, a steady one op by op, and the recording


def test_graphs_of_one_queue_share_a_pool_until_none_is_left(recording: Recording) -> None:
    queue = recording.queue(graphs=True)
    queue.device = CPU

    def recorded() -> tuple[DecodeWorker, object]:
        worker = DecodeWorker(AddingDecoder(), queue)
        state = worker.new_state(1, 2, 2, torch.float32)
        for _ in range(3):
            worker.submit(latents_of(1), state)
        return worker, worker._on_stream._captured._call.pool

    (first, pool), (second, same) = recorded(), recorded()
    assert pool is same is not None
    first.close()
    third, still = recorded()
    assert still is pool
    for worker in (second, third):
        worker.close()
    assert recorded()[1] is not pool


@pytest.mark.parametrize("latents", [2, 3])
def test_a_streaming_decoder_gives_the_same_frames_from_its_graph(recording: Recording, latents: int) -> None:
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(4, SMALL.in_dim, (1, 1, 2, 2), 1, latents_mean=(0.1,) * 4, latents_std=(1.2,) * 4))
    results = []
    for graphs in (False, True):
        decoder = StreamingDecoder(vae.eval(), REFERENCE_OPS)
        worker, _ = on_stream(recording, decoder, graphs=graphs)
        state = worker.new_state(1, GRID.latent_height, GRID.latent_width, torch.float32)
        chunks = [noise_of(chunk, latents, steps=1)[0] for chunk in range(5)]
        results.append([worker.submit(chunk, state) for chunk in chunks])
        assert (worker._on_stream._captured is not None) == graphs
    for plain, graphed in zip(*results, strict=True):
        assert numpy.array_equal(plain.result().frames, graphed.result().frames)


def test_an_error_of_the_device_is_raised_at_each_result(recording: Recording) -> None:
    worker, state = on_stream(recording, AddingDecoder())
    pending = worker.submit(latents_of(float("inf")), state)
    worker.submit(latents_of(1), state)  # the host learns of the error when it waits
    again = (lambda: worker.submit(latents_of(1), state),) * 2
    for call in (*again, pending.result, pending.result, worker.wait):
        with pytest.raises(RuntimeError, match="not finite"):
            call()


def test_closing_waits_for_the_stream(recording: Recording) -> None:
    worker, state = on_stream(recording, AddingDecoder(), graphs=True)
    pending = worker.submit(latents_of(2), state)
    recording.log.clear()
    worker.close()
    worker.close()
    assert recording.log == [("host", "waits for", "decode")]
    assert values_of(pending) == [2]
