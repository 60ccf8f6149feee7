"""Memory of one stream: the published sizes, and those of a real stream."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rfengine import memory
from rfengine.config import RuntimeConfig
from rfengine.costs.memory import memory_needs, require_stream_fits, stream_bytes
from rfengine.grid import LatentGrid
from rfengine.models.fp8_products import products, quantise
from rfengine.presets import PRESETS
from support.models import GRID, small_config, small_model, small_pipeline, with_runtime
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_in_fp8_is_that_of_the_weights_in_e4m3(dtype: torch.dtype) -> None:
    model = small_model(small_config().model).to(dtype)
    quantise(model)
    config = dataclasses.replace(small_config(), runtime=RuntimeConfig(precision="fp8"))
    weights = [tensor.nbytes for each in products(model).values() for tensor in each.owner.fp8]
    plain, needs = (memory_needs(each, GRID, dtype) for each in (small_config(), config))
    assert needs["transformer_fp8"] == sum(weights) > 0
    assert needs["transformer"] == sum(weight.nbytes for weight in model.parameters())
    assert plain["transformer_fp8"] == needs["window_fp8"] == 0
    assert needs["total"] - plain["total"] == sum(weights)
    assert stream_bytes(needs) == stream_bytes(plain)  # streams share the weights


@pytest.mark.parametrize("name", ["ema", "memory", "frozen absolute", "window 18, sink 6, chunk 4"])
def test_memory_of_fp8_attention_is_that_of_the_copies_of_a_window(name: str) -> None:
    cache_config, schedule = SYSTEMS[name]
    runtime = RuntimeConfig(precision="fp8-attention", sixteen_bit_passes=())
    pipeline = small_pipeline(cache_config, schedule=schedule)
    plain = pipeline.stream_bytes()
    pipeline = with_runtime(pipeline, runtime)
    stream, runner = pipeline.stream("a circle"), pipeline._engine.runner
    list(stream.take(cache_config.filling_chunks + 1))
    (window,) = runner._window_by_cache.values()
    own = (window.keys, window.values, window.key_mean, window.value_unit)
    needs = memory_needs(pipeline.config, stream.grid, torch.float32)
    assert needs["window_fp8"] == sum(tensor.nbytes for tensor in own)
    assert pipeline.stream_bytes() == plain + needs["window_fp8"]
    tokens = window.keys.shape[2]
    assert window.values.shape[-1] % 16 == 0 and window.values.shape[-1] >= tokens


def test_no_copies_are_kept_where_products_alone_are_in_fp8() -> None:
    runtime = RuntimeConfig(precision="fp8")
    needs = memory_needs(dataclasses.replace(small_config(), runtime=runtime), GRID, torch.float32)
    assert needs["window_fp8"] == 0 < needs["transformer_fp8"]


def test_a_stream_whose_copies_do_not_fit_beside_its_arenas_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, place = PRESETS["wan-1.3b"], torch.device("cpu")
    grid = LatentGrid.of(config)
    tiny_decoder = RuntimeConfig(vae="tiny")
    attends = dataclasses.replace(tiny_decoder, precision="fp8-attention")
    plain, fp8 = (dataclasses.replace(config, runtime=each) for each in (tiny_decoder, attends))
    needs = memory_needs(fp8, grid, torch.bfloat16)
    means_and_units = 30 * 4 * (1536 + 12)
    assert needs["window_fp8"] == 30 * 1536 * (14040 + 14048) + means_and_units
    arenas = needs["keys_values"] + needs["raw_keys"]
    monkeypatch.setattr(memory, "free_memory", lambda device: arenas + needs["window_fp8"] // 2)
    require_stream_fits(plain, grid, torch.bfloat16, (place, place))
    with pytest.raises(RuntimeError, match="a stream of 480 x 832 pixels needs"):
        require_stream_fits(fp8, grid, torch.bfloat16, (place, place))


def test_weights_in_e4m3_of_the_published_model() -> None:
    config = dataclasses.replace(PRESETS["wan-1.3b"], runtime=RuntimeConfig(precision="fp8"))
    needs = memory_needs(config, LatentGrid.of(config), torch.bfloat16)
    weights = 30 * (6 * 1536 * 1536 + 2 * 1536 * 8960)
    outputs = 30 * (3 + 1 + 1 + 1 + 1) * 1536 + 30 * 8960
    assert needs["transformer_fp8"] == weights + outputs * (4 + 2) + 30 * 6 * 8


def test_a_stream_has_its_cache_its_text_and_its_decoders_state_of_its_own() -> None:
    pipeline = small_pipeline()
    needs = memory_needs(pipeline.config, LatentGrid.of(pipeline.config), torch.float32)
    own = ("keys_values", "raw_keys", "sink_remainder", "cross_attention", "vae_state")
    assert pipeline.stream_bytes() == sum(needs[name] for name in own)
    assert pipeline.stream_bytes(64, 96) > 3 * pipeline.stream_bytes() - 3 * needs["cross_attention"]
