"""What several cards send each other: against the collectives that the code calls, and figures by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench.roofline import Options, render, roofline
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.costs.chunk import ChunkWork
from rfengine.costs.rates import GPUS
from rfengine.costs.shapes import Shapes
from rfengine.costs.splits import splits
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.presets import PRESETS
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule
from rfengine.tensor_parallel import TensorParallel
from support.models import small_config


def test_the_sums_of_a_chunk_are_those_that_the_code_makes(monkeypatch) -> None:
    """But for the end of the context pass, where the last layer stops after its keys and values."""
    sent: list[torch.Size] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: sent.append(x.shape))
    config = dataclasses.replace(small_config(), height=32, width=48)
    parallel, grid = TensorParallel(0, 2), LatentGrid.of(config)
    with torch.device("meta"):
        model = WanDiT(config.model, parallel=parallel)
    runner = ChunkRunner(model, FlowSchedule(config.schedule))
    cache = StreamingKVCache(config.model, config.cache, grid, device="meta", parallel=parallel)
    text = model.text_keys_values(torch.empty(1, 8, config.model.text_dim, device="meta"))
    sent.clear()
    noise = torch.empty(2, 1, 4, 3, grid.latent_height, grid.latent_width, device="meta")
    runner.advance(cache, cache.plan_chunk(), noise, text)

    work = dataclasses.replace(ChunkWork.steady(Shapes(config)), ranks=2)
    rows = [shape for shape in sent if len(shape) == 3 and shape[-1] == config.model.dim]
    squares = [shape for shape in sent if shape not in rows]
    tokens, calls = work.shapes.tokens, work.layer_calls
    assert len(rows) == 3 * (calls - 1) and set(rows) == {torch.Size((1, tokens, config.model.dim))}
    numbers = sum(shape.numel() for shape in squares)
    assert numbers == 3 * tokens * (calls - 1) + 2 * tokens  # the last one normed its keys twice
    assert len(squares) == 2 * calls - 1


def test_bytes_and_milliseconds_are_those_reckoned_by_hand() -> None:
    one, apart, ranks = splits(ChunkWork.steady(Shapes()), GPUS["h100"], 2)
    tokens, calls = 4680, 150
    assert ranks.sent == calls * (3 * tokens * 1536 * 2 + 3 * tokens * 4)  # a ring of two sends all once
    assert ranks.messages == 5 * calls and apart.messages == 1 and one.sent == one.messages == 0
    assert apart.sent == 16 * 3 * 60 * 104 * 2
    assert ranks.link_ms(450) == pytest.approx(14.396, abs=1e-3)
    assert one.chunk_ms(450) == pytest.approx(one.denoise_ms + one.decode_ms)
    assert apart.chunk_ms(64) == max(one.denoise_ms, one.decode_ms)
    assert ranks.chunk_ms(64) == pytest.approx(ranks.denoise_ms + ranks.decode_ms + 101.22, abs=0.01)
    assert ranks.held / one.held == pytest.approx(0.5, rel=0.05)


def test_ranks_share_out_the_products_of_the_blocks() -> None:
    whole = ChunkWork.steady(Shapes(), "fp8-attention")
    parts = {(part.group, part.name): part for part in whole.parts()}
    halved = {(part.group, part.name): part for part in dataclasses.replace(whole, ranks=2).parts()}
    assert parts.keys() == halved.keys()
    for key, part in parts.items():
        is_whole = part.decodes or key[1] in ("patch embedding", "head")
        assert halved[key].flops == (part.flops if is_whole else part.flops // 2), key
        of_heads = key[0] in ("self-attention", "cross-attention", "eviction")
        assert halved[key].bytes <= (0.51 if of_heads and "rephase" not in key[1] else 1) * part.bytes, key


def documented() -> list[str]:
    """The rows of docs/several_cards.md, as the code has them."""
    rows = []
    for name, counts in (("wan-1.3b", (2, 4)), ("wan-14b", (2, 4, 8))):
        work = ChunkWork.steady(Shapes(PRESETS[name]))
        ways = [each for count in counts for each in splits(work, GPUS["h100"], count)]
        for each in {each.name: each for each in ways}.values():
            held, sent = f"{each.held / 1e9:.2f}", f"{each.sent / 1e9:.4g}"
            links = []
            for rate in (450, 64):
                chunk = each.chunk_ms(rate)
                link = f"{each.link_ms(rate):.1f} | {chunk:.0f} ms, {work.pixel_frames / chunk * 1e3:.0f}"
                links.append(link)
            rows.append(f"| {name} | {each.name} | {held} | {sent} | {' | '.join(links)} |")
    return rows


def test_the_document_has_the_figures_of_the_code() -> None:
    lines = Path("docs/several_cards.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| wan-")] == documented()


def test_the_table_names_every_way_and_refuses_what_cannot_be() -> None:
    shown = render(roofline(Options(gpus=3)))
    assert "2 ranks and the decoder's card" in shown and "nvlink 450 GB/s, pcie 64 GB/s" in shown
    assert "one stream on several cards" not in render(roofline(Options()))
    assert "nvlink" not in render(roofline(Options(gpus=2, gpu="rtx4090")))
    with pytest.raises(ValueError, match="7 cards cannot share 12 heads and 8960 feed-forward columns"):
        roofline(Options(gpus=7))
    fourteen = splits(ChunkWork.steady(Shapes(PRESETS["wan-14b"])), GPUS["h100"], 4)
    assert [each.name for each in fourteen] == ["one card", "4 ranks"]
