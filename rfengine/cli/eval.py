"""`rfengine eval`: metrics of videos, as a table, JSON and plots."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tyro.conf import Positional

from rfengine.cli.exit_status import OTHER_ERROR
from rfengine.cli.terminal import fail

if TYPE_CHECKING:
    from torch import Tensor

    from rfengine.evaluation.copying import SinkTrace
    from rfengine.evaluation.video_report import Captions, MeasureOptions, VideoReport


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure videos: motion with drift, consistency, flicker, repetition, copying of the first frames."""

    paths: Positional[tuple[Path, ...]]
    """MP4 files, or directories of them. NAME.safetensors beside NAME.mp4 has its latents [C, F, h, w]."""
    out: Path = Path("evaluation")
    """The directory for metrics.json and the plots; it is made."""
    captions: Path | None = None
    """JSON of toy-world captions, {"a.mp4": "caption"}, or [[frame, caption], ...] for prompt switches."""
    baseline: tuple[Path, ...] = ()
    """Independent videos to reckon copying against; without any, the other videos given."""
    first_chunk_frames: int = 9
    """Frames of a video's first chunk."""
    chunk_frames: int = 12
    """Frames of each later chunk, the period at which flicker is looked for."""
    flow_pairs: int = 96
    """Pairs of frames of each video whose optical flow is measured, at most."""
    plots: bool = True
    """Draw PNG plots (matplotlib)."""
    vbench: bool = False
    """Add the scores of VBench, where it is installed."""


def run(options: EvalOptions) -> int:
    from rfengine.evaluation.captions_file import read_captions
    from rfengine.evaluation.report import summarise
    from rfengine.evaluation.vbench import check_vbench, vbench_scores
    from rfengine.evaluation.video_frames import ChunkGrid, find_videos
    from rfengine.evaluation.video_report import MeasureOptions, with_copying

    settings = MeasureOptions(ChunkGrid(options.first_chunk_frames, options.chunk_frames), options.flow_pairs)
    paths = find_videos(list(options.paths))
    captions = read_captions(options.captions) if options.captions else {}
    if captions and not any(path.name in captions for path in paths):
        raise ValueError(f"{options.captions} names none of the videos; its keys are their file names")
    if options.vbench:
        check_vbench()
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is no directory; choose another --out")
    baselines = _baselines(options.baseline, settings)
    measured, failures = _measured(paths, captions, settings)
    if not measured:
        return OTHER_ERROR
    report = summarise(
        with_copying([entry.report for entry in measured], [entry.trace for entry in measured], baselines),
        settings={
            "first_chunk_frames": options.first_chunk_frames,
            "chunk_frames": options.chunk_frames,
            "flow_pairs": options.flow_pairs,
            "baseline": [str(path) for path in options.baseline],
        },
        vbench=vbench_scores([entry.path for entry in measured]) if options.vbench else {},
    )
    print(report.table())
    options.out.mkdir(parents=True, exist_ok=True)
    written = [options.out / "metrics.json"]
    written[0].write_text(report.to_json() + "\n")
    if options.plots:
        written += _plots(report.videos, options.out)
    print("written: " + ", ".join(str(path) for path in written))
    return OTHER_ERROR if failures else 0


class _Measured(NamedTuple):
    path: Path
    report: VideoReport
    trace: SinkTrace | None


def _measured(
    paths: list[Path], captions: dict[str, Captions], settings: MeasureOptions
) -> tuple[list[_Measured], int]:
    """What was measured, and how many files could not be: each of those is told, and the others go on."""
    from tqdm import tqdm

    from rfengine.evaluation.video_frames import read_video
    from rfengine.evaluation.video_report import measure_video

    measured, failures = [], 0
    for path in tqdm(paths, unit="video", disable=not sys.stderr.isatty(), leave=False):
        try:
            report, trace = measure_video(
                str(path),
                read_video(path),
                settings,
                captions=captions.get(path.name, ()),
                latents=_latents(path.with_suffix(".safetensors")),
            )
        except ValueError as error:
            fail(error, OTHER_ERROR)
            failures += 1
        else:
            measured.append(_Measured(path, report, trace))
    return measured, failures


def _baselines(paths: tuple[Path, ...], settings: MeasureOptions) -> list[SinkTrace]:
    from rfengine.evaluation.copying import trace_sink
    from rfengine.evaluation.video_frames import find_videos, read_video

    if not paths:
        return []
    return [trace_sink(read_video(path), settings.chunks) for path in find_videos(list(paths))]


def _latents(path: Path) -> Tensor | None:
    """`latents` [C, F, h, w] of a safetensors file, a batch of one taken off; None where there is no file."""
    if not path.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); give a safetensors file or remove it") from error
    if "latents" not in tensors:
        raise ValueError(f"{path} has no tensor `latents`; add it or remove the file")
    latents = tensors["latents"]
    return latents[0] if latents.ndim == 5 and len(latents) == 1 else latents


def _plots(videos: tuple[VideoReport, ...], directory: Path) -> list[Path]:
    from rfengine.evaluation.plots import draw_plots, missing_plots

    missing = missing_plots()
    if missing:
        print(f"rfengine: {missing}", file=sys.stderr)
        return []
    return draw_plots(videos, directory)
