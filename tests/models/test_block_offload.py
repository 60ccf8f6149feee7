"""Blocks whose weights are in host memory give the bits of those that are on the device."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc

import pytest
import torch
from torch import nn

from rfengine.config import CacheConfig
from rfengine.models.block_offload import BlockOffload, offloaded_bytes
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.ops import REFERENCE_OPS, choose_ops
from support.models import GRID, SMALL, noise_of, small_cache, small_model, small_runner, text_states

CPU = torch.device("cpu")
LAYERS = 5
MODEL = dataclasses.replace(SMALL, num_layers=LAYERS)


def offloaded(model: WanDiT, count: int) -> WanDiT:
    model.offload = BlockOffload(model.blocks, CPU, count, ("modulation",))
    return model


def packed(model: WanDiT) -> WanDiT:
    pack_weights(model)
    return model


def chunks(model: WanDiT, count: int = 5) -> list[torch.Tensor]:
    """Clean latents of the first chunks, then everything that the cache holds."""
    runner, cache = small_runner(model), small_cache(CacheConfig(), MODEL)
    text = model.text_keys_values(text_states())
    found = []
    for chunk in range(count):
        found.append(runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), text))
    return [*found, *cache.tensors().values(), text.keys, text.values]


@pytest.mark.parametrize("count", [2, 3, 4, LAYERS, 64])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_stream_is_bit_equal(count: int, is_packed: bool) -> None:
    own, moved = small_model(MODEL), small_model(MODEL)
    for model in (own, moved) if is_packed else ():
        pack_weights(model)
    expected, found = chunks(own), chunks(offloaded(moved, count))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_layouts_of_the_fast_products_on_a_cpu_are_kept() -> None:
    ops = choose_ops("auto", "cpu")
    own, moved = (WanDiT(MODEL, ops).eval() for _ in range(2))
    own.load_state_dict(small_model(MODEL).state_dict())
    moved.load_state_dict(own.state_dict())
    expected, found = chunks(packed(own)), chunks(offloaded(packed(moved), 2))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    kept = own.blocks[3].self_attn.k.weight
    assert moved.block(3).self_attn.k.weight.stride() == kept.stride()
    assert moved.block(3).self_attn.is_packed


def test_a_block_has_its_own_weights_in_any_order() -> None:
    model = small_model(MODEL)
    weights = [copy.deepcopy(dict(block.named_parameters())) for block in model.blocks]
    offload = BlockOffload(model.blocks, CPU, 2)
    for number in (0, 1, 2, 3, 4, 0, 3, 3, 1, 4, 0, 2):
        held = dict(offload.block(number).named_parameters())
        assert held.keys() == weights[number].keys()
        assert all(torch.equal(held[name], weights[number][name]) for name in held), number


def test_what_stays_is_not_moved_and_what_is_moved_keeps_its_name() -> None:
    model = packed(small_model(MODEL))
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offloaded(model, 2)
    after = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    moved = {name for name in before if before[name] != after[name]}
    own = {name for name in before if name.startswith("blocks.") and not name.endswith(".modulation")}
    assert moved == own
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_device_has_two_blocks_and_none_after_a_release() -> None:
    model = packed(small_model(MODEL))
    stays = ("modulation",)
    own = sum(each.nbytes for name, each in model.blocks[0].named_parameters() if name not in stays)
    offloaded(model, 2).block(0)
    slots = model.offload._slots
    assert [slot.memory.numel() for slot in slots] == [model.offload.nbytes] * 2
    assert own <= model.offload.nbytes == offloaded_bytes(model.blocks[0], stays) < 1.5 * own
    kept = dict(model.block(4).named_parameters())["ffn.0.weight"].clone()
    model.offload.release()
    assert model.offload._slots == []
    assert torch.equal(model.block(4).ffn[0].weight, kept)


def test_a_copy_that_fails_leaves_no_block_with_the_wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(MODEL)
    expected = [block.ffn[0].weight.clone() for block in model.blocks]
    offload = BlockOffload(model.blocks, CPU, 2)
    offload.block(0)
    source = offload._host[2]
    offload._host[2] = source[1:]
    with pytest.raises(RuntimeError):
        offload.block(1)
    offload._host[2] = source
    for number in (2, 1, 0):
        assert torch.equal(offload.block(number).ffn[0].weight, expected[number])


def test_blocks_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape or layout"):
        BlockOffload([nn.Linear(2, 3), nn.Linear(3, 2)], CPU, 2)


def test_bytes_on_the_meta_device_are_those_of_real_blocks() -> None:
    with torch.device("meta"):
        described = WanDiT(MODEL, REFERENCE_OPS)
    assert offloaded_bytes(described.blocks[0]) == offloaded_bytes(small_model(MODEL).blocks[0])
    assert GRID.frame_tokens == 6


class Recorded:
    """In the place of CUDA's streams and events: what was launched on which, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[object, ...]] = []
        self.current = RecordedStream(self, "compute")
        streams = iter([RecordedStream(self, "copies")])
        make = torch.empty

        def empty(*size: int, device: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
            return make(*size, **options)

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(streams))
        monkeypatch.setattr(torch.cuda, "Event", lambda: RecordedEvent(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch, "empty", empty)


class RecordedStream:
    def __init__(self, recorded: Recorded, name: str) -> None:
        self.recorded, self.name = recorded, name

    def wait_stream(self, other: RecordedStream) -> None:
        self.recorded.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: RecordedEvent) -> None:
        self.recorded.log.append((self.name, "waits for", event))

    def synchronize(self) -> None:
        self.recorded.log.append(("host", "waits for", self.name))


class RecordedEvent:
    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded

    def record(self, stream: RecordedStream) -> None:
        self.recorded.log.append((stream.name, "records", self))


@pytest.mark.parametrize("count", [2, 3])
def test_a_gpu_overwrites_no_block_in_use_and_computes_on_none_that_is_still_copied(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    model = small_model(MODEL)
    recorded = Recorded(monkeypatch)
    log, offload = recorded.log, BlockOffload(model.blocks, torch.device("cuda"), count)
    for number in (*range(LAYERS), *range(LAYERS), 3, 1):
        block = offload.block(number)
        (event,) = [slot.ready for slot in offload._slots if slot.block is block]
        waits, records = last(log, ("compute", "waits for", event)), last(log, ("copies", "records", event))
        assert records < waits
        log.append(("compute", "uses", event))
    uses = {}
    for at, entry in enumerate(log):
        if entry[1] == "uses":
            uses[entry[2]] = at
        elif entry[1] == "records" and entry[2] in uses:  # a copy into what was used before
            assert uses[entry[2]] < last(log[:at], ("copies", "waits for", "compute"))


def last(log: list[tuple[object, ...]], entry: tuple[object, ...]) -> int:
    return len(log) - 1 - log[::-1].index(entry)


def test_working_blocks_are_dropped_once_the_copies_into_them_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = Recorded(monkeypatch)
    offload = BlockOffload(small_model(MODEL).blocks, torch.device("cuda"), 2)
    offload.block(0)  # which begins the copy of the next
    assert ("host", "waits for", "copies") not in recorded.log
    del offload
    gc.collect()
    assert recorded.log[-1] == ("host", "waits for", "copies")
