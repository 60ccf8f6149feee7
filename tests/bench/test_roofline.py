"""Counts of the roofline against the figures of the specification, and against the code, run on meta."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.roofline import Options, render, roofline, run
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.checkpoint.systems import configured
from rfengine.cli.process import run_script
from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.costs.chunk import ChunkWork, prompt_parts
from rfengine.costs.shapes import Shapes
from rfengine.costs.vae import VAEWork, decode_work
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.presets import PRESETS

SHIPPED = Shapes()

# GMAC per latent frame of decoding 480 x 832, later ones and the first
DECODER_LAYERS = {
    "conv2": ("0.0016", "0.0016"),
    "decoder.conv1": ("1.035", "1.035"),
    "decoder.middle.1.to_qkv": ("2.760", "2.760"),
    "decoder.middle.1": ("29.904", "29.904"),
    "decoder.middle.1.proj": ("0.920", "0.920"),
    "decoder.upsamples.3.time_conv": ("5.521", None),
    "decoder.upsamples.3.resample.1": ("33.125", "16.562"),
    "decoder.upsamples.4.shortcut": ("3.681", "1.840"),
    "decoder.upsamples.4.residual.2": ("99.374", "49.687"),
    "decoder.upsamples.4.residual.6": ("198.747", "99.374"),
    "decoder.upsamples.7.time_conv": ("44.166", None),
    "decoder.upsamples.7.resample.1": ("264.996", "66.249"),
    "decoder.upsamples.11.resample.1": ("264.996", "66.249"),
    "decoder.head.2": ("12.422", "3.105"),
} | {
    f"decoder.{block}.residual.{conv}": figures
    for blocks, figures in (
        (("middle.0", "middle.2", "upsamples.0", "upsamples.1", "upsamples.2"), ("24.843", "24.843")),
        (("upsamples.5", "upsamples.6"), ("198.747", "99.374")),
        (("upsamples.8", "upsamples.9", "upsamples.10"), ("397.494", "99.374")),
        (("upsamples.12", "upsamples.13", "upsamples.14"), ("397.494", "99.374")),
    )
    for block in blocks
    for conv in (2, 6)
}


def printed(amount: float, like: str) -> str:
    """`amount` with as many decimals as the figure it is compared with."""
    return f"{amount:.{len(like.partition('.')[2])}f}"


def assert_as_printed(amounts: dict[str, float], figures: dict[str, str]) -> None:
    assert {name: printed(amounts[name], figure) for name, figure in figures.items()} == figures


def decoded(first: bool, frames: int = 1) -> VAEWork:
    return decode_work(SHIPPED.config.vae, SHIPPED.grid, frames, first)


@cache
def report(**options: Any) -> dict[str, Any]:
    return roofline(Options(**options))


def group(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in found["groups"] if row["group"] == name)


def part_flops(found: dict[str, Any]) -> dict[str, float]:
    return {row["part"]: row["flops"] for row in found["parts"] if row["group"] != "VAE decode"}


@pytest.mark.parametrize(("first", "column"), [(False, 0), (True, 1)])
def test_every_layer_of_the_decoder_has_the_multiply_adds_of_the_table(first: bool, column: int) -> None:
    figures = {path: pair[column] for path, pair in DECODER_LAYERS.items() if pair[column] is not None}
    products = decoded(first).products
    assert products.keys() == figures.keys()
    assert_as_printed({path: work.multiply_adds / 1e9 for path, work in products.items()}, figures)


def test_the_decoder_sums_up_to_the_totals_and_stages_of_the_table() -> None:
    assert printed(decoded(False).multiply_adds / 1e9, "6775.0") == "6775.0"
    assert printed(decoded(False).multiply_adds / 4e9, "1693.75") == "1693.75"
    assert printed(decoded(True).multiply_adds / 1e9, "2176.1") == "2176.1"
    work, stages = decoded(False), Counter[str]()
    for path, product in work.products.items():
        stages[work.stages[path]] += product.multiply_adds / 1e9
    assert stages.keys() == {"input", "middle", "stage 0", "stage 1", "stage 2", "stage 3", "head"}
    assert_as_printed(
        stages,
        {
            "middle": "133.0",
            "stage 0": "187.7",
            "stage 1": "1406.0",
            "stage 2": "2650.0",
            "stage 3": "2385.0",
            "head": "12.4",
        },
    )


def test_the_decoder_sums_up_to_the_table_by_kernel() -> None:
    with torch.device("meta"):
        vae = WanVAE(SHIPPED.config.vae)
    sums: dict[str, float] = {}
    for path, work in decoded(False).products.items():
        kernel = getattr(vae.get_submodule(path), "kernel_size", "attention")
        name = kernel if isinstance(kernel, str) else "x".join(map(str, kernel))
        name = "pointwise" if set(name.split("x")) == {"1"} else name
        sums[name] = sums.get(name, 0.0) + work.multiply_adds / 1e9
    figures = {
        "3x3x3": "6124.9", "3x3": "563.1", "3x1x1": "49.7", "attention": "29.9", "pointwise": "7.4",
    }  # fmt: skip
    assert sums.keys() == figures.keys()
    assert_as_printed(sums, figures)


def test_three_latents_in_one_call_cost_what_they_cost_one_by_one() -> None:
    first, later = decoded(True).multiply_adds, decoded(False).multiply_adds
    assert decoded(True, 3).multiply_adds == first + 2 * later
    assert decoded(False, 3).multiply_adds == 3 * later
    assert printed(decoded(False, 3).multiply_adds / 1e12, "20.33") == "20.33"


@pytest.mark.parametrize(
    ("chunk", "attention", "total"), [(0, "2.019", "8.09"), (1, "4.037", "10.11"), (2, "6.056", "12.13")]
)
def test_one_pass_has_the_multiply_adds_of_the_cost_model(chunk: int, attention: str, total: str) -> None:
    found = report(chunk=chunk)
    tera = 2e12 * found["passes"]
    flops = part_flops(found)
    blocks = group(found, "linears")["flops"] - flops["patch embedding"] - flops["head"]
    cross, own = (group(found, name)["flops"] for name in ("cross-attention", "self-attention"))
    assert printed(blocks / tera, "5.852") == "5.852"
    assert printed(cross / tera, "0.221") == "0.221"
    assert printed(own / tera, attention) == attention
    assert printed((blocks + cross + own) / tera, total) == total


def test_a_steady_chunk_and_a_prompt_have_the_multiply_adds_of_the_cost_model() -> None:
    found = report()
    assert printed(found["totals"]["products_without_vae"]["flops"] / 2e12, "60.65") == "60.65"
    assert printed(group(found, "VAE decode")["flops"] / 2e12, "20.33") == "20.33"
    keys_values = next(
        part for part in prompt_parts(SHIPPED.config.model) if part.name == "cross-attention k, v"
    )
    assert printed(keys_values.flops / 2e12, "0.072") == "0.072"


def test_each_layer_has_the_gflop_of_the_floor_tables() -> None:
    calls = {name: 150e9 for name in part_flops(report())} | {"patch embedding": 5e9, "head": 5e9}
    for chunk, attention in ((0, "134.6"), (1, "269.1"), (2, "403.7")):
        amounts = {
            name: flops / calls[name] for name, flops in part_flops(report(chunk=chunk)).items() if flops
        }
        figures = {
            "self-attention q, k, v": "66.25",
            "self-attention out": "22.08",
            "cross-attention q": "22.08",
            "cross-attention out": "22.08",
            "feed-forward in": "128.8",
            "feed-forward out": "128.8",
            "patch embedding": "0.92",
            "head": "0.92",
            "sink_window_attention": attention,
            "clip_attention": "14.7",
        }
        assert amounts.keys() == figures.keys()
        assert_as_printed(amounts, figures)
    embed_in, embed_out, keys_values = (part.flops / 1e9 for part in prompt_parts(SHIPPED.config.model))
    assert printed(embed_in + embed_out, "8.9") == "8.9"
    assert printed(keys_values, "145") == "145"


def test_chunks_have_the_tflop_of_the_floor_tables() -> None:
    dit = [report(chunk=chunk)["totals"]["products_without_vae"]["flops"] / 1e12 for chunk in (0, 1, 2)]
    assert [printed(amount, "80.9") for amount in dit] == ["80.9", "101.1", "121.3"]
    vae = group(report(), "VAE decode")["flops"]
    assert printed(vae / 1e12, "40.65") == "40.65"
    assert printed(vae / 1e12 / report()["pixel_frames"], "3.39") == "3.39"
    stages = {row["part"]: 100 * row["flops"] / vae for row in report()["parts"]}
    assert_as_printed(stages, {"stage 3": "35.2", "stage 2": "39.1", "stage 1": "20.8"})


@pytest.mark.parametrize(
    ("precision", "milliseconds", "totals"),
    [
        ("bf16", ("59.2", "61.2", "2.2", "41.1"), ("122.6", "97.8", "163.7", "73.3")),
        ("fp8", ("29.6", "61.2", "2.2", "41.1"), ("93.0", "129", "134", "89.5")),
    ],
)
def test_products_at_the_peak_of_an_h100_take_the_milliseconds_of_the_floor_tables(
    precision: str, milliseconds: tuple[str, ...], totals: tuple[str, ...]
) -> None:
    found = report(precision=precision)
    names = ("linears", "self-attention", "cross-attention", "VAE decode")
    amounts = {name: group(found, name)["arithmetic_ms"] for name in names}
    assert_as_printed(amounts, dict(zip(names, milliseconds, strict=True)))
    summed = [
        found["totals"][f"products_{kind}"][key]
        for kind in ("without_vae", "with_vae")
        for key in ("arithmetic_ms", "arithmetic_frames_per_s")
    ]
    assert [printed(amount, figure) for amount, figure in zip(summed, totals, strict=True)] == [*totals]


def test_weights_and_vae_move_the_bytes_of_the_floor_tables() -> None:
    found = report()
    assert printed(found["pass_weights"] / 1e9, "1.250") == "1.250"

    grid = SHIPPED.grid
    with torch.device("meta"):
        vae = WanVAE(SHIPPED.config.vae)
    slots = vae.decoder_state(1, grid.latent_height, grid.latent_width, torch.bfloat16, "meta").slots
    history = 2 * sum(slot.numel() for slot in slots.values())
    assert printed(history / 1e9, "1.89") == "1.89"
    rows = [row for row in found["parts"] if row["group"] == "VAE decode"]
    products = sum(row["bytes"] for row in rows if row["flops"])
    assert printed((products - history) / 1e9, "24") == "24"  # the tables count new frames alone
    assert printed((group(found, "VAE decode")["bytes"] - history) / 1e9, "44") == "44"


def test_eviction_has_the_floor_of_the_kernel_page() -> None:
    assert printed(group(report(), "eviction")["floor_ms"], "1.9334") == "1.9334"
    assert printed(group(report(gpu="h200"), "eviction")["floor_ms"], "1.35") == "1.35"


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (PRESETS["tiny"], 96, 64),
        (replace(PRESETS["wan-14b"], model=replace(PRESETS["wan-14b"].model, num_layers=2)), 64, 160),
    ],
    ids=["tiny", "wan-14b with two layers"],
)
def test_the_transformer_itself_counts_the_same_products(
    config: EngineConfig, height: int, width: int
) -> None:
    shapes = Shapes(replace(config, height=height, width=width))
    for chunk, counted in enumerate(_transformer_flops(shapes, chunks=4)):
        parts = ChunkWork(shapes, chunk).parts()
        assert sum(part.flops for part in parts if not part.decodes) == counted * 5


def _transformer_flops(shapes: Shapes, chunks: int) -> list[int]:
    """FLOPs of one pass of each of the first chunks, as torch counts them."""
    config, grid = shapes.config, shapes.grid
    counts = []
    with torch.device("meta"), torch.no_grad():
        model = WanDiT(config.model)
        kv_cache = StreamingKVCache(config.model, config.cache, grid, device="meta")
        text = model.text_keys_values(torch.empty(1, 10, config.model.text_dim))
        modulation = model.modulation(torch.empty(1, 1))
        latents = torch.empty(1, config.model.in_dim, shapes.frames, grid.latent_height, grid.latent_width)
        for _ in range(chunks):
            plan = kv_cache.plan_chunk()
            kv_cache.begin_chunk(plan)
            with FlopCounterMode(display=False) as counter:
                model.forward_chunk(latents, modulation, text, kv_cache, plan)
            kv_cache.commit(plan)
            counts.append(counter.get_total_flops())
    return counts


def test_row_kernels_move_twenty_passes_over_the_chunk_in_every_layer() -> None:
    rows = [row for row in report()["parts"] if row["group"] == "row kernels"]  # GELU is in its product
    activation = 2 * SHIPPED.tokens * SHIPPED.dim  # bytes
    first_norms, raw_keys = 5 * 2 * activation, 30 * activation
    assert sum(row["bytes"] for row in rows) == 150 * 20 * activation + first_norms + raw_keys


def rows_of(**options: Any) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in report(**options)["parts"]}


def test_fp8_products_have_operands_of_one_byte_and_results_of_two() -> None:
    rows, plain = rows_of(precision="fp8"), rows_of()
    tokens, dim, inner, single = 4680, 1536, 8960, 4
    scales = single * (tokens + 3 * dim)  # of rows and of channels
    moved = (tokens + 3 * dim) * dim + 2 * tokens * 3 * dim + scales
    assert rows["self-attention q, k, v"]["bytes"] == 150 * moved
    # GELU's result is written in one byte, with a scale for each row
    moved = (tokens + inner) * dim + tokens * inner + single * (2 * tokens + inner)
    assert rows["feed-forward in"]["bytes"] == 150 * moved
    moved = (tokens + dim) * inner + 2 * tokens * dim + single * (tokens + dim)
    assert rows["feed-forward out"]["bytes"] == 150 * moved
    # results of attention come in 16 bits, and are rounded as they are read
    moved = (2 * tokens + dim) * dim + 2 * tokens * dim + single * dim
    assert rows["self-attention out"]["bytes"] == rows["cross-attention out"]["bytes"] == 150 * moved
    for name in ("patch embedding", "head", "sink_window_attention", "clip_attention", "rms_norm"):
        assert rows[name] == plain[name]  # in 16 bits as before


def test_norms_in_fp8_write_a_byte_and_a_scale_for_each_row_but_for_the_one_before_the_head() -> None:
    rows, values, scales = rows_of(precision="fp8"), 4680 * 1536, 4680 * 4
    assert rows["adaptive_layer_norm_fp8"]["bytes"] == 5 * (3 * values + scales)
    assert rows["gated_residual_affine_norm_fp8"]["bytes"] == 150 * (7 * values + scales)
    assert rows["gated_residual_adaptive_norm_fp8"]["bytes"] == 295 * (7 * values + scales)
    assert rows["gated_residual_adaptive_norm"]["bytes"] == 5 * 8 * values


def test_fp8_attention_is_that_of_the_passes_which_do_not_stay_in_16_bits() -> None:
    """By default the first step and the context pass stay, three of five passes do not."""
    plain, rows = rows_of(), rows_of(precision="fp8-attention")
    tokens, window, dim, heads = 4680, 14040, 1536, 12
    whole = plain["sink_window_attention"]
    kept, eight = rows["sink_window_attention"], rows["sink_window_attention_fp8"]
    assert 5 * kept["flops"] == 2 * whole["flops"] and kept["flops"] + eight["flops"] == whole["flops"]
    assert eight["arithmetic_ms"] / kept["arithmetic_ms"] == pytest.approx(1.5 * 989 / 1979)
    scales = 4 * tokens * heads
    assert eight["bytes"] == 90 * (2 * (tokens + window) * dim + scales)
    assert 5 * kept["bytes"] == 2 * whole["bytes"]
    # its result is read in one byte, with a scale for each head
    half, one = (2 * tokens + dim) * dim, (tokens + dim) * dim + scales
    out = rows["self-attention out"]["bytes"] - 150 * (2 * tokens * dim + 4 * dim)
    assert out == 60 * half + 90 * one
    assert rows["qk_norm_rope_write_fp8"]["bytes"] == 90 * 9 * tokens * dim
    assert rows["qk_norm_rope_write"]["bytes"] == 30 * 12 * tokens * dim
    assert rows["qk_norm_rope_write, raw keys too"]["bytes"] == 30 * 14 * tokens * dim
    arenas = 2 * 30 * window * dim * 2
    assert rows["window_fp8"]["bytes"] == arenas + arenas // 2 + 30 * 4 * (dim + heads)


def test_chunks_that_fill_the_window_have_no_fp8_attention() -> None:
    filling = [report(chunk=2, precision=precision)["parts"] for precision in ("fp8", "fp8-attention")]
    assert filling[0] == filling[1]


def test_a_context_pass_in_fp8_writes_the_arena_as_well() -> None:
    def moved(positions: str) -> dict[str, int]:
        runtime = RuntimeConfig(precision="fp8-attention", sixteen_bit_passes=())
        cache = replace(SHIPPED.config.cache, positions=positions, sink="frozen")
        config = replace(SHIPPED.config, cache=cache, runtime=runtime)
        work = ChunkWork.steady(Shapes(config), "fp8-attention")
        parts = work.parts()
        values = 30 * 4680 * 1536
        found = {part.name: part.bytes / values for part in parts if part.name.startswith("qk_norm")}
        apart = {part.name: part.bytes / values for part in work.saved_by_fusing()}
        assert apart["queries, keys and values"] == 5 * 3 * 4 - 2 * 2  # it has these in 16 bits as well
        assert "window_fp8" in {part.name for part in parts}
        return found

    steps = {"qk_norm_rope_write_fp8": 4 * 9}
    assert moved("absolute") == steps | {"qk_norm_rope_write_fp8, arena too": 13}
    assert moved("relative") == steps | {"qk_norm_rope_write_fp8, arena too": 15}


def test_fp8_attention_of_a_rolling_schedule_is_refused() -> None:
    shapes = Shapes(configured(SHIPPED.config, "rolling-forcing"))
    assert ChunkWork.steady(shapes, "fp8").parts()
    with pytest.raises(ValueError, match="precision is 'fp8-attention' and rolling is"):
        ChunkWork.steady(shapes, "fp8-attention").parts()


def test_the_large_convolutions_of_the_vae_are_in_fp8_by_a_choice_of_their_own() -> None:
    plain, fp8 = report(), report(vae_precision="fp8")
    assert fp8["groups"][:5] == plain["groups"][:5]
    work = decode_work(SHIPPED.config.vae, SHIPPED.grid, 3, False)
    names = [path for path in work.large if path in work.products]
    assert len(names) == 17 and len(work.large) == 2 * 17  # each with its norm
    flops = sum(work.products[path].flops for path in names)
    rows = [next(row for row in found["groups"] if row["group"] == "VAE decode") for found in (plain, fp8)]
    faster = flops / 989e9 - flops / 1979e9
    assert rows[0]["arithmetic_ms"] - rows[1]["arithmetic_ms"] == pytest.approx(faster)
    read = sum(work.products[path].read_elements for path in names)
    written = sum(count for path, count in work.norm_elements.items() if path in work.large)
    assert rows[0]["bytes"] - rows[1]["bytes"] == read + written


def saved(**options: Any) -> dict[str, float]:
    """In bytes for each value of a chunk's rows in one layer of one pass."""
    values = 150 * 4680 * 1536
    return {row["operand"]: row["bytes"] / values for row in report(**options)["saved_by_fusing"]}


def test_what_fusing_saves_is_a_pass_for_every_operand() -> None:
    """Apart, an operand is written in two bytes, read, and written in one; at once it is written in one."""
    assert saved() == {}
    gelu = 4 * 8960 / 1536
    assert saved(precision="fp8") == {"norms": 12, "GELU": pytest.approx(gelu), "attention results": 4}
    assert saved(precision="fp8-attention") == {
        "norms": 12, "GELU": pytest.approx(gelu), "attention results": pytest.approx(2 * 2 + 2 * 3 / 5),
        "queries, keys and values": pytest.approx(3 * 4 * 3 / 5),
    }  # fmt: skip
    found = report(precision="fp8-attention", vae_precision="fp8")
    assert found["saved_by_fusing"][-1]["operand"] == "norms of the VAE"
    whole = found["saved_in_all"]
    assert whole["bytes"] == sum(row["bytes"] for row in found["saved_by_fusing"])
    assert whole["memory_ms"] == pytest.approx(whole["bytes"] / 3.35e9)


def test_a_pass_apart_for_every_operand_would_move_what_is_saved() -> None:
    """The same chunk, counted anew with kernels that know nothing of FP8 and one that rounds."""
    fused = {row["part"]: row["bytes"] for row in report(precision="fp8")["parts"]}
    names = ("adaptive_layer_norm", "gated_residual_affine_norm", "gated_residual_adaptive_norm")
    values, tokens, inner, dim = 4680 * 1536, 4680, 8960, 1536
    calls = {"adaptive_layer_norm": 5, "gated_residual_affine_norm": 150, "gated_residual_adaptive_norm": 295}
    plain = {"adaptive_layer_norm": 4, "gated_residual_affine_norm": 8, "gated_residual_adaptive_norm": 8}
    norms = sum(calls[name] * (plain[name] + 3) * values for name in names)
    norms_fused = sum(fused[f"{name}_fp8"] - calls[name] * 4 * tokens for name in names)
    expand = 150 * ((tokens + inner) * dim + 2 * tokens * inner + 4 * (tokens + inner))  # a result in 16 bits
    gelu = expand + 150 * (3 * tokens * inner + 4 * tokens)
    out = 2 * 150 * (3 * values + values + dim * dim + 2 * values + 4 * dim)  # rounded, then read in a byte
    whole = norms + gelu + out
    whole_fused = norms_fused + fused["feed-forward in"]
    whole_fused += fused["self-attention out"] + fused["cross-attention out"]
    assert whole - whole_fused == report(precision="fp8")["saved_in_all"]["bytes"]


def test_a_faster_memory_lowers_what_memory_bounds_and_nothing_else() -> None:
    h100, h200 = report(), report(gpu="h200")
    for slow, fast in zip(h100["parts"], h200["parts"], strict=True):
        assert fast["floor_ms"] <= slow["floor_ms"]
        assert fast["arithmetic_ms"] == slow["arithmetic_ms"]
        assert fast["memory_ms"] == pytest.approx(slow["memory_ms"] * 3.35 / 4.8)


def test_floors_add_up_and_frames_follow_from_the_chunk() -> None:
    for chunk, frames in ((0, 9), (1, 12), ("steady", 12)):
        found = report(chunk=chunk)
        whole = found["totals"]["with_vae"]
        assert found["pixel_frames"] == frames
        assert whole["floor_ms"] == pytest.approx(sum(row["floor_ms"] for row in found["parts"]))
        assert whole["floor_ms"] >= max(whole["arithmetic_ms"], whole["memory_ms"])
        assert whole["floor_frames_per_s"] == pytest.approx(1e3 * frames / whole["floor_ms"])


def test_a_chunk_evicts_only_once_the_window_is_full() -> None:
    assert [group(report(chunk=chunk), "eviction")["bytes"] > 0 for chunk in (0, 1, 2, 3)] == [
        False, False, False, True,
    ]  # fmt: skip
    assert report(chunk=3) == report()


def test_frozen_sinks_are_not_averaged_and_absolute_positions_not_rotated_again() -> None:
    def moved(**changes: Any) -> int:
        config = PRESETS["tiny"]
        shapes = Shapes(replace(config, cache=replace(config.cache, **changes)))
        return sum(part.bytes for part in ChunkWork.steady(shapes).parts() if part.group == "eviction")

    assert moved() > moved(sink_precision="bf16") > moved(sink="frozen") > 0
    assert moved(sink="frozen", positions="absolute") == 0


def test_sizes_follow_the_options() -> None:
    found = report(model="tiny", height=96, width=64)
    assert (found["height"], found["width"]) == (96, 64)
    square = part_flops(report(model="tiny"))["feed-forward in"]
    assert part_flops(found)["feed-forward in"] == square * 24 // 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu": "a100", "precision": "fp8"}, "no FP8 products"),
        ({"gpu": "a100", "vae_precision": "fp8"}, "vae_precision is fp8 but A100 .* has no FP8 products"),
        ({"chunk": -1}, "chunks count from 0"),
        ({"height": 481}, "multiple of 16"),
        ({"model": "wan-2b"}, "wan-2b is no directory"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        report(**options)


def test_the_table_shows_every_part_and_the_totals() -> None:
    found = report()
    lines = {line[:40].strip(): line for line in render(found).splitlines()}
    for row in (*found["parts"], *found["groups"], *found["once_a_prompt"]):
        assert (row["part"] or row["group"]) in lines
    assert lines["self-attention"].split()[1:] == ["60,555.76", "17.25", "arithmetic", "61.2293"]
    assert lines["products alone, without the VAE"].endswith(" 97.8 frames/s")
    assert lines["products alone"].endswith(" 73.3 frames/s")


def test_the_text_says_what_fusing_saves() -> None:
    assert "saved" not in render(report())
    lines = {line[:40].strip(): line.split() for line in render(report(precision="fp8")).splitlines()}
    assert lines["saved, rounding to e4m3 is no pass"][-3:] == ["42.41", "memory", "12.6603"]
    assert lines["GELU"][-3:] == ["25.16", "memory", "7.5104"]


def test_the_command_prints_json_or_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["roofline.py", "--model", "tiny", *options])
        return run_script("roofline", Options, run)

    assert status("--chunk", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out) == report(model="tiny", chunk=0)
    assert status("--gpu", "a100", "--precision", "fp8") == 2
    assert capsys.readouterr().err.startswith("rfengine: error: precision is fp8 but A100")
