"""VideoStream: one running video. It owns the cache, the decoder's state, the noise and the prompt, and
yields chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.cache.sink_policy import CachePlan
from rfengine.clip import ClipMode, clip_digest, clip_latents, clip_parts
from rfengine.cuda_graph import launching_on
from rfengine.frame_chunk import ChunkTimings, FrameChunk
from rfengine.grid import LatentGrid
from rfengine.host_state import ordinary, own_state
from rfengine.models.decoder import reset_state
from rfengine.prompt_blend import Interpolation, TextTransition, checked_chunks
from rfengine.prompts import Prompt, PromptMode, prompt_line
from rfengine.runtime.chunk_runner import StepCallback
from rfengine.runtime.decode_worker import DecodedFrames, DecodeWorker, StreamFrames, finished
from rfengine.runtime.engine import Engine
from rfengine.runtime.ranks import on_all
from rfengine.snapshot import SNAPSHOT_FORMAT, Snapshot, StreamInfo, check_tensors
from rfengine.video import check_frames

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True, slots=True)
class _Computed:
    """A chunk that is denoised, or on its way there, and not handed out. frames: None without decoding."""

    latents: Tensor
    frames: Future[DecodedFrames] | StreamFrames | None
    denoise_ms: float


class VideoStream:
    """An endless iterator of FrameChunk. One chunk is computed for each `next`; there is no length and no
    end.

    With overlap (RuntimeConfig.overlap) the stream is one chunk ahead of its caller from the second chunk on:
    before chunk c is handed out, chunk c + 1 is begun, so that c is decoded while c + 1 is denoised. Frames
    are the same bit for bit and the first chunk comes no later. What a caller notices: a soft or recache
    switch of the prompt shows one chunk later (see set_prompt), and the last call has begun a chunk that
    nobody takes unless it says ahead=False, as `take` does. A snapshot holds the chunk that is ahead.

    After an error inside a chunk the stream is closed: its state could be half-way. Restore a snapshot to
    continue.

    Streams of one pipeline may run in several threads: each call waits for its turn and keeps it to its end,
    so they advance chunk by chunk, in the order of asking. Threads that share one stream get its chunks in
    that order too, each chunk once. A call on a stream from inside its own on_step raises RuntimeError. What
    the caller has set in torch (default dtype and device, autocast, inference and gradient mode) changes
    nothing. A forked process starts streams of its own: one from before the fork may wait for ever for a
    chunk that its parent decodes.
    """

    def __init__(self, engine: Engine, grid: LatentGrid, prompt: str, text_states: Tensor, seed: int) -> None:
        self.grid = grid
        self.seed = seed
        self.closed = False
        self.latents: Tensor | None = None  # clean latents [1, C, F, h, w] of the last chunk
        self._engine = engine
        self._busy = False  # inside a call
        self._index = 0
        self._undecoded = False  # a chunk was computed whose latents the decoder has not seen
        self._worker = DecodeWorker(engine.open_decoder(grid), engine.queue)
        model = engine.model
        with self._computing():
            self._set_text(prompt, ordinary(text_states))
            self._cache = StreamingKVCache(
                model.config, engine.config.cache, grid, dtype=model.dtype, device=model.device,
                ops=model.ops, parallel=model.parallel,
            )  # fmt: skip
        size = grid.latent_height, grid.latent_width
        self._decoder_state = self._worker.new_state(1, *size, engine.decoder_dtype)
        self._window_latents: dict[int, Tensor] = {}  # clean, by frame: a switch may recompute the window
        self._given: Tensor | None = None  # latents with which the next chunk begins as they are
        self._ahead: _Computed | None = None
        self._transition: TextTransition | None = None  # to the text states of the prompt
        self._drawn: dict[int, Tensor] = {}  # noise on the host of a chunk to come
        self._handed_out = False  # a chunk, since the start of this video

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call on the stream while it is open: alone on the pipeline, and under torch's own settings."""
        with self._engine.turns, own_state():
            if self._busy:
                raise RuntimeError(
                    f"chunk {self._index} of the stream is being made; call the stream once its on_step has "
                    "returned"
                )
            if self.closed:
                raise RuntimeError(
                    f"the stream was closed in chunk {self._index}; restore a snapshot or start a new one"
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _computing(self) -> AbstractContextManager[None]:
        """Launch on the model's device and on the denoising's CUDA stream."""
        return launching_on(self._engine.compute_stream, self._engine.model.device)

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """A step that fails half-way leaves a state from which nothing may continue."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _set_text(self, prompt: str, text_states: Tensor) -> None:
        text_states = text_states.to(self._engine.model.device)
        with torch.no_grad():  # or the keys and values would keep all that they came of
            text = self._engine.model.text_keys_values(text_states)
        self.prompt, self._text_states, self._text = prompt, text_states, text
        self._weights_version = self._engine.adapted.version

    def _take_weights(self) -> None:
        """Bring the keys and values of the text up to date with weights that were changed."""
        if self._weights_version != self._engine.adapted.version:
            self._set_text(self.prompt, self._text_states)

    def _continue_transition(self) -> None:
        """Take one of the steps of the text states to those of a new prompt, which the last step reaches."""
        if self._transition is not None:
            transition = self._transition.advanced()
            self._set_text(self.prompt, transition.states())
            self._transition = None if transition.ended else transition

    @property
    def num_steps(self) -> int:
        """Denoising steps of the next chunk to be made, as on_step counts them."""
        return self._engine.runner.passes(self._cache, self._cache.next_chunk)

    @property
    def index(self) -> int:
        """The index of the next chunk."""
        return self._index

    @property
    def is_at_start(self) -> bool:
        """Whether the next chunk to be made is the first of a video, which may be of another length."""
        return self._cache.next_chunk == 0

    @property
    def is_ahead(self) -> bool:
        """Whether the next chunk was begun by the call before: a soft or recache prompt shows after it."""
        return self._ahead is not None

    @property
    def runs_op_by_op(self) -> bool:
        """Whether on_step changes nothing in how chunks are made: neither recorded nor overlapped."""
        return not (self._engine.runner.graphs or self._engine.queue.overlap)

    def __iter__(self) -> VideoStream:
        return self

    def __next__(self) -> FrameChunk:
        return self.advance()

    def take(self, count: int) -> Iterator[FrameChunk]:
        """The next `count` chunks; none is begun after them."""
        for number in range(count):
            yield self.advance() if number + 1 < count else self.advance(ahead=False)

    def advance(
        self, on_step: StepCallback | None = None, decode: bool = True, ahead: bool = True
    ) -> FrameChunk:
        """Return the next chunk; on_step is ChunkRunner.advance's.

        ahead: whether the chunk after it may be begun, where the stream overlaps; with on_step and without
        decode it never is. Without decode, frames are empty and only the latents advance; such a stream can
        not be decoded later (RuntimeError), since the decoder's state would lack what it has not seen.
        RuntimeError also for on_step or not decode where this chunk was already begun by the call before.
        """
        with self._turn():
            if decode and self._undecoded:
                raise RuntimeError(
                    f"chunk {self._index - 1} was not decoded; decode every chunk of a stream or none"
                )
            plain = on_step is None and decode
            if self._ahead is not None and not plain:
                raise RuntimeError(
                    f"chunk {self._index} was begun by the call before it; give that call ahead=False to "
                    "watch its steps or to leave it undecoded"
                )
            self._undecoded = not decode
            with self._closed_on_error():
                return self._advance(on_step, decode, ahead and plain)

    def _advance(self, on_step: StepCallback | None, decode: bool, ahead: bool) -> FrameChunk:
        started = time.perf_counter()
        go_ahead = ahead and self._engine.queue.overlap and self._handed_out
        current = self._ahead or self._compute(on_step, decode, go_ahead)
        try:
            self._ahead = None
            if go_ahead:
                with self._engine.queue.denoising_beside():
                    self._ahead = self._compute(None, True, True)
            decoded = self._no_frames() if current.frames is None else current.frames.result()
        except BaseException:
            del current  # it may hold the error, whose traceback holds this frame: a circle
            raise
        self.latents = current.latents
        call_ms = (time.perf_counter() - started) * 1e3
        timings = ChunkTimings(current.denoise_ms, decoded.milliseconds, call_ms)
        chunk = FrameChunk(decoded.frames, self._index, timings)
        self._index += 1
        self._handed_out = True
        return chunk

    def _no_frames(self) -> DecodedFrames:
        size = (0, self.grid.height, self.grid.width, 3)
        return DecodedFrames(torch.zeros(size, dtype=torch.uint8, device="cpu").numpy(), 0.0)

    def _compute(self, on_step: StepCallback | None, decode: bool, beside: bool) -> _Computed:
        """Denoise the next chunk and submit its latents to the decoder, which runs beside another chunk or
        alone."""
        started = time.perf_counter()
        with self._computing():
            self._take_weights()
            self._continue_transition()
            plan, given = self._cache.plan_chunk(), self._given
            noise = self._noise(plan.chunk, plan.frames)
            x0 = self._engine.runner.advance(self._cache, plan, noise, self._text, on_step, given)
            self._given = None
            self._remember(plan, x0)
            denoise_ms = (time.perf_counter() - started) * 1e3
            frames = self._worker.submit(x0, self._decoder_state, beside) if decode else None
            if self._engine.compute_stream is not None:  # the device works meanwhile
                following = plan.chunk + 1
                self._drawn = {following: self._draw_noise(following, self._cache.config.chunk_frames)}
        return _Computed(x0, frames, denoise_ms)

    def _noise(self, chunk: int, frames: int) -> Tensor:
        """[draws, 1, C, F, h, w] of one chunk, from (seed, chunk, step) alone."""
        drawn, self._drawn = self._drawn, {}
        noise = drawn[chunk] if chunk in drawn else self._draw_noise(chunk, frames)
        return noise.to(self._engine.model.device, non_blocking=True)

    def _draw_noise(self, chunk: int, frames: int) -> Tensor:
        """_noise in host memory; at a large size the host takes a while."""
        model, runner = self._engine.model, self._engine.runner
        noise = runner.draw_noise(self._cache, chunk, frames, self.seed).to(model.dtype)
        if model.device.type == "cuda":  # from ordinary memory the copy would wait for the chunk before
            noise = noise.pin_memory()
        return noise

    def _remember(self, plan: CachePlan, latents: Tensor) -> None:
        for frame, clean in enumerate(latents.split(1, dim=2), plan.first_frame):
            self._window_latents[frame] = clean
            self._window_latents.pop(frame - self._cache.config.past_frames, None)

    def close(self) -> None:
        """End the stream; every later call on it is an error."""
        with self._engine.turns:
            self.closed = True
            self._ahead = None
            self._worker.close()

    def set_prompt(
        self,
        prompt: Prompt,
        mode: PromptMode = "soft",
        transition_chunks: int = 1,
        interpolation: Interpolation = "linear",
    ) -> None:
        """Change the prompt from the next chunk on; where a chunk is ahead (class docstring), from the one
        after it, since it is there already.

        "soft" changes the text only: the window still shows the old one. "recache" also recomputes the
        window's keys and values under the new text, from the clean latents kept for it, as LongLive does.
        "hard" restarts the video: output equals a new stream with this prompt and seed, what was ahead is
        dropped, and FrameChunk.index keeps counting.
        prompt: of several texts with weights the weighted mean of their text states is taken (prompt_blend).
        transition_chunks, with "soft": the text states go from the present ones to the new prompt's in as
        many steps, one before each of the next chunks, by `interpolation` at k/n of the way; 1 is at once.
        """
        with self._turn():
            with on_all(self._engine.model.parallel) as equal:
                chunks, line = checked_chunks(mode, transition_chunks, interpolation), prompt_line(prompt)
                if mode == "recache":
                    self._cache.config.check_recache()
                equal |= {"prompt": line, "mode of the prompt": mode, "transition": (chunks, interpolation)}
            text_states = ordinary(self._engine.encode_text(prompt))
            with self._closed_on_error(), self._computing():
                if mode == "hard":
                    self._restart()
                if chunks > 1:
                    way = TextTransition(self._text_states, text_states, chunks, interpolation)
                    self.prompt, self._transition = line, way
                    return
                self._set_text(line, text_states)
                self._transition = None
                if mode == "recache":
                    self._engine.runner.recache(self._cache, self._window_latents, self._text)

    def _restart(self) -> None:
        """Return to the start of a video in the memory that is there, which recorded graphs still use."""
        self._worker.wait()
        self._ahead = None
        self._handed_out = False
        self._cache.reset()
        reset_state(self._decoder_state)
        self._window_latents, self._given = {}, None

    def continue_from(self, frames: ndarray, mode: ClipMode = "chunks") -> None:
        """Take a given clip, or one picture, as the beginning of a fresh stream: uint8 [T, H, W, 3], at the
        stream's size and rate. The stream then yields what comes after it.

        mode: "chunks": the clip is prefilled in whole chunks; where T does not fill them, its last frames are
        used. "frames": latent by latent, as the independent first frame of Self-Forcing; any length.
        "clamped": in whole chunks, and what is left stays as it is inside the next chunk, at level 0, as the
        picture of LongLive 2; that chunk shows it. A clip of 1 + 4k frames is k + 1 latents.
        Raises ValueError for a clip that is too short or of another size, RuntimeError when the stream has
        begun.
        """
        engine = self._engine
        with self._turn():
            if self._cache.next_chunk or self._given is not None:
                raise RuntimeError(
                    f"the stream is at chunk {self._cache.next_chunk}; continue a clip with a new stream"
                )
            with on_all(engine.model.parallel) as equal:
                check_frames(frames)
                parts, group = clip_parts(len(frames), mode, engine.config), self._cache.config.chunk_frames
                latents = clip_latents(engine.vae, frames, self.grid, parts.latent_frames, group)
                latents = latents.to(engine.model.device, engine.model.dtype)
                if engine.model.parallel.divides:
                    equal |= {"mode of the clip": mode, "clip": clip_digest(frames)}
            *pieces, rest = latents.split([*parts.prefilled, parts.clamped], dim=2)
            with self._closed_on_error(), self._computing():
                self._given = rest if parts.clamped else None
                self._take_weights()
                for piece in pieces:
                    plan = self._cache.plan_chunk(piece.shape[2])
                    engine.runner.prefill(self._cache, plan, piece, self._text)
                    self._remember(plan, piece)
                    self._worker.submit(piece, self._decoder_state, beside=False)
                    self._index += 1

    def snapshot(self) -> Snapshot:
        """A copy of the whole state between two chunks; Pipeline.restore continues it bit for bit, with or
        without overlap. On several ranks each has its own heads (snapshot_parts.py)."""
        dtype = self._engine.model.dtype
        with self._turn():
            with self._closed_on_error(), self._computing():
                self._worker.wait()
                groups = {"cache": self._cache.tensors(), "decoder": self._decoder_state.tensors()}
                tensors = {
                    f"{group}.{name}": tensor
                    for group, members in groups.items()
                    for name, tensor in members.items()
                }
                if self._window_latents:
                    clean = [self._window_latents[frame] for frame in sorted(self._window_latents)]
                    tensors["window_latents"] = torch.cat(clean, dim=2).to(dtype)
                if self._given is not None:
                    tensors["given_latents"] = self._given.to(dtype)
                if self._ahead is not None:
                    tensors["ahead.frames"] = torch.from_numpy(self._ahead.frames.result().frames)
                tensors["text_states"] = self._text_states
                if self._transition is not None:
                    tensors |= self._transition.tensors()
                copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            info = {
                "format": SNAPSHOT_FORMAT,
                **self._engine.settings(),
                "prompt": self.prompt,
                "seed": self.seed,
                "height": self.grid.height,
                "width": self.grid.width,
                "index": self._index,
                "next_chunk": self._cache.next_chunk,
                "next_frame": self._cache.next_frame,
                "held": list(self._cache.held),
                "joint_chunks": self._cache.joint_chunks,
                "decoded_frames": self._decoder_state.frames,
            }
            if self._transition is not None:
                info |= self._transition.values()
            if self._given is not None:
                info["given_frames"] = self._given.shape[2]
            if (parallel := self._engine.model.parallel).divides:
                info["part"] = [parallel.rank, parallel.count]
            return Snapshot(copies, info)

    @classmethod
    def from_snapshot(
        cls, engine: Engine, grid: LatentGrid, snapshot: Snapshot, any_loras: bool = False
    ) -> VideoStream:
        """The stream a snapshot was taken of. Raises ValueError when it is of another model, decoder, format
        or setting, or damaged: before anything is taken over, and mostly before anything is allocated."""
        snapshot, info = snapshot.checked(engine.settings(), engine.model, grid, any_loras)
        stream = cls(engine, grid, info.prompt, snapshot.tensors["text_states"], info.seed)
        with stream._closed_on_error(), stream._computing(), on_all(engine.model.parallel):
            check_tensors(snapshot.group("decoder"), stream._decoder_state.tensors())
            stream._load(snapshot, info)
        return stream

    def rewind(self, snapshot: Snapshot, any_loras: bool = False) -> None:
        """Become the stream of `snapshot`, in the memory and with the graphs that are there.

        any_loras: as in Pipeline.restore. Raises ValueError as that does, and for a snapshot of another size;
        then the stream is as it was.
        """
        with self._turn():
            engine = self._engine
            snapshot, info = snapshot.checked(engine.settings(), engine.model, self.grid, any_loras)
            with on_all(engine.model.parallel):
                check_tensors(snapshot.group("decoder"), self._decoder_state.tensors())
            with self._closed_on_error(), self._computing():
                self._restart()
                self._drawn, self.seed = {}, info.seed
                self._set_text(info.prompt, snapshot.tensors["text_states"])
                self._load(snapshot, info)

    def _load(self, snapshot: Snapshot, info: StreamInfo) -> None:
        """Take over what is checked, but for the prompt and the seed."""
        self._cache.load(snapshot.group("cache"), info.position)
        self._decoder_state.load(snapshot.group("decoder"), info.decoded_frames)
        device, tensors = self._engine.model.device, snapshot.tensors
        if info.kept_frames:
            clean = ordinary(tensors["window_latents"]).to(device).split(1, dim=2)
            self._window_latents = dict(zip(info.kept_frames, clean, strict=True))
        self._given = ordinary(tensors["given_latents"]).to(device) if info.given_frames else None
        self._index, self._undecoded = info.index, info.undecoded
        self._transition = snapshot.transition(info, device)
        if info.ahead:
            frames = finished(DecodedFrames(snapshot.tensors["ahead.frames"].numpy().copy(), 0.0))
            last = info.kept_frames[-self._cache.config.chunk_frames :]
            latents = torch.cat([self._window_latents[frame] for frame in last], dim=2)
            self._ahead = _Computed(latents, frames, denoise_ms=0.0)
