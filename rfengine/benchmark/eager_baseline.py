"""The baseline: the usual way to run a causal Wan2.1 with EMA-Sink, in our own plain code.

Written from the mathematics alone (arXiv 2512.04678), with the habits of published code kept on purpose:
keys are kept unrotated in a buffer per layer, and every read of every layer of every pass joins sink and
window again and rotates all of it in complex128; a chunk that leaves shifts the buffer by clones; indices are
tensors that the host reads; q, k and v are three products; norms, gates and GELU are operations of their own;
the modulation is made in every pass; latents go through the VAE one at a time. No graphs. Only the attention
is the best library there is.
B batch, F latent frames, T tokens, D model dim, H heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.benchmark.attention_libraries import Attend, sdpa
from rfengine.config import CacheConfig, EngineConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.models.vae import WanVAE
from rfengine.schedule import FlowSchedule, add_noise

if TYPE_CHECKING:
    from numpy import ndarray

NoiseSource = Callable[[int, int], Tensor]  # (chunk, step) -> standard normal [1, C, F, h, w]
TABLE_FRAMES = 1024  # rows of the rotary table, as long as published code makes it


@dataclass
class LayerBuffer:
    """What one layer keeps: keys before rotation and values [B, S, H, E], and where it stands, on the device.

    seen, filled: int64 [1], tokens ever written and tokens that are valid. text: keys and values of the
    prompt, made by the first pass.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    filled: Tensor
    text: tuple[Tensor, Tensor] | None = None


class EagerTransformer:
    """One causal pass after another over the parameters of a WanDiT, read by their names."""

    def __init__(
        self, config: WanConfig, cache: CacheConfig, weights: Mapping[str, Tensor], attend: Attend = sdpa
    ) -> None:
        if cache.positions != "relative":
            raise ValueError(f"positions is {cache.positions!r}; the baseline knows 'relative' alone")
        plain = CacheConfig(
            cache.chunk_frames, cache.window_frames, cache.sink, cache.sink_frames, cache.alpha,
            sink_precision=cache.sink_precision,
        )  # fmt: skip
        if (
            cache != plain
            or cache.window_frames % cache.chunk_frames
            or cache.sink_frames % cache.chunk_frames
        ):
            raise ValueError(
                "the baseline knows a sink and a window of whole chunks, all of one length; compare a model "
                "with such a cache"
            )
        self.config, self.cache, self.weights, self.attend = config, cache, weights, attend
        device = weights["patch_embedding.weight"].device
        side = 2 * (config.head_dim // 6)
        self.turns = [_turns(dim, device) for dim in (config.head_dim - 2 * side, side, side)]

    def new_buffers(self, grid: LatentGrid) -> list[LayerBuffer]:
        weight = self.weights["patch_embedding.weight"]
        tokens = self.cache.window_frames * grid.frame_tokens
        shape = (1, tokens, self.config.num_heads, self.config.head_dim)
        arena = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        index = torch.zeros(1, dtype=torch.long, device=weight.device)
        return [
            LayerBuffer(arena.clone(), arena.clone(), index.clone(), index.clone())
            for _ in range(self.config.num_layers)
        ]

    def forward(
        self, latents: Tensor, timestep: float, text_states: Tensor, buffers: list[LayerBuffer], start: int
    ) -> Tensor:
        """Flow of latents [B, C, F, h, w], token `start` of the stream being their first; writes buffers."""
        weights, frames = self.weights, latents.shape[2]
        patches = weights["patch_embedding.weight"], weights["patch_embedding.bias"]
        x = F.conv3d(latents, *patches, stride=self.config.patch_size)
        size = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        times = torch.full(latents.shape[:1] + (frames,), timestep, device=x.device)
        embedded, rows = self._time_rows(times)
        text = self._text_embedding(text_states)
        for layer, buffer in enumerate(buffers):
            x = self._block(f"blocks.{layer}.", x, rows, text, buffer, size, start)
        shift, scale = (weights["head.modulation"].unsqueeze(1) + embedded.unsqueeze(2)).unbind(2)
        x = _modulated(_layer_norm(x, self.config.eps), shift, scale)
        return self._unpatchify(self._linear("head.head", x), latents, size)

    def _block(
        self,
        path: str,
        x: Tensor,
        rows: Tensor,
        text: Tensor,
        buffer: LayerBuffer,
        size: tuple[int, int, int],
        start: int,
    ) -> Tensor:
        """rows: [B, F, 6, D], the timestep's part of shift, scale and gate of both branches."""
        weights, eps = self.weights, self.config.eps
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (
            weights[path + "modulation"].unsqueeze(1) + rows
        ).unbind(2)
        y = _modulated(_layer_norm(x, eps), shift, scale)
        x = x + _per_frame(gate, self._self_attention(path + "self_attn.", y, buffer, size, start))
        y = _layer_norm(x, eps) * weights[path + "norm3.weight"] + weights[path + "norm3.bias"]
        x = x + self._cross_attention(path + "cross_attn.", y, text, buffer)
        y = _modulated(_layer_norm(x, eps), shift_ffn, scale_ffn)
        y = F.gelu(self._linear(path + "ffn.0", y), approximate="tanh")
        return x + _per_frame(gate_ffn, self._linear(path + "ffn.2", y))

    def _self_attention(
        self, path: str, x: Tensor, buffer: LayerBuffer, size: tuple[int, int, int], start: int
    ) -> Tensor:
        q = self._heads(self._rms_norm(path + "norm_q", self._linear(path + "q", x)))
        k = self._heads(self._rms_norm(path + "norm_k", self._linear(path + "k", x)))
        v = self._heads(self._linear(path + "v", x))
        sink = self.cache.sink_frames * size[1] * size[2]
        self.write(buffer, k, v, start, sink)
        filled = buffer.filled.item()
        keys, values = (
            torch.cat([arena[:, : min(sink, filled)], arena[:, sink:filled]], dim=1)
            for arena in (buffer.keys, buffer.values)
        )
        first = keys.shape[1] // (size[1] * size[2]) - size[0]
        out = self.attend(self._rotate(q, first, size), self._rotate(keys, 0, size), values)
        return self._linear(path + "o", out.flatten(2))

    def write(self, buffer: LayerBuffer, k: Tensor, v: Tensor, start: int, sink: int) -> None:
        """Write a chunk behind what is filled; one new to a full buffer first makes room."""
        count, end = k.shape[1], start + k.shape[1]
        seen, filled, capacity = buffer.seen.item(), buffer.filled.item(), buffer.keys.shape[1]
        fresh = end - seen
        leaving = max(0, count + filled - capacity) if fresh > 0 else 0
        if leaving:
            kept = filled - leaving - sink
            for arena in (buffer.keys, buffer.values):
                evicted = arena[:, sink : sink + leaving].clone()
                arena[:, sink : sink + kept] = arena[:, sink + leaving : sink + leaving + kept].clone()
                if self.cache.sink == "ema":
                    alpha = self.cache.alpha
                    arena[:, :sink] = alpha * arena[:, :sink] + (1 - alpha) * evicted
        filled = filled + fresh - leaving
        buffer.keys[:, filled - count : filled] = k
        buffer.values[:, filled - count : filled] = v
        buffer.seen.fill_(end)
        buffer.filled.fill_(filled)

    def _cross_attention(self, path: str, x: Tensor, text: Tensor, buffer: LayerBuffer) -> Tensor:
        if buffer.text is None:
            keys = self._heads(self._rms_norm(path + "norm_k", self._linear(path + "k", text)))
            buffer.text = keys, self._heads(self._linear(path + "v", text))
        q = self._heads(self._rms_norm(path + "norm_q", self._linear(path + "q", x)))
        return self._linear(path + "o", self.attend(q, *buffer.text).flatten(2))

    def _time_rows(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded timesteps [B, F, D], and their six rows [B, F, 6, D]."""
        half = self.config.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=times.device) / half
        angles = times.double().unsqueeze(-1) * torch.pow(10000.0, -exponents)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        sinusoid = sinusoid.to(self.weights["patch_embedding.weight"].dtype)
        embedded = self._linear("time_embedding.2", F.silu(self._linear("time_embedding.0", sinusoid)))
        return embedded, self._linear("time_projection.1", F.silu(embedded)).unflatten(-1, (6, -1))

    def _text_embedding(self, text_states: Tensor) -> Tensor:
        padded = F.pad(text_states, (0, 0, 0, self.config.text_len - text_states.shape[1]))
        hidden = F.gelu(self._linear("text_embedding.0", padded), approximate="tanh")
        return self._linear("text_embedding.2", hidden)

    def _rotate(self, x: Tensor, first: int, size: tuple[int, int, int]) -> Tensor:
        """x [B, T, H, E] with its frames at times first, first + 1, ..., in complex128."""
        _, rows, columns = size
        frames = x.shape[1] // (rows * columns)
        time, row, column = self.turns
        axes = (
            time[first : first + frames, None, None], row[None, :rows, None], column[None, None, :columns]
        )  # fmt: skip
        turns = torch.cat([axis.expand(frames, rows, columns, -1) for axis in axes], dim=-1)
        turns = turns.reshape(1, -1, 1, x.shape[-1] // 2)
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)

    def _rms_norm(self, path: str, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.config.eps)
        return normed.to(x.dtype) * self.weights[path + ".weight"]

    def _linear(self, path: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[path + ".weight"], self.weights[path + ".bias"])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_heads, -1))

    def _unpatchify(self, tokens: Tensor, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
        frames, rows, columns = size
        _, patch, _ = self.config.patch_size
        grid = tokens.view(latents.shape[0], frames, rows, columns, patch, patch, self.config.out_dim)
        return torch.einsum("bfrcpqd->bdfrpcq", grid).reshape(latents.shape)


class EagerStream:
    """One running video: chunks one after another, latents [1, C, F, h, w] or uint8 frames [T, H, W, 3]."""

    def __init__(
        self,
        config: EngineConfig,
        transformer: EagerTransformer,
        vae: WanVAE,
        grid: LatentGrid,
        text_states: Tensor,
        noise: NoiseSource,
    ) -> None:
        self.config, self.transformer, self.vae, self.grid = config, transformer, vae, grid
        self.text_states, self.noise = text_states, noise
        self.schedule = FlowSchedule(config.schedule)
        self.buffers = transformer.new_buffers(grid)
        weight = transformer.weights["patch_embedding.weight"]
        self.decoder_state = vae.decoder_state(
            1, grid.latent_height, grid.latent_width, vae.decoder_dtype, weight.device
        )
        self.chunk = 0

    @torch.no_grad()
    def advance_latents(self) -> Tensor:
        """Clean latents of the next chunk: every denoising step, then the context pass."""
        start = self.chunk * self.config.cache.chunk_frames * self.grid.frame_tokens
        x = self.noise(self.chunk, 0)
        for step, timestep in enumerate(self.schedule.denoising_timesteps):
            flow = self.transformer.forward(x, timestep, self.text_states, self.buffers, start)
            sigma = self._sigma(timestep, x.device)
            x0 = (x.double() - sigma.double() * flow.double()).to(x.dtype)
            if step + 1 == len(self.schedule.denoising_timesteps):
                break
            following = self._sigma(self.schedule.denoising_timesteps[step + 1], x.device)
            x = add_noise(x0, self.noise(self.chunk, step + 1), following)
        self.transformer.forward(x0, self.schedule.context_timestep, self.text_states, self.buffers, start)
        self.chunk += 1
        return x0

    @torch.no_grad()
    def advance(self) -> ndarray:
        """uint8 frames of the next chunk in host memory, decoded latent by latent."""
        latents = self.advance_latents().split(1, dim=2)
        pieces = [self.vae.decode(latent, self.decoder_state) for latent in latents]
        pixels = torch.cat(pieces, dim=2)
        pixels = (pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255.0
        return pixels.round().to(torch.uint8)[0].permute(1, 2, 3, 0).cpu().numpy()

    def _sigma(self, timestep: float, device: torch.device) -> Tensor:
        """Looked up in the table at every use."""
        return self.schedule.sigma_at(torch.tensor(timestep, device=device))


def device_noise(config: EngineConfig, grid: LatentGrid, like: Tensor, seed: int) -> NoiseSource:
    """Standard normal noise drawn where it is used, in the dtype and on the device of `like`."""
    generator = torch.Generator(like.device).manual_seed(seed)
    frames = config.cache.chunk_frames
    shape = (1, config.model.in_dim, frames, grid.latent_height, grid.latent_width)
    return lambda chunk, step: torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _turns(dim: int, device: torch.device) -> Tensor:
    """Unit numbers of the complex plane [TABLE_FRAMES, dim / 2] for every position of one axis."""
    rates = torch.pow(10000.0, -torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angles = torch.outer(torch.arange(TABLE_FRAMES, dtype=torch.float64, device=device), rates)
    return torch.polar(torch.ones_like(angles), angles)


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, D] times 1 + scale plus shift, [B, F, D] each."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def _per_frame(gate: Tensor, x: Tensor) -> Tensor:
    return (x.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)
