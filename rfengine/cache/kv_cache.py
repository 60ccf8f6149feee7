"""StreamingKVCache: keys and values of the sink and the window, per layer, in one contiguous arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.cache.eviction import Evictor, least_similar
from rfengine.cache.position import CachePosition, rewrite_plans
from rfengine.cache.sink_policy import EMPTY, CachePlan, frames_after, plan_frames, time_indices
from rfengine.config import CacheConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.rotary import rotary_table
from rfengine.tensor_parallel import WHOLE, TensorParallel


@dataclass(frozen=True, slots=True)
class Read:
    """What some of the queries see: the first kv_len tokens of the arena, for the next `tokens` queries.
    filled_tokens: the same number in int32 [1] on the device."""

    tokens: int
    kv_len: int
    filled_tokens: Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's views for one chunk.

    keys, values: what is read, [B, S, H, E], by the queries in the order of reads. own_keys, own_values,
    own_raw_keys: the whole arenas, of which the slots `slots` [F] are written; no raw keys are where None.
    """

    keys: Tensor
    values: Tensor
    reads: tuple[Read, ...]
    own_keys: Tensor
    own_values: Tensor
    own_raw_keys: Tensor | None
    slots: Tensor


def arena_shape(
    model: WanConfig, config: CacheConfig, grid: LatentGrid, batch: int = 1
) -> tuple[int, int, int, int, int]:
    """[L, B, S, H, E] of the keys, of the values, and with relative positions of the raw keys."""
    tokens = config.window_frames * grid.frame_tokens
    return model.num_layers, batch, tokens, model.num_heads, model.head_dim


class StreamingKVCache:
    """Keys and values of the sink and the window, for all layers, in slots of one latent frame.

    A chunk is planned (plan_chunk), begun (begin_chunk), computed over its layers' views (layer), and
    committed (commit).

    keys: rotated keys [L, B, S, H, E]; values: the same shape; raw_keys: keys after the norm and before
    rotation, kept only with relative positions, where a slot's time index changes. rotation: cosines and
    sines [2, S, E / 2] of the present time index of every resident slot; query_rotation: [2, T, E / 2], those
    of the chunk that has begun; write_slots: int64 [F], where its frames go. held: on the host, the number of
    the frame in every slot. joint_latents: [B, C, F, h, w], what a rolling schedule has in flight, of which
    joint_chunks chunks are there. parallel: the rank whose heads these are. Memory is fixed from the start,
    but for rows of integers and, once for each length of a chunk or a pass, write_slots and query_rotation.
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
        parallel: TensorParallel = WHOLE,
    ) -> None:
        self.config, self.grid, self.head_dim, self.parallel = config, grid, model.head_dim, parallel
        arena = arena_shape(parallel.own(model), config, grid, batch)
        self.keys = torch.zeros(arena, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.raw_keys = torch.zeros_like(self.keys) if config.positions == "relative" else None
        self.evictor = Evictor(config, grid.frame_tokens, self.keys, ops)
        self.joint_latents = torch.zeros(
            batch, model.in_dim, config.joint_frames, grid.latent_height, grid.latent_width,
            dtype=dtype, device=device,
        )  # fmt: skip
        # numbers of the frames in the slots, where only the device knows them
        by_device = config.eviction == "similarity"
        self.device_held = torch.zeros(config.resident_frames * by_device, dtype=torch.int64, device=device)
        resident = (2, config.resident_frames, grid.frame_tokens, model.head_dim // 2)
        self._rotation = torch.zeros(resident, dtype=torch.float32, device=device)
        places = range(config.window_frames) if config.positions == "relative" else range(0)
        # [2, P, frame tokens, E / 2]: relative positions use these time indices only
        self._place_rotation = self._rotation_of(places).unflatten(1, (len(places), -1)) if places else None
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self._filled: dict[int, Tensor] = {}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._reads: tuple[Read, ...] = ()
        self._view: tuple[int, ...] = ()  # what the layers' views depend on
        self._layers: dict[tuple[int, bool], LayerCache] = {}
        self.write_slots, self.query_rotation = self._written_to(config.chunk_frames)
        self._stand_before(0, 0, [EMPTY] * config.window_frames, 0)

    def _stand_before(self, chunk: int, frame: int, held: Sequence[int], joint_chunks: int) -> None:
        self.held, self.joint_chunks = list(held), joint_chunks
        self.next_chunk, self.next_frame = chunk, frame
        self.begun_chunk = chunk - 1  # the last chunk whose eviction and re-phasing were done
        # time index of every resident slot that the device has
        self._shown = (EMPTY,) * self.config.resident_frames

    def reset(self) -> None:
        """Back to the start of a video, in place: every address stays, and the state is that of a new
        cache."""
        for tensor in self.tensors().values():
            tensor.zero_()
        self._stand_before(0, 0, [EMPTY] * self.config.window_frames, 0)

    @property
    def rotation(self) -> Tensor:
        return self._rotation.flatten(1, 2)

    @property
    def full_read(self) -> tuple[int, Tensor]:
        """Tokens of the whole arena, and the same number on the device."""
        slots = self.config.window_frames
        return slots * self.grid.frame_tokens, self._filled_tokens(slots)

    def plan_chunk(self, frames: int | None = None) -> CachePlan:
        """Decide, without changing anything, what the next chunk does to the cache. frames: its latent
        frames; None: those of a first chunk at the start of a video, and of any other after it."""
        if self.begun_chunk == self.next_chunk:
            raise RuntimeError(f"chunk {self.next_chunk} has begun; commit it before the next one is planned")
        if frames is None:
            frames = self.config.chunk_frames if self.next_frame else self.config.first_chunk
        return plan_frames(self.config, self.held, self.next_chunk, self.next_frame, frames)

    def begin_chunk(self, plan: CachePlan) -> None:
        """Evict, then give every slot its new phase. Done once for each chunk: a repeated call changes
        nothing."""
        if plan.chunk != self.next_chunk:
            raise RuntimeError(
                f"the plan is for chunk {plan.chunk} but chunk {self.next_chunk} is next; plan again"
            )
        is_new = self.begun_chunk != plan.chunk
        self.show(plan)
        if len(plan.slots) < plan.frames and is_new:
            self._choose_slots(plan)
        if plan.evicts and is_new:  # then every resident slot is filled
            resident = slice(0, self.config.resident_frames * self.grid.frame_tokens)
            raw = None if self.raw_keys is None else self.raw_keys[:, :, resident]
            keys, values = self.keys[:, :, resident], self.values[:, :, resident]
            self.evictor.evict(raw, keys, values, self.rotation, plan.folds)
        self.begun_chunk = plan.chunk

    def rewrite_plans(self) -> list[CachePlan]:
        """The plans that write the past once more, in order of time; begin_rewrite begins each of them."""
        self.config.check_recache()
        return rewrite_plans(self.config, self.held, self.config.chunk_frames)

    def begin_rewrite(self, plan: CachePlan) -> None:
        """Make ready to write frames of the past once more; they see the slots up to and with their own."""
        for frame, slot in enumerate(plan.slots, plan.first_frame):
            self.held[slot] = frame
        self.show(plan)

    def commit(self, plan: CachePlan) -> None:
        """The chunk's final keys and values are in its slots: the next chunk follows."""
        if plan.chunk != self.next_chunk or self.begun_chunk != plan.chunk:
            raise RuntimeError(f"chunk {plan.chunk} has not begun; call begin_chunk before commit")
        self.held = frames_after(self.config, self.held, plan.slots, plan.first_frame)
        self.next_chunk += 1
        self.next_frame += plan.frames

    def begin_joint(self, causal: bool) -> CachePlan:
        """Make ready for a pass over the joint_chunks chunks in flight, which is not committed: their keys
        and values go behind what is filled. causal: a chunk sees those before it, else each sees all."""
        size, count = self.config.chunk_frames, self.joint_chunks
        start, times = time_indices(self.config, self.held)
        filled, frames = len(times), size * count
        first = self.next_frame if self.config.positions == "absolute" else filled
        slots = tuple(range(start + filled, start + filled + frames))
        plan = CachePlan(
            self.next_chunk, self.next_frame, frames, slots, False, (), start, filled + frames,
            tuple(range(first, first + frames)),
        )  # fmt: skip
        parts = range(size, frames + 1, size) if causal else (frames,)
        self._look(plan, tuple(filled + part for part in parts))
        self.write_slots.copy_(self._row(slots))
        if self._place_rotation is None:
            self.query_rotation.copy_(self._rotation_of(plan.times))
        else:
            self.query_rotation.copy_(self._place_rotation[:, first : first + frames].flatten(1, 2))
        return plan

    def show(self, plan: CachePlan) -> None:
        """Bring what the device reads, the fill, the slots and the rotations, to the view of `plan`; keys
        stay as they are, and so do slots that the device chooses."""
        self._look(plan, (plan.filled,))
        if len(plan.slots) == plan.frames:
            self._show_times(plan.start, plan.times)
            self._show_slots(self._row(plan.slots))

    def _look(self, plan: CachePlan, seen: tuple[int, ...]) -> None:
        """The layers' views become those of `plan`, whose frames, in equal parts, see the first `seen`
        slots."""
        if self._view == (view := (plan.start, plan.frames, *seen)):
            return
        self._view, tokens = view, self.grid.frame_tokens
        self._reads = tuple(
            Read(plan.frames // len(seen) * tokens, slots * tokens, self._filled_tokens(slots))
            for slots in seen
        )
        self.write_slots, self.query_rotation = self._written_to(plan.frames)
        self._layers = {}

    def _show_slots(self, slots: Tensor) -> None:
        self.write_slots.copy_(slots)
        rotation = self.query_rotation.unflatten(1, (len(slots), -1))
        torch.index_select(self._rotation, 1, self.write_slots, out=rotation)

    def _show_times(self, start: int, times: tuple[int, ...]) -> None:
        end = start + len(times)
        changed = [slot for slot, time in enumerate(times, start) if time != self._shown[slot]]
        if not changed:
            return
        if self._place_rotation is not None and len(times) == self.config.resident_frames:
            torch.index_select(self._place_rotation, 1, self._row(times), out=self._rotation)
        elif self._place_rotation is not None:  # while the window fills
            self._rotation[:, start:end] = self._place_rotation.index_select(1, self._row(times))
        else:
            table = self._rotation_of([times[slot - start] for slot in changed])
            table = table.unflatten(1, (len(changed), -1))
            self._rotation.index_copy_(1, self._row(tuple(changed)), table)
        self._shown = (*self._shown[:start], *times, *self._shown[end:])

    def _choose_slots(self, plan: CachePlan) -> None:
        """The device chooses the slots that are lacking; nothing of it is read by the host."""
        resident = self.raw_keys[:, :, : self.config.resident_frames * self.grid.frame_tokens]
        count = plan.frames - len(plan.slots)
        slots = least_similar(resident, self._held_on_device(), self.config, count, self.parallel)
        slots = torch.cat([self._row(plan.slots), slots])
        numbers = torch.arange(plan.frames, dtype=torch.int64, device=slots.device) + plan.first_frame
        self.device_held.index_copy_(0, slots, numbers)
        times = self.device_held.argsort().argsort()
        torch.index_select(self._place_rotation, 1, times, out=self._rotation)
        self._shown = (EMPTY,) * self.config.resident_frames
        self._show_slots(slots)

    def _held_on_device(self) -> Tensor:
        """device_held, taken over from the host by the first chunk that evicts."""
        if self.next_frame <= self.config.resident_frames:
            self.device_held.copy_(self._row(tuple(self.held)))
        return self.device_held

    def _filled_tokens(self, slots: int) -> Tensor:
        if slots not in self._filled:
            tokens = slots * self.grid.frame_tokens
            self._filled[slots] = torch.full((1,), tokens, dtype=torch.int32, device=self.keys.device)
        return self._filled[slots]

    def _row(self, numbers: tuple[int, ...]) -> Tensor:
        """The integers on the device, copied there once: a stream has few different rows."""
        if numbers not in self._rows:
            self._rows[numbers] = torch.tensor(numbers, dtype=torch.int64, device=self.keys.device)
        return self._rows[numbers]

    def _written_to(self, frames: int) -> tuple[Tensor, Tensor]:
        """write_slots and query_rotation of chunks of so many frames, at the same address for all of them."""
        if frames not in self._written:
            shape = (2, frames * self.grid.frame_tokens, self.head_dim // 2)
            device = self.keys.device
            self._written[frames] = (
                torch.zeros(frames, dtype=torch.int64, device=device),
                torch.zeros(shape, dtype=torch.float32, device=device),
            )
        return self._written[frames]

    def _rotation_of(self, frames: Sequence[int]) -> Tensor:
        device, run = self._rotation.device, range(frames[0], frames[-1] + 1)
        if tuple(frames) == tuple(run):  # made on the device: nothing waits
            indices = torch.arange(run.start, run.stop, dtype=torch.int64, device=device)
        else:
            indices = torch.tensor(list(frames), dtype=torch.int64, device=device)
        return rotary_table(self.head_dim, indices, self.grid.token_rows, self.grid.token_columns)

    def layer(self, index: int, plan: CachePlan, keep_raw: bool) -> LayerCache:
        """The views of one layer for the planned chunk; keep_raw adds the arena of the raw keys."""
        if (index, keep_raw) not in self._layers:
            with torch.inference_mode(False):  # views for chunks in that mode and out of it
                keys, values = self.keys[index], self.values[index]
                start = plan.start * self.grid.frame_tokens
                raw = self.raw_keys[index] if keep_raw and self.raw_keys is not None else None
                self._layers[index, keep_raw] = LayerCache(
                    keys[:, start:], values[:, start:], self._reads, keys, values, raw, self.write_slots
                )
        return self._layers[index, keep_raw]

    def chronological(self, arena: Tensor) -> Tensor:
        """The valid tokens of an arena [L, B, S, H, E] in the order sink, memory, oldest to newest; a
        copy."""
        held = self.held
        if self.config.eviction == "similarity" and self.next_frame > self.config.resident_frames:
            held = self.device_held.tolist()
        start, times = time_indices(self.config, held)
        frames = arena.unflatten(2, (self.config.window_frames, -1))
        slots = [start + slot for slot in sorted(range(len(times)), key=times.__getitem__)]
        return frames[:, :, slots].flatten(2, 3)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, not copied; the integers are held, joint_chunks, next_chunk and
        next_frame."""
        state = {"keys": self.keys, "values": self.values, **self.evictor.tensors()}
        optional = {
            "raw_keys": self.raw_keys, "joint_latents": self.joint_latents, "device_held": self.device_held
        }  # fmt: skip
        return state | {name: part for name, part in optional.items() if part is not None and part.numel()}

    def load(self, tensors: dict[str, Tensor], position: CachePosition) -> None:
        """Take over a state saved between two chunks, in place, cast to the cache's dtype.

        Raises ValueError, before anything is changed, when a tensor is missing, unknown or of another shape,
        and when the position is impossible: the state is of another model, size or cache configuration, or
        damaged.
        """
        state = self.tensors()
        for name in sorted(state.keys() | tensors.keys()):
            own, saved = state.get(name), tensors.get(name)
            if (
                own is None or saved is None or saved.shape != own.shape
                or saved.is_floating_point() != own.is_floating_point()
            ):  # fmt: skip
                found, needed = (
                    "missing" if each is None else f"{tuple(each.shape)} in {each.dtype}"
                    for each in (saved, own)
                )
                raise ValueError(f"{name} of the saved cache is {found}; in this stream it is {needed}")
        position.check(self.config)
        for name, own in state.items():
            own.copy_(tensors[name])
        self._stand_before(position.chunk, position.frame, position.held, position.joint_chunks)

    @property
    def position(self) -> CachePosition:
        return CachePosition(self.next_chunk, self.next_frame, tuple(self.held), self.joint_chunks)
