"""The table of systems, and the configurations made of it."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from rfengine.checkpoint.systems import SYSTEMS, SystemName, configured
from rfengine.config import CacheConfig, ScheduleConfig
from rfengine.presets import PRESETS


def test_every_name_has_a_row() -> None:
    assert tuple(SYSTEMS) == get_args(SystemName)


def test_rows_are_those_that_were_published() -> None:
    assert SYSTEMS["reward-forcing"].cache == CacheConfig(3, 9, "ema", 3, positions="relative")
    assert SYSTEMS["self-forcing"].cache == CacheConfig(3, 21, "none", 0, positions="absolute")
    assert SYSTEMS["longlive"].cache == CacheConfig(3, 12, "frozen", 3, positions="absolute")
    assert SYSTEMS["causal-forcing-2-step"].steps == (1000, 500)
    for name in ("causal-forcing-2-step", "causal-forcing-1-step", "one-forcing"):
        assert SYSTEMS[name].first_steps == (1000, 750, 500, 250) and SYSTEMS[name].cache.chunk_frames == 1
    memory = SYSTEMS["memrope"].cache  # 3 + 1 + 1 + 4 + 3
    assert (memory.sink_frames, memory.past_frames, memory.window_frames) == (3, 4 + 3, 12)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_configures_a_model(name: str) -> None:
    config = configured(PRESETS["wan-1.3b"], name)
    assert config.cache == SYSTEMS[name].cache and config.schedule.shift == 5.0
    joint = config.cache.joint_frames
    assert (joint > 0) == (config.schedule.rolling != "none")
    assert joint in (0, len(config.schedule.denoising_steps) * config.cache.chunk_frames)


def test_a_cache_of_its_own_leaves_the_steps_of_a_checkpoint() -> None:
    tiny = PRESETS["tiny"]
    assert configured(tiny, "memrope").schedule == tiny.schedule
    schedule = configured(tiny, "causal-forcing-2-step").schedule
    assert schedule == ScheduleConfig(
        tiny.schedule.shift, denoising_steps=(1000, 500), first_steps=(1000, 750, 500, 250)
    )
    assert dataclasses.replace(configured(tiny, "memrope"), cache=tiny.cache) == tiny


def test_a_system_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="system is 'sora'; use one of wan, reward-forcing, self-forcing"):
        configured(PRESETS["tiny"], "sora")
