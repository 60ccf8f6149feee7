import pytest
import torch

from inputs import GRID, SMALL, noise_of, relative_error, small_cache, small_model, small_runner, text_states
from rfengine.config import PRESETS, CacheConfig, WanConfig
from rfengine.models.dit import WanDiT
from rfengine.reference import unpatchify


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
        latents, runner.step_modulations[0], model.text_keys_values(text_states()), cache, plan
    )
    expected = model.forward_clip(latents, torch.tensor([1000.0]), text_states())
    assert relative_error(unpatchify(tokens, latents), expected) <= 1e-6


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
