"""The products of the transformer in FP8: which they are, what stays as it is, and what they do to a pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.config import CacheConfig
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.models.fp8_products import PRODUCTS, product_names, products, quantise, refresh
from rfengine.ops import REFERENCE_OPS, Ops
from support.models import SMALL, noise_of, small_cache, small_model, small_runner, text_states

LAYERS = SMALL.num_layers


class CountingOps(Ops):
    """The reference; counts its calls by op."""

    def __init__(self, folds_gate: bool = False) -> None:
        super().__init__(REFERENCE_OPS.choice, folds_gate)
        self.counts: Counter[str] = Counter()
        self._run = {name: self._counted(name) for name in self._run}

    def _counted(self, name: str) -> Any:
        run = self._run[name]

        def call(*arguments: Any) -> Any:
            self.counts[name] += 1
            return run(*arguments)

        return call


def model_on(ops: Ops) -> WanDiT:
    model = WanDiT(SMALL, ops).eval()
    model.load_state_dict(small_model().state_dict())
    return model


def latents_of(model: WanDiT, chunks: int = 5) -> Tensor:
    """The latents of some chunks, evictions included."""
    runner, cache = small_runner(model), small_cache(CacheConfig())
    with torch.no_grad():
        text = model.text_keys_values(text_states())
        parts = []
        for chunk in range(chunks):
            plan = cache.plan_chunk()
            parts.append(runner.advance(cache, plan, noise_of(chunk, 3), text))
    return torch.cat(parts, dim=2)


def test_every_product_of_a_block_has_a_name() -> None:
    names = product_names(SMALL)
    assert names == tuple(products(small_model())) and len(names) == LAYERS * len(PRODUCTS)
    assert names[0] == "blocks.0.self_attn.qkv" and names[-1] == f"blocks.{LAYERS - 1}.ffn.2"
    model = small_model()
    weights = {id(layer.weight) for each in products(model).values() for layer in each.layers}
    inside = {id(p) for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2}
    text = {id(layer.weight) for block in model.blocks for layer in (block.cross_attn.k, block.cross_attn.v)}
    assert weights == inside - text  # all but the keys and values of the text, which are made once a prompt


@pytest.mark.parametrize("folds_gate", [False, True])
def test_in_fp8_each_activation_is_rounded_by_what_makes_it(folds_gate: bool) -> None:
    """Two steps and a context pass, which has no head and of the last block its keys and values alone."""
    ops = CountingOps(folds_gate)
    model = model_on(ops)
    quantise(model)
    before = latents_of(model, 1).isfinite().all()
    assert before
    blocks = 2 * LAYERS + LAYERS - 1
    assert {name: count for name, count in ops.counts.items() if "linear" in name or "norm" in name} == {
        "adaptive_layer_norm_fp8": 3,  # before the first block
        "linear_fp8": 3 * blocks + 1,  # q, k, v; q of the text; the second of the feed-forward; the last k, v
        "linear_heads_fp8": 2 * blocks,  # both outputs of attention
        "linear_gelu_rows_fp8": blocks,
        "gated_residual_affine_norm_fp8": blocks,
        "gated_residual_adaptive_norm_fp8": 2 * blocks - 2,
        # the norm before the head, which is in the dtype of the model; with folded gates in two ops otherwise
        "gated_residual_adaptive_norm": 2,
        "rms_norm": blocks + LAYERS,  # queries, and keys of the text
        "qk_norm_rope_write": blocks + 1,
        "linear": 2 * LAYERS,  # keys and values of the text
    }


@pytest.mark.parametrize("left_out", PRODUCTS)
def test_a_product_that_is_left_out_is_as_it_was(left_out: str) -> None:
    names = {f"blocks.{layer}.{left_out}" for layer in range(LAYERS)}
    ops = CountingOps()
    model = model_on(ops)
    quantise(model, names)
    dependents = {f"blocks.{layer}.ffn.2" for layer in range(LAYERS)} if left_out == "ffn.0" else set()
    assert model.left_out_of_fp8 == names | dependents
    assert {name for name, each in products(model).items() if each.owner.fp8 is None} == names | dependents
    exact, found = latents_of(small_model()), latents_of(model)
    assert 1e-4 < relative_error(found, exact) < 0.5


def test_only_the_second_product_of_a_feed_forward_may_be_left_out() -> None:
    """The first one stays in FP8, and its result is in the dtype of the model."""
    ops = CountingOps()
    model = model_on(ops)
    quantise(model, {f"blocks.{layer}.ffn.2" for layer in range(LAYERS)})
    latents_of(model, 1)
    blocks = 2 * LAYERS + LAYERS - 1
    assert {name: count for name, count in ops.counts.items() if "gelu" in name} == {
        "linear_gelu_fp8": blocks
    }
    assert ops.counts["linear"] == blocks + 2 * LAYERS  # and keys and values of the text


def test_with_every_product_left_out_nothing_changes_and_in_fp8_a_little_does() -> None:
    exact = latents_of(small_model())
    model = small_model()
    quantise(model, product_names(SMALL))
    assert torch.equal(latents_of(model), exact) and model.left_out_of_fp8 is not None
    quantise(model)
    assert 1e-3 < relative_error(latents_of(model), exact) < 0.5
    assert torch.equal(latents_of(model), latents_of(model))  # the same from run to run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same(dtype: torch.dtype) -> None:
    plain, packed = small_model().to(dtype), small_model().to(dtype)
    pack_weights(packed)
    for model in (plain, packed):
        quantise(model)
    text = plain.text_keys_values(text_states())
    cache, other = (small_cache(CacheConfig(), dtype=dtype) for _ in range(2))
    noise = noise_of(0, 3).to(dtype)
    found = small_runner(plain).advance(cache, cache.plan_chunk(), noise, text)
    assert torch.equal(small_runner(packed).advance(other, other.plan_chunk(), noise, text), found)


def test_weights_that_change_are_followed_in_place() -> None:
    model = small_model()
    quantise(model)
    kept = {name: each.owner.fp8 for name, each in products(model).items()}
    bits = {name: [tensor.clone() for tensor in fp8] for name, fp8 in kept.items()}
    originals = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.mul_(1.1).add_(0.01)
    refresh(model)
    fresh = small_model()
    fresh.load_state_dict(model.state_dict())
    quantise(fresh)
    for name, each in products(fresh).items():
        for ours, theirs in zip(kept[name], each.owner.fp8, strict=True):
            assert torch.equal(ours.float(), theirs.float())
        assert not torch.equal(kept[name].scale, bits[name][1])
    model.load_state_dict(originals)
    refresh(model)
    for name, fp8 in kept.items():
        for ours, before in zip(fp8, bits[name], strict=True):
            assert torch.equal(ours.float(), before.float())


def test_the_context_pass_leaves_the_keys_and_values_of_a_whole_pass() -> None:
    """Its last layer multiplies keys and values alone: a part of the weights of q, k and v."""
    model, arenas = small_model(), []
    quantise(model)
    runner, text = small_runner(model), model.text_keys_values(text_states())
    with torch.no_grad():
        for is_context in (True, False):
            cache = small_cache(CacheConfig())
            plan, latents = cache.plan_chunk(), noise_of(0, 3)[0]
            cache.begin_chunk(plan)
            given = latents, runner.context_modulation, text, cache, plan
            if is_context:
                model.context_pass(*given)
            else:
                model.forward_chunk(*given, keep_raw=True)
            arenas.append(cache.tensors())
    for name in ("keys", "values", "raw_keys"):
        assert arenas[0][name].any() and torch.equal(arenas[0][name], arenas[1][name])


def test_each_head_of_an_attention_is_rounded_in_a_unit_of_its_own() -> None:
    model, head_dim = small_model(), SMALL.dim // SMALL.num_heads
    layer = model.blocks[0].self_attn.o
    layer.weight.data[:, :head_dim] = 0  # so that the first head, which is huge, only takes the unit
    quantise(model)
    x = torch.randn(1, 12, SMALL.dim)
    x[..., :head_dim] *= 1e6
    with torch.no_grad():
        exact, found = (each - layer.bias for each in (F.linear(x, layer.weight, layer.bias), layer(x)))
    assert relative_error(found, exact) < 0.06


def test_a_clip_is_seen_in_fp8_too() -> None:
    model, exact = small_model(), small_model()
    quantise(model)
    latents, timesteps = torch.randn(2, 4, 2, 4, 6), torch.tensor([500.0, 900.0])
    states = text_states().expand(2, -1, -1)
    with torch.no_grad():
        found, expected = (each.forward_clip(latents, timesteps, states) for each in (model, exact))
    assert 1e-3 < relative_error(found, expected) < 0.5


def test_an_unknown_product_is_refused() -> None:
    message = (
        "blocks.7.ffn.0 is left out of FP8 and is no product of this model; its 12 are named such as blocks"
    )
    with pytest.raises(ValueError, match=message):
        quantise(small_model(), ["blocks.7.ffn.0"])
