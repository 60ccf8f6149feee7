from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from rfengine.checkpoint.lora_scale import ScaleStatement, header_statements, read_adapter_config

PEFT = {"peft_type": "LORA", "r": 16, "lora_alpha": 64, "bias": "none", "use_dora": False}


def config(tmp_path: Path, values: object) -> ScaleStatement:
    path = tmp_path / "adapter_config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return read_adapter_config(path)


def header(**metadata: str) -> ScaleStatement:
    (statement,) = header_statements({"format": "pt", **metadata}, "lora.safetensors", has_alphas=False)
    return statement


def test_patterns_match_the_ends_of_names_as_in_peft(tmp_path: Path) -> None:
    statement = config(
        tmp_path,
        {
            **PEFT,
            "rank_pattern": {"self_attn.q": 4, r"^blocks\.1\..*": 8},
            "alpha_pattern": {"self_attn.q": 2, "ffn.0": 32, r"blocks\.\d+\.ffn\.2": 48},
        },
    )
    scales = {
        ("blocks.0.self_attn.q", 4): 0.5,
        ("blocks.0.self_attn.k", 16): 4.0,
        ("blocks.0.ffn.0", 16): 2.0,
        ("blocks.1.ffn.0", 8): 4.0,
        ("blocks.0.ffn.2", 16): 3.0,
        ("blocks.0.my_ffn.0", 16): 4.0,
    }
    for (layer, rank), scale in scales.items():
        assert statement.scale((f"diffusion_model.{layer}", layer), rank) == scale
    with pytest.raises(ValueError, match=r"states rank 4 for blocks.0.self_attn.q and its tensors have 16"):
        statement.scale(("blocks.0.self_attn.q",), 16)


def test_rslora_is_read(tmp_path: Path) -> None:
    assert config(tmp_path, {**PEFT, "use_rslora": True}).scale(("ffn.0",), 16) == 16.0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_dora": True}, "use_dora True: dora in place of plain LoRA"),
        ({"use_qalora": True}, "use_qalora True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True: transposed weights"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"peft_type": "LOHA"}, "is of peft_type 'LOHA'; the engine merges LORA alone"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changes the base"),
        ({"bias": "some"}, "has bias 'some'"),
        ({"modules_to_save": "head"}, "has modules_to_save 'head'"),
        ({"lora_bias": 1}, "has lora_bias 1"),
        ({"use_rslora": "yes"}, "has use_rslora 'yes'"),
        ({"rank_pattern": ["q"]}, r"has rank_pattern \['q'\]"),
        ({"rank_pattern": {"q": 0}}, "is 0; a rank is a whole number from 1"),
        ({"alpha_pattern": {"q": -1}}, "is -1; an alpha is a number above 0"),
        ({"alpha_pattern": {"(q": 4}}, r"the pattern '\(q' in alpha_pattern, which is no regular expression"),
        (
            {"alpha_pattern": {"(a+)+b": 4}},
            r"pattern '\(a\+\)\+b' in alpha_pattern, which is too long or rep",
        ),
        ({"alpha_pattern": {".*.*.*.*.*x": 4}}, "too long or repeats too much"),
        ({"alpha_pattern": {"a?" * 30 + "a" * 30: 4}}, "too long or repeats too much"),
        ({"alpha_pattern": {"(a|a)" * 30: 4}}, "too long or repeats too much"),
        ({"alpha_pattern": {f"{i}.*": 4 for i in range(33)}}, "33 patterns with repeats or choices"),
        ({"rank_pattern": {str(i): 4 for i in range(2001)}}, "2001 entries in rank_pattern"),
    ],
)
def test_options_that_are_not_merged_are_named(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, {**PEFT, **option})


@pytest.mark.parametrize("alpha", [0, -1, "64", None, True, [64], {}, 1e9, 10**400])
def test_impossible_alpha_is_refused(tmp_path: Path, alpha: object) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json (is|has no lora_alpha)"):
        config(tmp_path, {**PEFT, "lora_alpha": alpha})


@pytest.mark.parametrize("rank", [0, -1, 1.5, "16", True, [16], {}, 1 << 40])
def test_impossible_rank_is_refused(tmp_path: Path, rank: object) -> None:
    with pytest.raises(ValueError, match=r"r in .*adapter_config.json is .*; a rank is a whole number"):
        config(tmp_path, {**PEFT, "r": rank})


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"r": NaN}', '{"r": 1, "r": 2}', '{"lora_alpha": 1e999}', "[" * 9999]
)
def test_damaged_config_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json"):
        config(tmp_path, text)


def test_header_of_diffusers_is_read() -> None:
    values = {
        "transformer.r": 16,
        "transformer.lora_alpha": 64,
        "transformer.alpha_pattern": {"attn1.to_q": 32},
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 4,
    }
    statement = header(lora_adapter_metadata=json.dumps(values))
    assert statement.scale(("blocks.0.attn1.to_q",), 16) == 2.0
    assert statement.scale(("blocks.0.attn1.to_k",), 16) == 4.0


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_alpha": "64", "rank": "16"},
        {"lora_alpha": "64.0"},
        {"network_alpha": "64", "network_dim": "16"},
        {"alpha": "64", "lora_rank": "16"},
        {"transformer.lora_alpha": "64", "transformer.r": "16"},
        {"ss_network_alpha": "64.0", "ss_network_dim": "16"},
        {"lora_alpha": "16", "use_rslora": "True"},
    ],
)
def test_numbers_in_the_header_are_read(metadata: dict[str, str]) -> None:
    assert header(**metadata).scale(("blocks.0.ffn.0",), 16) == 4.0


def test_kohyas_header_yields_to_alphas_among_the_tensors() -> None:
    metadata = {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}
    assert header_statements(metadata, "lora.safetensors", has_alphas=True) == []
    with pytest.raises(ValueError, match=r"ss_network_alpha in the header of lora.safetensors is 'Dynamic'"):
        header_statements(metadata, "lora.safetensors", has_alphas=False)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_alpha": "64", "alpha": "32"}, "states lora_alpha 64, alpha 32, which contradict each other"),
        ({"lora_alpha": "nan"}, "lora_alpha in the header of lora.safetensors is 'nan'"),
        ({"lora_alpha": "64", "rank": "0"}, "rank in the header of lora.safetensors is 0"),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata in the header .* is not valid JSON"),
        ({"lora_adapter_metadata": "[1]"}, "holds a list, not a JSON object"),
        ({"lora_adapter_metadata": '{"transformer.r": 16}'}, "has no lora_alpha"),
        ({"lora_adapter_metadata": '{"unet.r": 16, "unet.lora_alpha": 1}'}, "rank and alpha of 'unet'"),
        (
            {"lora_adapter_metadata": '{"transformer.lora_alpha": 1, "transformer.use_dora": true}'},
            "has use_dora True",
        ),
    ],
)
def test_damaged_header_is_refused(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        header(**metadata)


def test_alpha_of_an_unknown_name_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert header_statements({"my_alpha": "64"}, "lora.safetensors", has_alphas=False) == []
    assert "the header of lora.safetensors has 'my_alpha', of which nothing is taken" in caplog.text


def test_values_of_every_wrong_type_give_a_sentence_or_a_scale(tmp_path: Path) -> None:
    draw = random.Random(0)
    values = [
        None,
        True,
        0,
        -3,
        1.5,
        1e308,
        10**30,
        "",
        "x",
        "16",
        "(",
        [],
        [1],
        {},
        {"q": 1},
        {"q": {}},
        {"(": 1},
    ]
    keys = [*PEFT, "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "modules_to_save",
            "init_lora_weights", "target_modules", "layer_replication",
            "fan_in_fan_out", "use_new"]  # fmt: skip
    for _ in range(600):
        options = {**PEFT, **{draw.choice(keys): draw.choice(values) for _ in range(draw.randint(1, 3))}}
        metadata = {
            "lora_adapter_metadata": json.dumps(
                {f"transformer.{key}": value for key, value in options.items()}
            ),
            draw.choice(["lora_alpha", "rank", "ss_network_dim", "transformer.r"]): str(draw.choice(values)),
        }
        has_alphas = draw.random() < 0.5
        for read in (
            lambda options=options: [config(tmp_path, options)],
            lambda metadata=metadata, has=has_alphas: header_statements(metadata, "a.safetensors", has),
        ):
            try:
                for statement in read():
                    scale = statement.scale(("blocks.0.self_attn.q",), 16)
                    assert scale is None or (math.isfinite(scale) and scale > 0)
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
