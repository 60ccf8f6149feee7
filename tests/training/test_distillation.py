"""What student and critic learn from one batch, on random models."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from rfengine.training import distillation
from rfengine.training.config import DistillationConfig, RolloutConfig
from rfengine.training.distillation import DistillationModels, DistillationStage, PromptBatch
from rfengine.training.parallel import Ranks
from support.models import text_states
from support.small_training import PLAIN, DrawnPrompts, changed, distillation_models

ROLLOUT = RolloutConfig(4, 4, 3)
PROMPTS = PromptBatch(
    ("a", "a", "b", "b"),
    torch.cat([text_states(0), text_states(0), text_states(1), text_states(1)]),
    torch.tensor([0, 0, 1, 1]),
)


def generators(seed: int = 0) -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)


def brightness(frames: torch.Tensor, prompts: tuple[str, ...]):
    assert frames.shape == (4, 36, 32, 48, 3)
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert len(frames) == len(prompts)
    return frames.flatten(1).mean(1), {}


def stage_of(models: DistillationModels, config: DistillationConfig, rollout=ROLLOUT, score=None):
    stage = "dmd" if config.beta is None else "re-dmd"
    settings = changed(stage=stage, distillation=config, rollout=rollout, batch=4, group=2)
    return DistillationStage(settings, models, DrawnPrompts(), Ranks(), score)


def student_gradient(config: DistillationConfig, score=None, given=None, rollout=ROLLOUT):
    """The loss, what is logged, and the gradient of every weight of the student."""
    models = given or distillation_models()
    loss, figures = stage_of(models, config, rollout, score).student_loss(PROMPTS, *generators())
    loss.backward()
    return loss.detach(), figures, {name: value.grad for name, value in models.student.named_parameters()}


@pytest.fixture(scope="module")
def plain():
    return student_gradient(PLAIN)


def test_student_loss_reaches_every_weight_of_the_student_and_no_other():
    parts = distillation_models()
    _, figures, gradients = student_gradient(PLAIN, given=parts)
    assert all(value is not None and value.isfinite().all() for value in gradients.values())
    assert all(value.abs().max() > 0 for value in gradients.values())
    assert all(value.grad is None for value in (*parts.critic.parameters(), *parts.teacher.parameters()))
    assert figures["distance"] > 0
    assert figures.keys() == {"distance"}


@pytest.mark.parametrize("recached", [0.0, 1.0])
def test_a_rollout_that_switches_begins_under_its_earlier_prompts(recached):
    rollout = dataclasses.replace(ROLLOUT, switch_share=1.0, recache_share=recached)
    stage = stage_of(distillation_models(), PLAIN, rollout)
    batch, _, _ = stage._batch("student", 0, 0)
    assert batch.earlier_states.shape == batch.states.shape
    assert torch.equal(batch.earlier_states[0], batch.earlier_states[1])  # of one group
    assert not torch.equal(batch.earlier_states, batch.states)
    latents = {}
    for name, earlier in (("same", PROMPTS.states), ("other", PROMPTS.states.flip(0))):
        prompts = dataclasses.replace(PROMPTS, earlier_states=earlier)
        latents[name] = stage._roll_out(prompts, *generators()).detach()
    unswitched = stage_of(distillation_models(), PLAIN)
    assert unswitched._batch("student", 0, 0)[0].earlier_states is None
    expected = unswitched._roll_out(PROMPTS, *generators()).detach()
    torch.testing.assert_close(latents["same"], expected, rtol=0, atol=1e-5)
    assert not torch.equal(latents["other"][:, :, :3], expected[:, :, :3])
    loss, _ = stage.student_loss(
        dataclasses.replace(PROMPTS, earlier_states=PROMPTS.states.flip(0)), *generators()
    )
    loss.backward()
    assert all(value.grad.isfinite().all() for value in stage.models["student"].parameters())


def test_critic_equal_to_the_teacher_gives_no_gradient():
    parts = distillation_models()
    same = dataclasses.replace(parts, critic=copy.deepcopy(parts.teacher).requires_grad_())
    _, figures, gradients = student_gradient(PLAIN, given=same)
    assert figures["distance"] == 0
    assert all(value.eq(0).all() for value in gradients.values())


def test_guidance_leads_away_from_the_negative_text(plain):
    guidance = dataclasses.replace(PLAIN, guidance=3.0)
    _, _, guided = student_gradient(guidance)
    texts = dataclasses.replace(distillation_models(), negative_states=PROMPTS.states[:1])
    only_a = PromptBatch(("a",), PROMPTS.states[:1], torch.tensor([0]))
    one, _ = stage_of(texts, guidance).student_loss(only_a, *generators())
    other, _ = stage_of(texts, PLAIN).student_loss(only_a, *generators())
    assert any(not torch.equal(plain[2][name], guided[name]) for name in guided)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_equal_rewards_are_plain_dmd(plain):
    config = dataclasses.replace(PLAIN, beta=0.1)
    _, figures, rewarded = student_gradient(config, lambda frames, prompts: (torch.full((4,), 0.3), {}))
    assert figures["largest_weight"] == 1 and figures["score"] == pytest.approx(0.3)
    for name, value in plain[2].items():
        assert torch.equal(value, rewarded[name]), name


def test_rewards_weigh_the_samples_of_each_prompt(monkeypatch):
    seen, of_rewards = [], distillation.reward_weights

    def reward_weights(*arguments):
        seen.append((*arguments, of_rewards(*arguments)))
        return seen[0][-1]

    monkeypatch.setattr(distillation, "reward_weights", reward_weights)
    _, figures, _ = student_gradient(dataclasses.replace(PLAIN, beta=0.01), brightness)
    ((scores, groups, beta, weights),) = seen
    assert groups is PROMPTS.groups and beta == 0.01
    assert figures["score"] == float(scores.mean()) and figures["largest_weight"] == float(weights.max())
    assert weights[:2].mean().item() == pytest.approx(1)
    assert weights[2:].mean().item() == pytest.approx(1)
    assert weights.std() > 0.01


def test_late_clip_begins_with_the_encoded_frame_and_learns_nothing_from_its_chunk():
    encoded = dataclasses.replace(PLAIN, first_latent="encoded")
    parts = distillation_models()
    seen = []

    def watched(x, *arguments):
        seen.append(x)
        return type(parts.teacher).forward_clip(parts.teacher, x, *arguments)

    parts.teacher.forward_clip = watched
    loss, _, _ = student_gradient(encoded, given=parts)
    assert seen[0].shape[2] == 9
    assert loss > 0
    whole = RolloutConfig(3, 3, 3)
    _, _, from_start = student_gradient(encoded, rollout=whole)
    _, _, given = student_gradient(PLAIN, rollout=whole)
    assert all(torch.equal(from_start[name], given[name]) for name in given), "a clip from the start is whole"


def test_critic_learns_and_the_student_does_not():
    parts = distillation_models()
    stage_of(parts, PLAIN).critic_loss(PROMPTS, *generators()).backward()
    assert all(value.grad is not None for value in parts.critic.parameters())
    assert all(value.grad is None for value in parts.student.parameters())


def test_the_same_draws_give_the_same_losses(plain):
    loss, _, again = student_gradient(PLAIN)
    assert loss == plain[0]
    assert all(torch.equal(plain[2][name], again[name]) for name in again)


def test_critic_follows_the_student_while_both_train():
    parts = distillation_models()
    stage = stage_of(parts, PLAIN, RolloutConfig(3, 3, 3))
    student = torch.optim.AdamW(parts.student.parameters(), lr=2e-3, betas=(0.0, 0.999))
    critic = torch.optim.AdamW(parts.critic.parameters(), lr=2e-3, betas=(0.0, 0.999))
    losses = []
    for step in range(40):
        loss = stage.critic_loss(PROMPTS, *generators(10 * step))
        critic.zero_grad()
        loss.backward()
        critic.step()
        losses.append(loss.item())
        if step % 5 == 4:
            student.zero_grad()
            stage.student_loss(PROMPTS, *generators(10 * step + 5))[0].backward()
            student.step()
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
