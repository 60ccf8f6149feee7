"""Scores of VBench for videos with free prompts; an optional package that fetches its own weights.

Against the interface of VBench 0.1.5: VBench(device, full_info_dir, output_path).evaluate(...) with the mode
custom_input, which writes {dimension: [mean, ...]} to <name>_eval_results.json.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


def check_vbench() -> None:
    """Raises RuntimeError when VBench is not installed."""
    if importlib.util.find_spec("vbench") is None:
        raise RuntimeError("VBench is not installed; pip install vbench, or leave --vbench out")


def vbench_scores(videos: Sequence[Path], device: str = "cuda") -> dict[str, float]:
    """The mean over the videos of each of DIMENSIONS, as VBench reports it.

    Raises RuntimeError when VBench is not installed; what it prints goes where it wants.
    """
    check_vbench()
    from vbench import VBench

    with tempfile.TemporaryDirectory() as name:
        directory, results = Path(name) / "videos", Path(name) / "results"
        directory.mkdir()
        for index, video in enumerate(videos):  # two directories may have files of one name
            (directory / f"{index}{video.suffix}").symlink_to(video.resolve())
        VBench(device, "", str(results)).evaluate(
            videos_path=str(directory),
            name="rfengine",
            dimension_list=list(DIMENSIONS),
            mode="custom_input",
        )
        found = json.loads((results / "rfengine_eval_results.json").read_text())
    return {dimension: float(found[dimension][0]) for dimension in DIMENSIONS}
