"""The work of a chunk of systems that do not denoise one chunk of three frames after another."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rfengine.cache.kv_cache import LayerCache, Read
from rfengine.checkpoint.systems import configured
from rfengine.config import CacheConfig, RuntimeConfig
from rfengine.costs.chunk import ChunkWork, Runs
from rfengine.costs.shapes import Shapes
from rfengine.models.dit import SelfAttention
from rfengine.models.fp8_products import quantise
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.presets import PRESETS
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule
from support.models import GRID, noise_of, small_cache, small_config, small_model, small_pipeline


def steady(name: str) -> ChunkWork:
    return ChunkWork.steady(Shapes(configured(PRESETS["wan-1.3b"], name)))


def flops(work: ChunkWork) -> int:
    return sum(part.flops for part in work.parts() if not part.decodes)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("reward-forcing", (Runs(5, 3, 9),)),
        ("self-forcing", (Runs(5, 3, 21),)),
        ("causal-forcing-framewise", (Runs(5, 1, 21),)),
        ("causal-forcing-2-step", (Runs(3, 1, 21),)),
        ("one-forcing", (Runs(2, 1, 21),)),
        ("memrope", (Runs(5, 3, 12),)),
        ("wave-forcing-4-step", (Runs(1, 12, 21), Runs(1, 3, 9))),
        ("rolling-forcing", (Runs(1, 15, 21), Runs(1, 3, 6))),
    ],
)
def test_runs_of_a_steady_chunk(name: str, runs: tuple[Runs, ...]) -> None:
    assert steady(name).runs == runs


def test_a_chunk_costs_what_docs_systems_says_of_it() -> None:
    """Of the transformer, for 12 pixel frames: a chunk of three latent frames, or three chunks of one."""
    assert flops(steady("reward-forcing")) == pytest.approx(121.3e12, rel=0.01)
    assert 3 * flops(steady("causal-forcing-2-step")) == pytest.approx(121e12, rel=0.01)
    assert 3 * flops(steady("one-forcing")) == pytest.approx(81e12, rel=0.01)


def test_passes_of_a_rolling_schedule_take_the_rows_of_all_chunks_in_flight() -> None:
    wave, plain = steady("wave-forcing-4-step"), steady("causal-forcing")
    assert wave.chunk_runs == plain.chunk_runs == 5
    assert wave.reads == (Runs(1, 3, 12), Runs(1, 3, 15), Runs(1, 3, 18), Runs(1, 3, 21), Runs(1, 3, 9))
    attended = [
        sum(part.flops for part in work.parts() if part.group == "self-attention") for work in (wave, plain)
    ]
    assert attended[0] / attended[1] == pytest.approx((12 + 15 + 18 + 21 + 9) / (5 * 21))
    assert flops(plain) - flops(wave) == attended[1] - attended[0]


@pytest.mark.parametrize(
    "name", ["wave-forcing-4-step", "rolling-forcing", "causal-forcing-2-step", "memrope"]
)
def test_reads_are_those_of_a_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every layer of a steady chunk, as attention is called."""
    config, seen = configured(small_config(), name), []
    attend = SelfAttention._attend

    def watched(self: SelfAttention, q: torch.Tensor, cache: LayerCache, read: Read) -> torch.Tensor:
        seen.append((q.shape[1] // GRID.frame_tokens, read.kv_len // GRID.frame_tokens))
        return attend(self, q, cache, read)

    pipe = small_pipeline(config.cache, schedule=config.schedule)
    stream, work = pipe.stream("a circle"), ChunkWork.steady(Shapes(config))
    for _ in range(config.cache.filling_chunks):
        stream.advance(decode=False)
    monkeypatch.setattr(SelfAttention, "_attend", watched)
    stream.advance(decode=False)
    passes = [(runs.frames, runs.seen) for runs in work.reads for _ in range(runs.count)]
    context = work.runs[-1]  # its last layer attends to nothing
    expected = sorted(passes * config.model.num_layers)
    expected.remove((context.frames, context.seen))
    assert sorted(seen) == expected


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("reward-forcing", {"evict_and_rephase": (9 * 2, 3 * 9)}),
        ("longlive", {}),
        ("memrope", {"ema_evict": (0, 2 * 3 * 10), "rephase_keys": (12 * 2, 0)}),  # two rates, three frames
        ("deep-sink", {"rephase_keys": (21 * 2, 0)}),
        ("rolling-forcing", {"rephase_keys": (6 * 2, 0)}),
    ],
)
def test_eviction_moves_what_its_policy_says(name: str, moved: dict[str, tuple[int, int]]) -> None:
    """moved: how many times the keys (or values) of a latent frame are read or written, in 16 bits: for new
    phases, and for averages."""
    work = steady(name)
    frame = work.shapes.layers * 1560 * 1536 * 2
    found = {part.name: part.bytes for part in work.parts() if part.group == "eviction"}
    assert found.keys() == moved.keys()
    for part, (phases, averages) in moved.items():
        rotation = phases // 2 * 1560 * 128 * 4
        assert found[part] == (phases + averages) * frame + rotation


def test_a_score_reads_the_keys_once() -> None:
    cache = CacheConfig(3, 12, "frozen", 3, eviction="similarity")
    config = dataclasses.replace(PRESETS["wan-1.3b"], cache=cache)
    found = {part.name: part.bytes for part in ChunkWork.steady(Shapes(config)).parts()}
    assert found["frame scores"] == 30 * 12 * 1560 * 1536 * 2
    for cache in (CacheConfig(3, 15, "ema", 6), CacheConfig(3, 10, "ema", 3), CacheConfig(1, 9, "ema", 3)):
        work = ChunkWork.steady(Shapes(dataclasses.replace(config, cache=cache)))
        found = {part.name: part.bytes for part in work.parts() if part.group == "eviction"}
        assert found.keys() == {"ema_evict", "rephase_keys"}
        assert found["ema_evict"] == work.plan.frames * 2 * 10 * 30 * 1560 * 1536


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _moved(name: str, given: tuple[Any, ...], returned: Any) -> int:
    """Bytes of what a call in FP8 reads and writes, without tables, biases, weights of norms and padding."""
    results = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
    written = _nbytes(*results)
    if name in ("linear_fp8", "linear_gelu_rows_fp8"):
        return _nbytes(*given[:4]) + written
    if name == "linear_heads_fp8":
        return _nbytes(*given[:3]) + written
    if name.startswith("gated_residual"):
        return _nbytes(*given[:2]) + written
    if name == "adaptive_layer_norm_fp8":
        return given[0].nbytes + written
    if name == "sink_window_attention_fp8":
        return given[0].nbytes + 2 * given[1][:, : given[5]].nbytes + written
    if name == "qk_norm_rope_write_fp8":
        return _nbytes(*given[:3]) + 3 * written  # queries returned, keys and values written alike
    if name == "window_fp8":
        return _nbytes(*given[:2], *given[3:5]) + 2 * given[5].nbytes
    return 0


def test_a_pass_in_fp8_moves_the_bytes_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a steady chunk, counted on the tensors of every call."""
    runtime = RuntimeConfig(precision="fp8-attention", sixteen_bit_passes=())
    config = dataclasses.replace(small_config(), runtime=runtime)
    model = small_model(config.model).requires_grad_(False).bfloat16()
    quantise(model)
    ops, found, counts = Ops(REFERENCE_OPS.choice), Counter(), [True]

    def counted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            returned = run(*given)
            if counts[0]:
                found[name] += _moved(name, given, returned)
            counts[0] = counts[0] and name != "flow_step"
            return returned

        return call

    ops._run = {name: counted(name, run) for name, run in ops._run.items()}
    for module in model.modules():
        if hasattr(module, "ops"):
            monkeypatch.setattr(module, "ops", ops)
    runner = ChunkRunner(model, FlowSchedule(config.schedule), fp8_passes=(0, 1, 2))
    cache = small_cache(config.cache, config.model, torch.bfloat16)
    text = model.text_keys_values(torch.zeros(1, 8, config.model.text_dim))
    for chunk in range(config.cache.filling_chunks + 1):
        found.clear()
        counts[0] = True
        runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3).bfloat16(), text)

    work = ChunkWork.steady(Shapes(config), "fp8-attention")
    rows = {part.name: part.bytes for part in work.parts()}
    products = [part for part in work.parts() if part.group == "linears" and part.is_fp8]
    assert sum(found[name] for name in found if name.startswith("linear_")) * 3 == sum(
        part.bytes for part in products
    )
    for name in ("sink_window_attention_fp8", "adaptive_layer_norm_fp8", "gated_residual_affine_norm_fp8"):
        assert found[name] * 3 == rows[name]
    assert found["gated_residual_adaptive_norm_fp8"] * 3 == rows["gated_residual_adaptive_norm_fp8"]
    assert found["gated_residual_adaptive_norm"] * 3 == rows["gated_residual_adaptive_norm"]
    assert found["qk_norm_rope_write_fp8"] * 2 == rows["qk_norm_rope_write_fp8"]  # the context pass apart
    assert found["window_fp8"] == rows["window_fp8"]
