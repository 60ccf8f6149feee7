"""What a captured chunk may not do, watched on the CPU: read a tensor on the host, or change what it runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inputs import noise_of, small_cache, small_model, small_runner, text_states
from rfengine.config import CacheConfig

HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.item.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}


class Watch(TorchDispatchMode):
    """Lists every op that runs, and fails on one that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in HOST_READS:
            raise AssertionError(f"{func} reads a tensor on the host inside a chunk")
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(),
        CacheConfig(window_frames=15),
        CacheConfig(sink_precision="bf16"),
        CacheConfig(sink="frozen", positions="absolute"),
        CacheConfig(sink="none", sink_frames=0),
    ],
)
def test_a_chunk_reads_nothing_on_the_host_and_runs_the_same_ops_once_the_window_is_full(config):
    model, cache = small_model(), small_cache(config)
    runner, text = small_runner(model), model.text_keys_values(text_states())
    ran = []
    for chunk in range(config.window_chunks + 4):
        noise = noise_of(chunk, config.chunk_frames)
        with Watch() as watch:
            runner.advance(cache, cache.plan_chunk(), noise, text)
        ran.append(watch.ran)
    steady = ran[config.window_chunks :]
    assert all(ops == steady[0] for ops in steady)
    assert len(steady[0]) > 100


def test_the_watch_sees_a_host_read():
    with pytest.raises(AssertionError, match="reads a tensor on the host"), Watch():
        torch.ones(1).item()


def test_memory_of_the_cache_stays_where_it_is():
    model, cache = small_model(), small_cache(CacheConfig())
    runner, text = small_runner(model), model.text_keys_values(text_states())
    static = [*cache.tensors().values(), cache.rotation, cache.query_rotation, cache.filled_tokens]
    places = [tensor.data_ptr() for tensor in static]
    for chunk in range(6):
        runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), text)
    after = [*cache.tensors().values(), cache.rotation, cache.query_rotation, cache.filled_tokens]
    assert [tensor.data_ptr() for tensor in after] == places
