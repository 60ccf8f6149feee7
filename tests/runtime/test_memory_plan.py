"""The planned bytes against those that torch's allocator gives out, phase by phase."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import EngineConfig, RuntimeConfig, ScheduleConfig, TextConfig, VAEConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.pipeline import Pipeline
from rfengine.presets import PRESETS
from rfengine.runtime import engine
from rfengine.runtime.memory_plan import MemoryPlan, plan_memory
from support.models import small_pipeline, write_pipeline
from support.peak_memory import peaks_of_pipeline
from support.systems import SYSTEMS

WITHIN = 0.05
GIB = 2**30
PROMPT = ("a large red circle moving slowly to the right over a cloudy sky " * 4)[:143]  # of full length
EVERYTHING = RuntimeConfig(
    text_encoder="layers", text_weights="int8", block_weights="int8", block_buffers=2, vae="tiny"
)


@pytest.fixture(autouse=True)
def no_untouched_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keep_freed_memory asks for is never touched, and so takes no memory."""
    monkeypatch.setattr(engine, "keep_freed_memory", lambda: None)


def assert_exact(plan: MemoryPlan, measured: dict[str, int]) -> None:
    for name, size in measured.items():  # with -s
        print(f"\n{name}: planned {plan.phases[name]}, measured {size}", end="")  # noqa: T201
    assert plan.phases.keys() == measured.keys()
    off = {name: plan.phases[name] / measured[name] - 1 for name in measured}
    assert all(abs(share) <= WITHIN for share in off.values()), off
    assert abs(plan.peak / max(measured.values()) - 1) <= WITHIN


@pytest.mark.parametrize(
    ("runtime", "dtype"),
    [
        (RuntimeConfig(), "float32"),
        (EVERYTHING, "float32"),
        pytest.param(RuntimeConfig(), "bfloat16", marks=pytest.mark.soak),
        pytest.param(
            RuntimeConfig(block_weights="int8", text_weights="int8"), "bfloat16", marks=pytest.mark.soak
        ),
        pytest.param(
            RuntimeConfig(text_encoder="layers", block_buffers=2), "float32", marks=pytest.mark.soak
        ),
        pytest.param(RuntimeConfig(vae="tiny"), "float32", marks=pytest.mark.soak),
    ],
    ids=["plain", "every knob", "bfloat16", "int8 in bfloat16", "host memory", "tiny decoder"],
)
def test_the_plan_of_tiny_is_what_it_takes(runtime: RuntimeConfig, dtype: str) -> None:
    Pipeline.from_pretrained("tiny", dtype=dtype).generate("a red circle", num_frames=9)  # imports and caches
    config = dataclasses.replace(PRESETS["tiny"], runtime=runtime)
    plan = plan_memory(config, LatentGrid.of(config), "cpu", dtype)

    def load() -> Pipeline:
        return Pipeline.from_pretrained("tiny", "cpu", dtype, runtime=runtime)

    assert_exact(plan, peaks_of_pipeline(load, PROMPT))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["rolling", "first chunk of one frame"])
def test_the_plan_of_other_systems_is_what_they_take(name: str, tmp_path: Path) -> None:
    cache, schedule = SYSTEMS[name]
    write_pipeline(tmp_path, small_pipeline(cache, schedule=schedule))
    checkpoint = Checkpoint.open(tmp_path)
    Pipeline.from_pretrained(checkpoint).stream("a")
    plan = plan_memory(checkpoint.config, LatentGrid.of(checkpoint.config), "cpu")
    measured = peaks_of_pipeline(lambda: Pipeline.from_pretrained(checkpoint), "a" * 63)
    # of a model this small, tensors of a few kilobytes are more than a twentieth
    assert plan.peak == pytest.approx(max(measured.values()), rel=WITHIN)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("runtime", [RuntimeConfig(), RuntimeConfig(block_weights="int8", block_buffers=2)])
def test_the_plan_of_400_million_weights_is_what_they_take(runtime: RuntimeConfig, dtype: str) -> None:
    config = dataclasses.replace(MIDDLE, runtime=runtime)
    plan = plan_memory(config, LatentGrid.of(config), "cpu", dtype, text_on_device=False)
    checkpoint = Checkpoint.random(config)  # whose text states are given, so that it has no text encoder
    plan = without_text_encoder(plan)
    measured = peaks_of_pipeline(lambda: Pipeline.from_pretrained(checkpoint, "cpu", dtype), "a")
    assert_exact(plan, measured)


MIDDLE = EngineConfig(
    "middle",
    WanConfig(dim=1024, ffn_dim=5632, num_heads=8, num_layers=20, text_dim=64, text_len=64),
    VAEConfig(base_dim=32),
    TextConfig(259, 64, 64, 64, 2, 1, tokenizer="bytes"),
    schedule=ScheduleConfig(denoising_steps=(1000, 500)),
    height=128,
    width=128,
)


def without_text_encoder(plan: MemoryPlan) -> MemoryPlan:
    size = plan.parts["text_encoder"]
    phases = {name: bytes_ - (0 if name == "loading" else size) for name, bytes_ in plan.phases.items()}
    return dataclasses.replace(plan, phases=phases)


def test_a_plan_leaves_nothing_behind() -> None:
    config = PRESETS["tiny"]
    before = Pipeline.from_pretrained("tiny").generate("a red circle", num_frames=21, seed=1).frames
    plan_memory(config, LatentGrid.of(config), "cpu")
    after = Pipeline.from_pretrained("tiny").generate("a red circle", num_frames=21, seed=1).frames
    assert (before == after).all()  # no tensor without memory is in a cache of the ops


def test_the_plan_of_the_published_model_on_a_gpu() -> None:
    config = PRESETS["wan-1.3b"]
    plan = plan_memory(config, LatentGrid.of(config), "cuda")
    parts = plan.parts
    assert parts["transformer"] == 1_418_996_800 * 2
    assert round(parts["vae_state"] / GIB, 1) == 1.8  # of a decoder in float16
    cache = StreamingKVCache(
        config.model, config.cache, LatentGrid.of(config), dtype=torch.bfloat16, device="meta"
    )
    arenas = sum(tensor.nbytes for tensor in cache.tensors().values())
    assert parts["keys_values"] + parts["raw_keys"] + parts["sink_remainder"] == arenas
    assert parts["graph_inputs"] > parts["cross_attention"]  # recorded programs have a text of their own
    # recorded graphs keep what they work in while a prompt is encoded
    assert plan.phases["steady chunk"] < plan.phases["prompt switch"] == plan.peak < plan.needed < plan.card
    assert plan.card - plan.needed == plan.reserve["context"]
    assert plan.host == {"transformer": 0, "text_encoder": 0}
    # text encoder included
    assert 24 * GIB < plan.card < 28 * GIB


def test_each_knob_saves_what_it_says() -> None:
    config = PRESETS["wan-1.3b"]

    def planned(**knobs: object) -> MemoryPlan:
        changed = dataclasses.replace(config, runtime=RuntimeConfig(**knobs))
        return plan_memory(changed, LatentGrid.of(config), "cuda")

    plain, layers = planned(), planned(text_encoder="layers")
    text = plain.parts["text_encoder"]
    assert layers.parts["text_encoder"] == 0
    table, norms = config.text.vocab_size * config.text.dim * 2, 2**20
    each = (text - table) // config.text.num_layers  # 368 MiB, for which torch pins 512
    assert 2**28 < each < 2**29
    assert layers.host["text_encoder"] == pytest.approx(table + config.text.num_layers * 2**29, abs=norms)
    assert 9.5 * GIB < plain.peak - layers.peak <= text  # two layers are there while a prompt is encoded
    int8 = planned(block_weights="int8")
    assert 0.5 < int8.parts["transformer"] / plain.parts["transformer"] < 0.52
    offload = planned(block_buffers=2)
    assert offload.parts["transformer"] < 0.1 * plain.parts["transformer"]
    assert offload.host["transformer"] > 0.9 * plain.parts["transformer"]
    assert "graph_inputs" not in offload.parts
    tiny = planned(vae="tiny")
    assert tiny.parts["vae_buffers"] == 0 and tiny.parts["vae_state"] < 0.1 * plain.parts["vae_state"]


def test_a_video_that_starts_anew_runs_op_by_op_beside_recorded_graphs() -> None:
    config = PRESETS["wan-1.3b"]

    def planned(**knobs: object) -> MemoryPlan:
        runtime = RuntimeConfig(text_encoder="layers", **knobs)
        return plan_memory(dataclasses.replace(config, runtime=runtime), LatentGrid.of(config), "cuda")

    recorded, eager = planned(), planned(graphs=False)
    first = recorded.work["decode_first"]
    assert first > recorded.work["encode"] > recorded.work["first"]
    assert recorded.phases["prompt switch"] == recorded.phases["steady chunk"] + first
    assert eager.phases["prompt switch"] < eager.phases["steady chunk"] + first


def test_a_decoder_of_tensorrt_has_no_plan() -> None:
    config = dataclasses.replace(PRESETS["wan-1.3b"], runtime=RuntimeConfig(vae="tensorrt"))
    with pytest.raises(ValueError, match="only its engine knows its memory"):
        plan_memory(config, LatentGrid.of(config), "cuda")
