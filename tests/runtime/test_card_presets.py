"""Which options a preset takes, and which the caller's own options keep from it."""

from __future__ import annotations

import dataclasses

import pytest

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.diffusion_forcing.pipeline import DiffusionForcingPipeline
from rfengine.presets import PRESETS
from rfengine.runtime.card_presets import (
    CARD_PRESETS,
    configurations,
    left_out,
    smaller_sizes,
    with_preset,
)

WAN = Checkpoint.random(PRESETS["wan-1.3b"])
KNOBS = ("text_encoder", "text_weights", "block_weights", "block_buffers", "vae")


def runtime_of(name: str = "8gb", has_loras: bool = False, text_apart: bool = False, **own: object) -> tuple:
    config = dataclasses.replace(WAN.config, runtime=RuntimeConfig(preset=name, **own))
    runtime = with_preset(config, name, WAN, text_apart, has_loras).runtime
    return tuple(getattr(runtime, knob) for knob in KNOBS)


def test_each_preset_has_all_that_the_one_before_has() -> None:
    assert [preset.name for preset in CARD_PRESETS] == ["24gb", "16gb", "12gb", "8gb"]
    assert runtime_of("24gb") == ("layers", None, None, None, "full")
    assert runtime_of("16gb") == ("layers", "int8", "int8", None, "full")
    assert runtime_of("12gb") == ("layers", "int8", "int8", None, "tiny")
    assert runtime_of("8gb") == ("layers", "int8", "int8", 2, "tiny")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"text_encoder": "stays"}, ("stays", "int8", "int8", 2, "tiny")),
        ({"text_weights": "default"}, ("layers", "default", "int8", 2, "tiny")),
        ({"block_weights": "default"}, ("layers", "int8", "default", 2, "tiny")),
        ({"block_buffers": 0}, ("layers", "int8", "int8", 0, "tiny")),
        ({"block_buffers": 3}, ("layers", "int8", "int8", 3, "tiny")),
        ({"vae_precision": "fp16"}, ("layers", "int8", "int8", 2, "full")),
        ({"graphs": True}, ("layers", "int8", "int8", None, "tiny")),
        ({"precision": "fp8"}, ("layers", "int8", None, None, "tiny")),
        ({"has_loras": True}, ("layers", "int8", None, None, "tiny")),
        ({"text_apart": True}, (None, "int8", "int8", 2, "tiny")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_is_given_is_kept(own: dict, expected: tuple) -> None:
    assert runtime_of(**own) == expected


@pytest.mark.parametrize(
    ("own", "missing"),
    [
        ({}, []),
        ({"block_buffers": 0, "block_weights": "default"}, []),
        ({"text_apart": True}, []),
        ({"vae_precision": "fp16"}, ["vae"]),
        ({"vae": "tensorrt"}, []),
        ({"graphs": True}, ["block_buffers"]),
        ({"precision": "fp8"}, ["block_weights", "block_buffers"]),
        ({"has_loras": True}, ["block_weights", "block_buffers"]),
    ],
)
def test_what_a_preset_goes_without_is_known(own: dict, missing: list[str]) -> None:
    apart, loras = own.pop("text_apart", False), own.pop("has_loras", False)
    config = dataclasses.replace(WAN.config, runtime=RuntimeConfig(**own))
    assert left_out(config, with_preset(config, "8gb", WAN, apart, loras), apart) == missing


def test_without_weights_of_the_tiny_decoder_the_full_one_stays(tmp_path) -> None:  # noqa: ANN001
    class Without(Checkpoint):
        def has(self, part: str) -> bool:
            return part != "tiny_vae"

    checkpoint = Without(WAN.config)
    assert with_preset(WAN.config, "8gb", checkpoint, False, False).runtime.vae == "full"
    names = [preset.name for preset, _ in configurations(checkpoint, WAN.config, may_shrink=False)]
    assert names == ["24gb", "16gb", "8gb"]  # 12gb would be 16gb once more


def test_configurations_are_in_the_order_of_loss_and_then_smaller() -> None:
    found = [(preset.name, config.height, config.width) for preset, config in configurations(WAN, WAN.config)]
    names = [preset.name for preset in CARD_PRESETS]
    sizes = [(480, 832), (352, 624), (288, 512), (240, 416), (176, 304)]
    assert found == [(name, *size) for size in sizes for name in names]
    assert len(configurations(WAN, WAN.config, may_shrink=False)) == 4


def test_smaller_sizes_are_ones_that_the_model_takes() -> None:
    tiny: EngineConfig = PRESETS["tiny"]
    assert smaller_sizes(tiny) == [(48, 48), (32, 32), (16, 16)]
    smallest = dataclasses.replace(tiny, height=16, width=16)
    assert smaller_sizes(smallest) == []


def test_options_that_exclude_each_other_are_refused() -> None:
    for options, message in (
        ({"block_buffers": 1}, "block_buffers is 1; use 2 or more"),
        ({"block_buffers": 65}, "must be at most 64"),
        ({"block_buffers": 2, "precision": "fp8"}, "block_buffers is 2 and precision is 'fp8'"),
        ({"block_weights": "int8", "precision": "fp8-attention"}, "block_weights is 'int8' and precision"),
        ({"block_buffers": 2, "graphs": True}, "graphs are asked for and block_buffers is 2"),
        ({"block_weights": "int4"}, "block_weights"),
        ({"preset": "6gb"}, "preset"),
    ):
        with pytest.raises(ValueError, match=message):
            RuntimeConfig(**options)


def test_a_diffusion_forcing_model_has_no_presets() -> None:
    config = PRESETS["skyreels-df-1.3b"]
    checkpoint = Checkpoint.random(config)
    with pytest.raises(ValueError, match="streams"):
        configurations(checkpoint, config)
    with pytest.raises(ValueError, match="preset is asked for and is for streams alone"):
        DiffusionForcingPipeline.from_pretrained(checkpoint, "cpu", runtime=RuntimeConfig(preset="8gb"))
