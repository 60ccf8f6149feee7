"""`rfengine doctor`: the report of rfengine.doctor, as text or JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from rfengine.cli.exit_status import OTHER_ERROR
from rfengine.cli.lora_options import LoraOptions
from rfengine.config import DTypeName
from rfengine.limits import Range, check_options


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Report versions, the GPU, backends and why each is on or off, memory needed and free, and whether the
    files of a checkpoint are what its manifest says; exit 1 if one differs, or if no preset fits."""

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
    gpu_memory: Annotated[float, Range(0.1, 10_000)] | None = None
    """GiB of a card, which need not be here: plan every preset for it, and say which fits."""
    renew: bool = False
    """First write the manifest of the checkpoint directory again, after an intended change."""


def run(options: DoctorOptions) -> int:
    from rfengine.checkpoint.directories import CheckpointDirectory, checkpoint_directory
    from rfengine.checkpoint.manifest import write_manifest
    from rfengine.doctor import examine, render

    check_options(options)
    if options.renew:
        directory = checkpoint_directory(options.model)
        CheckpointDirectory.of(directory)  # refuses a directory that is no checkpoint
        write_manifest(directory)
    report = examine(
        options.model, options.height, options.width, options.dtype, options.loras.loras(), options.gpu_memory
    )
    print(json.dumps(report, indent=2) if options.json else render(report))
    differs = report["files"] and any(report["files"].values())
    fits = report["cards"] is None or report["cards"]["takes"] is not None
    return OTHER_ERROR if differs or not fits else 0
