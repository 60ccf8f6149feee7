"""The student: first chunks from trajectories, later ones as the teacher learnt them, then distillation."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from recipes.tiny import student
from recipes.tiny.run import Options, run_stage
from recipes.tiny.stages import CHECKPOINT, DISTILLED, STARTED
from recipes.tiny.student import StartStage, first_chunks
from recipes.tiny.training import StageConfig, ToyModel
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import read_safetensors
from rfengine.checkpoint.manifest import verify
from rfengine.toy.data import LatentDataset
from rfengine.training.config import RolloutConfig
from rfengine.training.parallel import Ranks


@pytest.fixture(scope="module")
def teacher() -> ToyModel:
    return ToyModel.load("tiny")


class OneTrajectory:
    """Draws the same trajectory again and again."""

    def __init__(self, states: torch.Tensor, texts: torch.Tensor) -> None:
        self.states, self.texts = states, texts

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return self.states[:1].expand(count, *self.states.shape[1:]), self.texts[:1].expand(count, -1, -1)


def test_trajectories_are_of_first_chunks_from_noise_to_a_clean_end(monkeypatch, teacher):
    monkeypatch.setattr(student, "_SUBSTEPS", 1)
    ((states, texts),) = first_chunks(teacher, 2, seed=3)
    size = teacher.config.model
    assert states.shape == (2, 5, size.in_dim, 3, 8, 8) and texts.shape == (2, size.text_len, size.text_dim)
    assert 0.9 < float(states[:, 0].std()) < 1.1 and not torch.equal(states[0], states[1])
    ((again, _),) = first_chunks(teacher, 2, seed=3)
    assert torch.equal(again, states)


def test_the_start_learns_the_end_of_a_trajectory_and_videos_beside_it(monkeypatch, teacher):
    monkeypatch.setattr(student, "_BATCH", 2)
    monkeypatch.setattr(student, "_SUBSTEPS", 1)
    ((states, texts),) = first_chunks(teacher, 1, seed=5)
    size = teacher.config.model
    videos = LatentDataset(
        latents=torch.randn(2, size.in_dim, 12, 8, 8).half(),
        foreground=torch.zeros(2, 12, 8, 8, dtype=torch.bool),
        texts=torch.randn(2, size.text_len, size.text_dim).half(),
        text_rows=torch.tensor([[0, 1]]).expand(2, 4, 2),
    )
    config = StageConfig("start", teacher.config, 12, 0)
    stage = StartStage(config, teacher.transformer, OneTrajectory(states, texts), videos, Ranks())
    for name, value in teacher.transformer.state_dict().items():
        assert torch.equal(stage.model.state_dict()[name], value)
    with torch.no_grad():
        before = float(stage._trajectory_loss(torch.Generator().manual_seed(0)))
    kinds = {stage.update(step)["first_chunk"] for step in range(12)}
    with torch.no_grad():
        after = float(stage._trajectory_loss(torch.Generator().manual_seed(0)))
    assert kinds == {0.0, 1.0} and after < before


@pytest.mark.slow
def test_stages_of_the_student_leave_a_checkpoint_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(student, "_BATCH", 2)
    monkeypatch.setattr(student, "_SUBSTEPS", 1)
    recipe = student.toy_dmd
    rollout = RolloutConfig(4, 4, 1, switch_share=1.0)
    small = {"batch": 2, "group": 2, "critic_updates": 1, "rollout": rollout}
    monkeypatch.setattr(student, "toy_dmd", lambda *given: dataclasses.replace(recipe(*given), **small))
    shutil.copytree(checkpoint_directory("tiny"), tmp_path / CHECKPOINT)
    run_stage(Options("videos", tmp_path, videos=2))
    run_stage(Options("trajectories", tmp_path, videos=2))
    run_stage(Options("start", tmp_path, steps=1))
    run_stage(Options("student", tmp_path, steps=1))
    weights = {}
    for name in (CHECKPOINT, STARTED, DISTILLED):
        verify(tmp_path / name)
        weights[name], _ = read_safetensors(tmp_path / name / "transformer.safetensors")
    key = "blocks.0.self_attn.q.weight"
    assert not torch.equal(weights[CHECKPOINT][key], weights[STARTED][key])
    assert not torch.equal(weights[STARTED][key], weights[DISTILLED][key])
