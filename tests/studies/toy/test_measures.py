"""What the toy study measures: distances of sets of clips, sinks by name, kept units."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.tiny.stages import CHECKPOINT
from recipes.tiny.training import TINY
from rfengine.checkpoint.checkpoint import write_config
from rfengine.presets import PRESETS
from rfengine.toy.data import LatentDataset
from studies.toy.clips import energy_distance
from studies.toy.record import unit
from studies.toy.setting import CPU, OWN_SINK, WITH_EVICTION, Setting, trained_sink
from studies.toy.streams import sink_names, with_sink
from studies.toy.trainings import stream_config, training_configs, within_window


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
    rounded_names = ("ema_0.9_bf16", "ema_0.99_bf16")
    assert sink_names((0.9, 0.99)) == ("none", "frozen", "ema_0.9", "ema_0.99", *rounded_names)
    none, frozen, split, rounded = (
        with_sink(cache, name) for name in ("none", "frozen", "ema_0.9", "ema_0.9_bf16")
    )
    assert (none.sink, none.sink_frames, none.window_frames) == ("none", 0, cache.window_frames)
    assert frozen.sink == "frozen"
    assert (split.sink, split.alpha, split.sink_precision) == ("ema", 0.9, "split")
    assert (rounded.alpha, rounded.sink_precision) == (0.9, "bf16")


def test_students_are_trained_with_the_sinks_of_their_names(tmp_path: Path) -> None:
    directory = tmp_path / "base" / CHECKPOINT
    directory.mkdir(parents=True)
    write_config(directory, TINY)
    setting = Setting(CPU, tmp_path / "base", tmp_path, torch.device("cpu"), 1)
    configs = training_configs(setting)
    assert set(configs) == set(CPU.distilled)
    assert with_sink(TINY.cache, OWN_SINK) == TINY.cache
    assert all(config.engine.cache == TINY.cache for config in configs.values())
    caches = {name: stream_config(setting, name).model.cache for name in CPU.streamed}
    for name in caches:
        assert caches[name] == with_sink(TINY.cache, trained_sink(name)), name
    assert caches["sink_frozen"].sink == "frozen" and caches["sink_ema_0.9"].alpha == 0.9
    assert caches["no_eviction"] == caches[WITH_EVICTION] == TINY.cache
    same = {(config.steps, config.student, config.teacher, config.batch) for config in configs.values()}
    assert len(same) == 1


def test_what_fits_into_the_window_is_the_beginning_of_every_video() -> None:
    dataset = LatentDataset(
        latents=torch.arange(15.0)[None, None, :, None, None].expand(2, 1, 15, 1, 1),
        foreground=torch.zeros(2, 15, 1, 1, dtype=torch.bool),
        texts=torch.zeros(4, 1, 1),
        text_rows=torch.arange(5)[None, :, None].expand(2, 5, 2),
        places=torch.zeros(2, 3),
        values=torch.zeros(2, 3, 12, 2),
    )
    kept = within_window(dataset, TINY)
    assert kept.latents[1].flatten().tolist() == list(range(9)) and kept.foreground.shape == (2, 9, 1, 1)
    assert kept.text_rows[1, :, 0].tolist() == [0, 1, 2]


def test_a_unit_is_made_once_for_the_same_settings(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"value": len(made)}

    assert [unit(tmp_path, "u", {"a": 1}, make)["value"] for _ in range(2)] == [1, 1]
    assert unit(tmp_path, "u", {"a": 2}, make)["value"] == 2
