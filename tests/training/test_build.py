"""Stages built from their configs: where models come from, the reward and its second score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.manifest import verify
from rfengine.ops import choose_ops
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.world import WorldConfig
from rfengine.training import build
from rfengine.training.build import (
    base_engine,
    build_stage,
    export_checkpoint,
    load_transformer,
    text_states_of,
    trained_score,
)
from rfengine.training.config import RolloutConfig
from rfengine.training.parallel import Ranks
from rfengine.training.recipes import toy_re_dmd, wan_1_3b_reward_forcing

CPU = torch.device("cpu")
CAPTION = caption(sample_scenes(1, 0, WorldConfig(), "train")[0])


@pytest.fixture(scope="module")
def config():
    short = replace(toy_re_dmd(base_engine(), teacher="tiny"), batch=2, group=2, critic_updates=1)
    return replace(short, rollout=RolloutConfig(3, 3, 1), precision="float32")


@pytest.fixture(scope="module")
def stage(config):
    return build_stage(replace(config, lora_rank=2), CPU, Ranks())


def test_step_logs_the_reward_and_the_score_that_is_held_out(stage):
    figures = stage.update(0)
    assert figures["score"] == pytest.approx(figures["toy.motion"])
    assert 0 <= figures[stage.score.held_out] <= 1
    models = stage.networks
    assert not any(value.requires_grad for value in (*models.teacher.parameters(), *models.vae.parameters()))


def test_student_and_critic_of_one_source_are_models_of_their_own(stage):
    models = stage.networks
    pointers = [
        {value.data_ptr() for value in model.parameters()} for model in (models.student, models.critic)
    ]
    assert not pointers[0] & pointers[1]
    learning = [name for name, value in models.critic.named_parameters() if value.requires_grad]
    assert learning and all(".parametrizations." in name for name in learning)


def test_rewards_are_what_their_names_say(config, monkeypatch, tmp_path):
    frames = torch.rand(2, 3, 64, 64, 3)
    for name, trained in (("toy", "toy.motion"), ("flow", "flow.motion")):
        score, parts = trained_score(replace(config, reward=name), CPU)(frames, [CAPTION] * 2)
        assert torch.equal(score, parts[trained])
    with pytest.raises(ValueError, match="the reward nowhere is no directory"):
        trained_score(replace(config, reward="nowhere"), CPU)
    monkeypatch.setattr(build, "VideoReward", lambda directory, device, fps: None)
    wan = replace(wan_1_3b_reward_forcing(), reward=str(tmp_path))
    assert trained_score(wan, CPU).held_out == "video.text_alignment"


def test_texts_are_encoded_once():
    encode = text_states_of("tiny", base_engine(), CPU)
    one, two = encode([CAPTION, "another"]), encode(["another", CAPTION])
    assert torch.equal(one[0], two[1]) and not torch.equal(one[0], one[1])


def test_source_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="nowhere is no directory"):
        checkpoint_directory("nowhere")


def test_an_export_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, cpu = base_engine("tiny"), torch.device("cpu")
    weights = load_transformer("tiny", engine.model, choose_ops("reference", cpu), cpu).state_dict()
    out = tmp_path / "run" / "checkpoint"
    export_checkpoint(weights, engine, "tiny", out)
    verify(out)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(build, "write_manifest", full)
        with pytest.raises(RuntimeError, match=r"cannot write .*checkpoint \(No space left on device\)"):
            export_checkpoint(weights, engine, "tiny", out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    changed = {name: value + 1 for name, value in weights.items()}
    export_checkpoint(changed, engine, "tiny", out)
    verify(out)
    found = load_transformer(str(out), engine.model, choose_ops("reference", cpu), cpu).state_dict()
    name = next(iter(weights))
    assert torch.allclose(found[name], weights[name] + 1, atol=1e-2)
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint"]
