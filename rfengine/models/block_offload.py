"""BlockOffload: blocks of one shape whose weights are in host memory, a few of them on the device at a
time."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Block = TypeVar("Block", bound=nn.Module)

_ALIGNMENT = 256  # bytes between two storages of a block, as torch's own allocator keeps them


class _Place(NamedTuple):
    """Where one parameter is in the memory of a block: `offset` in values of its dtype."""

    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class BlockOffload(Generic[Block]):
    """The weights of `blocks` in host memory, and `count` working blocks on the device that take them on.

    block(n) is a working block with the weights of block n; the copies of those after it, the first one after
    the last, begin at once and run beside its work: on CUDA on a stream of their own, out of pinned memory,
    on a CPU at once. What comes out is bit for bit what the blocks themselves would give, since each
    parameter has its own strides, joined ones included.

    The parameters of `blocks` move to host memory in place, but for those named in `stays`, which are left
    where they are and which a working block must not read. nbytes: of one block. The working blocks are made
    at the first call and after a release. Callers take turns, on streams that wait for each other.
    """

    def __init__(
        self, blocks: Sequence[Block], device: torch.device, count: int, stays: Collection[str] = ()
    ) -> None:
        self.device, self.count = device, min(count, len(blocks))
        self._first, self._stays = blocks[0], frozenset(stays)
        self._places, self.nbytes = _places_of(blocks[0], self._stays)
        self._host = [self._moved(block) for block in blocks]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # a working block must not be dropped while a copy into it runs
            weakref.finalize(self, self._stream.synchronize)
        self._slots: list[_Slot[Block]] = []
        self._last = -1

    def _moved(self, block: Block) -> Tensor:
        """The memory that the parameters of `block` are in now."""
        places, nbytes = _places_of(block, self._stays)
        if places != self._places:
            raise ValueError(
                "the blocks differ in shape or layout; blocks that share working blocks are alike"
            )
        pinned = self.device.type == "cuda"
        memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        for name, parameter in block.named_parameters():
            if name not in self._stays:
                parameter.data = _view(memory, places[name]).copy_(parameter.data)
        return memory

    def block(self, number: int) -> Block:
        """A working block with the weights of block `number`, until the next call."""
        if not self._slots:
            with torch.inference_mode(False):
                self._slots = [self._new_slot() for _ in range(self.count)]
        held = [slot.number for slot in self._slots]
        at = held.index(number) if number in held else (self._last + 1) % self.count
        self._copy(number, self._slots[at])
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._slots[at].ready)
        for ahead in range(1, self.count):  # launched after the work of what was in the slot before
            self._copy((number + ahead) % len(self._host), self._slots[(at + ahead) % self.count])
        self._last = at
        return self._slots[at].block

    def release(self) -> None:
        """Free the memory of the working blocks until they are asked for again."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._slots = []

    def _new_slot(self) -> _Slot[Block]:
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        instead: dict[int, nn.Parameter] = {}
        for name, parameter in self._first.named_parameters():
            own = parameter if name in self._stays else _view(memory, self._places[name])
            instead[id(parameter)] = own if own is parameter else nn.Parameter(own, requires_grad=False)
        ready = torch.cuda.Event() if self._stream is not None else None
        return _Slot(copy.deepcopy(self._first, instead), memory, ready)

    def _copy(self, number: int, slot: _Slot[Block]) -> None:
        if slot.number == number:
            return
        slot.number = None  # a copy that fails leaves no block
        source = self._host[number]
        if self._stream is None:
            slot.memory.copy_(source)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                slot.memory.copy_(source, non_blocking=True)
                slot.ready.record(self._stream)
        slot.number = number


class _Slot(Generic[Block]):
    """A working block, the memory of its weights, and the number of the block that they are of."""

    def __init__(self, block: Block, memory: Tensor, ready: torch.cuda.Event | None) -> None:
        self.block, self.memory, self.ready = block, memory, ready
        self.number: int | None = None


def offloaded_bytes(block: nn.Module, stays: Collection[str] = ()) -> int:
    """Bytes of a working block like `block`, and of its weights in host memory; it may be on the meta
    device."""
    return _places_of(block, frozenset(stays))[1]


def _places_of(block: nn.Module, stays: frozenset[str]) -> tuple[dict[str, _Place], int]:
    """Where each parameter is in the memory of `block`, and the bytes of that memory. Parameters of one
    storage stay beside each other."""
    places: dict[str, _Place] = {}
    starts: dict[int, int] = {}
    size = 0
    for name, parameter in block.named_parameters():
        if name in stays:
            continue
        storage = parameter.untyped_storage()
        key = id(parameter) if parameter.is_meta else storage.data_ptr()
        if key not in starts:
            starts[key] = size
            size += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        offset = starts[key] // parameter.element_size() + parameter.storage_offset()
        places[name] = _Place(parameter.dtype, offset, parameter.shape, parameter.stride())
    return places, size


def _view(memory: Tensor, place: _Place) -> Tensor:
    """One parameter in the memory of a block."""
    return memory.view(place.dtype).as_strided(place.shape, place.stride, place.offset)
