"""Blocks computed twice and a teacher that lives elsewhere give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rfengine.training.memory import on_device, recompute_blocks
from support.models import SMALL, small_model, text_states


def gradients(recomputed: bool) -> tuple[dict[str, torch.Tensor], int]:
    model = small_model()
    calls = []
    for block in model.blocks:
        block.ffn[0].register_forward_hook(lambda *_: calls.append(1))
    if recomputed:
        recompute_blocks(model)
    latents = torch.randn(1, SMALL.in_dim, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    model.forward_clip(latents, torch.tensor([500.0]), text_states()).square().mean().backward()
    return {name: value.grad for name, value in model.named_parameters()}, len(calls)


def test_recomputed_blocks_give_the_same_gradients():
    (plain, once), (recomputed, twice) = gradients(False), gradients(True)
    assert (once, twice) == (SMALL.num_layers, 2 * SMALL.num_layers)
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name


@pytest.mark.gpu
def test_model_is_on_the_device_inside_the_block_alone():
    model = nn.Linear(3, 2).requires_grad_(False)
    home, x = model.weight.data_ptr(), torch.randn(4, 3)
    with on_device(model, torch.device("cuda:0")):
        assert {value.device.type for value in model.parameters()} == {"cuda"}
        torch.testing.assert_close(model(x.cuda()).cpu(), nn.functional.linear(x, *homes(model)))
    assert model.weight.device.type == "cpu" and model.weight.data_ptr() == home
    with pytest.raises(KeyError), on_device(model, torch.device("cuda:0")):
        raise KeyError
    assert model.weight.data_ptr() == home


def homes(model: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return model.weight.cpu(), model.bias.cpu()


def test_model_that_is_there_already_stays():
    model = nn.Linear(3, 2).requires_grad_(False)
    home = model.weight.data_ptr()
    with on_device(model, torch.device("cpu")):
        assert model.weight.data_ptr() == home
