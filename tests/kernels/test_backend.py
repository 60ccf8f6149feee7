"""The whole path on Triton kernels against the same path on the reference."""

import dataclasses

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig, VAEConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.kernels import sink_window_attention as kernel
from rfengine.models.dit import WanDiT
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS, choose_ops
from rfengine.ops.reference import frame_pack
from rfengine.ops.table import implementation
from support.bits import DEVICE
from support.interpreter_rounding import round_to_nearest_even
from support.models import noise_of, small_model, small_runner, text_states
from support.on_triton import ONE_HEAD, on_triton

TWO_HEADS = WanConfig(128, 96, 2, 1, text_dim=16, text_len=8, freq_dim=32, in_dim=4, out_dim=4)
GRID = LatentGrid(32, 16)  # 2 x 1 tokens in a frame: a program of the interpreter costs a millisecond


def noise(chunk: int, frames: int) -> torch.Tensor:
    return noise_of(chunk, frames)[..., : GRID.latent_height, : GRID.latent_width].contiguous()


def stream(
    model: WanDiT, config: CacheConfig, steps: tuple[int, ...]
) -> tuple[torch.Tensor, StreamingKVCache]:
    cache = StreamingKVCache(model.config, config, GRID, device=DEVICE, ops=model.ops)
    runner, text = small_runner(model, steps), model.text_keys_values(text_states().to(DEVICE))
    chunks = range(config.filling_chunks + 1)  # with the last of them the first leaves the window
    draws = [noise(chunk, config.chunk_frames)[: len(steps)].to(DEVICE) for chunk in chunks]
    out = [runner.advance(cache, cache.plan_chunk(), each, text) for each in draws]
    return torch.cat(out, dim=2), cache


def test_triton_is_chosen_for_every_op_that_has_a_kernel():
    choice = choose_ops("triton", DEVICE).choice
    assert {op for op, backend in choice.items() if backend == "reference"} == {"unpatchify"}


@pytest.mark.parametrize(
    ("backend", "form"),
    [("triton", None), ("triton-descriptor", "descriptor"), ("triton-pointer", "pointer")],
)
def test_a_form_of_the_attention_is_taken_by_its_name(monkeypatch, backend, form):
    seen = []
    monkeypatch.setattr(kernel, "sink_window_attention", lambda *given: seen.append(given))
    implementation("sink_window_attention", backend)("q", "keys", "values", 7, "filled")
    assert seen == [("q", "keys", "values", "filled", form)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "cache_config", "steps"),
    [
        (TWO_HEADS, CacheConfig(2, 6, "ema", 2, 0.9), (1000,)),
        (ONE_HEAD, CacheConfig(1, 2, "frozen", 1, positions="absolute"), (1000,)),
        (ONE_HEAD, CacheConfig(1, 2, "none", 0), (1000, 500)),
    ],
)
def test_a_stream_on_triton_equals_the_reference(config, cache_config, steps):
    model = small_model(config).to(DEVICE)
    expected, expected_cache = stream(model, cache_config, steps)
    actual, cache = stream(on_triton(model), cache_config, steps)
    assert relative_error(actual, expected) <= 3e-6
    for name, tensor in cache.tensors().items():
        if tensor.any():
            assert relative_error(tensor, expected_cache.tensors()[name]) <= 3e-6, name


def test_a_pass_over_a_clip_and_its_gradients_equal_the_reference():
    model = small_model(dataclasses.replace(TWO_HEADS, num_layers=2)).to(DEVICE)
    gradients = []
    for each in (model, on_triton(model)):
        each.train()
        out = each.forward_clip(
            noise(0, 2)[0].to(DEVICE), torch.tensor([500.0], device=DEVICE), text_states().to(DEVICE)
        )
        out.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    for name, expected in gradients[0].items():
        assert relative_error(gradients[1][name], expected) <= 1e-5, name


def test_an_override_changes_one_op_only():
    ops = choose_ops("reference", DEVICE, {"rms_norm": "triton"})
    assert ops.choice == REFERENCE_OPS.choice | {"rms_norm": "triton"}
    with pytest.raises(ValueError, match="unpatchify has no form for backend 'triton'"):
        choose_ops("reference", DEVICE, {"unpatchify": "triton"})


def one_level_vae() -> tuple[WanVAE, torch.Tensor]:
    """A decoder with one doubling, random weights, and two latents for it."""
    config = VAEConfig(16, 4, (1, 2), 1, (True,), (0.5,) * 4, (2.0,) * 4)
    generator = torch.Generator().manual_seed(0)
    vae = WanVAE(config)
    for parameter in vae.parameters():
        gamma = parameter.ndim > 1 and parameter[0].numel() == 1
        scale = 0.3 if gamma or parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = gamma + scale * torch.randn(parameter.shape, generator=generator)
    return vae.to(DEVICE), torch.randn(1, 4, 2, 1, 2, generator=generator).to(DEVICE)


@pytest.mark.slow
@torch.no_grad()
def test_the_streaming_decoder_on_triton_equals_the_plain_one_chunk_by_chunk():
    vae, latents = one_level_vae()
    decoder = StreamingDecoder(vae, choose_ops("triton", DEVICE))
    state = decoder.decoder_state(1, 1, 2, torch.float32, DEVICE)
    video = torch.cat([decoder.decode(part, state) for part in latents.split(1, dim=2)], dim=2)
    assert (video - vae.decode(latents)).abs().max() <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_the_streaming_decoder_in_float16_on_triton_is_as_near_as_the_reference():
    vae, latents = one_level_vae()
    exact = vae.decode(latents)
    vae.set_decoder_dtype(torch.float16)
    errors = []
    for ops in (REFERENCE_OPS, choose_ops("triton", DEVICE)):
        decoder = StreamingDecoder(vae, ops)
        state = decoder.decoder_state(1, 1, 2, torch.float16, DEVICE)
        parts = [decoder.decode(part, state) for part in latents.split(1, dim=2)]
        errors.append(relative_error(torch.cat(parts, dim=2), exact))
    usual, found = errors
    assert 1e-5 < usual < 5e-3 and found <= 2 * usual


@pytest.mark.slow
@torch.no_grad()
def test_frames_of_the_streaming_decoder_on_triton_are_the_bytes_of_the_plain_one():
    vae, latents = one_level_vae()
    decoder = StreamingDecoder(vae, choose_ops("triton", DEVICE))
    latents = latents[:, :, :1]
    frames = decoder.decode_frames(latents, decoder.decoder_state(1, 1, 2, torch.float32, DEVICE))
    expected = frame_pack(vae.decode(latents)[0])
    assert (frames.int() - expected.int()).abs().max() <= 1 and (frames != expected).float().mean() < 0.01


@pytest.mark.slow
def test_the_streaming_decoder_in_fp8_on_triton_is_as_near_as_the_reference(monkeypatch):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs sm_89")
    round_to_nearest_even(monkeypatch)
    vae, latents = one_level_vae()
    videos = []
    for ops in (REFERENCE_OPS, choose_ops("triton", DEVICE)):
        decoder = StreamingDecoder(vae, ops, "fp8")
        state = decoder.decoder_state(1, 1, 2, torch.float32, DEVICE)
        videos.append(torch.cat([decoder.decode(part, state) for part in latents.split(1, dim=2)], dim=2))
    assert len(decoder.fp8_slots) == 4
    with torch.no_grad():
        exact = vae.decode(latents)
    usual, found = (relative_error(video, exact) for video in videos)
    # a last bit of float32 may turn a tie of e4m3, and what follows from it
    assert 1e-3 < usual < 0.2 and abs(found - usual) < 0.2 * usual
    assert relative_error(videos[1], videos[0]) < 0.2 * usual
