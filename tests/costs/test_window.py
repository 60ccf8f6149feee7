from __future__ import annotations

import dataclasses

import pytest
import torch

from rfengine import memory
from rfengine.config import RuntimeConfig
from rfengine.costs.memory import memory_needs
from rfengine.costs.shapes import Shapes
from rfengine.costs.window import require_window_fits, window_needs
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS

PRESET = PRESETS["skyreels-df-1.3b"]
GRID = LatentGrid.of(PRESET)


def test_memory_of_the_preset_is_weights_latents_and_one_pass() -> None:
    needs = window_needs(PRESET, GRID, torch.bfloat16)
    parameters = 1_418_996_800 + 2 * 1536 + 1536 * 1537 + 9216 * 1537
    assert needs["transformer"] == 2 * parameters
    assert 2 * 126_892_531 < needs["vae"] < 4 * 126_892_531  # it encodes in float32
    assert needs["latents"] == 4 * 4 * 16 * 25 * 68 * 120
    assert needs["cross_attention"] == 2 * 2 * 30 * 512 * 1536 * 2
    tokens = 25 * 2040
    # a row of modulation for each latent frame, in float32; one for each token would be 1.9 GB
    modulation = 30 * 25 * 6 * 1536 * 4
    assert needs["activations"] == tokens * (2 * 1536 + 8960 + 1536) * 2 + modulation
    assert needs["total"] == sum(needs.values()) - needs["total"] and "keys_values" not in needs


def test_a_model_in_fp8_keeps_its_weights_in_e4m3_too() -> None:
    config = dataclasses.replace(PRESET, runtime=RuntimeConfig(precision="fp8"))
    plain, fp8 = (window_needs(each, GRID, torch.bfloat16) for each in (PRESET, config))
    weights = 30 * (6 * 1536 * 1536 + 2 * 1536 * 8960)
    assert plain["transformer_fp8"] == 0 and weights < fp8["transformer_fp8"] < 1.01 * weights
    assert fp8["total"] - plain["total"] == fp8["transformer_fp8"]


def test_a_shorter_window_needs_less_and_float32_one_vae() -> None:
    whole, short = (window_needs(PRESET, GRID, torch.float32, latent_frames=frames) for frames in (None, 5))
    assert short["latents"] * 5 == whole["latents"] and short["activations"] < whole["activations"]
    assert whole["vae"] == 4 * 126_892_531


def test_a_pass_and_a_piece_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small, place = (
        LatentGrid.of(PRESET, 8192, 8192),
        LatentGrid.of(PRESET, 16, 16),
        torch.device("cpu"),
    )
    with pytest.raises(RuntimeError, match="a piece of 400 latent frames of 8192 x 8192 pixels needs"):
        require_window_fits(PRESET, large, 400, 400, torch.float32, place)
    require_window_fits(PRESET, small, 1, 1, torch.float32, place)
    # an hour in one piece: 45 GB of latents, and a pass over 25 of them
    monkeypatch.setattr(memory, "free_memory", lambda device: 40 * 10**9)
    with pytest.raises(RuntimeError, match="a piece of 21601 latent frames of 544 x 960 pixels needs"):
        require_window_fits(PRESET, GRID, 21_601, 25, torch.bfloat16, place)
    require_window_fits(PRESET, GRID, 1_801, 25, torch.bfloat16, place)


def test_costs_of_a_chunk_are_refused() -> None:
    for reckon in (Shapes, lambda config: memory_needs(config, GRID, torch.bfloat16)):
        with pytest.raises(ValueError, match="skyreels-df-1.3b is a diffusion forcing model"):
            reckon(PRESET)
    with pytest.raises(ValueError, match="streams none"):
        dataclasses.replace(Shapes(), config=PRESET)
