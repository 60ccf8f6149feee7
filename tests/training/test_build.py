"""Stages built from their configs: where models come from, the reward and its second score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.toy.world import WorldConfig, caption, sample_scenes
from rfengine.training.build import build_reward, build_stage, held_out_score
from rfengine.training.checkpoint_parts import base_engine, text_states_of
from rfengine.training.parallel import Ranks
from rfengine.training.recipes import toy_re_dmd, wan_1_3b_reward_forcing
from rfengine.training.rollout import RolloutConfig

CPU = torch.device("cpu")
CAPTION = caption(sample_scenes(1, 0, WorldConfig(), "train")[0])


@pytest.fixture(scope="module")
def config():
    short = replace(toy_re_dmd(base_engine(), teacher="tiny"), batch=2, group=2, critic_updates=1)
    return replace(short, rollout=RolloutConfig(3, 3, 1), precision="float32")


def test_step_logs_the_reward_and_the_score_that_is_held_out(config):
    stage = build_stage(config, CPU, Ranks())
    figures = stage.update(0)
    assert figures["score"] == pytest.approx(figures["toy.motion"])
    assert 0 <= figures[held_out_score(config)] <= 1
    models = stage.distillation.models
    assert not any(value.requires_grad for value in (*models.teacher.parameters(), *models.vae.parameters()))


def test_student_and_critic_of_one_source_are_models_of_their_own(config):
    models = build_stage(replace(config, lora_rank=2), CPU, Ranks()).distillation.models
    pointers = [
        {value.data_ptr() for value in model.parameters()} for model in (models.student, models.critic)
    ]
    assert not pointers[0] & pointers[1]
    learning = [name for name, value in models.critic.named_parameters() if value.requires_grad]
    assert learning and all(".parametrizations." in name for name in learning)


def test_rewards_are_what_their_names_say(config):
    frames = torch.rand(2, 9, 64, 64, 3)
    for name, score in (("toy", "toy.motion"), ("flow", "flow.motion")):
        reward = build_reward(replace(config, reward=name), CPU)
        assert torch.equal(reward(frames, [CAPTION] * 2), reward.parts[score])
    with pytest.raises(ValueError, match="the reward nowhere is no directory"):
        build_reward(replace(config, reward="nowhere"), CPU)
    assert held_out_score(wan_1_3b_reward_forcing()) == "video.text_alignment"


def test_texts_are_encoded_once():
    encode = text_states_of("tiny", base_engine(), CPU)
    one, two = encode([CAPTION, "another"]), encode(["another", CAPTION])
    assert torch.equal(one[0], two[1]) and not torch.equal(one[0], one[1])


def test_source_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="nowhere is no directory"):
        checkpoint_directory("nowhere")
