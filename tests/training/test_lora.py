"""Adapters: where they sit, their gradients, and that what is exported is what was trained."""

from __future__ import annotations

import pytest
import torch

from rfengine.checkpoint.lora_change import merge_lora
from rfengine.checkpoint.lora_names import parse_lora
from rfengine.models.dit import WanDiT
from rfengine.training.lora import add_adapters, lora_weights, merged_weights
from support.models import SMALL, small_model, text_states


def flow(model: WanDiT) -> torch.Tensor:
    latents = torch.randn(1, SMALL.in_dim, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    return model.forward_clip(latents, torch.tensor([500.0]), text_states())


@pytest.fixture
def adapted() -> WanDiT:
    """A model whose adapters are not zero any more."""
    model = small_model()
    add_adapters(model, 2, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if name.endswith("up"):
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return model


def test_fresh_adapters_change_nothing():
    model = small_model()
    expected = flow(model)
    add_adapters(model, 2, seed=0)
    assert torch.equal(flow(model), expected)


def test_ten_linears_of_every_block_learn_and_nothing_else(adapted):
    learning = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert len(learning) == 2 * 10 * SMALL.num_layers
    assert all(name.endswith(("0.down", "0.up")) for name in learning)
    flow(adapted).square().mean().backward()
    assert {name for name, value in adapted.named_parameters() if value.grad is not None} == learning


def test_gradients_of_the_matrices_follow_from_that_of_the_weight(adapted):
    plain = small_model()
    plain.load_state_dict(merged_weights(adapted.state_dict()))
    for model in (plain, adapted):
        flow(model).square().mean().backward()
    for block, expected in zip(adapted.blocks, plain.blocks, strict=True):
        adapter = block.self_attn.q.parametrizations.weight[0]
        gradient = expected.self_attn.q.weight.grad
        torch.testing.assert_close(adapter.up.grad, gradient @ adapter.down.detach().T)
        torch.testing.assert_close(adapter.down.grad, adapter.up.detach().T @ gradient)


def test_merged_weights_load_into_a_plain_model_and_compute_the_same(adapted):
    plain = WanDiT(SMALL).eval()
    plain.load_state_dict(merged_weights(adapted.state_dict()))
    torch.testing.assert_close(flow(plain), flow(adapted))
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in merged_weights(state).items())


def test_exported_lora_is_read_and_merged_as_any_other(adapted):
    base, lora = small_model().state_dict(), lora_weights(adapted.state_dict())
    layers, unmatched = parse_lora(lora, base.keys())
    assert not unmatched.names
    assert len(layers) == 10 * SMALL.num_layers and layers.keys() <= base.keys()
    merged = merged_weights(adapted.state_dict())
    for weight, names in layers.items():
        found = merge_lora(base[weight], lora[names.down], lora[names.up])
        torch.testing.assert_close(found, merged[weight])
