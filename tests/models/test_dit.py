import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig, WanConfig
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.models.weight_layout import joined_view
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.ops.reference import unpatchify
from rfengine.presets import PRESETS
from support.models import GRID, SMALL, noise_of, small_cache, small_model, small_runner, text_states


@pytest.mark.parametrize(
    ("preset", "tensors", "parameters"), [("wan-1.3b", 825, 1_418_996_800), ("wan-14b", 1095, 14_288_491_584)]
)
def test_published_sizes_have_the_published_parameters(preset, tensors, parameters):
    with torch.device("meta"):
        model = WanDiT(PRESETS[preset].model)
    state = model.state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters


def diffusers_model(config: WanConfig, model: WanDiT):
    from diffusers import WanTransformer3DModel

    from rfengine.checkpoint.layouts import diffusers_transformer_from_wan

    other = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
    ).eval()  # fmt: skip
    other.load_state_dict(
        {diffusers_transformer_from_wan(name): value for name, value in model.state_dict().items()}
    )
    return other


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_bidirectional_pass_agrees_with_diffusers(head_dim):
    config = WanConfig(2 * head_dim, 96, 2, 2, text_dim=16, text_len=8)
    model = small_model(config)
    latents, text = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 8, 16)
    timesteps = torch.tensor([937.5, 833.25])
    expected = diffusers_model(config, model)(latents, timesteps, text, return_dict=False)[0]
    assert relative_error(model.forward_clip(latents, timesteps, text), expected) <= 1e-5


@torch.no_grad()
def test_first_chunk_over_the_cache_equals_the_bidirectional_pass():
    model, cache = small_model(), small_cache(CacheConfig())
    runner, plan = small_runner(model), cache.plan_chunk()
    cache.begin_chunk(plan)
    latents = noise_of(0, 3)[0]
    tokens = model.forward_chunk(
        latents, runner.steps[0].modulation, model.text_keys_values(text_states()), cache, plan
    )
    expected = model.forward_clip(latents, torch.tensor([1000.0]), text_states())
    assert relative_error(unpatchify(tokens, latents), expected) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, num_layers=1)])
def test_a_context_pass_leaves_the_keys_and_values_of_a_whole_pass(config, dtype, packed):
    model = small_model(config).to(dtype)
    if packed:
        pack_weights(model)
    runner, text = small_runner(model), model.text_keys_values(text_states())
    left = []
    for forward in (partial(model.forward_chunk, keep_raw=True), model.context_pass):
        cache = StreamingKVCache(config, CacheConfig(), GRID, dtype=dtype)
        for chunk in range(4):
            plan = cache.plan_chunk()
            cache.begin_chunk(plan)
            forward(noise_of(chunk, 3)[0].to(dtype), runner.context_modulation, text, cache, plan)
            cache.commit(plan)
        left.append(cache.tensors())
    assert all(tensor.isfinite().all() for tensor in left[0].values())
    assert all(torch.equal(tensor, left[1][name]) for name, tensor in left[0].items())


@torch.no_grad()
def test_a_context_pass_computes_nothing_that_is_thrown_away(monkeypatch):
    model, cache = small_model(), small_cache(CacheConfig())
    runner, text, plan = small_runner(model), model.text_keys_values(text_states()), cache.plan_chunk()
    cache.begin_chunk(plan)
    last = model.blocks[-1]
    unneeded = (last.self_attn.q, last.self_attn.o, last.cross_attn.q, last.ffn[0], model.head.head)
    for layer in unneeded:
        monkeypatch.setattr(layer, "forward", lambda x: 1 / 0)
    model.context_pass(noise_of(0, 3)[0], runner.context_modulation, text, cache, plan)
    with pytest.raises(ZeroDivisionError):
        model.forward_chunk(noise_of(0, 3)[0], runner.context_modulation, text, cache, plan)


@torch.no_grad()
def test_a_timestep_for_each_frame_equals_one_for_all():
    model, latents = small_model(), noise_of(0, 3)[0]
    one = model.forward_clip(latents, torch.tensor([500.0]), text_states())
    each = model.forward_clip(latents, torch.full((1, 3), 500.0), text_states())
    assert relative_error(each, one) <= 1e-6
    mixed = model.forward_clip(latents, torch.tensor([[0.0, 500.0, 500.0]]), text_states())
    assert relative_error(mixed, one) > 1e-3


@torch.no_grad()
def test_fractions_of_a_timestep_count():
    model, latents = small_model(), noise_of(0, 1)[0]
    whole = model.forward_clip(latents, torch.tensor([833.0]), text_states())
    third = model.forward_clip(latents, torch.tensor([833.3333]), text_states())
    assert relative_error(third, whole) > 1e-5


@torch.no_grad()
def test_missing_text_rows_are_zero_rows_that_take_part():
    model, latents = small_model(), noise_of(0, 1)[0]
    short = text_states()[:, :5]
    padded = torch.nn.functional.pad(short, (0, 0, 0, SMALL.text_len - 5))
    timesteps = torch.tensor([500.0])
    assert torch.equal(
        model.forward_clip(latents, timesteps, short), model.forward_clip(latents, timesteps, padded)
    )
    with pytest.raises(ValueError, match="text states are"):
        model.text_keys_values(torch.zeros(1, SMALL.text_len + 1, SMALL.text_dim))


def test_gradients_reach_every_parameter():
    model = small_model().train()
    out = model.forward_clip(noise_of(0, 3)[0], torch.tensor([500.0]), text_states())
    out.square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert idle == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model, latents = small_model(), noise_of(0, 3)[0]
    exact = model.forward_clip(latents, torch.tensor([500.0]), text_states())
    rounded = model.to(dtype).forward_clip(latents.to(dtype), torch.tensor([500.0]), text_states().to(dtype))
    assert rounded.dtype == dtype
    assert relative_error(rounded, exact) <= 64 * torch.finfo(dtype).eps / 8


def test_a_batch_of_prompts_equals_each_alone():
    model = small_model()
    latents, text = torch.randn(2, 4, 3, *noise_of(0, 3).shape[-2:]), torch.randn(2, 8, 16)
    timesteps = torch.tensor([500.0, 900.0])
    with torch.no_grad():
        both = model.forward_clip(latents, timesteps, text)
        for row in range(2):
            alone = model.forward_clip(latents[row : row + 1], timesteps[row : row + 1], text[row : row + 1])
            assert relative_error(both[row : row + 1], alone) <= 1e-6


def test_sizes_come_from_the_latents():
    latents = torch.randn(1, 4, 2, 6, 10)
    assert small_model().forward_clip(latents, torch.tensor([1.0]), text_states()).shape == latents.shape
    assert GRID.frame_tokens == 6


class CountedOps(Ops):
    """The ops of a CPU, with the shapes of the weights that linear ran on; linear: its backend, by which
    weights are laid out."""

    def __init__(self, folds_gate=False, linear="reference"):
        super().__init__(REFERENCE_OPS.choice | {"linear": linear}, folds_gate)
        self.shapes = []

    def linear(self, x, weight, bias):
        self.shapes.append(tuple(weight.shape))
        return super().linear(x, weight, bias)


def clip_of(model, dtype=torch.float32):
    with torch.no_grad():
        return model.forward_clip(noise_of(0, 3)[0].to(dtype), torch.tensor([500.0]), text_states().to(dtype))


def counted_model(**options) -> WanDiT:
    model = WanDiT(SMALL, CountedOps(**options)).eval()
    model.load_state_dict(small_model().state_dict())
    return model


@pytest.mark.parametrize("linear", ["reference", "cpu"])
def test_packed_weights_are_one_product_and_the_same_parameters(linear):
    model, dim = counted_model(linear=linear), SMALL.dim
    expected, before = clip_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert (3 * dim, dim) not in model.ops.shapes
    model.ops.shapes.clear()
    pack_weights(model)
    assert relative_error(clip_of(model), expected) <= 1e-6
    layers = SMALL.num_layers
    assert model.ops.shapes.count((3 * dim, dim)) == layers  # q, k, v of the clip
    assert model.ops.shapes.count((2 * dim, dim)) == layers  # k, v of the text
    assert model.ops.shapes.count((dim, dim)) == 3 * layers  # both output projections, q of the text
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    attention = model.blocks[0].self_attn
    assert len({layer.weight.untyped_storage().data_ptr() for layer in (attention.q, attention.v)}) == 1
    assert attention.q.weight.untyped_storage().nbytes() == 3 * attention.q.weight.nbytes


@pytest.mark.parametrize("linear", ["reference", "cpu"])
def test_weights_loaded_into_a_packed_model_are_the_ones_that_run(linear):
    model, others = counted_model(linear=linear), small_model(seed=1)
    pack_weights(model)
    model.load_state_dict(others.state_dict())
    model.ops.shapes.clear()
    assert relative_error(clip_of(model), clip_of(others)) <= 1e-6
    assert (3 * SMALL.dim, SMALL.dim) in model.ops.shapes


@pytest.mark.parametrize("linear", ["reference", "cpu"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(small_model(seed=1).state_dict(), assign=True),
        lambda model: model.double().float(),
        lambda model: model.blocks[0].self_attn.k.weight.data.copy_(torch.ones(SMALL.dim, SMALL.dim)),
        lambda model: setattr(
            model.blocks[0].self_attn.v, "weight", torch.nn.Parameter(torch.ones(SMALL.dim, SMALL.dim))
        ),
    ],
)
def test_a_packed_model_follows_whatever_happens_to_its_weights(change, linear):
    model, plain = counted_model(linear=linear), counted_model(linear=linear)
    pack_weights(model)
    change(model)
    change(plain)
    assert relative_error(clip_of(model), clip_of(plain)) <= 1e-6
    pack_weights(model)
    assert relative_error(clip_of(model), clip_of(plain)) <= 1e-6


@pytest.mark.parametrize("linear", ["reference", "cpu"])
def test_a_copy_of_a_packed_model_has_weights_of_its_own(linear):
    model = counted_model(linear=linear)
    pack_weights(model)
    expected, copied = clip_of(model), copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[0].self_attn.q.weight.zero_()
    assert relative_error(clip_of(copied), expected) <= 1e-6
    assert relative_error(clip_of(model), expected) > 1e-3


def test_a_packed_model_still_learns_every_weight():
    gradients = []
    for packed in (False, True):
        model = small_model().train()
        if packed:
            pack_weights(model)
        out = model.forward_clip(noise_of(0, 3)[0], torch.tensor([500.0]), text_states())
        out.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], grad) for name, grad in gradients[0].items())


def test_neighbours_in_memory_of_their_own_are_not_one_view():
    whole = torch.randn(6, 4)
    parts = whole.split(2)
    assert torch.equal(joined_view(parts), whole)
    assert joined_view([parts[0], parts[2]]) is None
    assert joined_view([parts[1], parts[0]]) is None
    assert joined_view([parts[0], parts[1].clone()]) is None
    assert joined_view([part[:, :2] for part in parts]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_folded_into_the_product_changes_nothing(dtype):
    apart, folded = (counted_model(folds_gate=folds).to(dtype) for folds in (False, True))
    assert torch.equal(clip_of(folded, dtype), clip_of(apart, dtype))
    assert len(folded.ops.shapes) < len(apart.ops.shapes)
