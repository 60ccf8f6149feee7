"""What the toy study measures: distances of sets of clips, sinks by name, true videos, kept units."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rfengine.config import PRESETS
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.reward import ToyReward
from rfengine.toy.world import WorldConfig
from studies.toy.clips import energy_distance
from studies.toy.record import unit
from studies.toy.streams import sink_names, true_video, with_sink


def test_energy_distance_of_points_on_a_line() -> None:
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    # between samples of different captions: |0 - 5| and |2 - 1|; within: 2 and 4
    assert energy_distance(first, second) == pytest.approx(2 * 3 - 2 - 4)


def test_energy_distance_grows_with_the_shift_and_vanishes_without() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 400, 6, generator=generator)
    near, far = (energy_distance(one, two + shift) for shift in (0.5, 2.0))
    assert abs(energy_distance(one, two)) < 0.02
    assert 0.1 < near < far


def test_sinks_by_name() -> None:
    cache = PRESETS["tiny"].cache
    split_names, rounded_names = ("ema_0.9", "ema_0.99"), ("ema_0.9_bf16", "ema_0.99_bf16")
    assert sink_names((0.9, 0.99)) == (("none", "frozen", *split_names), rounded_names)
    none, frozen, split, rounded = (
        with_sink(cache, name) for name in ("none", "frozen", "ema_0.9", "ema_0.9_bf16")
    )
    assert (none.sink, none.sink_frames, none.window_frames) == ("none", 0, cache.window_frames)
    assert frozen.sink == "frozen"
    assert (split.sink, split.alpha, split.sink_precision) == ("ema", 0.9, "split")
    assert (rounded.alpha, rounded.sink_precision) == (0.9, "bf16")


def test_true_videos_move_as_their_caption_says_and_differ_in_their_start() -> None:
    world = WorldConfig(motion_weights=(1.0, 0.0, 0.0, 0.0), pair_share=0.0)
    scene = next(scene for scene in sample_scenes(20, 3, world) if scene.speed == "fast")
    one, other = true_video(scene, 500, 1), true_video(scene, 500, 2)
    assert one.shape == (500, 64, 64, 3)
    assert one.dtype == torch.uint8
    assert not torch.equal(one, other)
    late = ToyReward()(one[None, 452:], [caption(scene)])
    assert float(late["motion"]) == pytest.approx(1.0, abs=0.05)
    assert float(late["agreement"]) == 1.0


def test_a_unit_is_made_once_for_the_same_settings(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"value": len(made)}

    assert [unit(tmp_path, "u", {"a": 1}, make)["value"] for _ in range(2)] == [1, 1]
    assert unit(tmp_path, "u", {"a": 2}, make)["value"] == 2
