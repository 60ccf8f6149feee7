"""Drift: each distortion moves its own signal, more of it moves it further, and motion moves none."""

from __future__ import annotations

import functools

import pytest
import torch

from rfengine.evaluation.drift import latent_drift, measure_drift
from rfengine.evaluation.video_frames import ChunkGrid, Measured, NotMeasurableError
from support.distortions import (
    CLIPS,
    blur_ramp,
    distorted,
    gamma_ramp,
    noise_ramp,
    textured_clip,
    tint_ramp,
)

clips = pytest.mark.parametrize("clip", CLIPS)


@functools.cache
def drift(clip: str, distortion: str) -> Measured:
    return measure_drift(distorted(clip, distortion))


@clips
def test_each_ramp_moves_its_own_signal_most(clip: str) -> None:
    names = ("true", "gamma", "tint", "blur", "noise", "pulse", "loop")
    found = {name: drift(clip, name).values for name in names}
    assert max(found, key=lambda name: found[name]["exposure_drift"]) == "gamma"
    assert max(found, key=lambda name: found[name]["colour_drift"]) == "tint"
    others = max(found[name]["exposure_drift"] for name in names if name != "gamma")
    assert found["gamma"]["exposure_drift"] > 5 * others
    blur, noise = (drift(clip, name).curves["sharpness_drift"][-1][1] for name in ("blur", "noise"))
    assert blur < -0.8 and noise > 0.8
    quiet = max(found[name]["sharpness_drift"] for name in ("true", "gamma", "tint", "pulse", "loop"))
    assert quiet < 0.2 * min(found[name]["sharpness_drift"] for name in ("blur", "noise"))


@clips
def test_frozen_video_does_not_drift_at_all(clip: str) -> None:
    assert max(drift(clip, "frozen").values.values()) < 1e-6


def test_motion_over_a_fixed_scene_is_no_drift() -> None:
    found = dict(drift("toy", "true").values)
    assert found.pop("sharpness_drift") < 0.02
    assert max(found.values()) < 0.002


@clips
@pytest.mark.parametrize(
    ("ramp", "signal", "amounts"),
    [
        (gamma_ramp, "exposure", (1.2, 1.5, 2.0)),
        (tint_ramp, "colour", (0.1, 0.2, 0.4)),
        (blur_ramp, "sharpness", (1.0, 1.5, 2.5)),
        (noise_ramp, "sharpness", (0.05, 0.1, 0.2)),
    ],
)
def test_more_of_a_ramp_is_more_drift(clip: str, ramp, signal: str, amounts: tuple[float, ...]) -> None:
    video = distorted(clip, "true")
    found = [measure_drift(ramp(video, amount)).values[f"{signal}_drift"] for amount in amounts]
    assert drift(clip, "true").values[f"{signal}_drift"] < found[0] < found[1] < found[2]


def test_overexposure_is_clipping() -> None:
    video = textured_clip(45)
    gain = torch.linspace(1, 2.5, 45)[:, None, None, None]
    bright = (video.float() * gain).clamp(max=255).to(torch.uint8)
    assert measure_drift(bright).values["clipped_drift"] > 0.1 > measure_drift(video).values["clipped_drift"]


def test_curves_have_one_value_a_chunk_and_begin_at_zero() -> None:
    found = measure_drift(textured_clip(50), ChunkGrid(first_frames=9, frames=12))
    assert [start for start, _ in found.curves["exposure_drift"]] == [0, 9, 21, 33]
    assert found.curves["exposure_drift"][0][1] == found.curves["colour_drift"][0][1] == 0


def test_latents_that_grow_or_shift_drift_and_equal_ones_do_not() -> None:
    latents = torch.randn(4, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    steady = latent_drift(latents)
    grown = latent_drift(latents * torch.linspace(1, 2, 12)[:, None, None])
    shifted = latent_drift(latents + torch.linspace(0, 2, 12)[:, None, None])
    assert steady.shape == (4,) and float(steady[0]) == 0 and float(steady.max()) < 0.05
    for moved in (grown, shifted):
        assert bool((moved.diff() > 0).all()) and float(moved[-1]) > 0.3
    with pytest.raises(NotMeasurableError, match="5 latent frames"):
        latent_drift(latents[:, :5])


def test_latent_drift_is_the_divergence_of_gaussians() -> None:
    base = torch.randn(1, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    found = latent_drift(torch.cat((base, 2 * base + 1), dim=1))
    expected = 0.5 * (4 - 1 - torch.log(torch.tensor(4.0)) + 1)
    assert float(found[1]) == pytest.approx(float(expected), rel=0.01)
