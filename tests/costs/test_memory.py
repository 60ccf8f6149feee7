"""Memory of one stream: the published sizes, and those of a real stream."""

from __future__ import annotations

import pytest
import torch

from rfengine.costs.memory import memory_needs
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS
from support.models import small_pipeline
from support.systems import SYSTEMS

MIB = 2**20


def test_memory_of_the_published_models_at_their_size() -> None:
    config = PRESETS["wan-1.3b"]
    needs = memory_needs(config, LatentGrid.of(config), torch.bfloat16)
    assert round(needs["keys_values"] / MIB) == 2468
    assert needs["raw_keys"] == needs["keys_values"] // 2
    assert needs["sink_remainder"] == needs["keys_values"] // 3  # 3 of 9 frames
    assert round(needs["cross_attention"] / MIB) == 90
    assert round(needs["vae_state"] / MIB) == 1801
    assert 1.8e9 < needs["vae_buffers"] < 1.95e9
    assert needs["transformer"] == 1_418_996_800 * 2
    assert needs["total"] == sum(size for name, size in needs.items() if name != "total")


@pytest.mark.parametrize(
    "name",
    [
        "ema",
        "memory",
        "rolling",
        "similarity",
        "frozen absolute",
        "first chunk of one frame",
        "first chunk of four frames",
    ],
)
def test_memory_is_that_of_a_real_stream(name: str) -> None:
    cache_config, schedule = SYSTEMS[name]
    pipeline = small_pipeline(cache_config, schedule=schedule)
    stream = pipeline.stream("a circle")
    needs = memory_needs(pipeline.config, stream.grid, torch.float32)
    weights = {"transformer": pipeline.model, "vae": pipeline.vae}
    for name, module in weights.items():
        assert needs[name] == sum(weight.nbytes for weight in module.parameters()), name
    tensors = stream.snapshot().tensors
    cache = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("cache."))
    state = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("decoder."))
    parts = ("keys_values", "raw_keys", "sink_remainder", "in_flight")
    assert sum(needs[part] for part in parts) == cache
    assert needs["vae_state"] == state
    list(stream.take(2))
    assert needs["vae_buffers"] == stream._worker.decoder.halo_bytes > 0


def test_a_stream_has_its_cache_its_text_and_its_decoders_state_of_its_own() -> None:
    pipeline = small_pipeline()
    needs = memory_needs(pipeline.config, LatentGrid.of(pipeline.config), torch.float32)
    own = ("keys_values", "raw_keys", "sink_remainder", "cross_attention", "vae_state")
    assert pipeline.stream_bytes() == sum(needs[name] for name in own)
    assert pipeline.stream_bytes(64, 96) > 3 * pipeline.stream_bytes() - 3 * needs["cross_attention"]
