"""The plan of memory and work: against the roofline, the code run without data, and what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.roofline import Options, roofline
from rfengine.costs.memory import parameter_count
from rfengine.costs.training import adapter_parameters, clip_flops, decode_flops, pass_flops
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.presets import PRESETS
from rfengine.training import recipes
from rfengine.training.lora import add_adapters, lora_weights
from rfengine.training.resources import _block_activations, plan_resources
from support.models import text_states
from support.small_training import ENGINE

WAN = PRESETS["wan-1.3b"]


@pytest.fixture(scope="module")
def steady() -> dict:
    return roofline(Options())


def test_a_denoising_pass_has_the_roofline_products(steady):
    chunk = 3 * LatentGrid.of(WAN).frame_tokens
    ours = pass_flops(WAN.model, chunk, 3 * chunk)
    products = steady["totals"]["products_without_vae"]["flops"]
    assert products == 5 * ours  # four denoising passes and the context pass


def test_a_decoded_chunk_has_the_roofline_products(steady):
    totals = steady["totals"]
    theirs = totals["products_with_vae"]["flops"] - totals["products_without_vae"]["flops"]
    ours = decode_flops(WAN, 9) - decode_flops(WAN, 6)
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_clip_has_the_products_of_the_code():
    latents = torch.zeros(1, ENGINE.model.in_dim, 9, 4, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        WanDiT(ENGINE.model).forward_clip(latents, torch.tensor([500.0]), text_states())
    found, counted = clip_flops(ENGINE, ENGINE.model, 9), counter.get_total_flops()
    assert found <= counted  # the products of the time embedding are not counted
    assert found == pytest.approx(counted, rel=0.1)


def test_activations_are_near_what_autograd_keeps():
    config = PRESETS["tiny"].model
    model, kept = WanDiT(config), {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    states = torch.zeros(1, config.text_len, config.text_dim)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model.forward_clip(
            torch.zeros(4, config.in_dim, 9, 8, 8), torch.full((4,), 500.0), states.expand(4, -1, -1)
        )
    measured = sum(size for place, (size, _) in kept.items() if place not in weights)
    planned = config.num_layers * _block_activations(config, 4 * 9 * 16, 4)
    assert out.requires_grad and 0.5 < planned / measured < 2


def test_sharding_divides_what_is_learned_by_the_ranks():
    config = recipes.wan_1_3b_reward_forcing()
    one, eight = (plan_resources(config, ranks, ranks, "cuda") for ranks in (1, 8))
    for before, after in zip(one.models[:3], eight.models[:3], strict=True):
        assert after.total == pytest.approx(before.total / 8)
    assert eight.step_flops == one.step_flops
    student, critic, teacher = one.models[:3]
    assert student.parameters == critic.parameters == parameter_count(WAN.model)
    assert student.total == 20 * student.parameters and teacher.total == 2 * teacher.parameters


def test_replicas_divide_by_their_own_ranks_alone():
    config = replace(recipes.wan_1_3b_reward_forcing(), parallel="hybrid")
    sharded, hybrid = plan_resources(config, 8, 8, "cuda"), plan_resources(config, 32, 8, "cuda")
    assert hybrid.models == sharded.models and hybrid.peak == sharded.peak
    assert "one of 32 rank(s), 4 copies of the weights, each on 8, GiB" in hybrid.render()
    assert "copies" not in sharded.render()


def test_shares_are_gathered_and_a_teacher_on_the_cpu_comes_whole_to_one_that_shares_nothing():
    config = recipes.wan_1_3b_reward_forcing()
    one, eight = (plan_resources(config, ranks, ranks, "cuda").phases["student update"] for ranks in (1, 8))
    assert one["weights gathered"] == 0
    # of 14B: 351 million in each of 40 blocks and 233 million outside of them
    assert 2 * 2 * 0.35e9 < eight["weights gathered"] < 2 * (2 * 0.36e9 + 0.5e9)
    config = replace(config, offload_teacher=True)
    one, eight = (plan_resources(config, ranks, ranks, "cuda").phases["student update"] for ranks in (1, 8))
    assert one["teacher"] == 2 * parameter_count(config.teacher_model) and eight["teacher"] == 0


def test_adapters_cost_their_own_gradients_and_moments():
    config = recipes.toy_dmd()
    student = plan_resources(replace(config, lora_rank=4), 1, 1, "cpu").models[0]
    with torch.device("meta"):
        model = WanDiT(config.engine.model)
    count = adapter_parameters(config.engine.model, 4)
    assert student.gradients == 4 * count and student.moments == 8 * count
    add_adapters(model, 4, 0)
    assert sum(value.numel() for value in lora_weights(model.state_dict()).values()) == count


def test_plan_that_cannot_fit_is_refused_with_its_numbers():
    plan = plan_resources(recipes.wan_1_3b_reward_forcing(), 8, 8, "cuda")
    plan.check(plan.peak, "cuda:0")
    with pytest.raises(RuntimeError, match=r"needs \d+\.\d GiB on a rank and cuda:0 has 80\.0 GiB; use more"):
        plan.check(80 * 2**30, "cuda:0")


@pytest.mark.parametrize("recipe", [recipes.toy_teacher, recipes.toy_ode_init, recipes.toy_re_dmd])
def test_every_plan_prints_its_numbers(recipe):
    plan = plan_resources(recipe(), 1, 1, "cpu")
    assert plan.peak > plan.resident > 0 and plan.step_flops > 0
    text = plan.render()
    assert "most at once" in text and "work of one step" in text and "student" in text
