"""What a precision does to a stream: each chunk beside the same one without FP8, under the same noise.

    python bench/precision.py --model tiny --chunks 200 --scenes 100 --json precision.json

Two streams that differ by rounding drift apart as any two of an autoregressive model do: errors are fed back
through the window and the sink. So the difference is told by chunk, and as its growth from the first tenth to
the last. Where a text leaves something open, the noise decides it, and rounding may decide otherwise: such a
stream differs from its first chunk on and is no worse. So several streams are compared, and for a model that
draws the toy world the share of videos is told whose last 48 frames show what the text says. On a CPU FP8 is
emulated: the same roundings, sums in float32.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.accuracy import psnr_db, relative_error
from rfengine.benchmark.conditions import device_name, versions
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.cli.process import run_script
from rfengine.config import DTypeName, RuntimeConfig
from rfengine.files import require_writable, write_text
from rfengine.grid import LatentGrid
from rfengine.limits import Range, check_options
from rfengine.pipeline import Pipeline
from rfengine.presets import PRESETS
from rfengine.runtime_config import Precision
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.detector import detect, score

REPEATED_CHUNKS = 12  # that are made twice, and must be the same
JUDGED_FRAMES, SCENE_CHUNKS = 48, 8
SCENE_SEED, PROMPT_SEED = 29, 31


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Compare the streams of each precision with those without FP8."""

    model: str = "tiny"
    """tiny, a checkpoint directory, or a preset with seeded random weights."""
    precision: tuple[Precision | Literal["int8"], ...] = ("fp8", "fp8-attention")
    """What is compared; int8: weights of the blocks in int8 (RuntimeConfig.block_weights)."""
    sixteen_bit_passes: tuple[int, ...] = (0, -1)
    """As in RuntimeConfig, for fp8-attention."""
    streams: Annotated[int, Range(1, 1000)] = 1
    """Streams that are compared, each of a prompt and a seed of its own."""
    chunks: Annotated[int, Range(1, 100_000)] = 200
    """Chunks of each stream."""
    scenes: Annotated[int, Range(0, 10_000)] = 0
    """Videos of the toy world that are judged for each precision."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    device: str | None = None
    """cpu, cuda or cuda:N; cuda where there is one."""
    dtype: DTypeName | None = None
    """Precision of the weights; bfloat16 on CUDA, float32 on the CPU."""
    threads: Annotated[int, Range(1, 1024)] | None = None
    """CPU threads of torch; its own choice where nothing is given."""
    json: Path | None = None
    """Write the figures as JSON, after every precision."""


@dataclass(frozen=True)
class ChunkDifference:
    """Of one chunk: the cosine of its latents to the exact ones, their difference over their size, and the
    PSNR of its frames in dB (infinite where they are equal)."""

    cosine: float
    relative: float
    psnr: float


def measure(options: PrecisionOptions) -> Iterator[dict[str, Any]]:
    """The report, with one precision more each time."""
    check_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    exact = pipeline_of(options, RuntimeConfig())
    grid, streams = LatentGrid.of(exact.config), range(options.streams)
    truth = [list(chunks_of(exact, number, options.chunks)) for number in streams]
    dtype = str(exact.model.dtype).removeprefix("torch.")
    report: dict[str, Any] = {
        "model": exact.config.name, "height": grid.height, "width": grid.width, "dtype": dtype,
        "weights": "random" if options.model in PRESETS and options.model != "tiny" else "its own",
        "device": device_name(exact.model.device), "streams": options.streams, "chunks": options.chunks,
        "versions": versions(exact.model.device), "scenes": options.scenes,
        "right_without_fp8": right_scenes(exact, options.scenes), "precisions": {},
    }  # fmt: skip
    del exact
    for precision in options.precision:
        if precision == "int8":
            runtime = RuntimeConfig(block_weights="int8")
        else:
            runtime = RuntimeConfig(precision=precision, sixteen_bit_passes=options.sixteen_bit_passes)
        pipeline = pipeline_of(options, runtime)
        found = []
        for number in streams:
            chunks = zip(chunks_of(pipeline, number, options.chunks), truth[number], strict=True)
            found.append([difference(ours, true) for ours, true in chunks])
        report["precisions"][precision] = {
            **summary(found),
            "repeats": repeats(pipeline, min(REPEATED_CHUNKS, options.chunks)),
            "right": right_scenes(pipeline, options.scenes),
            "by_chunk": [[asdict(each) for each in stream] for stream in found],
        }
        yield report


def pipeline_of(options: PrecisionOptions, runtime: RuntimeConfig) -> Pipeline:
    """At the size of `options`; a preset but tiny has random weights and text states."""
    if options.model == "tiny" or options.model not in PRESETS:
        checkpoint = Checkpoint.open(options.model)
        return Pipeline.from_pretrained(checkpoint, options.device, options.dtype, runtime=runtime)
    preset = PRESETS[options.model]
    grid = LatentGrid.of(preset, options.height, options.width)
    checkpoint = Checkpoint.random(replace(preset, height=grid.height, width=grid.width))
    return Pipeline.from_pretrained(checkpoint, options.device, options.dtype, runtime=runtime)


def chunks_of(pipeline: Pipeline, number: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents of each chunk of stream `number` and its frames from -1 to 1, on the CPU."""
    stream = pipeline.stream(caption(sample_scenes(number + 1, PROMPT_SEED)[number]), seed=number)
    for _ in range(count):
        frames = torch.from_numpy(stream.advance().frames).float() / 127.5 - 1
        yield stream.latents.cpu().float(), frames


def difference(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> ChunkDifference:
    ours, true = (each[0].double().flatten() for each in (found, exact))
    cosine = F.cosine_similarity(ours, true, dim=0).item()
    return ChunkDifference(cosine, relative_error(ours, true), psnr_db(found[1], exact[1]))


def summary(streams: Sequence[Sequence[ChunkDifference]]) -> dict[str, float]:
    """Medians over all streams of the first and of the last tenth of chunks, the worst chunk, and how the
    difference grows from the one tenth to the other: the median over the streams."""
    tenth = max(1, len(streams[0]) // 10)
    figures: dict[str, float] = {}
    for name in ("cosine", "relative", "psnr"):
        values = [[getattr(each, name) for each in stream] for stream in streams]
        figures[f"{name}_first"] = statistics.median(itertools.chain(*(each[:tenth] for each in values)))
        figures[f"{name}_last"] = statistics.median(itertools.chain(*(each[-tenth:] for each in values)))
        every = list(itertools.chain(*values))
        figures[f"{name}_worst"] = max(every) if name == "relative" else min(every)
    return figures | {"growth": statistics.median(_growth(stream, tenth) for stream in streams)}


def _growth(stream: Sequence[ChunkDifference], tenth: int) -> float:
    first, last = (
        statistics.median(each.relative for each in part) for part in (stream[:tenth], stream[-tenth:])
    )
    return last / first if first else math.nan


def repeats(pipeline: Pipeline, count: int) -> bool:
    """Whether two streams of one seed are the same to the bit."""
    pairs = zip(chunks_of(pipeline, 0, count), chunks_of(pipeline, 0, count), strict=True)
    return all(torch.equal(one[part], other[part]) for one, other in pairs for part in (0, 1))


def right_scenes(pipeline: Pipeline, count: int) -> float | None:
    """The share of held-out scenes of the toy world of which everything is right at the end of a stream."""
    right = []
    for number, scene in enumerate(sample_scenes(count, SCENE_SEED, split="held_out") if count else ()):
        stream = pipeline.stream(caption(scene), seed=1_000_003 + number)
        frames = torch.cat([torch.from_numpy(chunk.frames) for chunk in stream.take(SCENE_CHUNKS)])
        right.append(all(score(scene, detect(frames[-JUDGED_FRAMES:])).values()))
    return sum(right) / count if count else None


def render(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']} (weights: {report['weights']}) at {report['width']} x {report['height']} in "
        f"{report['dtype']} on {report['device']}; {report['streams']} streams of {report['chunks']} chunks: "
        "median of the first and of the last tenth, worst chunk",
        f"{'':<15}{'cosine of latents':^24}{'difference':^24}{'PSNR of frames, dB':^21}",
        f"{'precision':<15}{'first    last   worst ':>24}" + f"{'first    last   worst ':>24}"
        f"{'first   last  worst ':>21} growth again",
    ]
    for name, row in report["precisions"].items():
        cells = [f"{row[f'cosine_{part}']:>8.4f}" for part in ("first", "last", "worst")]
        cells += [f"{row[f'relative_{part}']:>8.4f}" for part in ("first", "last", "worst")]
        cells += [f"{row[f'psnr_{part}']:>7.1f}" for part in ("first", "last", "worst")]
        again = "same" if row["repeats"] else "OTHER"
        lines.append(f"{name:<15}{''.join(cells)}{row['growth']:>7.2f} {again}")
    if report["scenes"]:
        shares = [f"{report['right_without_fp8']:.1%} without FP8"]
        shares += [f"{row['right']:.1%} with {name}" for name, row in report["precisions"].items()]
        lines.append(f"right in everything at the end, of {report['scenes']} scenes: {', '.join(shares)}")
    return "\n".join(lines)


def run(options: PrecisionOptions) -> None:
    if options.json is not None:
        require_writable(options.json, "--json")
    report: dict[str, Any] = {}
    for report in measure(options):
        if options.json is not None:
            write_text(options.json, json.dumps(report, indent=1) + "\n")
    print(render(report))


if __name__ == "__main__":
    sys.exit(run_script("precision", PrecisionOptions, run))
