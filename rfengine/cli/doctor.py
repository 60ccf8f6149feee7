"""`rfengine doctor`: the report of rfengine.doctor, as text or JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tyro.conf import OmitArgPrefixes

from rfengine.cli.exit_status import OTHER_ERROR
from rfengine.cli.lora_options import LoraOptions
from rfengine.config import DTypeName


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Report versions, the GPU, backends and why each is on or off, memory needed and free, and whether the
    files of a checkpoint are what its manifest says; exit 1 if one differs."""

    json: bool = False
    """Print JSON instead of text."""
    model: str = "tiny"
    """Whose memory is computed: tiny, wan-1.3b, wan-14b, skyreels-df-1.3b or a checkpoint directory."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    dtype: DTypeName | None = None
    """bfloat16 on CUDA, float32 on the CPU where nothing is given."""
    loras: OmitArgPrefixes[LoraOptions] = LoraOptions()
    renew: bool = False
    """First write the manifest of the checkpoint directory again, after an intended change."""


def run(options: DoctorOptions) -> int:
    from rfengine.checkpoint.directories import CheckpointDirectory, checkpoint_directory
    from rfengine.checkpoint.manifest import write_manifest
    from rfengine.doctor import examine, render

    if options.renew:
        directory = checkpoint_directory(options.model)
        CheckpointDirectory.of(directory)  # refuses a directory that is no checkpoint
        write_manifest(directory)
    report = examine(options.model, options.height, options.width, options.dtype, options.loras.loras())
    print(json.dumps(report, indent=2) if options.json else render(report))
    return OTHER_ERROR if report["files"] and any(report["files"].values()) else 0
