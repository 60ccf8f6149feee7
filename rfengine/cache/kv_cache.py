"""StreamingKVCache: a contiguous arena [sink | slot | slot | ...] for every layer, written in place.

Attention does not care about the order of keys, so a chunk that leaves is overwritten where it is: nothing is
rolled or concatenated. All decisions are integers on the host, made once for each chunk in a CachePlan.
Shapes: L layers, B batch, S arena tokens, T tokens of a chunk, H heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.cache.sink_policy import build_sink_policy
from rfengine.config import CacheConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.rotary import rotary_table

EMPTY = -1


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Where one chunk is written, what leaves for it, and which time index every slot has then.

    chunk: number of the chunk in the stream. slot: the slot it is written to. evicts: whether the chunk in
    that slot leaves the window. filled_slots: slots that hold something once this chunk is written; they come
    first. slot_times: time index of the first latent frame of every filled slot.
    """

    chunk: int
    slot: int
    evicts: bool
    filled_slots: int
    slot_times: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's views for one chunk: the arena to read, [B, S, H, E], and the chunk's slot to write, [B, T,
    H, E]."""

    keys: Tensor
    values: Tensor
    slot_keys: Tensor
    slot_values: Tensor
    slot_raw_keys: Tensor | None
    kv_len: int
    filled_tokens: Tensor


def arena_shape(
    model: WanConfig, config: CacheConfig, grid: LatentGrid, batch: int = 1
) -> tuple[int, int, int, int, int]:
    """[L, B, S, H, E] of the keys, of the values, and with relative positions of the raw keys."""
    tokens = config.window_frames * grid.frame_tokens
    return model.num_layers, batch, tokens, model.num_heads, model.head_dim


class StreamingKVCache:
    """Keys and values of the sink and the window, for all layers.

    A chunk is planned (plan_chunk), begun (begin_chunk), computed over its layers' views (layer), and
    committed (commit).

    keys: rotated keys [L, B, S, H, E]; values: the same shape; raw_keys: keys after the norm and before
    rotation, kept only with relative positions, where a slot's time index changes. rotation: cosines and
    sines [2, S, E / 2] of every slot's present time index; query_rotation: [2, T, E / 2], those of the chunk
    that has begun. filled_tokens: int32 [1], how much of S the chunk sees. Memory is fixed from the start.
    """

    def __init__(
        self,
        model: WanConfig,
        config: CacheConfig,
        grid: LatentGrid,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ops: Ops = REFERENCE_OPS,
    ) -> None:
        self.config = config
        self.grid = grid
        self.head_dim = model.head_dim
        self.chunk_tokens = config.chunk_frames * grid.frame_tokens
        arena = arena_shape(model, config, grid, batch)
        self.keys = torch.zeros(arena, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.raw_keys = torch.zeros_like(self.keys) if config.positions == "relative" else None
        self.policy = build_sink_policy(config, self.keys[:, :, : self.sink_tokens], ops)
        self.filled_tokens = torch.zeros(1, dtype=torch.int32, device=device)
        self.rotation = torch.zeros(2, arena[2], model.head_dim // 2, dtype=torch.float32, device=device)
        self.query_rotation = self.rotation[:, : self.chunk_tokens].clone()
        places = range(config.window_frames) if config.positions == "relative" else range(0)
        self._place_rotation = self._rotation_of(places)  # relative positions use these time indices only
        self._shown_times = [EMPTY] * config.window_chunks  # time index that `rotation` holds for every slot
        self._stand_before(0, [EMPTY] * config.window_chunks)

    def _stand_before(self, chunk: int, slot_chunks: Sequence[int]) -> None:
        self.slot_chunks = list(slot_chunks)
        self.next_chunk = chunk
        self.begun_chunk = chunk - 1  # the last chunk whose eviction and re-phasing were done

    def reset(self) -> None:
        """Back to the start of a video, in place: every address stays, and the state is that of a new
        cache."""
        for tensor in self.tensors().values():
            tensor.zero_()
        self._stand_before(0, [EMPTY] * self.config.window_chunks)

    @property
    def sink_tokens(self) -> int:
        return self.config.sink_chunks * self.chunk_tokens

    def plan_chunk(self) -> CachePlan:
        """Decide, without changing anything, what the next chunk does to the cache."""
        if self.begun_chunk == self.next_chunk:
            raise RuntimeError(f"chunk {self.next_chunk} has begun; commit it before the next one is planned")
        chunks = list(self.slot_chunks)
        evicts = EMPTY not in chunks
        slot = self.policy.leaving(chunks) if evicts else chunks.index(EMPTY)
        chunks[slot] = self.next_chunk
        filled = [chunk for chunk in chunks if chunk != EMPTY]
        return CachePlan(self.next_chunk, slot, evicts, len(filled), self._slot_times(filled))

    def begin_chunk(self, plan: CachePlan) -> None:
        """Evict, then give every slot its new phase. Done once for each chunk: a repeated call changes
        nothing."""
        if plan.chunk != self.next_chunk:
            raise RuntimeError(
                f"the plan is for chunk {plan.chunk} but chunk {self.next_chunk} is next; plan again"
            )
        self._show(plan)
        if plan.evicts and self.begun_chunk != plan.chunk:  # then every slot is filled
            leaving = self.slot_tokens(plan.slot).start
            self.policy.evict(self.raw_keys, self.keys, self.values, self.rotation, leaving)
        self.begun_chunk = plan.chunk

    def begin_rewrite(self, slot: int) -> CachePlan:
        """Make ready to write the chunk of a filled slot once more; it sees the slots up to and with its
        own."""
        chunks = self.slot_chunks[: slot + 1]
        plan = CachePlan(self.slot_chunks[slot], slot, False, slot + 1, self._slot_times(chunks))
        self._show(plan)
        return plan

    def commit(self, plan: CachePlan) -> None:
        """The chunk's final keys and values are in its slot: the next chunk follows."""
        if plan.chunk != self.next_chunk or self.begun_chunk != plan.chunk:
            raise RuntimeError(f"chunk {plan.chunk} has not begun; call begin_chunk before commit")
        self.slot_chunks[plan.slot] = plan.chunk
        self.next_chunk += 1

    def _show(self, plan: CachePlan) -> None:
        """Bring what the device reads, the fill and the rotations, to the view of `plan`; keys stay as they
        are."""
        self.filled_tokens.fill_(plan.filled_slots * self.chunk_tokens)
        for slot, time in enumerate(plan.slot_times):
            if time != self._shown_times[slot]:
                self.rotation[:, self.slot_tokens(slot)] = self._chunk_rotation(time)
                self._shown_times[slot] = time
        self.query_rotation.copy_(self.rotation[:, self.slot_tokens(plan.slot)])

    def _chunk_rotation(self, time: int) -> Tensor:
        """[2, T, E / 2] of a chunk whose first latent frame has the index `time`."""
        if self.config.positions == "absolute":
            return self._rotation_of(range(time, time + self.config.chunk_frames))
        start = time * self.grid.frame_tokens
        return self._place_rotation[:, start : start + self.chunk_tokens]

    def _rotation_of(self, frames: range) -> Tensor:
        indices = torch.arange(frames.start, frames.stop, dtype=torch.int64, device=self.rotation.device)
        return rotary_table(self.head_dim, indices, self.grid.token_rows, self.grid.token_columns)

    def _slot_times(self, chunks: list[int]) -> tuple[int, ...]:
        """Time index of every filled slot: its place in the window (relative) or in the stream (absolute)."""
        frames = self.config.chunk_frames
        if self.config.positions == "absolute":
            return tuple(chunk * frames for chunk in chunks)
        order = {chunk: place for place, chunk in enumerate(sorted(chunks))}
        return tuple(order[chunk] * frames for chunk in chunks)

    def slot_tokens(self, slot: int) -> slice:
        return slice(slot * self.chunk_tokens, (slot + 1) * self.chunk_tokens)

    def layer(self, index: int, plan: CachePlan, keep_raw: bool) -> LayerCache:
        """The views of one layer for the planned chunk; keep_raw adds the slot of the raw keys."""
        tokens = self.slot_tokens(plan.slot)
        keys, values = self.keys[index], self.values[index]
        raw = self.raw_keys[index][:, tokens] if keep_raw and self.raw_keys is not None else None
        filled = plan.filled_slots * self.chunk_tokens
        return LayerCache(keys, values, keys[:, tokens], values[:, tokens], raw, filled, self.filled_tokens)

    def chronological(self, arena: Tensor) -> Tensor:
        """The valid tokens of an arena [L, B, S, H, E] in the order sink, then oldest to newest; a copy."""
        filled = [slot for slot, chunk in enumerate(self.slot_chunks) if chunk != EMPTY]
        ordered = sorted(filled, key=lambda slot: self.slot_chunks[slot])
        return torch.cat([arena[:, :, self.slot_tokens(slot)] for slot in ordered], dim=2)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, not copied; the integers are slot_chunks and next_chunk."""
        raw = {} if self.raw_keys is None else {"raw_keys": self.raw_keys}
        return {"keys": self.keys, "values": self.values, **raw, **self.policy.tensors()}

    def load(self, tensors: dict[str, Tensor], slot_chunks: Sequence[int], next_chunk: int) -> None:
        """Take over a state saved between two chunks, in place, cast to the cache's dtype.

        Raises ValueError, before anything is changed, when a tensor is missing, unknown or of another shape,
        and when the slots cannot be those before `next_chunk`: the state is of another model, size or cache
        configuration, or damaged.
        """
        state = self.tensors()
        for name in sorted(state.keys() | tensors.keys()):
            own, saved = state.get(name), tensors.get(name)
            if own is None or saved is None or saved.shape != own.shape or not saved.is_floating_point():
                found, needed = (
                    "missing" if each is None else f"{tuple(each.shape)} in {each.dtype}"
                    for each in (saved, own)
                )
                raise ValueError(f"{name} of the saved cache is {found}; in this stream it is {needed}")
        check_slots(self.config, slot_chunks, next_chunk)
        for name, own in state.items():
            own.copy_(tensors[name])
        self._stand_before(next_chunk, slot_chunks)


def check_slots(config: CacheConfig, slot_chunks: Sequence[int], next_chunk: int) -> None:
    """Raises ValueError unless slots can hold `slot_chunks` when `next_chunk` is the next one to be written.

    The sink holds the first chunks and the window the last ones, from its oldest on around its end.
    """
    first, count = config.sink_chunks, config.window_chunks
    if len(slot_chunks) != count:
        raise ValueError(f"the saved cache has {len(slot_chunks)} slots; this stream has {count}")
    if next_chunk < count:
        wanted = [*range(next_chunk), *[EMPTY] * (count - next_chunk)]
        found = list(slot_chunks)
    else:
        wanted = [*range(first), *range(next_chunk - count + first, next_chunk)]
        window = slot_chunks[first:]
        oldest = window.index(min(window))
        found = [*slot_chunks[:first], *window[oldest:], *window[:oldest]]
    if found != wanted:
        raise ValueError(
            f"the slots of the saved cache hold the chunks {list(slot_chunks)}, which cannot be before chunk "
            f"{next_chunk}"
        )
