from __future__ import annotations

import json
import re

import pytest

from rfengine.config import CacheConfig, EngineConfig, ScheduleConfig, WanConfig
from rfengine.config_json import from_dict, to_dict
from rfengine.diffusion_forcing_config import DiffusionForcingConfig
from rfengine.presets import PRESETS

SMALL = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 1}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name: str) -> None:
    stored = json.dumps(to_dict(PRESETS[name]))
    assert from_dict(EngineConfig, json.loads(stored)) == PRESETS[name]


def test_unknown_field_is_named_and_refused() -> None:
    with pytest.raises(ValueError, match="CacheConfig has no field 'windw'; it has chunk_frames"):
        from_dict(CacheConfig, {"windw": 9})
    with pytest.raises(ValueError, match="EngineConfig.model has no field 'depth'; it has dim"):
        from_dict(EngineConfig, {"name": "mine", "model": {**SMALL, "depth": 2}})


def test_missing_field_is_named_and_refused() -> None:
    with pytest.raises(ValueError, match="WanConfig needs num_heads, num_layers; add it"):
        from_dict(WanConfig, {"dim": 24, "ffn_dim": 48})


def test_lists_of_json_become_tuples() -> None:
    assert from_dict(ScheduleConfig, {"denoising_steps": [1000, 500]}) == ScheduleConfig(
        denoising_steps=(1000, 500)
    )


def test_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="ScheduleConfig.shift is inf; it must be a finite number"):
        from_dict(ScheduleConfig, {"shift": float("inf")})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ScheduleConfig, {"shift": "5"}, "ScheduleConfig.shift is '5'; it must be a finite number"),
        (ScheduleConfig, {"denoising_steps": [1000, 2.5]}, "ScheduleConfig.denoising_steps is"),
        (CacheConfig, {"window_frames": 9.0}, "CacheConfig.window_frames is 9.0; it must be an integer"),
        (CacheConfig, {"chunk_frames": True}, "CacheConfig.chunk_frames is True; it must be an integer"),
        (CacheConfig, {"sink": "melted"}, "CacheConfig.sink is 'melted'; use 'ema', 'frozen' or 'none'"),
        (
            WanConfig,
            {"dim": 8, "ffn_dim": 8, "num_heads": 0, "num_layers": 1},
            "num_heads is 0; it must be at",
        ),
    ],
)
def test_a_value_of_another_type_is_refused(kind, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(kind, values)


def test_an_optional_table_is_read_and_may_be_null() -> None:
    values = to_dict(PRESETS["skyreels-df-1.3b"])
    values["diffusion_forcing"]["steps"] = 50
    assert from_dict(EngineConfig, values).diffusion_forcing == DiffusionForcingConfig(steps=50)
    for wrong, message in (
        ({"step": 50}, "has no field 'step'; it has base_frames"),
        (50, "is 50; it must be"),
    ):
        with pytest.raises(ValueError, match=f"EngineConfig.diffusion_forcing {re.escape(message)}"):
            from_dict(EngineConfig, values | {"diffusion_forcing": wrong})
    plain = to_dict(PRESETS["wan-1.3b"])
    assert plain["diffusion_forcing"] is None and from_dict(EngineConfig, plain) == PRESETS["wan-1.3b"]
    del plain["diffusion_forcing"], plain["model"]["fps_embedding"]  # as an earlier rfengine wrote it
    assert from_dict(EngineConfig, plain) == PRESETS["wan-1.3b"]
