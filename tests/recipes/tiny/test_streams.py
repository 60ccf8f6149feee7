"""Streams of the student's own, compared with the truth that their noise tells."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from recipes.tiny import streams
from recipes.tiny.noise import VALUES, telling_noise
from recipes.tiny.streams import StreamStage, draw_plan
from recipes.tiny.training import StageConfig, ToyModel
from rfengine.ops import REFERENCE_OPS
from rfengine.schedule import FlowSchedule
from rfengine.toy.data import LatentDataset
from rfengine.training.ops import DifferentiableOps
from rfengine.training.parallel import Ranks

CHUNKS, VIDEOS = 5, 4
SWITCHES = (0, 1, 2, 4)  # the chunk before which each video has one


@pytest.fixture(scope="module")
def student() -> ToyModel:
    return ToyModel.load("tiny", ops=DifferentiableOps(REFERENCE_OPS.choice))


@pytest.fixture
def videos(student: ToyModel) -> LatentDataset:
    size, generator = student.config.model, torch.Generator().manual_seed(1)
    rows = [[[0, 1]] * (at or CHUNKS) + [[2, 3]] * (CHUNKS - at if at else 0) for at in SWITCHES]
    return LatentDataset(
        latents=torch.randn(VIDEOS, size.in_dim, 3 * CHUNKS, 8, 8, generator=generator).half(),
        foreground=torch.rand(VIDEOS, 3 * CHUNKS, 8, 8, generator=generator) < 0.3,
        texts=torch.randn(4, size.text_len, size.text_dim, generator=generator).half(),
        text_rows=torch.tensor(rows),
        places=torch.rand(VIDEOS, 3, generator=generator),
        values=torch.full((VIDEOS, 3, len(VALUES), 2), torch.nan),
    )


def stage_of(student: ToyModel, videos: LatentDataset) -> StreamStage:
    model = student.transformer.requires_grad_(True)
    return StreamStage(StageConfig("streams", student.config, 8, 0), model, videos, Ranks())


def test_videos_of_the_learnt_length_have_no_true_chunk():
    plans = [draw_plan(random.Random(seed), (9, 1, 1), 4) for seed in range(200)]
    assert {(plan.chunks, plan.given) for plan in plans} == {(3, 0)}
    assert {plan.switch for plan in plans} == {0, 1, 2}


def test_a_switch_is_before_one_of_the_chunks_that_are_learnt():
    plans = [draw_plan(random.Random(seed), (9, 1, 1, 0, 1, 1, 1), 4) for seed in range(2000)]
    assert {plan.switch for plan in plans} == {0, 1, 2, 4, 5, 6}
    assert all(0 <= plan.given <= 4 for plan in plans)
    long = [plan for plan in plans if plan.chunks == 7 and plan.given == 0]
    assert abs(len(long) / 2000 - 0.3) < 0.03 and {plan.switch for plan in long} == {0, 1, 2, 4, 5, 6}
    short = [plan for plan in plans if plan not in long]
    assert all(plan.chunks == plan.given + 3 for plan in short)
    assert all(plan.given <= plan.switch < plan.chunks for plan in short if plan.switch)
    steady = [plan for plan in plans if not plan.switch]
    assert abs(len(steady) / 2000 - 0.6 / (0.6 + 0.4 * 5 / 6)) < 0.03
    assert abs(sum(plan.given == 0 for plan in steady) / len(steady) - 0.65) < 0.04
    assert {plan.exit_step for plan in plans} == {0, 1, 2, 3}
    assert {plan.recached for plan in plans} == {False, True}


def test_the_loss_is_the_weighted_error_of_the_last_chunks(monkeypatch, student, videos):
    calls = []

    def standing(model, config, text, noise, exits, rollout, switch, given):
        frames = config.cache.chunk_frames
        shape = (len(given), given.shape[1], frames * len(exits), *given.shape[3:])
        calls.append((exits, given, switch, noise(0, 0)))
        return torch.cat([given, torch.full(shape, 0.5)[:, :, given.shape[2] :]], 2)

    monkeypatch.setattr(streams, "self_forced_rollout", standing)
    told = []

    def recorded(noise, turns, values):
        told.append(turns)
        return telling_noise(noise, turns, values)

    monkeypatch.setattr(streams, "telling_noise", recorded)
    stage, sigmas = stage_of(student, videos), FlowSchedule(student.config.schedule).denoising_sigmas
    for step in range(8):
        loss, _ = stage.loss(step, 0)
        exits, given, switch, _ = calls[-1]
        rows = [int(torch.where((videos.places == row).all(1))[0]) for row in told[-1]]
        assert {SWITCHES[row] for row in rows} == {switch.chunk if switch else 0}
        first, end = 3 * len(exits) - 9, 3 * len(exits)
        assert torch.equal(given, videos.latents[rows, :, : given.shape[2]].float())
        error = (0.5 - videos.latents[rows, :, first:end].float()).square().mean(1)
        weight = 1 + 2.0 * videos.foreground[rows, first:end]
        wanted = (error * weight).mean() / sigmas[exits[0]]
        torch.testing.assert_close(loss, wanted)
        again, _ = stage.loss(step, 0)
        assert torch.equal(again, loss)


def test_a_text_that_leaves_values_open_comes_with_noise_that_tells_them(monkeypatch, student, videos):
    monkeypatch.setattr(streams, "_OPEN_SHARE", 1.0)
    monkeypatch.setattr(streams, "_BATCH", 2)
    values = videos.values.clone()
    values[:, 1, 3] = torch.tensor([0.25, 0.5])
    told, texts = [], []

    def recorded(noise, turns, values):
        told.append(values)
        return telling_noise(noise, turns, values)

    monkeypatch.setattr(streams, "telling_noise", recorded)
    stage = stage_of(student, dataclasses.replace(videos, values=values))
    encode = stage.model.text_keys_values
    monkeypatch.setattr(
        stage.model, "text_keys_values", lambda states: texts.append(states) or encode(states)
    )
    step = 0
    while not told:
        texts.clear()
        stage.update(step)
        step += 1
    assert told[0].isnan().sum(1).eq(len(VALUES) - 1).all()
    assert ((told[0][:, 3] > 0.25) & (told[0][:, 3] < 0.5)).all()
    assert torch.equal(texts[0], videos.texts[[1, 1]].float())


def test_streams_change_the_weights(monkeypatch, student, videos):
    monkeypatch.setattr(streams, "_BATCH", 2)
    stage = stage_of(student, videos)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    figures = [stage.update(step) for step in range(2)]
    assert all(entry["streams_loss"] > 0 for entry in figures)
    for name in ("blocks.0.self_attn.q.weight", "text_embedding.0.weight"):
        assert not torch.equal(before[name], stage.model.state_dict()[name])
