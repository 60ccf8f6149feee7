"""What a recorded chunk may not do, watched on a CPU: read a tensor on the host, copy to or from it, keep new
memory, or change what it runs."""

import contextlib
import dataclasses
import gc
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig
from rfengine.models.dit import TextKeysValues, WanDiT
from rfengine.runtime import chunk_runner
from support.models import GRID, SMALL, noise_of, small_cache, small_model, small_runner, text_states

HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.item.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}
SETTINGS = [
    CacheConfig(),
    CacheConfig(window_frames=15),
    CacheConfig(sink_precision="bf16"),
    CacheConfig(sink="frozen", positions="absolute"),
    CacheConfig(sink="none", sink_frames=0),
    CacheConfig(window_frames=12, sink="frozen", memory_rates=(0.01, 0.1)),
    CacheConfig(4, 18, "frozen", 6),
    CacheConfig(sink="frozen", eviction="similarity"),
]


class Watch(TorchDispatchMode):
    """Lists every op that runs, and fails on one that would wait for the device or whose result is on
    another."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in HOST_READS:
            raise AssertionError(f"{func} reads a tensor on the host inside a chunk")
        if torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"{func} has a result whose shape depends on data")
        self.ran.append(str(func))
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.device.type != self.device:
                raise AssertionError(f"{func} gives a tensor on {result.device} inside a chunk")
        return results


@pytest.mark.parametrize("config", SETTINGS)
def test_a_chunk_reads_nothing_on_the_host_and_runs_the_same_ops_once_the_window_is_full(config):
    model, cache = small_model(), small_cache(config)
    runner, text = small_runner(model), model.text_keys_values(text_states())
    ran = []
    period = math.lcm(config.past_frames, config.chunk_frames) // config.chunk_frames
    first = config.filling_chunks + period  # until then rows of integers are still copied to the device
    for chunk in range(first + 4):
        noise = noise_of(chunk, config.chunk_frames)
        with Watch() as watch:
            runner.advance(cache, cache.plan_chunk(), noise, text)
        ran.append(watch.ran)
    steady = ran[first:]
    assert all(ops == steady[0] for ops in steady)
    assert len(steady[0]) > 100


def recorded_functions(monkeypatch, model, cache, text: TextKeysValues, device: str) -> list:
    """The functions that the runner passes to CapturedCall, none of which has run yet."""
    functions = []

    class Given:
        def __init__(self, function, *_):
            functions.append(function)
            self.function = function

        def replay(self):
            return self.function()

    monkeypatch.setattr(chunk_runner, "CapturedCall", Given)
    monkeypatch.setattr(chunk_runner, "graph_pool", object)
    runner = small_runner(model, graphs=True)
    for chunk in range(3 * cache.config.filling_chunks):
        noise = noise_of(chunk, cache.config.chunk_frames).to(device)
        runner.advance(cache, cache.plan_chunk(), noise, text)
    return functions


@torch.no_grad()
@pytest.mark.parametrize("config", SETTINGS[2:4])
def test_recorded_functions_stay_on_the_device(config, monkeypatch):
    """On the meta device there is no number to read, and the host's tensors are another device's."""
    one_block = dataclasses.replace(SMALL, num_layers=1)
    model = WanDiT(one_block).to("meta").eval()
    cache = StreamingKVCache(one_block, config, GRID, device="meta")
    text = model.text_keys_values(torch.empty(1, 8, one_block.text_dim, device="meta"))
    (function,) = recorded_functions(monkeypatch, model, cache, text, "meta")
    with Watch("meta") as watch:
        function()
    assert len(watch.ran) > 100


def live_memory() -> set[int]:
    """Memory of all tensors that have any: those of an export that another test made have none."""
    gc.collect()
    tensors = (item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter))
    places = set()
    for tensor in tensors:
        with contextlib.suppress(RuntimeError):
            places.add(tensor.untyped_storage().data_ptr())
    return places


@torch.no_grad()
def test_recorded_functions_keep_no_new_memory_and_no_host_state(monkeypatch):
    model, cache = small_model(), small_cache(CacheConfig())
    text = model.text_keys_values(text_states())
    functions = recorded_functions(monkeypatch, model, cache, text, "cpu")
    before, host = live_memory(), dict(vars(cache))
    for function in functions:
        result = function()
        del result
    assert live_memory() == before
    assert vars(cache) == host


@pytest.mark.parametrize(
    ("act", "complaint"),
    [
        (lambda: torch.ones(1).item(), "reads a tensor on the host"),
        (lambda: torch.ones(3).unique(), "depends on data"),
        (lambda: torch.ones(3, device="meta"), "tensor on meta"),
    ],
)
def test_the_watch_sees_what_it_looks_for(act, complaint):
    with pytest.raises(AssertionError, match=complaint), Watch():
        act()


def test_memory_of_the_cache_stays_where_it_is():
    model, cache = small_model(), small_cache(CacheConfig())
    runner, text = small_runner(model), model.text_keys_values(text_states())

    def places() -> dict[str, int]:
        low = {f"low.{place}": low for place, low in enumerate(cache.evictor.low)}
        tensors = {
            name: value for name, value in vars(cache).items() if isinstance(value, torch.Tensor)
        } | low
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    before = places()
    for chunk in range(6):
        runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), text)
    cache.load({name: value.clone() for name, value in cache.tensors().items()}, cache.position)
    cache.reset()
    assert places() == before
    assert {
        "keys",
        "values",
        "raw_keys",
        "_rotation",
        "query_rotation",
        "write_slots",
        "low.0",
    } <= before.keys()
