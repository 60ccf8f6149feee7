"""The recipes: what each says, and that what a student trains on is what the published one meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rfengine.training import recipes


def test_re_dmd_differs_from_dmd_by_its_reward_alone():
    plain, rewarded = recipes.toy_dmd(), recipes.toy_re_dmd(beta=0.25)
    assert rewarded.distillation.beta == 0.25 and plain.distillation.beta is None
    for name in ("optimizer", "critic_optimizer", "rollout", "batch", "group", "steps", "seed", "teacher"):
        assert getattr(plain, name) == getattr(rewarded, name)


@pytest.mark.parametrize("recipe", [recipes.toy_dmd, recipes.wan_1_3b_reward_forcing])
def test_every_stream_of_a_student_is_longer_than_the_window(recipe):
    config = recipe()
    assert config.rollout.min_chunks > config.engine.cache.filling_chunks


def test_wan_recipe_has_the_published_numbers():
    config = recipes.wan_1_3b_reward_forcing()
    assert config.batch * config.accumulation == 64
    assert (config.steps, config.critic_updates, config.average_start) == (600, 5, 200)
    assert (config.optimizer.rate, config.critic_optimizer.rate) == (2e-6, 4e-7)
    assert config.optimizer.betas == config.critic_optimizer.betas == (0.0, 0.999)
    assert config.rollout.max_chunks * config.engine.cache.chunk_frames == config.clip_frames == 21
    assert config.parallel == "hybrid" and config.shard_ranks is None
    assert config.teacher_model.num_layers == 40 and config.critic_model.num_layers == 30


def test_the_ranks_of_every_command_in_the_documentation_can_share_its_passes():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("torchrun --")]
    for command in commands:
        nodes, ranks = (
            int(found[1]) if (found := re.search(rf"--{name} (\d+)", command)) else 1
            for name in ("nnodes", "nproc-per-node")
        )
        recipe = re.search(r"cli train (\w+)", command)[1]
        assert recipes.RECIPES[recipe]().accumulation % (nodes * ranks) == 0
    assert len(commands) == 2


@pytest.mark.parametrize("recipe", [recipes.toy_teacher, recipes.toy_ode_init])
def test_toy_clips_are_whole_chunks(recipe):
    config = recipe()
    assert config.clip_frames % config.engine.cache.chunk_frames == 0
