"""`rfengine eval`: metrics of videos, as a table, JSON and plots."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from rfengine.cli.exit_status import OTHER_ERROR
from rfengine.cli.terminal import fail, one_line
from rfengine.files import locked, write_text
from rfengine.limits import Range, check_value

if TYPE_CHECKING:
    from rfengine.evaluation.copying import SinkTrace
    from rfengine.evaluation.prompt_switch import Captions
    from rfengine.evaluation.report import EvaluationReport, LeftOut
    from rfengine.evaluation.video_frames import ChunkGrid
    from rfengine.evaluation.video_report import VideoReport


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
    vbench: Path | None = None
    """Add the scores of a *_eval_results.json that `vbench evaluate --mode=custom_input` wrote, in its own
    environment, about these videos."""


def run(options: EvalOptions) -> int:
    from rfengine.evaluation.report import summarise
    from rfengine.evaluation.side_files import read_vbench
    from rfengine.evaluation.video_frames import ChunkGrid, find_videos
    from rfengine.evaluation.video_report import with_copying

    grid = ChunkGrid(options.first_chunk_frames, options.chunk_frames)
    check_value("flow_pairs", options.flow_pairs, Annotated[int, Range(1, 100_000)])
    paths = find_videos(options.paths)
    failed: list[LeftOut] = []
    captions = _captions(options.captions, paths, failed)
    vbench = read_vbench(options.vbench, paths) if options.vbench else {}
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is no directory; choose another --out")
    baselines = _baselines(options.baseline, grid, failed)
    with ExitStack() as held:
        with _writing(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(options.out / ".evaluation.lock", "writing an evaluation beside it"))
        measured = _measured(paths, captions, grid, options.flow_pairs, failed)
        report = summarise(
            with_copying([each for each, _ in measured], [trace for _, trace in measured], baselines),
            settings={
                "first_chunk_frames": options.first_chunk_frames,
                "chunk_frames": options.chunk_frames,
                "flow_pairs": options.flow_pairs,
                "baseline": [str(path) for path in options.baseline],
            },
            vbench=vbench,
            failed=failed,
        )
        try:
            with _writing(options.out):
                written = _write(report, options.out, options.plots)
        finally:
            print(report.table())
    print("written: " + ", ".join(str(path) for path in written))
    return OTHER_ERROR if failed else 0


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{directory} cannot be written ({error.strerror}); free space or choose another --out"
        ) from error


@contextmanager
def _noted(path: Path, failed: list[LeftOut]) -> Iterator[None]:
    """Show whatever is wrong with one file and note it in `failed`; the others continue."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - of any library that the file has led into trouble
        text = one_line(error)
        if str(path) not in text:
            reason = "it needs more memory than there is" if isinstance(error, MemoryError) else text
            text = f"{path} cannot be measured ({reason}); repair it or take it out"
        _leave_out(path, text, failed)


def _leave_out(path: Path, reason: str, failed: list[LeftOut]) -> None:
    from rfengine.evaluation.report import LeftOut

    fail(reason, OTHER_ERROR)
    failed.append(LeftOut(str(path), one_line(reason)))


def _captions(path: Path | None, videos: list[Path], failed: list[LeftOut]) -> dict[str, Captions]:
    """The captions by file name; names that no video has are left out."""
    from rfengine.evaluation.side_files import read_captions

    if path is None:
        return {}
    captions = read_captions(path)
    strangers = sorted(captions.keys() - {video.name for video in videos})
    if len(strangers) == len(captions):
        raise ValueError(f"{path} names none of the videos; its keys are their file names")
    if strangers:
        shown = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        _leave_out(path, f"{path} has captions for {shown}, not among the videos; take them out", failed)
    return captions


def _measured(
    paths: list[Path],
    captions: dict[str, Captions],
    grid: ChunkGrid,
    flow_pairs: int,
    failed: list[LeftOut],
) -> list[tuple[VideoReport, SinkTrace | None]]:
    from tqdm import tqdm

    from rfengine.evaluation import video_report
    from rfengine.evaluation.side_files import read_latents
    from rfengine.evaluation.video_file import open_video

    measured = []
    for path in tqdm(paths, unit="video", disable=not sys.stderr.isatty(), leave=False):
        with _noted(path, failed):
            video = open_video(path)
            beside, latents = path.with_suffix(".safetensors"), None
            with _noted(beside, failed):
                latents = read_latents(beside, video)
            given = captions.get(path.name, ())
            measured.append(
                video_report.measure_video(
                    str(path), video, grid, flow_pairs, captions=given, latents=latents
                )
            )
    return measured


def _baselines(paths: tuple[Path, ...], grid: ChunkGrid, failed: list[LeftOut]) -> list[SinkTrace]:
    from rfengine.evaluation.copying import trace_sink
    from rfengine.evaluation.video_file import open_video
    from rfengine.evaluation.video_frames import find_videos

    traces: list[SinkTrace] = []
    for path in find_videos(paths) if paths else ():
        with _noted(path, failed):
            traces.append(trace_sink(open_video(path), grid))
    if paths and not traces:
        raise ValueError("no video of --baseline can be used; give one that can, or none")
    return traces


def _write(report: EvaluationReport, directory: Path, plots: bool) -> list[Path]:
    from rfengine.evaluation.plots import draw_plots, missing_plots

    written = [directory / "metrics.json"]
    write_text(written[0], report.to_json() + "\n")
    missing = missing_plots() if plots else None
    if missing:
        print(f"rfengine: {missing}", file=sys.stderr)
    elif plots:
        written += draw_plots(report.videos, directory)
    return written
