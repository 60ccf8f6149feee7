"""A pass over a window, compared with Diffusers' SkyReels-V2 and with a pass under an explicit mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.models.dit import WanDiT
from rfengine.models.window import window_flow
from support.diffusion_forcing import FORCING, diffusers_transformer
from support.models import SMALL, small_model

FRAMES, HEIGHT, WIDTH = 6, 4, 6
TIMESTEPS = (0, 20, 363, 700, 995, 999)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, SMALL.in_dim, FRAMES, HEIGHT, WIDTH, generator=generator)
    text = torch.randn(1, SMALL.text_len, SMALL.text_dim, generator=generator)
    return latents, torch.tensor([TIMESTEPS]), text


@torch.no_grad()
def flow_of(model: WanDiT, block_frames: int | None = None, fps: int | None = None, shift: int = 0) -> Tensor:
    latents, timesteps, text = inputs()
    modulation = model.modulation(timesteps + shift, fps)
    return window_flow(model, latents, modulation, model.text_keys_values(text), block_frames)


@torch.no_grad()
def diffusers_flow(model: WanDiT, block_frames: int, fps: int) -> Tensor:
    latents, timesteps, text = inputs()
    other = diffusers_transformer(model, block_frames)
    row = [0 if fps == 16 else 1]
    return other(latents, timesteps, text, enable_diffusion_forcing=True, fps=row, return_dict=False)[0]


@pytest.mark.parametrize("fps", [16, 24])
@pytest.mark.parametrize("block_frames", [None, 2, 3])
@pytest.mark.parametrize("config", [FORCING, SMALL], ids=["fps table", "none"])
def test_a_window_agrees_with_diffusers(config, block_frames: int | None, fps: int) -> None:
    model = small_model(config)
    found, expected = flow_of(model, block_frames, fps), diffusers_flow(model, block_frames or 1, fps)
    assert relative_error(found, expected) <= 1e-5
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_another_rate_timestep_or_mask_is_seen() -> None:
    model = small_model(FORCING)
    expected, masked = diffusers_flow(model, 1, 24), diffusers_flow(model, 2, 24)
    assert relative_error(flow_of(model, None, 16), expected) > 1e-2
    assert relative_error(flow_of(model, None, 24, shift=1), expected) > 1e-3
    assert relative_error(flow_of(model, 2, 24), expected) > 1e-2
    for off_by_one in (1, 3, None):
        assert relative_error(flow_of(model, off_by_one, 24), masked) > 1e-2


def test_every_rate_but_16_is_one() -> None:
    model = small_model(FORCING)
    assert torch.equal(flow_of(model, fps=30), flow_of(model, fps=24))
    with pytest.raises(ValueError, match="fps is None and the model is told its frame rate"):
        flow_of(model)
    plain = small_model(SMALL)
    assert torch.equal(flow_of(plain, fps=16), flow_of(plain))


@torch.no_grad()
@pytest.mark.parametrize("block_frames", [1, 2, 4, 6, 9])
def test_blocks_equal_an_explicit_mask(block_frames: int) -> None:
    # 4 does not divide 6: the last block is shorter
    model, (latents, timesteps, text) = small_model(SMALL), inputs()
    block = torch.arange(FRAMES).repeat_interleave(HEIGHT * WIDTH // 4) // block_frames
    mask = block[:, None] >= block[None, :]
    expected = model.forward_clip(latents, timesteps, text, mask=mask)
    assert relative_error(flow_of(model, block_frames), expected) <= 1e-6


@torch.no_grad()
def test_the_head_is_not_told_the_rate() -> None:
    model = small_model(FORCING)
    timesteps = torch.tensor([TIMESTEPS])
    slow, fast = model.modulation(timesteps, 16), model.modulation(timesteps, 24)
    assert torch.equal(slow.head, fast.head) and slow.layers.shape[2:4] == (FRAMES, 6)
    added = (fast.layers - slow.layers).flatten(0, 2)
    assert added.abs().min() > 0 and torch.allclose(added, added[:1].expand_as(added), atol=1e-5)


@torch.no_grad()
def test_half_precision_stays_near_float32() -> None:
    exact = flow_of(small_model(FORCING), 2, 24)
    assert relative_error(flow_of(small_model(FORCING).bfloat16(), 2, 24), exact) <= 0.06


def test_timesteps_of_frames_reach_their_own_frames_alone_under_the_mask() -> None:
    model = small_model(FORCING)
    latents, timesteps, text = inputs()
    later = timesteps.clone()
    later[0, -1] = 500
    with torch.no_grad():
        keys = model.text_keys_values(text)
        rows = [model.modulation(each, 24) for each in (timesteps, later)]
        flows = [window_flow(model, latents, each, keys, 3) for each in rows]
    assert torch.equal(flows[0][:, :, :3], flows[1][:, :, :3])
    assert not torch.allclose(flows[0][:, :, 3:], flows[1][:, :, 3:])


def test_parameters_of_the_table_are_five_more() -> None:
    names = {
        "fps_embedding.weight", "fps_projection.0.weight", "fps_projection.0.bias", "fps_projection.2.weight",
        "fps_projection.2.bias",
    }  # fmt: skip
    plain = small_model(dataclasses.replace(FORCING, fps_embedding=False)).state_dict().keys()
    assert small_model(FORCING).state_dict().keys() - plain == names
