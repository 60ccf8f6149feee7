"""The FrameDecoder protocol: what every decoder and its state have, and a state that is put back."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor

from rfengine.config import TinyVAEConfig, VAEConfig
from rfengine.models.decoder import FrameDecoder, reset_state
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS, reference
from support.models import GRID, SMALL, noise_of

VAE = VAEConfig(4, SMALL.in_dim, (1, 1, 2, 2), 1, latents_mean=(0.1,) * 4, latents_std=(1.2,) * 4)


def decoders() -> list[FrameDecoder]:
    torch.manual_seed(0)
    vae = WanVAE(VAE).eval().requires_grad_(False)
    tiny = TinyVAE(TinyVAEConfig(SMALL.in_dim, (8, 8, 8, 8), 1)).eval().requires_grad_(False)
    return [vae, StreamingDecoder(vae, REFERENCE_OPS), tiny]


@pytest.fixture(params=range(3), ids=["WanVAE", "StreamingDecoder", "TinyVAE"])
def decoder(request: pytest.FixtureRequest) -> FrameDecoder:
    return decoders()[request.param]


def state_of(decoder: FrameDecoder):
    return decoder.decoder_state(1, GRID.latent_height, GRID.latent_width, torch.float32, "cpu")


def latents_of(chunk: int) -> Tensor:
    return noise_of(chunk, 3, steps=1)[0]


def test_a_decoder_has_the_calls_of_the_protocol(decoder: FrameDecoder) -> None:
    for name in ("decoder_state", "decode", "decode_frames"):
        wanted = list(inspect.signature(getattr(FrameDecoder, name)).parameters)[1:]
        assert list(inspect.signature(getattr(decoder, name)).parameters) == wanted, name


@torch.no_grad()
def test_frames_are_the_packed_pixels(decoder: FrameDecoder) -> None:
    packed, pixels = state_of(decoder), state_of(decoder)
    for chunk in range(2):
        frames = decoder.decode_frames(latents_of(chunk), packed)
        expected = reference.frame_pack(decoder.decode(latents_of(chunk), pixels)[0])
        assert frames.dtype == torch.uint8 and frames.shape == expected.shape
        assert (frames.int() - expected.int()).abs().max() <= 1
    assert packed.frames == pixels.frames == 6


@torch.no_grad()
def test_a_state_that_was_put_back_is_a_fresh_one_in_the_same_memory(decoder: FrameDecoder) -> None:
    state = state_of(decoder)
    first = [decoder.decode_frames(latents_of(chunk), state) for chunk in range(2)]
    places = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
    reset_state(state)
    assert state.frames == 0
    assert {name: tensor.data_ptr() for name, tensor in state.tensors().items()} == places
    again = [decoder.decode_frames(latents_of(chunk), state) for chunk in range(2)]
    assert all(map(torch.equal, first, again))


@torch.no_grad()
def test_a_copied_state_goes_on_by_itself(decoder: FrameDecoder) -> None:
    state = state_of(decoder)
    decoder.decode_frames(latents_of(0), state)
    copied, loaded = copy.deepcopy(state), state_of(decoder)
    loaded.load(state.tensors(), state.frames)
    expected = decoder.decode_frames(latents_of(1), state)
    for other in (copied, loaded):
        assert other.frames == 3
        assert torch.equal(decoder.decode_frames(latents_of(1), other), expected)


def test_frames_of_two_videos_at_once_are_refused(decoder: FrameDecoder) -> None:
    with pytest.raises(ValueError, match="latents are|batch is"):
        decoder.decode_frames(latents_of(0).repeat(2, 1, 1, 1, 1), state_of(decoder))
