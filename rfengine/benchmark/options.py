"""What `rfengine bench` measures, as the fields of its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction

from rfengine.checkpoint.systems import SystemName
from rfengine.config import Backend, DTypeName, RuntimeConfig
from rfengine.limits import Range


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """Measure frames per second, each part's time against its floor, and how evenly chunks come."""

    protocol: UseAppendAction[tuple[str, ...]] = ()
    """A named way to measure, several with commas between them, or all; may be given several times. What is
    inside of each one's time, and whose published figures it stands beside: docs/benchmarks.md."""
    model: str | None = None
    """tiny, a checkpoint directory, or wan-1.3b or wan-14b with seeded random weights; wan-1.3b on CUDA and
    tiny on a CPU where nothing is given."""
    system: SystemName | None = None
    """The cache and the denoising steps of a published system, in place of the model's own."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    chunks: Annotated[int, Range(1, 1_000_000)] = 100
    """Chunks to measure, after those that warm up; a protocol of a whole video has its own length."""
    device: str | None = None
    """cpu, cuda or cuda:N; cuda where there is one."""
    dtype: DTypeName | None = None
    """Precision of the weights; bfloat16 on CUDA, float32 on the CPU."""
    backend: Backend = "auto"
    """What runs the ops; auto takes what is fastest here."""
    runtime: OmitArgPrefixes[RuntimeConfig] = RuntimeConfig()
    decode: bool = True
    """Decode every chunk; --no-decode measures latents alone."""
    compare: Literal["baseline", "default"] | None = None
    """Alternate with another engine and report the ratio. baseline: the published loop in plain PyTorch.
    default: the same engine with --precision and --vae-precision left out."""
    threads: Annotated[int, Range(1, 1024)] | None = None
    """CPU threads of torch; its own choice where nothing is given."""
    json: Path | None = None
    """Write the figures as JSON, of protocols a list; - prints them instead of the table."""
    plot: Path | None = None
    """Draw the parts against their floors; needs matplotlib."""
