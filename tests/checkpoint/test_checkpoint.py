from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rfengine.checkpoint.checkpoint import Checkpoint, open_tokenizer, write_config
from rfengine.checkpoint.directories import CheckpointDirectory, checkpoint_directory, read_json
from rfengine.checkpoint.loader import save_weights
from rfengine.config import TextConfig, TinyVAEConfig
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import build_umt5
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.presets import PRESETS

MODEL_DIM = 128  # of the transformer in conftest.py
Parts = dict[str, dict[str, Tensor]]


def linear() -> nn.Module:
    return nn.Linear(1, 1)


def test_configuration_survives_the_disk(tmp_path: Path) -> None:
    for config in PRESETS.values():
        write_config(tmp_path, config)
        assert Checkpoint.open(tmp_path).config == config


def test_configuration_of_an_earlier_rfengine_may_name_a_switch_that_was_off(tmp_path: Path) -> None:
    write_config(tmp_path, PRESETS["tiny"])
    written = json.loads((tmp_path / "rfengine.json").read_text())
    written["engine"]["runtime"]["merged_pass"] = False
    (tmp_path / "rfengine.json").write_text(json.dumps(written))
    assert Checkpoint.open(tmp_path).config == PRESETS["tiny"]
    written["engine"]["runtime"]["merged_pass"] = True
    (tmp_path / "rfengine.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"engine\.runtime has no field 'merged_pass'"):
        Checkpoint.open(tmp_path)


def test_damaged_configurations_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "rfengine.json"
    write_config(tmp_path, PRESETS["tiny"])
    good = json.loads(path.read_text())
    for change, message in (
        ({"format": 2}, r"has format 2 and this rfengine reads 1; convert the source again"),
        ({"format": True}, r"has format True and this rfengine reads 1"),
        ({"engin": {}}, "has the key 'engin'; it holds format and engine alone"),
        ({"engine": 3}, "engine is 3; it must be a table of its fields"),
        ({"engine": good["engine"] | {"colour": 1}}, "engine has no field 'colour'; it has name, model"),
        ({"engine": good["engine"] | {"model": {"dim": "wide"}}}, "is not a configuration of this rfengine"),
        ({"engine": good["engine"] | {"model": None}}, "is not a configuration of this rfengine"),
        ({"engine": good["engine"] | {"fps": "many"}}, "is not a configuration of this rfengine"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "format": 1}', "it has the key 'format' twice"),
        ('{"format": ' + "9" * 5000 + "}", "it has an integer of 5000 digits; use at most 1000"),
        ('{"format": NaN}', "NaN is no number of JSON"),
        ('{"format": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is nested too deep"),
        (b'{"format": "\xff"}', "is not UTF-8 at byte 12"),
        (None, "has more than the 4194304 bytes that are read"),
    ],
    ids=["twice", "digits", "nan", "deep", "utf-8", "gigabyte"],
)
def test_a_configuration_that_is_no_such_file_is_refused_by_its_name(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    for name in ("rfengine.json", "transformer/config.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content or b" ")
            if content is None:
                file.truncate(2**30)
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            Checkpoint.open(tmp_path) if name == "rfengine.json" else read_json(path)


def test_a_published_setting_that_cannot_be_is_refused_by_folder_and_key(
    diffusers_directory: Path, wan_directory: Path, tmp_path: Path
) -> None:
    for source, file, key in (
        (diffusers_directory, "transformer/config.json", "num_attention_heads"),
        (diffusers_directory, "vae/config.json", "latents_std"),
        (diffusers_directory, "text_encoder/config.json", "relative_attention_max_distance"),
        (wan_directory, "config.json", "num_layers"),
    ):
        copy = tmp_path / file.replace("/", "-")
        shutil.copytree(source, copy, copy_function=os.link)
        path = copy / file
        values = json.loads(path.read_text())
        path.unlink()
        for absurd in ("2", None, [], 2**63, 0.5):
            path.write_text(json.dumps(values | {key: absurd}))
            with pytest.raises(ValueError) as caught:
                Checkpoint.open(copy)
            assert str(caught.value).startswith(f"{path.parent}: ") and key in str(caught.value)


def test_diffusers_directory_loads_directly(
    diffusers_directory: Path, parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        checkpoint = Checkpoint.open(diffusers_directory)
    config = checkpoint.config
    assert "names no cache; EMA-Sink is taken" in caplog.text
    assert config.name == "wan-dim128-layers2" and config.model.num_heads == 1
    builds = {
        "transformer": lambda: WanDiT(config.model),
        "vae": lambda: WanVAE(config.vae),
        "text_encoder": lambda: build_umt5(config.text),
    }
    for part, build in builds.items():
        module = checkpoint.load(build, part, torch.float32)
        assert len(dict(module.named_parameters())) == len(parts[part])
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, parts[part][name]), name
    text = module
    assert text.shared.weight is text.encoder.embed_tokens.weight


def test_original_directory_loads_directly_as_far_as_it_is_safetensors(
    wan_directory: Path, tmp_path: Path, parts: Parts, write_file: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    write_file(tmp_path / "Wan2.1_VAE.safetensors", parts["vae"])
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / name).symlink_to(wan_directory / name)
    with pytest.raises(ValueError, match=r"text_dim of the model is 32, the text encoder gives 4096"):
        Checkpoint.open(tmp_path)
    transformer = dict(parts["transformer"]) | {"text_embedding.0.weight": torch.zeros(MODEL_DIM, 4096)}
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    write_file(tmp_path / "diffusion_pytorch_model.safetensors", transformer)
    checkpoint = Checkpoint.open(tmp_path)
    model = checkpoint.load(lambda: WanDiT(checkpoint.config.model), "transformer", torch.float32)
    vae = checkpoint.load(lambda: WanVAE(checkpoint.config.vae), "vae", torch.float32)
    assert torch.equal(vae.conv1.weight, parts["vae"]["conv1.weight"])
    assert torch.equal(model.head.modulation, parts["transformer"]["head.modulation"])
    with pytest.raises(
        ValueError, match=rf"is a pickle, .* run `rfengine convert {tmp_path} DST` and load DST"
    ):
        checkpoint.load(linear, "text_encoder", torch.float32)


def test_absent_part_says_how_to_add_it(tmp_path: Path) -> None:
    write_config(tmp_path, PRESETS["tiny"])
    with pytest.raises(ValueError, match="has no vae; run `rfengine convert SRC DST --base WAN`"):
        Checkpoint.open(tmp_path).load(linear, "vae", torch.float32)
    (tmp_path / "rfengine.json").unlink()
    (tmp_path / "Wan2.1_VAE.safetensors").touch()
    with pytest.raises(ValueError, match="has no transformer; give the directory that has it"):
        Checkpoint.open(tmp_path)


def test_an_absent_tiny_decoder_says_how_to_add_it(tmp_path: Path) -> None:
    write_config(tmp_path, PRESETS["tiny"])
    way = re.escape(f"has no tiny_vae; run `rfengine convert taew2_1.pth DST --base {tmp_path}` and load DST")
    with pytest.raises(ValueError, match=way):
        Checkpoint.open(tmp_path).load(linear, "tiny_vae", torch.float32)


def test_a_tiny_decoder_in_its_folder_is_loaded_and_its_size_inferred(
    diffusers_directory: Path, tmp_path: Path, write_file: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(diffusers_directory, directory)
    torch.manual_seed(0)
    config = TinyVAEConfig(widths=(8, 6, 4, 4))
    tensors = TinyVAE(config).state_dict()
    encoder = {"encoder.0.weight": torch.zeros(4, 3, 3, 3)}
    write_file(directory / "tiny_vae" / "taew2_1.safetensors", encoder | tensors)
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.config.tiny_vae == config
    decoder = checkpoint.load(lambda: TinyVAE(config), "tiny_vae", torch.float32)
    assert all(torch.equal(value, tensors[name]) for name, value in decoder.state_dict().items())
    other = TinyVAEConfig(widths=(8, 6, 4, 5))
    with pytest.raises(ValueError, match=r"2 mis-shaped: decoder.20.weight \(4, 4, 3, 3\) instead of \(5, 4"):
        checkpoint.load(lambda: TinyVAE(other), "tiny_vae", torch.float32)


def test_a_pickled_tiny_decoder_stands_in_nobodys_way(diffusers_directory: Path, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(diffusers_directory, directory)
    (directory / "tiny_vae").mkdir()
    (directory / "tiny_vae" / "taew2_1.pth").touch()
    checkpoint, plain = Checkpoint.open(directory), Checkpoint.open(diffusers_directory)
    assert checkpoint.fingerprint() == plain.fingerprint() and checkpoint.config == plain.config
    with pytest.raises(ValueError, match=r"taew2_1.pth is a pickle, .* run `rfengine convert"):
        checkpoint.load(linear, "tiny_vae", torch.float32)


def test_part_in_the_wrong_file_is_refused(
    tmp_path: Path, parts: Parts, write_file: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    write_config(tmp_path, PRESETS["tiny"])
    write_file(tmp_path / "vae.safetensors", parts["text_encoder"])
    with pytest.raises(ValueError, match=r"vae.safetensors holds a text_encoder, not a vae"):
        Checkpoint.open(tmp_path).load(linear, "vae", torch.float32)


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    write_config(tmp_path, PRESETS["tiny"])

    directory = CheckpointDirectory.of(tmp_path)

    def saved() -> str:
        save_weights(tmp_path / "transformer.safetensors", model.state_dict())
        return directory.fingerprint()

    first = saved()
    assert first == saved() and len(first) == 64
    with torch.no_grad():
        model.weight += 1e-3
    second = saved()
    model.to(torch.bfloat16)
    assert len({first, second, saved()}) == 3


TINY = checkpoint_directory("tiny")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped model, without the manifest that its changed configuration would offend."""
    directory = tmp_path_factory.mktemp("agreement") / "tiny"
    shutil.copytree(TINY, directory)
    (directory / "manifest.json").unlink(missing_ok=True)
    return directory


def read_with(directory: Path, changes: dict[str, object]) -> None:
    """Read the configuration with the values at the paths in `changes` replaced."""
    values = json.loads((TINY / "rfengine.json").read_text())
    for path, value in changes.items():
        *tables, name = path.split(".")
        table = values["engine"]
        for key in tables:
            table = table[key]
        table[name] = value
    (directory / "rfengine.json").write_text(json.dumps(values))
    Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_layers": 2**31}, "engine.model.num_layers is 2147483648; it must be at most 1024"),
        (
            {"model.num_layers": 1024},
            "the checkpoint has dim 192 in 4 layers and the model has dim 192 in 1024",
        ),
        ({"model.dim": 384, "model.num_heads": 6}, "has dim 192 in 4 layers and the model has dim 384 in 4"),
        ({"model.ffn_dim": 577}, "12 mis-shaped: blocks.0.ffn.0.bias"),
        ({"model.freq_dim": 65536}, "1 mis-shaped: time_embedding.0.weight"),
        ({"model.patch_size": [1, 4, 4]}, "mis-shaped: head.head.bias"),
        ({"vae.num_res_blocks": 64}, "vae.safetensors does not fit the model of rfengine.json"),
        ({"vae.base_dim": 1024}, "vae.safetensors does not fit the model of rfengine.json"),
        ({"text.num_layers": 4}, "the checkpoint has dim 96 in 3 layers and the model has dim 96 in 4"),
        ({"text.vocab_size": 4194304}, "1 mis-shaped: shared.weight"),
        ({"text.num_buckets": 64}, "3 mis-shaped: encoder.block.0.layer.0.SelfAttention.relative"),
        ({"tiny_vae.widths": [4096] * 4}, "tiny_vae.safetensors does not fit the model of rfengine.json"),
        ({"model.text_len": 10**6}, "engine.model.text_len is 1000000; it must be at most 1024"),
        ({"height": 72}, "height is 72 pixels; it must be a multiple of 16, such as 64"),
    ],
)
def test_a_size_that_the_tensors_do_not_have_is_refused_at_once(
    model: Path, changes: dict[str, object], message: str
) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError) as caught:
        read_with(model, changes)
    assert message in str(caught.value)
    assert time.process_time() - begun < 1


def test_what_the_tensors_do_not_tell_may_be_anything_within_its_limits(model: Path) -> None:
    read_with(model, {"model.eps": 1e-5, "model.text_len": 512, "cache.window_frames": 12, "fps": 24})
    read_with(model, {})


SIZES = {"dim": 32, "attention_dim": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 1}


def test_ids_that_the_encoder_has_no_row_for_are_refused(wan_directory: Path) -> None:
    folder = CheckpointDirectory.of(wan_directory).tokenizer()
    assert open_tokenizer(folder, TextConfig(29, **SIZES)).vocab_size == 29
    with pytest.raises(ValueError, match=r"umt5-xxl has ids up to 28 and the text encoder has 28 rows; use"):
        open_tokenizer(folder, TextConfig(28, **SIZES))
    assert open_tokenizer(None, TextConfig(259, **SIZES, tokenizer="bytes")).vocab_size == 259


def test_random_weights_depend_on_the_seed_alone() -> None:
    config = PRESETS["tiny"]
    first, again, other = (Checkpoint.random(config, seed) for seed in (1, 1, 2))

    def weights(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Parts:
        builds = {
            "transformer": lambda: WanDiT(config.model),
            "vae": lambda: WanVAE(config.vae),
            "tiny_vae": lambda: TinyVAE(config.tiny_vae),
        }
        return {part: checkpoint.load(build, part, dtype).state_dict() for part, build in builds.items()}

    ours = weights(first)
    for part, tensors in weights(again).items():
        assert all(torch.equal(tensor, ours[part][name]) for name, tensor in tensors.items())
    assert not torch.equal(weights(other)["vae"]["conv1.weight"], ours["vae"]["conv1.weight"])
    rounded = weights(first, torch.bfloat16)["transformer"]
    assert all(torch.equal(rounded[name], value.bfloat16()) for name, value in ours["transformer"].items())
    assert first.fingerprint() == "random weights, seed 1" != other.fingerprint()
    assert first.has("text_encoder")
    with pytest.raises(ValueError, match="tiny has random weights; give a checkpoint directory"):
        _ = first.path


def test_random_weights_have_random_text_states_of_any_prompt() -> None:
    config = PRESETS["tiny"]
    states = (
        Checkpoint.random(config).text_encoder("cpu", torch.float32).encode(["a", "b"], "cpu", torch.float16)
    )
    assert states.shape == (2, config.model.text_len, config.model.text_dim) and states.dtype == torch.float16
    assert torch.equal(states[0], states[1]) and states.std() > 0.5


def test_a_checkpoint_with_another_configuration_keeps_its_weights(wan_directory: Path) -> None:
    checkpoint = Checkpoint.open("tiny")
    changed = replace(checkpoint, config=replace(checkpoint.config, fps=3))
    assert changed.fingerprint() == checkpoint.fingerprint() and changed.path == checkpoint.path
