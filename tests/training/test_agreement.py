"""What ranks have to have in common; test_parallel.py has ranks that differ."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.training.agreement import check_agreement, facts_of
from rfengine.training.checkpoints import first_difference
from rfengine.training.config import TrainConfig
from rfengine.training.parallel import Ranks
from support.small_training import DMD, PLAIN, changed


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    shutil.copytree(checkpoint_directory("tiny"), tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    return changed(teacher=str(tmp_path / "teacher"), data=str(tmp_path / "prompts.txt"), base="tiny")


def spoil_teacher(config: TrainConfig) -> None:
    path = Path(config.teacher) / "transformer.safetensors"
    tensors, metadata = read_safetensors(path)
    save_weights(path, {name: value + 1 for name, value in tensors.items()}, metadata)


def name_of_first(before: dict, config: TrainConfig) -> str:
    return first_difference("", before, facts_of(config, 2))[0]


def test_each_thing_that_differs_is_found(config):
    before = facts_of(config, 2)
    assert name_of_first(before, replace(config, seed=3)) == "config.seed"
    assert facts_of(config, 4) != before
    Path(config.data).write_text("a dog\n")
    assert name_of_first(before, config) == "files.data"
    Path(config.data).write_text("a cat\n")
    assert facts_of(config, 2) == before
    spoil_teacher(config)
    assert name_of_first(before, config) == "weights.teacher"
    shutil.rmtree(config.teacher)
    assert name_of_first(before, config) == "weights.teacher"


def test_only_what_the_stage_reads_is_compared(tmp_path, monkeypatch):
    """Words are no paths, though directories are called so; in none of them is the working directory read."""
    monkeypatch.chdir(tmp_path)
    for word in ("toy", "flow"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "file").write_text("x")
    distils = changed(stage="re-dmd", distillation=replace(PLAIN, beta=0.5), batch=2, group=2)
    for config in (DMD, distils, replace(distils, reward="flow")):
        assert facts_of(config, 2)["files"] == {}
    teacher = facts_of(replace(DMD, stage="teacher"), 2)["files"]
    assert list(teacher) == ["data"] and teacher["data"].endswith("of 1 names")
    video = facts_of(replace(distils, reward=str(tmp_path / "flow")), 2)["files"]
    assert list(video) == ["reward"] and video["reward"].endswith("of 1 names")


def test_ranks_that_differ_are_told_apart_by_number_host_and_value(config):
    facts = facts_of(config, 2)

    class TwoRanks(Ranks):
        def gathered(self, value):
            return [value, ("second", value[1] | {"versions": value[1]["versions"] | {"torch": "1.0"}})]

    with pytest.raises(ValueError, match=r"rank 1 on second has versions.torch '1.0' and rank 0 on .* '2"):
        check_agreement(facts, TwoRanks())
    check_agreement(facts, Ranks())
