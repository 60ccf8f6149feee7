"""DecodeWorker: turns latents into frames in host memory, beside the denoising of the next chunk.

On CUDA the host only launches: decoding has a stream of its own, on the model's device or another, and frames
go to pinned buffers that are used again. On a CPU a thread decodes, and it and the denoising beside it share
the threads of torch, which releases the GIL meanwhile. Without overlap a chunk is decoded where it is
submitted.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfengine.cuda_graph import CapturedCall, GraphPool, graph_pool, made_current
from rfengine.host_state import SharedThreads
from rfengine.models.decoder import FrameDecoder, FrameDecoderState
from rfengine.nvtx_ranges import nvtx_range

if TYPE_CHECKING:
    from numpy import ndarray

DEPTH = 2  # decodes in flight: one that is awaited and one of the chunk begun ahead
_NOT_FINITE = "the latents of a chunk are not finite; start a new stream or restore a snapshot"


@dataclass(frozen=True, slots=True)
class DecodedFrames:
    """Frames uint8 [T, H, W, 3] in host memory, and the milliseconds that decoding took where it ran."""

    frames: ndarray
    milliseconds: float


class DecodeQueue:
    """Where all decodes of one decoder run, one after the other, whichever stream they are for.

    device: where the decoder's weights are. overlap: decode beside what the caller does next, on a CUDA
    stream or on a thread. graphs: with overlap, replay as a CUDA graph what a FrameDecoder says can be.
    The CUDA stream has the lowest priority, so the denoising of the next chunk is never behind. Latents of
    another device are copied on copy_stream, since a copy between devices makes the streams of both wait for
    each other, and the denoising must not wait. On a CPU the queue's thread has half of the threads of torch
    that the caller has, and the denoising beside it the others.
    """

    def __init__(self, device: torch.device, overlap: bool = False, graphs: bool = False) -> None:
        self.device = device
        self.overlap = overlap
        self.graphs = graphs
        on_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if overlap and on_cuda else None
        self._thread = ThreadPoolExecutor(1, "rfengine-decode") if overlap and not on_cuda else None
        self._process = os.getpid()
        self.threads = SharedThreads()
        self._copy_streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: GraphPool | None = None
        self._captured: weakref.WeakSet[_CapturedDecode] = weakref.WeakSet()

    @property
    def thread(self) -> ThreadPoolExecutor | None:
        """What decodes on a CPU; a forked process, which has none of its parent's threads, makes its own."""
        if self._thread is not None and self._process != os.getpid():
            self._thread, self._process = ThreadPoolExecutor(1, "rfengine-decode"), os.getpid()
            self.threads = SharedThreads()
        return self._thread

    def denoising_beside(self) -> AbstractContextManager[None]:
        """What the caller's thread computes inside, it computes while the queue's thread decodes."""
        return nullcontext() if self.thread is None else self.threads.divided()

    def synchronize(self) -> None:
        """Return once everything that was submitted is decoded."""
        if self.thread is not None:
            self.thread.submit(int).result()  # it does one thing after the other, for every stream
        if self.stream is not None:
            self.stream.synchronize()

    def copy_stream(self, source: torch.device) -> torch.cuda.Stream:
        if source not in self._copy_streams:
            self._copy_streams[source] = torch.cuda.Stream(source)
        return self._copy_streams[source]

    def capture(self, decoder: FrameDecoder, latents: Tensor, state: FrameDecoderState) -> _CapturedDecode:
        """A recorded decode. All of them share the memory of what they compute, since one runs at a time; the
        pool is a new one where no graph is left that holds the old one open."""
        if not self._captured:
            self._pool = graph_pool()
        made = _CapturedDecode(decoder, latents, state, self.device, self._pool)
        self._captured.add(made)
        return made


class DecodeWorker:
    """Decodes the chunks of one stream in the order they are submitted, at most `depth` at a time.

    Latents from another device than the queue's are copied there. Frames that nobody takes are kept in
    ordinary memory, so a caller may take them late or never; nothing waits for them. An error of an
    overlapped decode is raised by its result and by every later submit and result: a state that is half-way
    decodes nothing more.
    """

    def __init__(self, decoder: FrameDecoder, queue: DecodeQueue, depth: int = DEPTH) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; at least one decode is in flight")
        self.decoder = decoder
        self._queue = queue
        self._depth = depth
        self._in_flight: deque[Future[DecodedFrames] | StreamFrames] = deque()
        self._closed = False
        self._on_stream = None if queue.stream is None else _StreamDecoding(decoder, queue, depth)

    def new_state(
        self, batch: int, latent_height: int, latent_width: int, dtype: torch.dtype
    ) -> FrameDecoderState:
        """A fresh state on the worker's device, in memory that is released in the order of its stream."""
        queue = self._queue
        with torch.cuda.stream(queue.stream):  # None, without a stream, changes nothing
            state = self.decoder.decoder_state(batch, latent_height, latent_width, dtype, queue.device)
        if queue.stream is not None:  # a snapshot may be loaded next, over the zeros
            torch.cuda.current_stream(queue.device).wait_stream(queue.stream)
        return state

    def submit(
        self, latents: Tensor, state: FrameDecoderState, beside: bool = True
    ) -> Future[DecodedFrames] | StreamFrames:
        """Decode latents [1, z, F, h, w], which what the caller launched before still may write. beside:
        another chunk may be denoised meanwhile, by denoising_beside; else, on a CPU, the caller decodes with
        all threads, once the queue has done what it was given before.

        Waits while `depth` decodes run. Raises the error of an earlier decode, RuntimeError once closed.
        """
        if self._closed:
            raise RuntimeError("the decode worker is closed; start a new stream")
        if self._in_flight and self._in_flight[-1].done():
            self._in_flight[-1].result()
        while len(self._in_flight) >= self._depth:
            self._in_flight[0].result()  # stays where it fails, so the next submit fails too
            self._in_flight.popleft()
        self._in_flight.append(self._start(latents, state, beside))
        return self._in_flight[-1]

    def _start(
        self, latents: Tensor, state: FrameDecoderState, beside: bool
    ) -> Future[DecodedFrames] | StreamFrames:
        if self._on_stream is not None:
            return self._on_stream.start(latents, state)
        decoder, queue = self.decoder, self._queue
        last = self._in_flight[-1] if self._in_flight else None
        if queue.thread is None or not beside:
            queue.synchronize()
            return finished(_decode_after(last, None, decoder, queue.device, latents, state))
        share = partial(queue.threads.take_share, queue.threads.whole)
        return queue.thread.submit(_decode_after, last, share, decoder, queue.device, latents, state)

    def wait(self) -> None:
        """Return once everything that was submitted is decoded; the state may then be read and changed."""
        for decode in self._in_flight:
            decode.result()

    def close(self) -> None:
        """Drop what has not begun and wait for what has. Frames that were finished can still be taken."""
        if self._closed:
            return
        self._closed = True
        if self._on_stream is not None:
            self._on_stream.close()
        else:
            wait([future for future in self._in_flight if not future.cancel()])
        self._in_flight.clear()  # an error in it leads back here by its traceback


def finished(decoded: DecodedFrames) -> Future[DecodedFrames]:
    """A future of frames that are there."""
    future: Future[DecodedFrames] = Future()
    future.set_result(decoded)
    return future


@torch.no_grad()
def _decode(decoder: FrameDecoder, latents: Tensor, state: FrameDecoderState) -> tuple[Tensor, Tensor]:
    """The frames on the decoder's device and whether their latents were finite, [1] of bool."""
    with nvtx_range("decode"):
        finite = latents.isfinite().all().view(1)
        return decoder.decode_frames(latents, state), finite


def _decode_to_host(
    decoder: FrameDecoder, device: torch.device, latents: Tensor, state: FrameDecoderState
) -> DecodedFrames:
    started = time.perf_counter()
    with made_current(device), torch.inference_mode(device.type == "cpu"):  # as the denoising there
        frames, finite = _decode(decoder, latents.to(device), state)
        if not finite.item():
            raise RuntimeError(_NOT_FINITE)
        host = frames.cpu().numpy()
    return DecodedFrames(host, (time.perf_counter() - started) * 1e3)


def _decode_after(
    last: Future[DecodedFrames] | None,
    take_share: Callable[[], None] | None,
    decoder: FrameDecoder,
    device: torch.device,
    latents: Tensor,
    state: FrameDecoderState,
) -> DecodedFrames:
    """_decode_to_host once `last` is decoded, whose error thus reaches all later decodes. take_share: of the
    threads of torch, before; None leaves those that this thread has.

    No method, and without `last` in the end: an error's traceback keeps its calls and what they know, and
    must not lead back to the future that holds the error.
    """
    try:
        if last is not None:
            last.result()
    finally:
        del last
    if take_share is not None:
        take_share()
    return _decode_to_host(decoder, device, latents, state)


class _StreamDecoding:
    """Decodes on the queue's CUDA stream, after all that the caller's stream was given so far."""

    def __init__(self, decoder: FrameDecoder, queue: DecodeQueue, depth: int) -> None:
        self._decoder, self._queue = decoder, queue
        self._captured: _CapturedDecode | None = None
        self._seen_latents = 0  # latents of the last call that was the steady work and ran op by op
        self._buffers: deque[Tensor] = deque([_pinned(0)] * depth)
        weakref.finalize(self, queue.stream.synchronize)  # a graph must not be dropped while it runs

    def start(self, latents: Tensor, state: FrameDecoderState) -> StreamFrames:
        stream = self._queue.stream
        stream.wait_stream(torch.cuda.current_stream(self._queue.device))
        brought = self._bring(latents)
        started, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            started.record(stream)
            frames, finite = self._run(brought, state)
            host = self._buffer(frames.numel() + 1)
            host[:-1].view(frames.shape).copy_(frames, non_blocking=True)
            host[-1:].copy_(finite.view(torch.uint8), non_blocking=True)
            done.record(stream)
        return StreamFrames(host, tuple(frames.shape), started, done)

    def _bring(self, latents: Tensor) -> Tensor:
        """The latents on the queue's device, in memory that stays theirs until the queue has read it."""
        stream = self._queue.stream
        if latents.device == self._queue.device:
            latents.record_stream(stream)
            return latents
        copying = self._queue.copy_stream(latents.device)
        copying.wait_stream(torch.cuda.current_stream(latents.device))
        latents.record_stream(copying)
        with torch.cuda.stream(copying), torch.cuda.stream(stream):
            return _moved(latents, self._queue.device, non_blocking=True)

    def _run(self, latents: Tensor, state: FrameDecoderState) -> tuple[Tensor, Tensor]:
        """Op by op, or from the second call of steady work on as a graph: the first builds its kernels."""
        count = latents.shape[2]
        steady = state.frames > 0 and getattr(self._decoder, "capturable_frames", 0) == count
        if not (self._queue.graphs and steady):
            return _decode(self._decoder, latents, state)
        if self._seen_latents != count:
            self._seen_latents = count
            return _decode(self._decoder, latents, state)
        if self._captured is None or self._captured.state is not state:
            self._captured = self._queue.capture(self._decoder, latents, state)
        return self._captured.replay(latents)

    def _buffer(self, size: int) -> Tensor:
        """The first `size` bytes of the buffer that was used longest ago, whose frames were taken out."""
        buffer = self._buffers.popleft()
        if buffer.numel() < size:
            buffer = _pinned(size)
        self._buffers.append(buffer)
        return buffer[:size]

    def close(self) -> None:
        self._queue.stream.synchronize()
        self._captured = None


def _moved(latents: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
    return latents.to(device, non_blocking=non_blocking)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=size > 0)


class StreamFrames:
    """Frames on their way to a pinned buffer, to be awaited as a Future is; the buffer's last byte says
    whether the latents were finite."""

    def __init__(
        self, host: Tensor, shape: tuple[int, ...], started: torch.cuda.Event, done: torch.cuda.Event
    ) -> None:
        self._host, self._shape = host, shape
        self._started, self._done = started, done
        self._decoded: DecodedFrames | None = None

    def done(self) -> bool:
        """Whether result() would return, or raise, at once."""
        return self._decoded is not None or self._done.query()

    def result(self) -> DecodedFrames:
        """Wait for the frames. Raises RuntimeError for latents that were not finite, at every call."""
        if self._decoded is None:
            self._done.synchronize()
            if not self._host[-1].item():
                raise RuntimeError(_NOT_FINITE)
            frames = self._host[:-1].view(self._shape).numpy().copy()
            self._decoded = DecodedFrames(frames, self._started.elapsed_time(self._done))
        return self._decoded


class _CapturedDecode:
    """A chunk's decoding on one state, recorded; it has run before in these shapes."""

    def __init__(
        self,
        decoder: FrameDecoder,
        latents: Tensor,
        state: FrameDecoderState,
        device: torch.device,
        pool: GraphPool | None,
    ) -> None:
        self.state = state
        self._latents = static = latents.clone()
        seen = state.frames
        self._call = CapturedCall(lambda: _decode(decoder, static, state), None, device, pool)
        state.frames = seen  # recording counted its latents but ran nothing

    def replay(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        self._latents.copy_(latents)
        results = self._call.replay()
        self.state.frames += latents.shape[2]
        return results
