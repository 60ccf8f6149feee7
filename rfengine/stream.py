"""VideoStream: one running video. It owns the cache, the VAE state, the noise and the prompt, and yields
chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rfengine.cache.kv_cache import EMPTY, StreamingKVCache
from rfengine.config import to_dict
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.runtime.chunk_runner import ChunkRunner, StepCallback
from rfengine.schedule import chunk_noise
from rfengine.video import frames_from_pixels, pixels_from_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy import ndarray

    from rfengine.config import CacheConfig

PromptMode = Literal["soft", "recache", "hard"]
SNAPSHOT_FORMAT = 1
_SNAPSHOT_INFO = (
    "prompt", "seed", "height", "width", "index", "next_chunk", "slot_chunks", "decoded_frames"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChunkTimings:
    """Host milliseconds of one chunk. CUDA runs behind the host, so there the wait for both shows in
    decode_ms."""

    denoise_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Frames of one chunk: uint8 [T, H, W, 3], RGB; index counts the chunks of the stream from 0."""

    frames: ndarray
    index: int
    timings: ChunkTimings


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stream between two chunks: tensors by name, and everything else as JSON values."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file whose metadata holds the JSON; it appears under its name when it is
        whole."""
        from rfengine.checkpoint.loader import save_weights

        save_weights(Path(path), self.tensors, {"snapshot": json.dumps(self.info)})

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what save wrote. Raises ValueError when the file is none of ours or damaged."""
        from rfengine.checkpoint.loader import read_safetensors

        tensors, metadata = read_safetensors(Path(path))
        if "snapshot" not in metadata:
            raise ValueError(
                f"{path} is a safetensors file but holds no stream; give one that Snapshot.save wrote"
            )
        return cls(tensors, json.loads(metadata["snapshot"]))


@dataclass(frozen=True, slots=True)
class StreamParts:
    """What a stream uses and does not own: the loaded models, shared by all streams of a pipeline."""

    model: WanDiT
    vae: WanVAE
    runner: ChunkRunner
    cache_config: CacheConfig
    encode_text: Callable[[str], Tensor]
    fingerprint: str


class VideoStream:
    """An endless iterator of FrameChunk. One chunk is computed for each `next`; there is no length and no
    end.

    After an error inside a chunk the stream is closed: its state could be half-way. Restore a snapshot to go
    on.
    """

    def __init__(
        self, parts: StreamParts, grid: LatentGrid, prompt: str, text_states: Tensor, seed: int
    ) -> None:
        self.grid = grid
        self.seed = seed
        self.closed = False
        self.latents: Tensor | None = None  # clean latents [1, C, F, h, w] of the last chunk
        self._parts = parts
        self._set_text(prompt, text_states)
        self._index = 0
        self._undecoded = False  # a chunk was computed whose latents the VAE has not seen
        self._start()

    def _start(self) -> None:
        parts, grid = self._parts, self.grid
        self._cache = StreamingKVCache(
            parts.model.config,
            parts.cache_config,
            grid,
            dtype=parts.model.dtype,
            device=parts.model.device,
            ops=parts.model.ops,
        )
        self._decoder_state = parts.vae.decoder_state(
            1, grid.latent_height, grid.latent_width, parts.model.dtype, parts.model.device
        )
        self._window_latents: dict[int, Tensor] = {}

    @torch.no_grad()
    def _set_text(self, prompt: str, text_states: Tensor) -> None:
        text = self._parts.model.text_keys_values(text_states.to(self._parts.model.device))
        self.prompt, self._text_states, self._text = prompt, text_states, text

    @property
    def num_steps(self) -> int:
        """Denoising steps of one chunk."""
        return self._parts.runner.num_steps

    def __iter__(self) -> VideoStream:
        return self

    def __next__(self) -> FrameChunk:
        return self.advance()

    def advance(self, on_step: StepCallback | None = None, decode: bool = True) -> FrameChunk:
        """Compute the next chunk; on_step is ChunkRunner.advance's.

        Without decode, frames are empty and only the latents advance; such a stream can not be decoded later
        (RuntimeError), since the VAE's state would lack what it has not seen.
        """
        self._check_open()
        if decode and self._undecoded:
            raise RuntimeError(
                f"chunk {self._index - 1} was not decoded; decode every chunk of a stream or none"
            )
        self._undecoded = not decode
        with self._closed_on_error():
            return self._advance(on_step, decode)

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """A step that fails half-way leaves a state that nothing may go on from."""
        try:
            yield
        except BaseException:
            self.closed = True
            raise

    def _advance(self, on_step: StepCallback | None, decode: bool) -> FrameChunk:
        started = time.perf_counter()
        plan = self._cache.plan_chunk()
        x0 = self._parts.runner.advance(self._cache, plan, self._noise(plan.chunk), self._text, on_step)
        self._remember(plan.chunk, x0)
        denoised = time.perf_counter()
        size = (self.grid.height, self.grid.width)
        pixels = self._decode(x0) if decode else x0.new_zeros(1, 3, 0, *size)
        frames = frames_from_pixels(pixels)
        timings = ChunkTimings((denoised - started) * 1e3, (time.perf_counter() - denoised) * 1e3)
        chunk = FrameChunk(frames, self._index, timings)
        self._index += 1
        return chunk

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        return self._parts.vae.decode(latents, self._decoder_state)

    def _noise(self, chunk: int) -> Tensor:
        """[num_steps, 1, C, F, h, w] of one chunk, from (seed, chunk, step) alone."""
        model, frames = self._parts.model, self._parts.cache_config.chunk_frames
        shape = (1, model.config.in_dim, frames, self.grid.latent_height, self.grid.latent_width)
        draws = [chunk_noise(self.seed, chunk, step, shape) for step in range(self.num_steps)]
        return torch.stack(draws).to(device=model.device, dtype=model.dtype)

    def _remember(self, chunk: int, latents: Tensor) -> None:
        """Keep the clean latents of the chunks in the window: a prompt switch may recompute them."""
        self.latents = latents
        self._window_latents[chunk] = latents
        self._window_latents.pop(chunk - self._parts.cache_config.window_chunks, None)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError(
                f"the stream was closed in chunk {self._index}; restore a snapshot or start a new one"
            )

    def close(self) -> None:
        """End the stream; every later call on it is an error."""
        self.closed = True

    def set_prompt(self, text: str, mode: PromptMode = "soft") -> None:
        """Change the prompt from the next chunk on.

        "soft" changes the text only: the window still shows the old one. "recache" also recomputes the
        window's keys and values under the new text, from the clean latents kept for it (spec 2.7). "hard"
        starts anew: what follows is what a new stream with this prompt and seed gives, and FrameChunk.index
        goes on.
        """
        if mode not in ("soft", "recache", "hard"):
            raise ValueError(f"mode is {mode!r}; use 'soft', 'recache' or 'hard'")
        self._check_open()
        text_states = self._parts.encode_text(text)
        with self._closed_on_error():
            self._set_text(text, text_states)
            if mode == "hard":
                self._start()
            elif mode == "recache":
                self._parts.runner.recache(self._cache, self._window_latents, self._text)

    @torch.no_grad()
    def continue_from(self, frames: ndarray) -> None:
        """Take a given clip as the beginning of a fresh stream: uint8 [T, H, W, 3], at the stream's size and
        rate.

        The clip is encoded by the VAE and prefilled in whole chunks; where T does not fill whole chunks, its
        last frames are used. The stream then yields what comes after it. Raises ValueError for a clip that is
        too short or of another size, RuntimeError when the stream has begun.
        """
        self._check_open()
        if self._cache.next_chunk:
            raise RuntimeError(
                f"the stream is at chunk {self._cache.next_chunk}; continue a clip with a new stream"
            )
        parts, chunk_frames = self._parts, self._parts.cache_config.chunk_frames
        pixels = pixels_from_frames(frames)
        size = (self.grid.height, self.grid.width)
        if tuple(pixels.shape[-2:]) != size:
            raise ValueError(
                f"the clip is {tuple(pixels.shape[-2:])} pixels and the stream is {size}; resize the clip"
            )
        shortest = self.grid.pixel_frames(chunk_frames)
        if pixels.shape[2] < shortest:
            raise ValueError(
                f"the clip has {pixels.shape[2]} frames; at least {shortest} are needed, one whole chunk"
            )
        complete = (pixels.shape[2] - 1) // self.grid.temporal_stride + 1
        latent_frames = complete // chunk_frames * chunk_frames
        used = pixels[:, :, -self.grid.pixel_frames(latent_frames) :]
        latents = parts.vae.encode(used.to(device=parts.model.device, dtype=parts.model.dtype))
        with self._closed_on_error():
            for piece in latents.split(chunk_frames, dim=2):
                plan = self._cache.plan_chunk()
                parts.runner.prefill(self._cache, plan, piece, self._text)
                self._remember(plan.chunk, piece)
                self._decode(piece)
                self._index += 1

    def snapshot(self) -> Snapshot:
        """A copy of the whole state between two chunks; Pipeline.restore continues it bit for bit."""
        self._check_open()
        tensors = {f"cache.{name}": tensor for name, tensor in self._cache.tensors().items()}
        tensors |= {f"decoder.{name}": tensor for name, tensor in self._decoder_state.tensors().items()}
        tensors |= {f"window_latents.{chunk}": latents for chunk, latents in self._window_latents.items()}
        tensors["text_states"] = self._text_states
        info = {
            "format": SNAPSHOT_FORMAT,
            "fingerprint": self._parts.fingerprint,
            "dtype": str(self._parts.model.dtype),
            "cache": to_dict(self._parts.cache_config),
            "denoising_timesteps": list(self._parts.runner.schedule.denoising_timesteps),
            "prompt": self.prompt,
            "seed": self.seed,
            "height": self.grid.height,
            "width": self.grid.width,
            "index": self._index,
            "next_chunk": self._cache.next_chunk,
            "slot_chunks": list(self._cache.slot_chunks),
            "decoded_frames": self._decoder_state.frames,
        }
        return Snapshot({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, info)

    @classmethod
    def from_snapshot(cls, parts: StreamParts, grid: LatentGrid, snapshot: Snapshot) -> VideoStream:
        """The stream a snapshot was taken of. Raises ValueError when it is of another model, format or
        setting."""
        info = snapshot.info
        expected = {
            "format": SNAPSHOT_FORMAT,
            "fingerprint": parts.fingerprint,
            "dtype": str(parts.model.dtype),
            "cache": json.loads(json.dumps(to_dict(parts.cache_config))),
            "denoising_timesteps": list(parts.runner.schedule.denoising_timesteps),
        }
        for name, value in expected.items():
            if info.get(name) != value:
                raise ValueError(
                    f"the snapshot's {name} is {info.get(name)!r}, this pipeline's is {value!r}; "
                    "restore it with the model and settings it was taken with"
                )
        missing = [name for name in _SNAPSHOT_INFO if name not in info]
        missing += ["text_states"] * ("text_states" not in snapshot.tensors)
        if missing:
            raise ValueError(f"the snapshot lacks {', '.join(missing)}; take it again")
        stream = cls(parts, grid, info["prompt"], snapshot.tensors["text_states"], info["seed"])
        stream._load(snapshot)
        return stream

    def _load(self, snapshot: Snapshot) -> None:
        info = snapshot.info
        groups: dict[str, dict[str, Tensor]] = {"cache": {}, "decoder": {}, "window_latents": {}}
        for name, tensor in snapshot.tensors.items():
            group, _, rest = name.partition(".")
            if group in groups:
                groups[group][rest] = tensor
        model = self._parts.model
        self._cache.load(groups["cache"], info["slot_chunks"], info["next_chunk"])
        self._decoder_state.load(groups["decoder"], info["decoded_frames"])
        self._window_latents = {
            int(chunk): latents.to(device=model.device, dtype=model.dtype)
            for chunk, latents in groups["window_latents"].items()
        }
        self._index = info["index"]
        window = info["slot_chunks"][self._parts.cache_config.sink_chunks :]
        lost = [chunk for chunk in window if chunk != EMPTY and chunk not in self._window_latents]
        if lost:
            raise ValueError(f"the snapshot lacks the latents of chunk {lost[0]}; take it again")
