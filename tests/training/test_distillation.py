"""What student and critic learn from one batch, on random models."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from rfengine.training.distillation import Distillation, DistillationConfig, PromptBatch
from rfengine.training.re_dmd import reward_weights
from rfengine.training.rollout import RolloutConfig
from support.models import text_states
from support.small_distillation import ENGINE, PLAIN, distillation_models

ROLLOUT = RolloutConfig(4, 4, 3)
PROMPTS = PromptBatch(
    ("a", "a", "b", "b"),
    torch.cat([text_states(0), text_states(0), text_states(1), text_states(1)]),
    torch.tensor([0, 0, 1, 1]),
)


def generators(seed: int = 0) -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)


def brightness(frames: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert len(frames) == len(prompts)
    return frames.flatten(1).mean(1)


def student_gradient(config: DistillationConfig, score=None, given=None, rollout=ROLLOUT):
    parts = given or distillation_models()
    result = Distillation(ENGINE, parts, config, rollout, score).student_loss(PROMPTS, *generators())
    result.loss.backward()
    return result, {name: value.grad for name, value in parts.student.named_parameters()}


def test_student_loss_reaches_every_weight_of_the_student_and_no_other():
    parts = distillation_models()
    result, gradients = student_gradient(PLAIN, given=parts)
    assert all(value is not None and value.isfinite().all() for value in gradients.values())
    assert all(value.abs().max() > 0 for value in gradients.values())
    assert all(value.grad is None for value in (*parts.critic.parameters(), *parts.teacher.parameters()))
    assert result.distance > 0
    assert result.scores is None


def test_critic_equal_to_the_teacher_gives_no_gradient():
    parts = distillation_models()
    same = dataclasses.replace(parts, critic=copy.deepcopy(parts.teacher))
    result, gradients = student_gradient(PLAIN, given=same)
    assert result.distance == 0
    assert all(value.eq(0).all() for value in gradients.values())


def test_guidance_leads_away_from_the_negative_text():
    _, without = student_gradient(PLAIN)
    _, guided = student_gradient(dataclasses.replace(PLAIN, guidance=3.0))
    parts = distillation_models()
    texts = dataclasses.replace(parts, negative_states=PROMPTS.states[:1])
    only_a = PromptBatch(("a",), PROMPTS.states[:1], torch.tensor([0]))
    config = dataclasses.replace(PLAIN, guidance=3.0)
    one = Distillation(ENGINE, texts, config, ROLLOUT).student_loss(only_a, *generators())
    other = Distillation(ENGINE, texts, PLAIN, ROLLOUT).student_loss(only_a, *generators())
    assert any(not torch.equal(without[name], guided[name]) for name in without)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=0)


def test_equal_rewards_are_plain_dmd():
    config = dataclasses.replace(PLAIN, beta=0.1)
    _, plain = student_gradient(PLAIN)
    result, rewarded = student_gradient(config, lambda frames, prompts: torch.full((4,), 0.3))
    assert result.weights.eq(1).all()
    for name, value in plain.items():
        assert torch.equal(value, rewarded[name]), name


def test_rewards_weigh_the_samples_of_each_prompt():
    config = dataclasses.replace(PLAIN, beta=0.01)
    result, _ = student_gradient(config, brightness)
    assert result.frames.shape == (4, 36, 32, 48, 3)
    torch.testing.assert_close(result.weights, reward_weights(result.scores, PROMPTS.groups, 0.01))
    assert result.weights[:2].mean().item() == pytest.approx(1)
    assert result.weights[2:].mean().item() == pytest.approx(1)
    assert result.weights.std() > 0.01


def test_late_clip_begins_with_the_encoded_frame_and_learns_nothing_from_its_chunk():
    encoded = dataclasses.replace(PLAIN, first_latent="encoded")
    parts = distillation_models()
    seen = []

    def watched(x, *arguments):
        seen.append(x)
        return type(parts.teacher).forward_clip(parts.teacher, x, *arguments)

    parts.teacher.forward_clip = watched
    result, gradients = student_gradient(encoded, given=parts)
    assert seen[0].shape[2] == 9
    assert result.loss > 0
    short, whole = RolloutConfig(3, 3, 3), RolloutConfig(3, 3, 3)
    _, from_start = student_gradient(encoded, rollout=short)
    _, given = student_gradient(PLAIN, rollout=whole)
    assert all(torch.equal(from_start[name], given[name]) for name in given), "a clip from the start is whole"


def test_critic_learns_and_the_student_does_not():
    parts = distillation_models()
    loss = Distillation(ENGINE, parts, PLAIN, ROLLOUT).critic_loss(PROMPTS, *generators())
    loss.backward()
    assert all(value.grad is not None for value in parts.critic.parameters())
    assert all(value.grad is None for value in parts.student.parameters())


def test_the_same_draws_give_the_same_losses():
    first, gradients = student_gradient(PLAIN)
    second, again = student_gradient(PLAIN)
    assert first.loss == second.loss
    assert all(torch.equal(gradients[name], again[name]) for name in again)


def test_critic_follows_the_student_while_both_train():
    parts = distillation_models()
    distillation = Distillation(ENGINE, parts, PLAIN, RolloutConfig(3, 3, 3))
    student = torch.optim.AdamW(parts.student.parameters(), lr=2e-3, betas=(0.0, 0.999))
    critic = torch.optim.AdamW(parts.critic.parameters(), lr=2e-3, betas=(0.0, 0.999))
    losses = []
    for step in range(60):
        loss = distillation.critic_loss(PROMPTS, *generators(10 * step))
        critic.zero_grad()
        loss.backward()
        critic.step()
        losses.append(loss.item())
        if step % 5 == 4:
            student.zero_grad()
            distillation.student_loss(PROMPTS, *generators(10 * step + 5)).loss.backward()
            student.step()
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize(
    ("config", "score", "rollout", "message"),
    [
        (dataclasses.replace(PLAIN, beta=1.0), None, ROLLOUT, "no reward"),
        (PLAIN, brightness, ROLLOUT, "beta is None"),
        (PLAIN, None, RolloutConfig(5, 5, 5), "gradient_chunks is 5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, score, rollout, message):
    with pytest.raises(ValueError, match=message):
        Distillation(ENGINE, distillation_models(), config, rollout, score)
