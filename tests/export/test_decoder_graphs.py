"""The decoder as pure functions: equal to WanVAE.decode with its state, for every chunk length."""

from __future__ import annotations

import pytest
import torch

from rfengine.config import VAEConfig
from rfengine.export.decoder_graphs import LATENTS, PIXELS, DecoderGraph, state_input, state_output
from rfengine.models.vae import WanVAE
from support.small_export import random_vae

FOUR_LEVELS = VAEConfig(
    base_dim=4,
    z_dim=4,
    num_res_blocks=1,
    latents_mean=(0.5, -0.25, 0.0, 1.0),
    latents_std=(2.0, 0.5, 1.0, 3.0),
)
SIZE = (4, 6)
TOLERANCE = 1e-5  # float32, values around one; the plain decoder sums in another order


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return random_vae(FOUR_LEVELS)


def noise(latents: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 4, latents, *SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode_by_graphs(
    vae: WanVAE, pieces: list[torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Pixels of each piece, and the slots at the end."""
    slots: dict[str, torch.Tensor] = {}
    pixels = []
    for number, piece in enumerate(pieces):
        graph = DecoderGraph(vae, piece.shape[2], *SIZE, first=number == 0)
        outputs = dict(zip(list(graph.outputs), graph(piece, *slots.values()), strict=True))
        pixels.append(outputs[PIXELS])
        slots = {
            name: outputs.get(state_output(name), torch.zeros(shape))
            for name, shape in graph.slot_shapes.items()
        }
    return pixels, slots


@pytest.mark.parametrize("plan", [[1, 1, 1, 1], [2, 2, 2], [3, 3, 3], [1, 3, 3], [1, 2, 3]], ids=str)
def test_chunks_and_state_equal_the_plain_decoder(vae: WanVAE, plan: list[int]) -> None:
    pieces = [noise(latents, seed) for seed, latents in enumerate(plan)]
    pixels, slots = decode_by_graphs(vae, pieces)
    state = vae.decoder_state(1, *SIZE, torch.float32, "cpu")
    with torch.no_grad():
        wanted = [vae.decode(piece, state) for piece in pieces]
    for ours, theirs in zip(pixels, wanted, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    assert list(slots) == list(state.tensors())
    for name, slot in state.tensors().items():
        torch.testing.assert_close(slots[name], slot, atol=5 * TOLERANCE, rtol=TOLERANCE)


def test_first_latent_alone_leaves_the_temporal_doublings_untouched(vae: WanVAE) -> None:
    graph = DecoderGraph(vae, 1, *SIZE, first=True)
    left = set(list(graph.outputs))
    missing = [name for name in graph.slot_shapes if state_output(name) not in left]
    assert missing == ["upsamples.2.time_conv", "upsamples.5.time_conv"]
    with torch.no_grad():
        assert graph(noise(1, 0))[0].shape[2] == 1


def test_frames_after_the_first_latent_know_nothing_of_it_in_the_temporal_doubling(vae: WanVAE) -> None:
    """What the published exporters get wrong: the history of the second latent is zeros."""
    graph = DecoderGraph(vae, 2, *SIZE, first=True)
    outputs = dict(zip(list(graph.outputs), graph(noise(2, 0)), strict=True))
    history = outputs[state_output("upsamples.2.time_conv")]
    assert history[:, :, 0].count_nonzero() == 0 and history[:, :, 1].count_nonzero() > 0


def test_names_follow_the_order_in_which_layers_run(vae: WanVAE) -> None:
    graph = DecoderGraph(vae, 3, *SIZE, first=False)
    slots = list(vae.decoder_state(1, *SIZE, torch.float32, "cpu").tensors())
    assert list(graph.inputs) == [LATENTS, *map(state_input, slots)]
    assert list(graph.outputs) == [PIXELS, *map(state_output, slots)]
    assert list(graph.inputs)[1:3] == ["state_conv1", "state_middle_0_residual_2"]
    assert len(graph.example_inputs()) == len(list(graph.inputs))
    assert list(DecoderGraph(vae, 3, *SIZE, first=True).inputs) == [LATENTS]


def test_half_precision_norm_holds_sums_that_half_precision_does_not() -> None:
    vae = random_vae(FOUR_LEVELS)
    vae.conv2.bias.data.fill_(3e3)  # squares of it are above 65504, and a norm that is infinite gives zeros
    with torch.no_grad():
        wanted = DecoderGraph(vae, 1, *SIZE, first=True)(noise(1, 0))[0]
        pixels = DecoderGraph(vae.half(), 1, *SIZE, first=True)(noise(1, 0))[0]
    assert pixels.dtype == torch.float16
    assert ((pixels.float() - wanted).norm() / wanted.norm()).item() < 0.02  # some 40 roundings to 11 bits


def test_graphs_share_the_weights_of_the_decoder(vae: WanVAE) -> None:
    owned = {parameter.data_ptr() for parameter in DecoderGraph(vae, 3, *SIZE, first=False).parameters()}
    assert owned <= {parameter.data_ptr() for parameter in vae.parameters()}


def test_a_chunk_of_no_latents_is_refused(vae: WanVAE) -> None:
    with pytest.raises(ValueError, match="latents is 0; a call decodes at least one"):
        DecoderGraph(vae, 0, *SIZE, first=True)
