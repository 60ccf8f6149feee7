"""Which preset fits a card, as `rfengine doctor --gpu-memory` says it: planned, with nothing loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import DTypeName, EngineConfig
from rfengine.runtime.card_presets import GIB, Candidate, configurations, planned, too_small
from rfengine.runtime.options import runtime_switches

_CUDA = "cuda"
_COLUMNS = 8  # of a table, as a terminal has room for them


def card_report(
    checkpoint: Checkpoint,
    config: EngineConfig,
    card_bytes: int,
    dtype: DTypeName | None = None,
    has_loras: bool = False,
    may_shrink: bool = True,
) -> dict[str, Any]:
    """The presets of `config` on a CUDA card of `card_bytes`, as plain JSON values; sizes are bytes.

    presets: all at the size of `config`, and smaller sizes up to the first that fits, where none does.
    takes: the number of what --preset auto takes there; None, with `refusal`, where nothing fits. dtype: of
    the model; bfloat16 where nothing is given. Raises ValueError for a model that streams nothing.
    """
    options = configurations(checkpoint, config, has_loras=has_loras, may_shrink=may_shrink)
    size, rows, takes = (config.height, config.width), [], None
    for preset, changed in options:
        if takes is not None and (changed.height, changed.width) != size:
            break
        rows.append(planned(preset, changed, _CUDA, dtype))
        if takes is None and rows[-1].plan.card <= card_bytes:
            takes = len(rows) - 1
    refusal = ""
    if takes is None:
        place = f"a card of {card_bytes / GIB:.2f} GiB is"
        refusal = too_small(place, rows, lambda plan: plan.card)
    return {
        "card": card_bytes, "model": config.name, "presets": [_row(each, card_bytes) for each in rows],
        "takes": takes, "refusal": refusal,
    }  # fmt: skip


def _row(candidate: Candidate, card_bytes: int) -> dict[str, Any]:
    plan, config = candidate.plan, candidate.config
    runtime = config.runtime
    return {
        "preset": candidate.preset.name, "height": config.height, "width": config.width,
        "parts": plan.parts, "work": plan.work, "phases": plan.phases, "reserve": plan.reserve,
        "host": plan.host, "needed": plan.card, "fits": plan.card <= card_bytes,
        "options": {
            "text_encoder": runtime.text_encoder or "stays",
            "text_weights": runtime.text_weights or "default",
            "block_weights": runtime.block_weights or "default",
            "block_buffers": runtime.block_buffers or 0,
            "decoder": runtime.vae,
        },
        "graphs": dataclasses.asdict(runtime_switches(runtime, torch.device(_CUDA))["graphs"]),
        "quality": candidate.preset.quality, "speed": candidate.preset.speed,
    }  # fmt: skip


def card_lines(report: dict[str, Any]) -> list[str]:
    """The report as tables: a column for each preset, in GiB."""
    rows = report["presets"]
    lines = [
        f"presets for {report['model']} on a card of {_gib(report['card'])} GiB, planned in GiB; the reserve "
        "is not measured"
    ]
    for start in range(0, len(rows), _COLUMNS):
        lines += _table(rows[start : start + _COLUMNS])
    lines += [
        f"  {row['preset']}: {row['quality']}; {row['speed']}; CUDA graphs {_switch(row['graphs'])}"
        for row in {row["preset"]: row for row in rows}.values()
    ]
    if report["takes"] is None:
        return [*lines, f"  {report['refusal']}"]
    taken = rows[report["takes"]]
    return [*lines, f"  --preset auto takes {taken['preset']} at {taken['height']} x {taken['width']} pixels"]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    table = {"": [row["preset"] for row in rows], "size": [f"{row['height']}x{row['width']}" for row in rows]}
    names = [name for name in rows[0]["parts"] if any(row["parts"].get(name) for row in rows)]
    for name in names:
        table[name.replace("_", " ")] = [_gib(row["parts"].get(name, 0)) for row in rows]
    for name in rows[0]["phases"]:
        table[f"peak, {name}"] = [_gib(row["phases"][name]) for row in rows]
    table["reserve"] = [_gib(sum(row["reserve"].values())) for row in rows]
    table["in all"] = [_gib(row["needed"]) for row in rows]
    table["fits"] = ["yes" if row["fits"] else "no" for row in rows]
    table["in host memory"] = [_gib(sum(row["host"].values())) for row in rows]
    for name in rows[0]["options"]:
        table[name.replace("_", " ")] = [str(row["options"][name]) for row in rows]
    return [f"  {name:<20}" + "".join(f"{cell:>9}" for cell in cells) for name, cells in table.items()]


def _switch(graphs: dict[str, Any]) -> str:
    return f"{'on' if graphs['on'] else 'off'}: {graphs['reason']}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
