"""The causal VAE: golden vectors, streams against whole clips, diffusers, state and errors."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from rfengine.accuracy import relative_error
from rfengine.checkpoint.layouts import wan_vae_from_diffusers
from rfengine.config import VAEConfig
from rfengine.models import vae as vae_module
from rfengine.models.vae import ChannelNorm, WanVAE

GOLDEN = Path(__file__).parents[1] / "golden" / "vae.safetensors"
GOLDEN_TOLERANCE = 3e-6  # norm of the difference over norm, float32
SMALL = VAEConfig(
    base_dim=4,
    z_dim=4,
    num_res_blocks=1,
    latents_mean=(0.5, -0.25, 0.0, 1.0),
    latents_std=(2.0, 0.5, 1.0, 3.0),
)
PLANS = {"1+2+3": [1, 2, 3], "one by one": [1] * 6, "two by two": [2] * 3, "1+5": [1, 5], "all at once": [6]}


def random_vae(config: VAEConfig = SMALL, seed: int = 0) -> WanVAE:
    generator = torch.Generator().manual_seed(seed)
    vae = WanVAE(config).eval()
    for parameter in vae.parameters():
        scale = 0.3 if parameter.ndim == 1 or parameter[0].numel() == 1 else parameter[0].numel() ** -0.5
        offset = 1.0 if parameter.ndim > 1 and parameter[0].numel() == 1 else 0.0
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)
    return vae


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode_in_calls(vae: WanVAE, latents: torch.Tensor, plan: list[int]) -> torch.Tensor:
    state = vae.decoder_state(latents.shape[0], *latents.shape[3:], latents.dtype, latents.device)
    pixels = torch.cat([vae.decode(part, state) for part in latents.split(plan, dim=2)], dim=2)
    assert state.frames == latents.shape[2]
    return pixels


def encode_in_calls(vae: WanVAE, pixels: torch.Tensor, plan: list[int]) -> torch.Tensor:
    side = vae.config.spatial_stride
    height, width = pixels.shape[3] // side, pixels.shape[4] // side
    state = vae.encoder_state(pixels.shape[0], height, width, pixels.dtype, pixels.device)
    latents = torch.cat([vae.encode(part, state) for part in pixels.split(plan, dim=2)], dim=2)
    assert state.frames == latents.shape[2]
    return latents


@pytest.fixture(scope="module")
def golden() -> tuple[WanVAE, dict[str, torch.Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    vae = WanVAE(
        VAEConfig(
            base_dim=config["base_dim"],
            z_dim=config["z_dim"],
            dim_mult=tuple(config["dim_mult"]),
            num_res_blocks=config["num_res_blocks"],
            temporal_downsample=tuple(config["temporal_downsample"]),
        )
    ).eval()
    vae.load_state_dict({name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")})
    return vae, {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("t.")}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_golden_latents_decode_to_the_recorded_video_in_any_plan(golden, plan):
    vae, tensors = golden
    with torch.no_grad():
        assert (
            relative_error(decode_in_calls(vae, tensors["latents"], plan), tensors["video"])
            <= GOLDEN_TOLERANCE
        )


@pytest.mark.parametrize("frames_per_call", [1, 2, 3, 6])
def test_golden_latents_decode_to_the_recorded_video_with_equal_calls(golden, frames_per_call):
    vae, tensors = golden
    with torch.no_grad():
        video = decode_in_calls(vae, tensors["latents"], [frames_per_call] * (6 // frames_per_call))
    assert relative_error(video, tensors["video"]) <= GOLDEN_TOLERANCE


def test_golden_clip_decodes_whole_with_and_without_autograd(golden):
    vae, tensors = golden
    with torch.no_grad():
        assert relative_error(vae.decode(tensors["latents"]), tensors["video"]) <= GOLDEN_TOLERANCE
    video = vae.decode(tensors["latents"])
    assert video.requires_grad
    assert relative_error(video.detach(), tensors["video"]) <= GOLDEN_TOLERANCE


@pytest.mark.parametrize("plan", [[21], [1] + [4] * 5, [5, 8, 8], [1, 12, 8]])
def test_golden_pixels_encode_to_the_recorded_latents_in_any_plan(golden, plan):
    vae, tensors = golden
    with torch.no_grad():
        assert relative_error(vae.encode(tensors["pixels"]), tensors["encoded"]) <= GOLDEN_TOLERANCE
        encoded = encode_in_calls(vae, tensors["pixels"], plan)
    assert relative_error(encoded, tensors["encoded"]) <= GOLDEN_TOLERANCE


def test_variance_with_eps_in_place_of_the_l2_norm_misses_the_golden_video(golden, monkeypatch):
    vae, tensors = golden

    def variance_norm(self, x):
        gamma = self.gamma.flatten()
        return F.rms_norm(x.movedim(1, -1), gamma.shape, gamma, eps=1e-6).movedim(-1, 1)

    monkeypatch.setattr(ChannelNorm, "forward", variance_norm)
    with torch.no_grad():
        assert relative_error(vae.decode(tensors["latents"]), tensors["video"]) > GOLDEN_TOLERANCE


def test_norm_divides_by_the_l2_norm_down_to_its_floor():
    norm = ChannelNorm(4, 3)
    gamma = torch.tensor([1.0, -2.0, 0.5, 3.0])
    norm.gamma.data = gamma.view(4, 1, 1, 1)
    x = noise(2, 4, 3, 2, 2) * torch.tensor([1e-8, 1e4]).view(2, 1, 1, 1, 1)
    expected = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) * 2.0 * gamma.view(4, 1, 1, 1)
    assert relative_error(norm(x), expected) <= 1e-6
    assert torch.equal(norm(torch.zeros_like(x)), torch.zeros_like(x))


@pytest.mark.parametrize("plan", [[1, 2, 3], [1] * 6, [3, 3], [2, 4]])
def test_decoding_plan_does_not_change_the_video(plan):
    vae, latents = random_vae(), noise(2, 4, 6, 2, 3)
    with torch.no_grad():
        whole = vae.decode(latents)
        assert whole.shape == (2, 3, 21, 16, 24)
        assert relative_error(decode_in_calls(vae, latents, plan), whole) <= 1e-6


@pytest.mark.parametrize("plan", [[1, 4, 4], [5, 4], [9], [1, 8]])
def test_encoding_plan_does_not_change_the_latents(plan):
    vae, pixels = random_vae(), noise(2, 3, 9, 16, 24)
    with torch.no_grad():
        whole = vae.encode(pixels)
        assert whole.shape == (2, 4, 3, 2, 3)
        assert relative_error(encode_in_calls(vae, pixels, plan), whole) <= 1e-6


@pytest.mark.parametrize(("latent_frames", "calls"), [(1, [1, 4, 4]), (2, [5, 4]), (3, [9]), (4, [9])])
def test_encoding_in_groups_gives_the_same_latents_a_group_at_a_time(latent_frames, calls, monkeypatch):
    vae, pixels, seen = random_vae(), noise(2, 3, 9, 16, 24), []
    with torch.no_grad():
        whole = vae.encode(pixels)
    encode = WanVAE.encode
    monkeypatch.setattr(
        WanVAE, "encode", lambda self, part, state: seen.append(part.shape[2]) or encode(self, part, state)
    )
    latents = vae.encode_in_groups(pixels, latent_frames)
    assert relative_error(latents, whole) <= 1e-6 and not latents.requires_grad
    assert seen == calls
    with pytest.raises(ValueError, match="latent_frames is 0; a group has at least one"):
        vae.encode_in_groups(pixels, 0)
    with pytest.raises(ValueError, match="pixels have 8 frames; at the start of a video give 1"):
        vae.encode_in_groups(pixels[:, :, :8], 1)


def test_first_latent_gives_one_frame_and_later_ones_four():
    vae = random_vae()
    state = vae.decoder_state(1, 2, 2, torch.float32, "cpu")
    with torch.no_grad():
        assert [vae.decode(noise(1, 4, 1, 2, 2), state).shape[2] for _ in range(4)] == [1, 4, 4, 4]


def test_past_frames_never_depend_on_future_latents():
    vae, latents = random_vae(), noise(1, 4, 4, 2, 2)
    changed = latents.clone()
    changed[:, :, 2:] += 1.0
    with torch.no_grad():
        before, after = vae.decode(latents), vae.decode(changed)
    assert relative_error(after[:, :, :5], before[:, :, :5]) <= 1e-6
    assert relative_error(after[:, :, 5:], before[:, :, 5:]) > 1e-3


@pytest.mark.parametrize(
    ("dim_mult", "temporal", "res_blocks"),
    [((1, 2, 4, 4), (False, True, True), 2), ((1, 2, 2), (True, False), 1)],
)
def test_random_weights_agree_with_diffusers(dim_mult, temporal, res_blocks):
    diffusers = pytest.importorskip("diffusers")
    config = dataclasses.replace(
        SMALL, dim_mult=dim_mult, temporal_downsample=temporal, num_res_blocks=res_blocks
    )
    vae = random_vae(config)
    theirs = diffusers.AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(dim_mult),
        num_res_blocks=res_blocks,
        attn_scales=[],
        temperal_downsample=list(temporal),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    ).eval()
    ours = vae.state_dict()
    theirs.load_state_dict(
        {name: ours[wan_vae_from_diffusers(name, res_blocks)] for name in theirs.state_dict()}
    )
    stride, side = config.temporal_stride, config.spatial_stride
    pixels, latents = noise(1, 3, 1 + 2 * stride, 2 * side, 3 * side), noise(1, 4, 3, 2, 3)
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        assert relative_error(vae.encode(pixels), (posterior.mean - mean) / std) <= 1e-4
        moments = torch.cat(vae.encode_moments(pixels), dim=1)
        assert relative_error(moments, posterior.parameters) <= 1e-4
        expected = theirs.decode(latents * std + mean).sample  # clamped to [-1, 1]
        assert relative_error(vae.decode(latents).clamp(-1, 1), expected) <= 1e-4
        assert (expected.abs() < 1).float().mean() > 0.2


def test_snapshot_in_mid_stream_continues_bit_for_bit():
    vae, latents, pixels = random_vae(), noise(1, 4, 5, 2, 3), noise(1, 3, 17, 16, 24)
    with torch.inference_mode():
        decoding = vae.decoder_state(1, 2, 3, torch.float32, "cpu")
        encoding = vae.encoder_state(1, 2, 3, torch.float32, "cpu")
        vae.decode(latents[:, :, :2], decoding)
        vae.encode(pixels[:, :, :9], encoding)
        decoding_copy = {name: tensor.clone() for name, tensor in decoding.tensors().items()}
        encoding_copy = copy.deepcopy(encoding)
        video = vae.decode(latents[:, :, 2:], decoding)
        encoded = vae.encode(pixels[:, :, 9:], encoding)

        restored = vae.decoder_state(1, 2, 3, torch.float32, "cpu")
        restored.load(decoding_copy, frames=2)
        assert torch.equal(vae.decode(latents[:, :, 2:], restored), video)
        assert torch.equal(vae.encode(pixels[:, :, 9:], encoding_copy), encoded)
    assert (restored.frames, encoding_copy.frames) == (5, 5)
    assert all(torch.equal(restored.slots[name], slot) for name, slot in decoding.slots.items())


def test_state_keeps_its_tensors_and_its_size_from_the_first_call_on():
    vae = random_vae()
    state = vae.decoder_state(1, 2, 2, torch.float32, "cpu")
    pointers = {name: slot.data_ptr() for name, slot in state.tensors().items()}
    for frames in (1, 3, 3):
        vae.decode(noise(1, 4, frames, 2, 2), state)
    assert {name: slot.data_ptr() for name, slot in state.tensors().items()} == pointers
    assert not any(slot.requires_grad for slot in state.slots.values())


def test_full_configuration_has_the_published_parameter_count():
    with torch.device("meta"):
        vae = WanVAE(VAEConfig())
    counts = {
        part: sum(tensor.numel() for name, tensor in vae.state_dict().items() if name.startswith(part))
        for part in ("encoder.", "decoder.", "conv1.", "conv2.")
    }
    assert counts == {"encoder.": 53_595_872, "decoder.": 73_295_331, "conv1.": 1_056, "conv2.": 272}
    assert sum(counts.values()) == 126_892_531
    assert len(vae.state_dict()) == 194


def test_full_configuration_has_the_published_state_shapes():
    with torch.device("meta"):
        vae = WanVAE(VAEConfig())
    decoding = vae.decoder_state(1, 60, 104, torch.bfloat16, "meta")
    assert [tuple(slot.shape[1:]) for slot in decoding.slots.values()] == (
        [(16, 2, 60, 104)]
        + [(384, 2, 60, 104)] * 11
        + [(192, 2, 120, 208)]
        + [(384, 2, 120, 208)] * 6
        + [(192, 2, 240, 416)] * 6
        + [(96, 2, 480, 832)] * 7
    )
    assert sum(slot.numel() for slot in decoding.slots.values()) == 944_286_720
    encoding = vae.encoder_state(1, 60, 104, torch.bfloat16, "meta")
    assert [tuple(slot.shape[1:]) for slot in encoding.slots.values()] == (
        [(3, 2, 480, 832)]
        + [(96, 2, 480, 832)] * 4
        + [(96, 2, 240, 416)]
        + [(192, 2, 240, 416)] * 3
        + [(192, 1, 120, 208)]
        + [(192, 2, 120, 208)]
        + [(384, 2, 120, 208)] * 3
        + [(384, 1, 60, 104)]
        + [(384, 2, 60, 104)] * 9
    )


def test_slots_are_listed_in_the_order_the_convolutions_run():
    vae, order = random_vae(), []
    for half in (vae.encoder, vae.decoder):
        for module in half.modules():
            if hasattr(module, "slot"):
                module.register_forward_pre_hook(lambda module, _: order.append(module.slot))
    encoding = vae.encoder_state(1, 2, 2, torch.float32, "cpu")
    decoding = vae.decoder_state(1, 2, 2, torch.float32, "cpu")
    with torch.no_grad():
        vae.decode(vae.encode(noise(1, 3, 5, 16, 16), encoding), decoding)
    assert order == [*encoding.slots, *decoding.slots]


def test_gradients_reach_every_parameter_and_the_input():
    vae, pixels = random_vae(), noise(1, 3, 5, 16, 16).requires_grad_()
    mean, log_variance = vae.encode_moments(pixels)
    (vae.decode(mean + log_variance).square().mean() + log_variance.sum()).backward()
    assert pixels.grad is not None
    assert pixels.grad.norm() > 0
    silent = [
        name
        for name, parameter in vae.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def test_gradients_flow_within_a_group_that_continues_a_video():
    vae, pixels = random_vae(), noise(1, 3, 9, 16, 16)
    state = vae.encoder_state(1, 2, 2, torch.float32, "cpu")
    vae.encode(pixels[:, :, :5], state)
    group = pixels[:, :, 5:].clone().requires_grad_()
    latents = vae.encode(group, state)
    latents.sum().backward()
    assert group.grad.any() and vae.encoder.conv1.weight.grad.any()
    assert relative_error(latents.detach(), vae.encode(pixels).detach()[:, :, 2:]) <= 1e-6


def test_decoder_trains_after_it_ran_in_inference_mode():
    vae, latents = random_vae(), noise(1, 4, 2, 2, 2)
    with torch.inference_mode():
        state = vae.decoder_state(1, 2, 2, torch.float32, "cpu")
        vae.decode(latents, state)
    vae.decode(latents, state).sum().backward()
    assert vae.conv2.weight.grad is not None


def test_statistics_stay_exact_in_a_bfloat16_vae_and_one_loaded_from_meta():
    config = dataclasses.replace(SMALL, latents_mean=(0.4134,) * 4, latents_std=(2.8184,) * 4)
    with torch.device("meta"):
        vae = WanVAE(config)
    vae.load_state_dict(random_vae(config).state_dict(), assign=True)
    vae.to(torch.bfloat16)
    mean, std = vae._statistics(torch.device("cpu"))
    assert torch.equal(mean.flatten(), torch.tensor(config.latents_mean))
    assert torch.equal(std.flatten(), torch.tensor(config.latents_std))
    with torch.no_grad():
        assert vae.decode(noise(1, 4, 2, 2, 2)).dtype == torch.bfloat16


def test_autocast_keeps_close_to_float32_with_and_without_autograd():
    vae, latents = random_vae(), noise(1, 4, 3, 2, 2)
    expected = vae.decode(latents).detach()
    with torch.autocast("cpu", torch.bfloat16):
        training = vae.decode(latents)
        with torch.no_grad():
            inference = vae.decode(latents)
    assert training.dtype == inference.dtype == torch.bfloat16
    assert torch.equal(training, inference)
    assert relative_error(training.float(), expected) < 0.05


@pytest.mark.parametrize(("seen", "frames"), [(0, 0), (0, 2), (0, 4), (1, 1), (1, 3), (1, 5)])
def test_wrong_number_of_pixel_frames_is_an_error(seen, frames):
    vae = random_vae()
    state = vae.encoder_state(1, 2, 2, torch.float32, "cpu")
    with torch.no_grad():
        if seen:
            vae.encode(noise(1, 3, 1, 16, 16), state)
        with pytest.raises(ValueError, match=f"pixels have {frames} frames; .* give .*a multiple of 4"):
            vae.encode(torch.zeros(1, 3, frames, 16, 16), state)
    assert state.frames == seen


@pytest.mark.parametrize("shape", [(1, 4, 1, 16, 16), (1, 3, 1, 16, 20), (3, 1, 16, 16)])
def test_pixels_of_another_layout_are_an_error(shape):
    with pytest.raises(ValueError, match="pixels are .* multiples of 8"):
        random_vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 1, 2, 2), (1, 4, 0, 2, 2), (4, 1, 2, 2)])
def test_latents_of_another_layout_are_an_error(shape):
    with pytest.raises(ValueError, match=r"latents are .*; give \[batch, 4, frames, height, width\]"):
        random_vae().decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("batch", "height", "width", "dtype"),
    [(2, 2, 2, torch.float32), (1, 3, 2, torch.float32), (1, 2, 3, torch.float32), (1, 2, 2, torch.bfloat16)],
)
def test_state_of_another_size_or_dtype_is_an_error(batch, height, width, dtype):
    vae = random_vae()
    with pytest.raises(ValueError, match="slot 'conv1' of the state is"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2), vae.decoder_state(batch, height, width, dtype, "cpu"))
    with pytest.raises(ValueError, match="slot 'conv1' of the state is"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16), vae.encoder_state(batch, height, width, dtype, "cpu"))


def test_state_of_another_model_is_an_error_and_changes_nothing():
    vae, wider = random_vae(), WanVAE(dataclasses.replace(SMALL, base_dim=2 * SMALL.base_dim))
    for call, shape, state in (
        (vae.decode, (1, 4, 1, 2, 2), wider.decoder_state(1, 2, 2, torch.float32, "cpu")),
        (vae.encode, (1, 3, 1, 16, 16), wider.encoder_state(1, 2, 2, torch.float32, "cpu")),
    ):
        with pytest.raises(ValueError, match=r"slot '.+' of the state is .* make the state for this model"):
            call(torch.ones(shape), state)
        assert state.frames == 0 and not any(slot.any() for slot in state.slots.values())


def test_state_of_the_other_half_is_an_error():
    vae = random_vae()
    with pytest.raises(ValueError, match="state is a EncoderState; this call needs a DecoderState"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2), vae.encoder_state(1, 2, 2, torch.float32, "cpu"))


def test_snapshot_that_does_not_fit_is_an_error_and_changes_nothing():
    vae = random_vae()
    state = vae.decoder_state(1, 2, 2, torch.float32, "cpu")
    filled = {name: torch.ones_like(slot) for name, slot in state.slots.items()}
    with pytest.raises(ValueError, match="1 slot names differ"):
        state.load({name: tensor for name, tensor in filled.items() if name != "conv1"}, frames=1)
    with pytest.raises(ValueError, match=r"slot 'head.2' is .* load a snapshot of the same VAE"):
        state.load({**filled, "head.2": torch.ones(1, 4, 2, 8, 8)}, frames=1)
    with pytest.raises(ValueError, match="frames is -1"):
        state.load(filled, frames=-1)
    assert state.frames == 0
    assert not any(slot.any() for slot in state.slots.values())


def test_direct_convolution_equals_the_ordinary_one(monkeypatch):
    vae, latents = random_vae(), noise(1, 4, 3, 2, 2)
    with torch.no_grad():
        direct = vae.decode(latents)
        monkeypatch.setattr(vae_module, "_convolve", torch.nn.Conv3d.forward)
        assert relative_error(direct, vae.decode(latents)) <= 1e-6
