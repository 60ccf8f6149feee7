"""The units a measurement is gathered from, kept so that an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rfengine.files import replaced

Values = dict[str, float]
Unit = dict[str, Any]  # what torch.save keeps: videos, and what the record needs of all units at once


def unit(directory: Path, name: str, settings: dict[str, Any], make: Callable[[], Unit]) -> Unit:
    """What `make` gives, kept in `directory` so that an interrupted measurement goes on after it.

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
