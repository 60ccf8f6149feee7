"""studies/toy/run.py: the whole way once, at a size that proves nothing but that it can be walked."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from studies.toy import run as toy_study
from studies.toy import trainings
from studies.toy.setting import SIZES, SMOKE

TRAINED = ("start", "clips", "teacher", "re_dmd_0.5")
MEASURED = ("clips_teacher", "clips_re_dmd_0.5", "streams_re_dmd_0.5_ema_0.9_3s")


@pytest.mark.slow
def test_parts_are_made_one_after_another_and_end_in_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = trainings.toy_re_dmd
    monkeypatch.setattr(
        trainings, "toy_re_dmd", lambda *given: dataclasses.replace(recipe(*given), critic_updates=2)
    )
    monkeypatch.setattr(toy_study, "LOGGED_EVERY", 2)
    monkeypatch.setitem(SIZES, "smoke", dataclasses.replace(SMOKE, student_steps=2))
    for amount in ("clips._TEACHER_SUBSTEPS", "clips._FLOW_PAIRS", "streams._FLOW_PAIRS", "streams._WINDOWS"):
        monkeypatch.setattr(f"studies.toy.{amount}", 1)
    monkeypatch.setattr("studies.toy.clips._CHUNKS", 2)
    monkeypatch.setattr("recipes.tiny.muon._ITERATIONS", 1)
    monkeypatch.setattr("recipes.tiny.transformer._BATCH", 2)
    directory, results = tmp_path / "study", tmp_path / "results"
    one_thread = ["--workers", str(os.cpu_count())]
    common = ["--size", "smoke", "--directory", str(directory), "--results", str(results), *one_thread]
    assert toy_study.main([*common, "--part", "teacher"]) == 1  # without its clips
    for name in (*TRAINED, *MEASURED):
        assert toy_study.main([*common, "--part", name]) == 0, name
    assert toy_study.main([*common, "--tables"]) == 0
    record = json.loads((results / "streams_re_dmd_0.5_ema_0.9_3s.json").read_text())
    assert len(record["videos"]) == 2
    tables = (results / "tables.md").read_text()
    assert "re_dmd_0.5, 3 s" in tables
    assert (results / "log_re_dmd_0.5.jsonl").read_text().count("\n") == 1
    assert (results / "models.png").exists()


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
        (["--only", "clips"], "holds a study of size gpu, not cpu"),
    ],
)
def test_unknown_parts_and_mixed_sizes_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--directory", str(tmp_path), "--results", str(tmp_path / "results")]
    if "clips" in arguments:
        (tmp_path / "size.txt").write_text("gpu\n")
    with pytest.raises(SystemExit) as stopped:
        toy_study.main([*common, *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_list_shows_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips.pt").touch()
    assert toy_study.main(["--directory", str(tmp_path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "done  clips" in lines
    assert "      teacher" in lines
