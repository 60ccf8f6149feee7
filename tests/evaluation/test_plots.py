"""Plots are PNG files; without matplotlib one sentence says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rfengine.evaluation.plots import draw_plots
from rfengine.evaluation.video_report import VideoReport

LINE = ((0.0, 0.0), (9.0, 0.5), (21.0, 1.0))
DRIFT = ("exposure_drift", "contrast_drift", "colour_drift", "sharpness_drift", "clipped_drift")


def report(**curves: tuple[tuple[float, float], ...]) -> VideoReport:
    return VideoReport("a", 33, 48, 64, (), {}, curves, {})


@pytest.mark.parametrize("videos", [1, 3])
def test_curves_become_png_files(tmp_path: Path, videos: int) -> None:
    pytest.importorskip("matplotlib")
    drawn = report(
        speed=LINE, consistency=((1, 1.0), (2, 0.9)), latent_drift=LINE, **dict.fromkeys(DRIFT, LINE)
    )
    files = draw_plots([drawn] * videos, tmp_path)
    assert [file.name for file in files] == ["motion_and_drift.png", "consistency.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_video_without_curves_draws_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw_plots([report()], tmp_path) == [] and not list(tmp_path.iterdir())


def test_missing_matplotlib_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="matplotlib is not installed; pip install matplotlib"):
        draw_plots([report(speed=LINE)], tmp_path)
