"""A stream without an arena: every latent frame's keys and values in lists, rotated anew in every pass.

An independent statement of what the cache, its policies and the schedules compute, written from their
descriptions alone; slow, and for small models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.config import CacheConfig, ScheduleConfig
from rfengine.models.dit import TextKeysValues, WanDiT, patchify
from rfengine.ops.reference import rms_norm, rotate, unpatchify
from rfengine.rotary import rotary_table
from rfengine.schedule import FlowSchedule
from support.models import GRID, SMALL


def noise(chunk: int, step: int, frames: int) -> Tensor:
    """[1, C, frames, h, w] of a draw for a small model, the same for every call."""
    generator = torch.Generator().manual_seed(1000 * chunk + step)
    return torch.randn(1, SMALL.in_dim, frames, GRID.latent_height, GRID.latent_width, generator=generator)


@dataclass
class Frame:
    """Keys before rotation and values of one latent frame, [B, T, H, E] for each layer."""

    number: int
    keys: list[Tensor]
    values: list[Tensor]

    def averaged(self, other: Frame, weight: float) -> Frame:
        """weight * this + (1 - weight) * other."""
        return Frame(
            other.number,
            [weight * a + (1 - weight) * b for a, b in zip(self.keys, other.keys, strict=True)],
            [weight * a + (1 - weight) * b for a, b in zip(self.values, other.values, strict=True)],
        )


class PlainStream:
    """Chunks of a model under a cache and a schedule; noise(chunk, step, frames) is [B, C, F, h, w]."""

    def __init__(self, model: WanDiT, cache: CacheConfig, schedule: ScheduleConfig, noise) -> None:
        self.model, self.cache, self.schedule, self.noise = model, cache, FlowSchedule(schedule), noise
        self.rolling, self.chunk, self.first = schedule.rolling, 0, 0
        self.sink: list[Frame] = []
        self.memory: list[Frame] = []
        self.past: list[Frame] = []
        self.flight: list[list] = []  # [chunk, latents, step], the oldest first
        self.left = 0

    # what the policies do

    def make_room(self, count: int) -> None:
        room = self.cache.sink_frames + self.cache.past_frames - len(self.sink) - len(self.past)
        for _ in range(max(0, count - room)):
            self.leave(self.past.pop(self.leaving()))

    def leaving(self) -> int:
        if self.cache.eviction == "oldest":
            return 0
        size = self.cache.chunk_frames
        present = [
            torch.stack([frame.keys[i] for frame in self.past[-size:]]).mean((0, 2)) for i in self.layers
        ]
        likeness = []
        for frame in self.past[:-size]:
            each = [
                F.cosine_similarity(frame.keys[i].mean(1), present[i], dim=-1).mean() for i in self.layers
            ]
            likeness.append(sum(each) / len(each))
        return min(range(len(likeness)), key=likeness.__getitem__)

    @property
    def layers(self) -> range:
        return range(len(self.model.blocks))

    def leave(self, frame: Frame) -> None:
        if self.cache.sink == "ema":
            place = self.left % self.cache.sink_frames
            self.sink[place] = self.sink[place].averaged(frame, self.cache.alpha)
        elif self.cache.memory_rates:
            if not self.memory:
                self.memory = [frame for _ in self.cache.memory_rates]
            else:
                pairs = zip(self.memory, self.cache.memory_rates, strict=True)
                self.memory = [old.averaged(frame, 1 - rate) for old, rate in pairs]
        self.left += 1

    def keep(self, frames: list[Frame]) -> None:
        for frame in frames:
            (self.sink if len(self.sink) < self.cache.sink_frames else self.past).append(frame)

    def context(self) -> tuple[list[Frame], list[int]]:
        frames = [*self.sink, *self.memory, *self.past]
        if self.cache.positions == "absolute":
            return frames, [frame.number for frame in frames]
        return frames, list(range(len(frames)))

    # what the model does

    def forward(
        self, x: Tensor, timesteps: list[float], text: TextKeysValues, groups: int = 1
    ) -> tuple[Tensor, list[Frame]]:
        """The flow of x [B, C, F, h, w] over the context, and its frames. groups: equal parts of x, of which
        each sees itself and those before it."""
        seen, times = self.context()
        count, own = x.shape[2], self.first
        own_times = [own + i for i in range(count)]
        if self.cache.positions == "relative":
            own_times = [len(seen) + i for i in range(count)]
        eps, patch = self.model.config.eps, self.model.config.patch_size[1]
        grid = (x.shape[3] // patch, x.shape[4] // patch)
        tokens_of_frame, heads = grid[0] * grid[1], self.model.config.num_heads
        modulation = self.model.modulation(torch.tensor([timesteps]))

        def table(indices: list[int]) -> Tensor:
            return rotary_table(self.model.config.head_dim, torch.tensor(indices, dtype=torch.int64), *grid)

        def spread(rows: Tensor) -> Tensor:
            return rows.expand(-1, count, -1).repeat_interleave(tokens_of_frame, 1)

        def product(inputs: Tensor, layer) -> Tensor:
            return F.linear(inputs, layer.weight, layer.bias)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), mask)
            return out.transpose(1, 2).flatten(2)

        total = (len(seen) + count) * tokens_of_frame
        mask = torch.zeros(count * tokens_of_frame, total, dtype=torch.bool)
        part = count // groups * tokens_of_frame
        for group in range(groups):
            mask[group * part : (group + 1) * part, : len(seen) * tokens_of_frame + (group + 1) * part] = True
        weight = self.model.patch_embedding.weight.flatten(1)
        tokens = F.linear(patchify(x, patch), weight, self.model.patch_embedding.bias)
        made = [Frame(own + i, [], []) for i in range(count)]
        for index, block in enumerate(self.model.blocks):
            shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = map(
                spread, modulation.layers[index].unbind(2)
            )
            normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + scale) + shift
            attention = block.self_attn
            q = rms_norm(product(normed, attention.q), attention.norm_q.weight, eps).unflatten(
                -1, (heads, -1)
            )
            k = rms_norm(product(normed, attention.k), attention.norm_k.weight, eps).unflatten(
                -1, (heads, -1)
            )
            v = product(normed, attention.v).unflatten(-1, (heads, -1))
            for frame, key, value in zip(
                made, k.split(tokens_of_frame, 1), v.split(tokens_of_frame, 1), strict=True
            ):
                frame.keys.append(key)
                frame.values.append(value)
            keys = torch.cat([*(frame.keys[index] for frame in seen), k], 1)
            values = torch.cat([*(frame.values[index] for frame in seen), v], 1)
            q, keys = rotate(q, table(own_times)), rotate(keys, table([*times, *own_times]))
            tokens = tokens + gate * product(attend(q, keys, values, mask), attention.o)
            normed = F.layer_norm(tokens, tokens.shape[-1:], block.norm3.weight, block.norm3.bias, eps)
            cross = block.cross_attn
            q = rms_norm(product(normed, cross.q), cross.norm_q.weight, eps).unflatten(-1, (heads, -1))
            tokens = tokens + product(attend(q, text.keys[index], text.values[index]), cross.o)
            normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + scale_ffn) + shift_ffn
            hidden = F.gelu(product(normed, block.ffn[0]), approximate="tanh")
            tokens = tokens + gate_ffn * product(hidden, block.ffn[2])
        shift, scale = map(spread, modulation.head.unbind(2))
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + scale) + shift
        return unpatchify(product(normed, self.model.head.head), x), made

    # what the schedules do

    def commit(self, x0: Tensor, text: TextKeysValues) -> None:
        _, frames = self.forward(x0, [0.0] * x0.shape[2], text)
        self.keep(frames)
        self.chunk, self.first = self.chunk + 1, self.first + x0.shape[2]

    @torch.no_grad()
    def given(self, x0: Tensor, text: TextKeysValues) -> None:
        """A chunk that is there already."""
        self.make_room(x0.shape[2])
        self.commit(x0, text)

    @torch.no_grad()
    def advance(self, text: TextKeysValues, clean: Tensor | None = None) -> Tensor:
        return self._roll(text) if self.rolling != "none" else self._denoise(text, clean)

    def _denoise(self, text: TextKeysValues, clean: Tensor | None) -> Tensor:
        count = self.cache.chunk_frames if self.first else self.cache.first_chunk
        kept = 0 if clean is None else clean.shape[2]
        steps = self.schedule.steps_of(self.chunk)
        self.make_room(count)
        x = self.noise(self.chunk, 0, count)
        if clean is not None:
            x = torch.cat([clean, x[:, :, kept:]], dim=2)
        for step, (timestep, sigma) in enumerate(zip(steps.timesteps, steps.sigmas, strict=True)):
            flow, _ = self.forward(x, [0.0] * kept + [timestep] * (count - kept), text)
            x0 = x - sigma * flow
            if step + 1 < len(steps.sigmas):
                level = steps.sigmas[step + 1]
                x0 = (1 - level) * x0 + level * self.noise(self.chunk, step + 1, count)
            x = torch.cat([x[:, :, :kept], x0[:, :, kept:]], dim=2)
        self.commit(x, text)
        return x

    def _roll(self, text: TextKeysValues) -> Tensor:
        steps, size = self.schedule.steps_of(0), self.cache.chunk_frames
        while not self.flight or self.flight[0][2] < len(steps.sigmas):
            entering = self.flight[-1][0] + 1 if self.flight else self.chunk
            self.flight.append([entering, self.noise(entering, 0, size), 0])
            x = torch.cat([latents for _, latents, _ in self.flight], dim=2)
            timesteps = [steps.timesteps[step] for _, _, step in self.flight for _ in range(size)]
            groups = len(self.flight) if self.rolling == "causal" else 1
            flow, _ = self.forward(x, timesteps, text, groups)
            for entry, part in zip(self.flight, flow.split(size, dim=2), strict=True):
                x0 = entry[1] - steps.sigmas[entry[2]] * part
                entry[2] += 1
                if entry[2] < len(steps.sigmas):
                    level = steps.sigmas[entry[2]]
                    x0 = (1 - level) * x0 + level * self.noise(entry[0], entry[2], size)
                entry[1] = x0
        x0 = self.flight.pop(0)[1]
        self.make_room(size)
        self.commit(x0, text)
        return x0
