"""FLOPs, bytes and floors of one chunk, part by part, from the configuration alone; no GPU is needed.

    python bench/roofline.py --gpu h200 --precision fp8-attention --vae-precision fp8

The floor of a part is the larger of FLOPs over the rate of products and bytes over the rate of the memory, as
the data sheet has them; nothing here was measured. Floors of parts are added up, as if no two ran at once.
"Products alone" takes the FLOPs at peak rate and no byte. What is counted and what is not stands at the head
of costs/chunk.py; the VAE is counted by running its code without data.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.cli.process import run_script
from rfengine.costs.chunk import GROUPS, PRODUCTS, ChunkWork, Part, Precision, prompt_parts
from rfengine.costs.rates import GPU, GPUS, GPUName, arithmetic_ms, floor_ms, memory_ms
from rfengine.costs.shapes import Shapes
from rfengine.costs.splits import Split, splits
from rfengine.grid import LatentGrid
from rfengine.limits import Range, check_options
from rfengine.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Options:
    """FLOPs, bytes and floors of one chunk, part by part, at the rates of a data sheet."""

    gpu: GPUName = "h100"
    """Whose data sheet."""
    model: str = "wan-1.3b"
    """A preset (tiny, wan-1.3b, wan-14b) or a checkpoint directory."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    chunk: int | Literal["steady"] = "steady"
    """Which chunk of the video, from 0; steady is the first that evicts another."""
    precision: Precision = "bf16"
    """Of the transformer's products. fp8: the linears of the blocks in FP8. fp8-attention: the attention over
    a full window as well, in the passes that the model's runtime does not keep in 16 bits."""
    vae_precision: Literal["bf16", "fp8"] = "bf16"
    """fp8: the large convolutions of the VAE in FP8."""
    gpus: Annotated[int, Range(1, 64)] = 1
    """Show what it costs to have one stream on so many of them: what they send each other, and the floors."""
    json: bool = False
    """Print JSON instead of text."""


def roofline(options: Options) -> dict[str, Any]:
    """The report as JSON values: options, rates, rows of parts and of groups, totals, and of several cards
    the ways to divide a stream among them.

    Raises ValueError for a size, a chunk or a model that cannot be, and for FP8 on a GPU without it.
    """
    check_options(options)
    gpu = GPUS[options.gpu]
    for name, value in (("precision", options.precision), ("vae_precision", options.vae_precision)):
        if value != "bf16" and gpu.fp8_tflop_per_s is None:
            raise ValueError(f"{name} is {value} but {gpu.name} has no FP8 products; use bf16")
    config = PRESETS[options.model] if options.model in PRESETS else Checkpoint.open(options.model).config
    grid = LatentGrid.of(config, options.height, options.width)
    shapes = Shapes(replace(config, height=grid.height, width=grid.width))
    steady = ChunkWork.steady(shapes, options.precision, options.vae_precision == "fp8")
    work = steady if options.chunk == "steady" else replace(steady, index=options.chunk)
    parts, saved = work.parts(), work.saved_by_fusing()
    named: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        named.setdefault((part.group, part.name), []).append(part)
    totals = {
        f"{what}{vae}": _total(
            [part for part in parts if part.group in groups and (decodes or not part.decodes)], work, gpu
        )
        for what, groups in (("", GROUPS), ("products_", PRODUCTS))
        for vae, decodes in (("without_vae", False), ("with_vae", True))
    }
    return {
        "model": config.name, "height": grid.height, "width": grid.width, "chunk": work.index,
        "is_steady": work.evicts, "precision": options.precision, "vae_precision": options.vae_precision,
        "gpu": asdict(gpu),
        "passes": sum(runs.count for runs in work.runs),
        "pixel_frames": work.pixel_frames, "pass_weights": work.pass_weights,
        "parts": [_row(*name, members, gpu) for name, members in named.items()],
        "groups": [_row(name, "", [each for each in parts if each.group == name], gpu) for name in GROUPS],
        "once_a_prompt": [_row(part.group, part.name, [part], gpu) for part in prompt_parts(config.model)],
        "saved_by_fusing": [_saved(part.name, [part], gpu) for part in saved],
        "saved_in_all": _saved("", saved, gpu),
        "totals": totals,
        "splits": [_split(each, work, gpu) for each in splits(work, gpu, options.gpus)]
        if options.gpus > 1
        else [],
    }  # fmt: skip


def _split(split: Split, work: ChunkWork, gpu: GPU) -> dict[str, Any]:
    """One way to divide a stream, over each link that the cards can have."""
    links = {"nvlink": gpu.nvlink_gb_per_s, "pcie": gpu.pcie_gb_per_s}
    over = {
        name: {
            "gb_per_s": rate, "link_ms": split.link_ms(rate), "chunk_ms": split.chunk_ms(rate),
            "frames_per_s": work.pixel_frames / split.chunk_ms(rate) * 1e3,
        }
        for name, rate in links.items()
        if rate
    }  # fmt: skip
    return asdict(split) | {"links": over}


def _row(group: str, name: str, members: list[Part], gpu: GPU) -> dict[str, Any]:
    """The sum of `members`: a stage of the VAE is as many parts as it has layers."""
    arithmetic = sum(arithmetic_ms(part, gpu) for part in members)
    memory = sum(memory_ms(part, gpu) for part in members)
    return {
        "group": group, "part": name, "flops": sum(part.flops for part in members),
        "bytes": sum(part.bytes for part in members), "arithmetic_ms": arithmetic, "memory_ms": memory,
        "floor_ms": sum(floor_ms(part, gpu) for part in members),
        "bound": "arithmetic" if arithmetic > memory else "memory",
    }  # fmt: skip


def _saved(operand: str, members: list[Part], gpu: GPU) -> dict[str, Any]:
    """Bytes of passes that would round operands, and their milliseconds."""
    row = _row("", "", members, gpu)
    return {"operand": operand, "bytes": row["bytes"], "memory_ms": row["memory_ms"]}


def _total(parts: list[Part], work: ChunkWork, gpu: GPU) -> dict[str, float]:
    """Sums of `parts`, and the frames per second of their floors and of their arithmetic alone."""
    row = _row("", "", parts, gpu)
    rates = {
        f"{kind}_frames_per_s": work.pixel_frames / row[f"{kind}_ms"] * 1e3
        for kind in ("floor", "arithmetic")
    }
    return {key: row[key] for key in ("flops", "bytes", "arithmetic_ms", "memory_ms", "floor_ms")} | rates


def render(report: dict[str, Any]) -> str:
    gpu, totals = report["gpu"], report["totals"]
    fp8 = f", {gpu['fp8_tflop_per_s']:g} FP8" if gpu["fp8_tflop_per_s"] else ""
    lines = [
        f"{report['model']} at {report['width']} x {report['height']}, chunk {report['chunk']}"
        f"{' (steady)' if report['is_steady'] else ''}, {report['precision']}, VAE in "
        f"{report['vae_precision']}: {report['pixel_frames']} "
        f"frames from {report['passes']} passes, {report['pass_weights'] / 1e9:.3f} G parameters each",
        f"data sheet of {gpu['name']}: {gpu['tb_per_s']:g} TB/s, {gpu['bf16_tflop_per_s']:g} TFLOP/s bf16"
        f"{fp8}; a multiply-add is two FLOPs",
        "",
        f"{'part':<40}{'GFLOP':>11}{'GB':>11}  {'bound':<10}{'floor, ms':>10}",
    ]
    for group in report["groups"]:
        if not group["bytes"]:
            continue
        lines.append(_line(group["group"], group))
        members = [row for row in report["parts"] if row["group"] == group["group"]]
        lines.extend(_line(f"  {row['part']}", row) for row in members)
    lines.append("")
    for name, key, kind in (
        ("all but the VAE", "without_vae", "floor"),
        ("all", "with_vae", "floor"),
        ("products alone, without the VAE", "products_without_vae", "arithmetic"),
        ("products alone", "products_with_vae", "arithmetic"),
    ):
        total = totals[key]
        moved = total["bytes"] if kind == "floor" else 0
        row = {"flops": total["flops"], "bytes": moved, "floor_ms": total[f"{kind}_ms"]}
        lines.append(f"{_line(name, row)}  {total[f'{kind}_frames_per_s']:,.1f} frames/s")
    lines += ["", "once a prompt, in no chunk:"]
    lines.extend(_line(f"  {row['part']}", row) for row in report["once_a_prompt"])
    if report["saved_by_fusing"]:
        lines += ["", _saved_line("saved, rounding to e4m3 is no pass", report["saved_in_all"])]
        lines.extend(_saved_line(f"  {row['operand']}", row) for row in report["saved_by_fusing"])
    if report["splits"]:
        lines += ["", *_split_lines(report["splits"])]
    return "\n".join(lines)


def _split_lines(found: list[dict[str, Any]]) -> list[str]:
    links = list(found[0]["links"])
    heads = "".join(f"{f'{name}, ms':>12}{'chunk, ms':>11}{'frames/s':>10}" for name in links)
    lines = [f"{'one stream on several cards':<34}{'GB held':>9}{'MB sent':>9}{'messages':>10}{heads}"]
    for row in found:
        amounts = f"{row['held'] / 1e9:>9.2f}{row['sent'] / 1e6:>9,.1f}{row['messages']:>10}"
        over = "".join(
            f"{link['link_ms']:>12.2f}{link['chunk_ms']:>11.1f}{link['frames_per_s']:>10.1f}"
            for link in row["links"].values()
        )
        lines.append(f"{row['name']:<34}{amounts}{over}")
    rates = ", ".join(f"{name} {found[0]['links'][name]['gb_per_s']:g} GB/s" for name in links)
    return [*lines, f"each way, by the data sheets: {rates}; the start of a message is not counted"]


def _saved_line(name: str, row: dict[str, Any]) -> str:
    return _line(name, {"flops": 0, "bytes": row["bytes"], "bound": "memory", "floor_ms": row["memory_ms"]})


def _line(name: str, row: dict[str, Any]) -> str:
    amounts = f"{_billions(row['flops']):>11}{_billions(row['bytes']):>11}"
    return f"{name:<40}{amounts}  {row.get('bound', ''):<10}{row['floor_ms']:>10.4f}"


def _billions(amount: int) -> str:
    if not amount:
        return ""
    value = amount / 1e9
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def run(options: Options) -> None:
    report = roofline(options)
    print(json.dumps(report, indent=2) if options.json else render(report))


if __name__ == "__main__":
    sys.exit(run_script("roofline", Options, run))
