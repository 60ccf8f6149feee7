"""`rfengine doctor`: the report of rfengine.doctor, as text or JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rfengine.config import DTypeName


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Report versions, the GPU, backends and why each is on or off, and memory needed and free."""

    json: bool = False
    """Print JSON instead of text."""
    model: str = "tiny"
    """Whose memory is reckoned: tiny, wan-1.3b, wan-14b or a checkpoint directory."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    dtype: DTypeName | None = None
    """bfloat16 on CUDA, float32 on the CPU where nothing is given."""


def run(options: DoctorOptions) -> int:
    from rfengine.doctor import examine, render

    report = examine(options.model, options.height, options.width, options.dtype)
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0
