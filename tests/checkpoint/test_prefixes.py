from __future__ import annotations

import logging

import pytest

from rfengine.checkpoint.layouts import engine_names
from rfengine.checkpoint.prefixes import choose_model, strip_prefixes
from rfengine.checkpoint.shapes import expected_transformer_shapes
from rfengine.config import WanConfig

CONFIG = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2)
NAMES = list(expected_transformer_shapes(CONFIG))
PREFIXES = [
    "model.diffusion_model.", "diffusion_model.", "module.", "module.model.", "model.model.", "generator.",
    "model.module.", "generator_ema.model.", "ema.module.", "pipe.dit.", "net.", "_orig_mod.",
    "module._orig_mod.", "_orig_mod.module.", "model._fsdp_wrapped_module._orig_mod.", "transformer.",
    "generator.module.model.", "_forward_module.", "student.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_of_trainers_and_programs_is_removed(prefix: str) -> None:
    assert [strip_prefixes(prefix + name) for name in NAMES] == NAMES
    part, tensors = engine_names({prefix + name: name for name in NAMES})
    assert part == "transformer" and tensors == {name: name for name in NAMES}


def test_segments_of_wrappers_are_removed_at_every_place_and_only_whole() -> None:
    wrapped = "blocks._checkpoint_wrapped_module.3._orig_mod.ffn._fsdp_wrapped_module.0.weight"
    assert strip_prefixes(wrapped) == "blocks.3.ffn.0.weight"
    assert strip_prefixes("my_orig_mod.weight") == "my_orig_mod.weight"


def model(prefix: str, value: str) -> dict[str, str]:
    return {prefix + name: value for name in NAMES}


@pytest.mark.parametrize(
    ("tensors", "use_ema", "taken"),
    [
        (model("generator.model.", "g") | model("critic.model.", "c"), True, "g"),
        (model("critic.", "c") | model("generator.", "g") | model("generator_ema.", "e"), True, "e"),
        (model("critic.", "c") | model("generator.", "g") | model("generator_ema.", "e"), False, "g"),
        (model("model.", "m") | model("ema.", "e"), True, "e"),
        (model("model.", "m") | model("model_ema.", "e"), False, "m"),
        (model("", "m") | model("fake_score.", "f") | model("real_score.", "r"), True, "m"),
        (model("model.diffusion_model.", "m") | {"vae.conv1.weight": "v"}, True, "m"),
        (model("generator.", "g") | {"step": "s"}, True, "g"),
    ],
)
def test_of_several_models_the_right_one_is_read_and_named(
    tensors: dict[str, str], use_ema: bool, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = choose_model(tensors, use_ema)
    assert len(chosen) == len(NAMES) and set(chosen.values()) == {taken}
    assert "the file holds several models: " in caplog.text and " is read, and not " in caplog.text


@pytest.mark.parametrize(
    ("tensors", "use_ema", "message"),
    [
        (model("critic.", "c"), True, "holds critic., and which of them is the model is not clear"),
        (model("generator.", "g") | model("student.", "s"), True, "holds generator., student., and which"),
        (
            model("generator.", "g") | model("", "m"),
            True,
            "holds generator., names without a word in front, and",
        ),
        (model("ema.", "a") | model("generator_ema.", "b"), True, "holds ema., generator_ema., and which"),
        (model("ema.", "a"), False, "holds ema. alone, which are averaged weights; read them with use_ema"),
        (model("vae.", "v") | model("text_encoder.", "t"), True, "holds vae., text_encoder., and which"),
    ],
)
def test_an_unclear_choice_is_refused_with_its_names(
    tensors: dict[str, str], use_ema: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_model(tensors, use_ema)


def test_two_names_that_become_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"module.head.modulation and another tensor both become head.mod"):
        engine_names(model("", "a") | {"module.head.modulation": "b"})
