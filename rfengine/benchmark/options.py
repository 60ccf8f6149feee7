"""What `rfengine bench` and bench/throughput.py measure: one set of options for both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typing_extensions import Doc

from rfengine.config import Backend, DTypeName, VAEPrecision
from rfengine.limits import Range

Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """Measure frames per second, each part's time against its floor, and how evenly chunks come."""

    model: Annotated[
        str | None,
        Doc(
            "tiny, a checkpoint directory, or wan-1.3b or wan-14b with seeded random weights; where nothing "
            "is given, wan-1.3b on CUDA and tiny on a CPU."
        ),
    ] = None
    height: Annotated[int | None, Doc("Pixels; the model's own size where nothing is given.")] = None
    width: Annotated[int | None, Doc("Pixels.")] = None
    chunks: Annotated[int, Range(1, 1_000_000), Doc("Chunks to measure, after those that warm up.")] = 100
    backend: Annotated[Backend, Doc("What runs the ops.")] = "auto"
    dtype: Annotated[
        DTypeName | None, Doc("Precision; bfloat16 on CUDA, float32 on the CPU where nothing is given.")
    ] = None
    vae: Annotated[
        Literal["full", "tensorrt", "tiny", "none"], Doc("The decoder; none measures latents alone.")
    ] = "full"
    vae_precision: Annotated[
        VAEPrecision, Doc("fp8 runs the large convolutions of the full decoder in FP8.")
    ] = "default"
    tensorrt_directory: Annotated[
        Path | None, Doc("Where export-vae wrote the engine, if it was told to with --out.")
    ] = None
    graphs: Annotated[Switch, Doc("A chunk as one CUDA graph; auto is on where the device is CUDA.")] = "auto"
    overlap: Annotated[
        Switch, Doc("Decoding beside the next chunk; auto is on where the device is CUDA.")
    ] = "auto"
    autotune: Annotated[bool, Doc("Time the backends at start-up and keep what won.")] = True
    compare: Annotated[
        Literal["baseline"] | None, Doc("Alternate with the field's usual way and give the ratio.")
    ] = None
    threads: Annotated[
        int | None, Range(1, 1024), Doc("CPU threads of torch; its own choice where nothing is given.")
    ] = None
    device: Annotated[str | None, Doc("cpu, cuda or cuda:N; cuda where there is one.")] = None
    json: Annotated[Path | None, Doc("Write the figures as JSON; - prints them instead of the table.")] = None
    plot: Annotated[Path | None, Doc("Draw the parts against their floors; needs matplotlib.")] = None
