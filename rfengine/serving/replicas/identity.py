"""What a replica runs, as JSON values that those of one gateway must have in common."""

from __future__ import annotations

from typing import Any

import torch

from rfengine import __version__
from rfengine.config_json import to_dict
from rfengine.limits import shown
from rfengine.pipeline import Pipeline


def identity_of(pipeline: Pipeline) -> dict[str, Any]:
    """Versions, the kind of device, the weights' fingerprint with dtype and LoRAs, and the configuration."""
    settings = pipeline.settings()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "device": pipeline.model.device.type,
        **{name: settings.get(name) for name in ("fingerprint", "dtype", "decoder", "precision", "loras")},
        "configuration": to_dict(pipeline.config),
    }


def difference(own: Any, other: Any, name: str = "") -> tuple[str, str, str] | None:
    """The first field in which two identities differ, by its dotted name, and both values as text."""
    if isinstance(own, dict) and isinstance(other, dict):
        for key in sorted(own.keys() | other.keys()):
            inner = f"{name}.{key}" if name else key
            if found := difference(own.get(key), other.get(key), inner):
                return found
        return None
    return None if own == other else (name, shown(own), shown(other))
