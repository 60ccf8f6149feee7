"""Stages: done or not, and never mixed with files of another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recipes.tiny.stages import NEEDS, STAGES, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose stages are all done."""
    run = RunDirectory(tmp_path / "run", tmp_path / "output")
    for stage in STAGES:
        run.result(stage).parent.mkdir(parents=True, exist_ok=True)
        run.result(stage).write_text(f"result of {stage}")
        run.remember(stage)
    return run


def test_every_stage_comes_behind_what_it_needs() -> None:
    for place, stage in enumerate(STAGES):
        assert set(NEEDS[stage]) <= set(STAGES[:place])


def test_what_is_done_is_done_in_a_moved_directory_too(run: RunDirectory) -> None:
    assert all(run.is_done(stage) for stage in STAGES)
    moved = RunDirectory(run.directory.with_name("moved"), run.output)
    shutil.move(run.directory, moved.directory)
    assert all(moved.is_done(stage) for stage in STAGES)


def test_a_stage_without_its_result_or_its_record_is_not_done(run: RunDirectory) -> None:
    run.result("start").unlink()
    (run.directory / "stages" / "teacher.json").unlink()
    assert not run.is_done("start") and not run.is_done("teacher")
    assert run.is_done("videos")


def test_files_of_another_run_are_named(run: RunDirectory) -> None:
    run.result("vae").write_text("another")
    message = r"videos\.pt was made from another vae\.safetensors than the one in .*--stage videos"
    with pytest.raises(ValueError, match=message):
        run.is_done("videos")
    assert run.is_done("text") and run.is_done("teacher")


def test_what_is_missing_is_named_with_its_stage(run: RunDirectory) -> None:
    run.result("starts").unlink()
    with pytest.raises(ValueError, match=r"starts\.pt does not exist; run --stage starts before teacher"):
        run.check_needs("teacher")
    run.check_needs("videos")


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_record_is_one_sentence(run: RunDirectory, content: str) -> None:
    (run.directory / "stages" / "videos.json").write_text(content)
    with pytest.raises(ValueError, match=r"videos\.json") as caught:
        run.is_done("videos")
    assert "\n" not in str(caught.value)
