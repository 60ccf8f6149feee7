"""The records of the toy study, one JSON file for each set of videos that was measured, and the units that a
record is gathered from.

A record of clips: {"kind": "clips", "model", "settings", "fidelity": {captions: [a value for each sampling
seed]}, "videos"}; of streams: {"kind": "streams", "model", "sink", "scenario", "settings", "videos"}. A
video: {"prompt", "seed", "captions" (full or open, of clips), "values": {name: number}, "curves": {name:
[[second or lag in s, value], ...]} (of streams)}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rfengine.files import replaced, write_text

Record = dict[str, Any]
Values = dict[str, float]
Unit = dict[str, Any]  # what torch.save keeps: videos, and what the record needs of all units at once


def unit(directory: Path, name: str, settings: dict[str, Any], make: Callable[[], Unit]) -> Unit:
    """The result of `make`, kept in `directory` so that an interrupted measurement continues after it.

    One of other settings is made again.
    """
    path = directory / f"{name}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["settings"] == settings:
            return kept["unit"]
    directory.mkdir(parents=True, exist_ok=True)
    made = make()
    with replaced(path) as partial:
        torch.save({"settings": settings, "unit": made}, partial)
    return made


def write_record(path: Path, record: Record) -> None:
    """Write `record` whole or not at all, numbers to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_text(path, json.dumps(rounded) + "\n")


def read_records(folder: Path) -> list[Record]:
    """The records clips_*.json and streams_*.json of a folder."""
    paths = [*sorted(folder.glob("clips_*.json")), *sorted(folder.glob("streams_*.json"))]
    return [json.loads(path.read_text()) for path in paths]
