"""PieceDecoder: the frames of pieces, compared with a decode in one call."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from rfengine.diffusion_forcing.frames import PieceDecoder
from rfengine.models.vae import WanVAE
from rfengine.ops.reference import frame_pack
from support.diffusion_forcing import forcing_pipeline
from support.models import GRID


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return forcing_pipeline().vae


def latents_of(frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, frames, GRID.latent_height, GRID.latent_width, generator=generator)


def opened(vae: WanVAE, kept: int = 0) -> PieceDecoder:
    return PieceDecoder(vae, GRID, torch.empty(0), 3, kept)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 5])
def test_frames_come_in_groups_and_the_rest_at_the_end(vae: WanVAE, kept: int) -> None:
    latents, decoder = latents_of(8), opened(vae, kept)
    parts = [decoder.decode(latents, clean, clean == 8) for clean in (0, 2, 4, 5, 6, 8)]
    assert [len(part) for part in parts] == [0, 0, 9, 0, 12, 8]
    whole = vae.decode(latents)
    # a group at a time, rounding differs now and then by one
    difference = numpy.concatenate(parts).astype(int) - frame_pack(whole[0]).numpy()
    assert abs(difference).max() <= 1
    if kept:
        assert torch.allclose(decoder.tail, whole[:, :, -5:].clamp(-1, 1), atol=1e-5)
    else:
        assert decoder.tail is None


@torch.no_grad()
def test_a_piece_goes_on_from_the_one_before(vae: WanVAE) -> None:
    latents, decoder = latents_of(7), opened(vae)
    first = decoder.decode(latents[:, :, :4], 4, True)
    decoder.continue_at(2)  # the second piece begins with two that were decoded
    second = decoder.decode(latents[:, :, 2:], 5, True)
    difference = numpy.concatenate([first, second]).astype(int) - frame_pack(vae.decode(latents)[0]).numpy()
    assert abs(difference).max() <= 1 and len(second) == 12


@torch.no_grad()
def test_a_piece_of_its_own_leaves_out_what_was_shown(vae: WanVAE) -> None:
    other, decoder = latents_of(5, seed=1), opened(vae, kept=5)
    decoder.decode(latents_of(4), 4, True)
    decoder.restart(5)
    parts = [decoder.decode(other, clean, clean == 5) for clean in (3, 5)]
    assert [len(part) for part in parts] == [4, 8]
    expected = frame_pack(vae.decode(other)[0]).numpy()[5:]
    assert abs(numpy.concatenate(parts).astype(int) - expected).max() <= 1


def test_latents_that_are_not_finite_are_refused(vae: WanVAE) -> None:
    latents, decoder = latents_of(6), opened(vae)
    latents[0, 0, 4, 0, 0] = float("nan")
    decoder.decode(latents, 3, False)
    with pytest.raises(RuntimeError, match="latent frames 3 to 6 of a piece are not finite"):
        decoder.decode(latents, 6, True)
