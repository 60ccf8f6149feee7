"""studies/toy/run.py: the whole way once, at a size that proves nothing but that it can be walked."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from recipes.tiny.stages import CHECKPOINT, STARTED
from recipes.tiny.videos import encode_dataset
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.toy.data import save_dataset
from rfengine.training.config import RolloutConfig
from studies.toy import run as toy_study
from studies.toy import trainings
from studies.toy.setting import SIZES, SMOKE, Setting

MEASURED = ("clips_teacher", "clips_dmd", "streams_sink_ema_0.999_ema_0.9_switches")


@pytest.mark.slow
def test_parts_are_made_one_after_another_and_end_in_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, rollout = trainings.toy_dmd, RolloutConfig(3, 4, 1, switch_share=1.0)
    small = {"critic_updates": 2, "rollout": rollout}
    monkeypatch.setattr(trainings, "toy_dmd", lambda *given: dataclasses.replace(recipe(*given), **small))
    monkeypatch.setattr(toy_study, "LOGGED_EVERY", 2)
    monkeypatch.setitem(SIZES, "smoke", dataclasses.replace(SMOKE, student_steps=2))
    for amount in ("clips._TEACHER_SUBSTEPS", "clips._FLOW_PAIRS", "streams._FLOW_PAIRS"):
        monkeypatch.setattr(f"studies.toy.{amount}", 1)
    monkeypatch.setattr("studies.toy.clips._STREAM_CHUNKS", 3)
    monkeypatch.setattr("recipes.tiny.muon._ITERATIONS", 1)
    monkeypatch.setattr("recipes.tiny.transformer._BATCH", 2)
    monkeypatch.setattr("recipes.tiny.streams._BATCH", 2)
    base, directory, results = tmp_path / "base", tmp_path / "study", tmp_path / "results"
    one_thread = ["--workers", str(os.cpu_count())]
    places = ("--base", str(base), "--directory", str(directory), "--results", str(results))
    common = ["--size", "smoke", *places, *one_thread]
    assert toy_study.main([*common, "--part", "dmd"]) == 1  # without its start
    for name in (CHECKPOINT, STARTED):
        shutil.copytree(checkpoint_directory("tiny"), base / name)
    save_dataset(encode_dataset("tiny", 4, 8, 0), base / "videos.pt")
    for name in ("dmd", "sink_ema_0.999", "no_eviction", *MEASURED):
        assert toy_study.main([*common, "--part", name]) == 0, name
    assert toy_study.main([*common, "--tables"]) == 0
    record = json.loads((results / "streams_sink_ema_0.999_ema_0.9_switches.json").read_text())
    assert len(record["videos"]) == 2
    tables = (results / "tables.md").read_text()
    assert "a scene that switches, sink_ema_0.999" in tables
    assert (results / "log_dmd.jsonl").read_text().count("\n") == 1
    assert (results / "models.png").exists()


def test_the_start_is_what_the_recipe_has_left_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(trainings, "run_stage", asked.append)
    monkeypatch.setattr(trainings.RunDirectory, "is_done", lambda self, stage: stage in ("vae", "text"))
    trainings.train_start(Setting(SMOKE, tmp_path, tmp_path / "study", torch.device("cpu"), 1))
    named = [(options.stage, options.steps, options.videos) for options in asked]
    assert named == [
        *(("videos", None, 2), ("starts", None, 2)),
        *(("teacher", 2, None), ("start", 2, None)),
    ]
    assert all(options.directory == tmp_path and options.device == "cpu" for options in asked)


@pytest.mark.parametrize("workers", ["0", "-1", "1000000000"])
def test_a_number_of_workers_that_cannot_be_is_refused(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        toy_study.main(["--directory", str(tmp_path), "--workers", workers, "--list"])
    assert f"--workers is {workers}; run 1 to 256 parts at once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "nothing"], "--part is 'nothing'; see --list"),
        (["--only", "nothing*"], "which no part matches"),
        (["--only", "clips_dmd"], "holds a study of size gpu, not cpu"),
    ],
)
def test_unknown_parts_and_mixed_sizes_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--directory", str(tmp_path), "--results", str(tmp_path / "results")]
    if "clips_dmd" in arguments:
        (tmp_path / "size.txt").write_text("gpu\n")
    with pytest.raises(SystemExit) as stopped:
        toy_study.main([*common, *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_list_shows_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dmd" / "checkpoint").mkdir(parents=True)
    assert toy_study.main(["--directory", str(tmp_path), "--base", str(tmp_path / "base"), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "done  dmd" in lines
    assert "      start" in lines
