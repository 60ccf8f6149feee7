"""The table of systems, and the configurations made of it."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from rfengine.checkpoint.systems import SYSTEMS, SystemName, configured, named_system
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


@pytest.mark.parametrize("name", ["memrope", "deep-sink"])
def test_a_cache_of_its_own_keeps_the_chunks_of_a_checkpoint(name: str) -> None:
    framewise = configured(PRESETS["wan-1.3b"], "causal-forcing-2-step")
    config = configured(framewise, name)
    assert config.cache == dataclasses.replace(SYSTEMS[name].cache, chunk_frames=1)
    assert config.schedule == framewise.schedule
    rolling = configured(PRESETS["wan-1.3b"], "rolling-forcing")
    message = f"system {name} is a cache for checkpoints whose chunks are denoised one after another, and the"
    with pytest.raises(ValueError, match=message):
        configured(rolling, name)


@pytest.mark.parametrize(
    ("path", "system"),
    [
        ("chunkwise/causal_forcing.pt", "causal-forcing"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-2-step"),
        ("causal-forcing++/framewise-1step.pt", "causal-forcing-1-step"),
        ("causal_forcing_framewise_2step.safetensors", "causal-forcing-2-step"),
        ("causal-forcing-framewise-1step", "causal-forcing-1-step"),
        ("chunkwise/longvideo.pt", "causal-forcing-long"),
        ("causal-forcing-chunkwise-longvideo.pt", "causal-forcing-long"),
        ("checkpoints/one_forcing.pt", "one-forcing"),
        ("rolling_forcing_dmd.pt", "rolling-forcing"),
        ("WaveForcing-4step/model.safetensors", "wave-forcing-4-step"),
        ("WaveForcing/model.safetensors", None),
        ("self_forcing_dmd.pt", "self-forcing"),
        ("model.safetensors", None),
    ],
)
def test_a_path_tells_the_system_that_says_most_of_it(path: str, system: str | None) -> None:
    assert named_system(path) == system


def test_a_system_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="system is 'sora'; use one of wan, reward-forcing, self-forcing"):
        configured(PRESETS["tiny"], "sora")
