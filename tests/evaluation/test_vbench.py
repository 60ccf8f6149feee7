"""VBench runs in an environment of its own; what it writes there is read strictly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rfengine.evaluation.vbench import read_vbench

VIDEOS = (Path("videos/a.mp4"), Path("videos/b.mp4"))


def scores(mean: object, *names: str) -> list[object]:
    return [mean, [{"video_path": f"./other/{name}", "video_results": 0.5} for name in names]]


def test_means_are_those_that_vbench_reports(tmp_path: Path) -> None:
    path = tmp_path / "results_eval_results.json"
    content = {"imaging_quality": scores(0.62, "a.mp4", "b.mp4"), "dynamic_degree": scores(1, "b.mp4")}
    path.write_text(json.dumps(content))
    assert read_vbench(path, VIDEOS) == {"imaging_quality": 0.62, "dynamic_degree": 1.0}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"motion_smoothness": [NaN, []]}', "NaN as a score, so VBench found no video"),
        ("[]", "no object with dimensions"),
        ("{}", "no object with dimensions"),
        ('{"a b": [1, [1]]}', "'a b', which is no name"),
        ('{"scene": 0.5}', "0.5' for scene, not a mean"),
        ('{"scene": [true, [1]]}', "not a mean and the scored videos"),
        ('{"scene": ["1", [1]]}', "not a mean and the scored videos"),
        ('{"scene": [0.5, []]}', "not a mean and the scored videos"),
        ('{"scene": [1e999, [1]]}', "not a mean and the scored videos"),
        ('{"scene": [1' + "0" * 400 + ", [1]]}", "not a mean and the scored videos"),
        ('{"scene": [0.5, [1]]}', "not a video and its score"),
        ('{"scene": [0.5, [{"video_path": "a.mp4"}]]}', "not a video and its score"),
        ('{"scene": [0.5, [{"video_path": 1, "video_results": 1}]]}', "not a video and its score"),
        (json.dumps({"scene": scores(0.5, "a.mp4", "c.mp4")}), "scores c.mp4, which is none of the videos"),
    ],
)
def test_anything_else_is_one_sentence_with_the_file(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError) as told:
        read_vbench(path, VIDEOS)
    assert str(told.value).startswith(str(path)) and reason in str(told.value)


def test_a_missing_file_and_a_pipe_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "none.json"):
        with pytest.raises(ValueError, match=name):
            read_vbench(tmp_path / name, VIDEOS)
