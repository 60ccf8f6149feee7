"""A self-forced rollout with its gradients on the kernels, as training runs it on CUDA."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.config import CacheConfig, WanConfig
from rfengine.models.dit import WanDiT
from rfengine.ops import Ops, choose_ops
from rfengine.training.config import RolloutConfig
from rfengine.training.ops import DifferentiableOps
from rfengine.training.rollout import self_forced_rollout
from support.models import small_model, text_states
from support.small_training import ENGINE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_OF_64 = WanConfig(
    dim=64, ffn_dim=64, num_heads=1, num_layers=1, text_dim=16, text_len=8, in_dim=4, out_dim=4
)
FRAMES = 1  # of a chunk, with 2 x 1 tokens
CONFIG = dataclasses.replace(ENGINE, model=HEAD_OF_64, cache=CacheConfig(FRAMES, 3, "ema", 1, 0.8), width=16)


def learned(ops: Ops, rollout: RolloutConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Latents of four chunks, one of which leaves the window, and the gradient of every weight."""
    model = WanDiT(HEAD_OF_64, DifferentiableOps(ops.choice)).to(DEVICE)
    model.load_state_dict(small_model(HEAD_OF_64).state_dict())
    generator = torch.Generator().manual_seed(5)
    noise = {
        (chunk, step): torch.randn(1, 4, FRAMES, 4, 2, generator=generator)
        for chunk in range(4)
        for step in (0, 1)
    }
    text = model.text_keys_values(text_states().to(DEVICE))
    latents = self_forced_rollout(
        model, CONFIG, text, lambda chunk, step: noise[chunk, step].to(DEVICE), (0, 0, 1, 0), rollout
    )
    latents[:, :, FRAMES * (4 - rollout.gradient_chunks) :].square().mean().backward()
    return latents, {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rollout_and_its_gradients_on_triton_equal_the_reference(checkpointing):
    rollout = RolloutConfig(4, 4, 2, checkpointing=checkpointing)
    expected, expected_gradients = learned(choose_ops("reference", DEVICE), rollout)
    found, gradients = learned(choose_ops("triton", DEVICE), rollout)
    assert relative_error(found, expected) <= 1e-5
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 0, name
        assert relative_error(gradients[name], gradient) <= 1e-4, name
