"""The table and the JSON of a report, and bootstrap intervals."""

from __future__ import annotations

import json

import pytest
import torch

from rfengine.evaluation.report import METRICS, LeftOut, bootstrap_mean, summarise
from rfengine.evaluation.video_report import VideoReport


def video(name: str, values: dict[str, float], absent: dict[str, str] | None = None) -> VideoReport:
    return VideoReport(name, 30, 48, 64, (), values, {"speed": ((0, 1.0),)}, absent or {})


def test_means_are_over_the_videos_that_have_the_metric() -> None:
    report = summarise([video("a", {"speed": 1.0, "repetition": 0.5}), video("b", {"speed": 3.0})])
    assert report.means["speed"].mean == 2 and report.means["speed"].count == 2
    assert report.means["repetition"].count == 1 and list(report.means) == ["speed", "repetition"]


def test_table_has_a_row_for_each_metric_and_a_line_for_each_reason() -> None:
    short = [video(f"v{index}", {"speed": 1.0}, {"flicker": "30 frames are too few"}) for index in range(5)]
    lines = summarise(short, vbench={"dynamic_degree": 0.5}).table().splitlines()
    assert lines[0].split() == ["metric", "mean", "95%", "interval", "videos", "unit"]
    assert lines[1].startswith("speed") and "1 to 1" in lines[1] and METRICS["speed"] in lines[1]
    assert lines[2].split()[:3] == ["vbench", "dynamic_degree", "0.5"]
    assert lines[3:] == ["no flicker for v0, v1, v2 and 2 more: 30 frames are too few"]


def test_json_holds_videos_means_and_settings_and_no_nan() -> None:
    report = summarise(
        [video("a", {"speed": float("nan")}), video("b", {"speed": 2.0})], {"chunk_frames": 12}
    )
    found = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert found["settings"] == {"chunk_frames": 12} and found["means"]["speed"]["mean"] is None
    assert found["videos"][1]["values"] == {"speed": 2.0}
    assert found["videos"][0]["curves"]["speed"] == [[0, 1.0]]


def test_files_left_out_are_in_the_table_and_in_the_json() -> None:
    lost = LeftOut("b.mp4", "b.mp4 is empty (0 bytes); give a video")
    for videos in ([video("a", {"speed": 1.0})], []):
        report = summarise(videos, failed=[lost])
        assert report.table().splitlines()[-1] == "left out: b.mp4 is empty (0 bytes); give a video"
        assert json.loads(report.to_json())["failed"] == [{"file": "b.mp4", "reason": lost.reason}]


def test_no_video_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 videos were measured"):
        summarise([])


def test_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(30, generator=generator).tolist() for _ in range(200)]
    held = 0
    for values in drawn:
        interval = bootstrap_mean(values)
        assert interval.low is not None and interval.high is not None
        assert interval.low < interval.mean < interval.high
        held += interval.low <= 0 <= interval.high
    assert 0.88 <= held / 200 <= 0.98


def test_interval_has_the_width_of_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    interval = bootstrap_mean(values.tolist())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)
    assert bootstrap_mean(values.tolist()) == interval


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert (bootstrap_mean([2.0]).low, bootstrap_mean([2.0]).mean) == (None, 2.0)
    assert bootstrap_mean([3.0, 3.0]).low == bootstrap_mean([3.0, 3.0]).high == 3.0
    with pytest.raises(ValueError, match="0 values are given"):
        bootstrap_mean([])
