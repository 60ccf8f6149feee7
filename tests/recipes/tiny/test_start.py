"""The student: at the noise levels of the sampler first, then on streams of its own."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch

from recipes.tiny import streams, transformer
from recipes.tiny.noise import VALUES
from recipes.tiny.run import Options, run_stage
from recipes.tiny.stages import CHECKPOINT, DISTILLED, STARTED, STREAMED
from recipes.tiny.start import StartStage
from recipes.tiny.training import StageConfig, ToyModel
from recipes.tiny.transformer import LATE, OPENING, START, Segment, flow_loss
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import read_safetensors
from rfengine.checkpoint.manifest import verify
from rfengine.schedule import FlowSchedule
from rfengine.toy.data import LatentDataset
from rfengine.training.parallel import Ranks


@pytest.fixture(scope="module")
def teacher() -> ToyModel:
    return ToyModel.load("tiny")


def dataset(teacher: ToyModel, chunks: int) -> LatentDataset:
    size = teacher.config.model
    return LatentDataset(
        latents=torch.randn(2, size.in_dim, 3 * chunks, 8, 8).half(),
        foreground=torch.zeros(2, 3 * chunks, 8, 8, dtype=torch.bool),
        texts=torch.randn(2, size.text_len, size.text_dim).half(),
        text_rows=torch.tensor([[0, 1]]).expand(2, chunks, 2),
        places=torch.rand(2, 3),
        values=torch.full((2, 3, len(VALUES), 2), torch.nan),
    )


def test_the_start_has_the_weights_of_the_teacher_and_learns_at_the_levels_of_the_sampler(
    monkeypatch, teacher
):
    monkeypatch.setattr(transformer, "_BATCH", 2)
    learnt: list[tuple[tuple[Segment, ...], torch.Tensor]] = []

    def recorded(model, config, batch, layout, levels, generator):
        learnt.append((layout, levels))
        return flow_loss(model, config, batch, layout, levels, generator)

    monkeypatch.setattr(transformer, "flow_loss", recorded)
    config, data = StageConfig("start", teacher.config, 12, 0), (dataset(teacher, 4), dataset(teacher, 1))
    stage = StartStage(config, teacher.transformer, *data, Ranks())
    for name, value in teacher.transformer.state_dict().items():
        assert torch.equal(stage.model.state_dict()[name], value)
    losses = [stage.update(step)["start_loss"] for step in range(12)]
    assert all(math.isfinite(loss) for loss in losses)
    assert {layout for layout, _ in learnt} == {START, OPENING, LATE}
    sigmas = set(FlowSchedule(teacher.config.schedule).denoising_sigmas)
    levels = {round(level, 6) for _, drawn in learnt for level in drawn.flatten().tolist()}
    assert levels == {round(sigma, 6) for sigma in sigmas}
    generator = torch.Generator().manual_seed(0)
    for layout, share in ((START, 0.8), (LATE, 0.5)):  # of the chunks are pure noise
        assert abs(float((stage.levels(500, layout, generator) == 1).float().mean()) - share) < 0.05
    key = "blocks.0.self_attn.q.weight"
    assert not torch.equal(stage.model.state_dict()[key], teacher.transformer.state_dict()[key])


def test_passes_of_a_compiled_start_are_compiled(monkeypatch, teacher):
    monkeypatch.setattr(transformer, "_BATCH", 1)
    passes: list[int] = []

    def counted(function, dynamic: bool):
        return lambda *arguments, **named: passes.append(1) or function(*arguments, **named)

    monkeypatch.setattr(torch, "compile", counted)
    data = (dataset(teacher, 4), dataset(teacher, 1))
    config = StageConfig("start", teacher.config, 2, 0)
    stage = StartStage(config, teacher.transformer, *data, Ranks(), compiled=True)
    for step in range(2):
        stage.update(step)
    assert len(passes) == 2


@pytest.mark.slow
def test_stages_of_the_student_leave_a_checkpoint_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformer, "_BATCH", 2)
    monkeypatch.setattr(streams, "_BATCH", 2)
    shutil.copytree(checkpoint_directory("tiny"), tmp_path / CHECKPOINT)
    run_stage(Options("videos", tmp_path, videos=2))
    run_stage(Options("starts", tmp_path, videos=2))
    run_stage(Options("start", tmp_path, steps=1))
    run_stage(Options("streams", tmp_path, steps=1))
    run_stage(Options("distill", tmp_path, steps=5))  # four of the critic, then one of the student
    weights = {}
    names = (CHECKPOINT, STARTED, STREAMED, DISTILLED)
    for name in names:
        verify(tmp_path / name)
        weights[name], _ = read_safetensors(tmp_path / name / "transformer.safetensors")
    key = "blocks.0.self_attn.q.weight"
    for before, after in itertools.pairwise(names):
        assert not torch.equal(weights[before][key], weights[after][key])
