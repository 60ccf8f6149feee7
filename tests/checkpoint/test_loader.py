from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rfengine.checkpoint.directories import read_json
from rfengine.checkpoint.loader import (
    fingerprint,
    load_part,
    load_weights,
    read_config,
    read_safetensors,
    save_weights,
    write_config,
)
from rfengine.checkpoint.shapes import expected_transformer_shapes
from rfengine.config import PRESETS, TinyVAEConfig, VAEConfig, WanConfig
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import build_umt5
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE

SMALL = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=16, freq_dim=8, in_dim=4, out_dim=4)
Parts = dict[str, dict[str, Tensor]]


def on_meta(config: WanConfig = SMALL) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(config)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_weights(tmp_path / "small.safetensors", WanDiT(SMALL).state_dict())
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_weights_are_assigned_in_the_dtype_asked_for(weights: Path, dtype: torch.dtype | None) -> None:
    model = on_meta()
    load_weights(model, weights, dtype, "cpu")
    stored = load_file(weights)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
        assert torch.equal(parameter, stored[name].to(dtype or torch.float32))


def test_frozen_parameters_stay_frozen(weights: Path) -> None:
    model = on_meta().requires_grad_(False)
    load_weights(model, weights, torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_stored_names_can_be_renamed(weights: Path, tmp_path: Path) -> None:
    save_weights(tmp_path / "renamed.safetensors", {f"x.{k}": v for k, v in load_file(weights).items()})
    model = on_meta()
    load_weights(
        model, tmp_path / "renamed.safetensors", torch.float32, rename=lambda name: name.removeprefix("x.")
    )
    assert torch.equal(model.head.modulation, load_file(weights)["head.modulation"])
    with pytest.raises(ValueError, match="rename gives 69 tensors only 1 names"):
        load_weights(on_meta(), weights, torch.float32, rename=lambda name: "same")


def test_missing_unexpected_and_misshaped_tensors_are_listed(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights)
    del tensors["blocks.1.ffn.2.bias"]
    tensors |= {"surprise": torch.ones(2), "head.head.bias": torch.ones(17)}
    save_weights(tmp_path / "wrong.safetensors", tensors)
    with pytest.raises(ValueError) as caught:
        load_weights(on_meta(), tmp_path / "wrong.safetensors", torch.float32)
    assert str(caught.value) == (
        f"{tmp_path / 'wrong.safetensors'} does not fit the model: 1 missing: blocks.1.ffn.2.bias; "
        "1 unexpected: surprise; 1 mis-shaped: head.head.bias (17,) instead of (16,); "
        "load it into the model that it was made for"
    )


def test_failed_load_leaves_the_module_as_it_was(weights: Path) -> None:
    model = WanDiT(replace(SMALL, num_layers=3))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(
        ValueError, match="the checkpoint has dim 24 in 2 layers and the model has dim 24 in 3 layers"
    ):
        load_weights(model, weights, torch.float32)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_values_that_are_not_finite_are_found_when_asked(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights)
    tensors["head.head.bias"][3] = 70_000.0
    save_weights(tmp_path / "large.safetensors", tensors)
    load_weights(on_meta(), tmp_path / "large.safetensors", torch.bfloat16, check_finite=True)
    with pytest.raises(ValueError, match=r"head.head.bias has values that are not finite in torch.float16"):
        load_weights(on_meta(), tmp_path / "large.safetensors", torch.float16, check_finite=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_in_the_place_of_weights_are_refused(
    weights: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = load_file(weights)
    tensors["head.head.bias"] = tensors["head.head.bias"].to(dtype)
    save_weights(tmp_path / "whole.safetensors", tensors)
    with pytest.raises(
        ValueError,
        match=rf"whole.safetensors holds head.head.bias in {dtype} and the model has torch.float32",
    ):
        load_weights(on_meta(), tmp_path / "whole.safetensors", torch.float32)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("names", [["first.weight"], ["second.weight"], ["first.weight", "second.weight"]])
def test_tied_parameters_stay_tied(tmp_path: Path, names: list[str]) -> None:
    tensor = torch.randn(3, 3)
    save_weights(tmp_path / "tied.safetensors", {name: tensor.clone() for name in names})
    with torch.device("meta"):
        module = Tied()
    load_weights(module, tmp_path / "tied.safetensors", torch.float32)
    assert module.first.weight is module.second.weight and torch.equal(module.first.weight, tensor)


def test_buffer_that_no_checkpoint_holds_is_reported(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("table", torch.ones(2), persistent=False)
    save_weights(tmp_path / "linear.safetensors", nn.Linear(2, 2).state_dict())
    with pytest.raises(RuntimeError, match="buffers table are in no checkpoint; build them outside the meta"):
        load_weights(module, tmp_path / "linear.safetensors", torch.float32)


def test_saved_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "n": torch.arange(4)}
    save_weights(tmp_path / "a.safetensors", tensors, {"note": "x"})
    back, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt", "note": "x"}
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


PEAK = """
import os, sys, torch
from pathlib import Path
from rfengine.checkpoint.loader import load_weights
from rfengine.config import WanConfig
from rfengine.models.dit import WanDiT

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

path = Path(sys.argv[1])
for dtype in (torch.bfloat16, torch.float32):
    if child := os.fork():  # each in a process of its own, where no freed memory hides the next load
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
        continue
    with torch.device("meta"):
        model = WanDiT(WanConfig(dim=1024, ffn_dim=2048, num_heads=8, num_layers=3))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present
    before = status("VmRSS")
    load_weights(model, path, dtype, "cpu")
    print((status("VmHWM") - before) / path.stat().st_size, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_loading_never_holds_the_weights_twice(tmp_path: Path) -> None:
    """Peak memory above the start, in file sizes, for a file of about 200 MB in float32."""
    path = tmp_path / "large.safetensors"
    shapes = expected_transformer_shapes(WanConfig(dim=1024, ffn_dim=2048, num_heads=8, num_layers=3))
    save_weights(path, {name: torch.ones(shape) for name, shape in shapes.items()})
    assert path.stat().st_size > 180_000_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    cast, same = map(float, done.stdout.split())
    assert 0.4 < cast < 0.7
    assert 0.9 < same < 1.3


def test_configuration_survives_the_disk(tmp_path: Path) -> None:
    for config in PRESETS.values():
        write_config(tmp_path, config)
        assert read_config(tmp_path) == config


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
            read_config(tmp_path)


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
            read_config(tmp_path) if name == "rfengine.json" else read_json(path)


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
                read_config(copy)
            assert str(caught.value).startswith(f"{path.parent}: ") and key in str(caught.value)


def test_diffusers_directory_loads_directly(
    diffusers_directory: Path, parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = read_config(diffusers_directory)
    assert "names no cache; EMA-Sink is taken" in caplog.text
    assert config.name == "wan-dim128-layers30" and config.model.num_heads == 1
    with torch.device("meta"):
        modules = (WanDiT(config.model), WanVAE(config.vae), build_umt5(config.text))
    for part, module in zip(parts, modules, strict=True):
        load_part(module, diffusers_directory, part, torch.float32)
        assert len(dict(module.named_parameters())) == len(parts[part])
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, parts[part][name]), name
    text = modules[2]
    assert text.shared.weight is text.encoder.embed_tokens.weight


def test_original_directory_loads_directly_as_far_as_it_is_safetensors(
    wan_directory: Path, tmp_path: Path, parts: Parts, write_file: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    write_file(tmp_path / "Wan2.1_VAE.safetensors", parts["vae"])
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / name).symlink_to(wan_directory / name)
    with pytest.raises(ValueError, match=r"text_dim of the model is 32, the text encoder gives 4096"):
        read_config(tmp_path)
    with torch.device("meta"):
        model, vae = (
            WanDiT(WanConfig(128, 64, 1, 30, text_dim=32, freq_dim=32)),
            WanVAE(VAEConfig(base_dim=8)),
        )
    load_part(model, tmp_path, "transformer", torch.float32)
    load_part(vae, tmp_path, "vae", torch.float32)
    assert torch.equal(vae.conv1.weight, parts["vae"]["conv1.weight"])
    assert torch.equal(model.head.modulation, parts["transformer"]["head.modulation"])
    with pytest.raises(
        ValueError, match=rf"is a pickle, .* run `rfengine convert {tmp_path} DST` and load DST"
    ):
        load_part(vae, tmp_path, "text_encoder", torch.float32)


def test_absent_part_says_how_to_add_it(tmp_path: Path) -> None:
    write_config(tmp_path, PRESETS["tiny"])
    with pytest.raises(ValueError, match="has no vae; run `rfengine convert SRC DST --base WAN`"):
        load_part(nn.Linear(1, 1), tmp_path, "vae", torch.float32)
    (tmp_path / "rfengine.json").unlink()
    (tmp_path / "Wan2.1_VAE.safetensors").touch()
    with pytest.raises(ValueError, match="has no transformer; give the directory that has it"):
        read_config(tmp_path)


def test_an_absent_tiny_decoder_says_how_to_add_it(tmp_path: Path) -> None:
    write_config(tmp_path, PRESETS["tiny"])
    way = re.escape(f"has no tiny_vae; run `rfengine convert taew2_1.pth DST --base {tmp_path}` and load DST")
    with pytest.raises(ValueError, match=way):
        load_part(nn.Linear(1, 1), tmp_path, "tiny_vae", torch.float32)


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
    assert read_config(directory).tiny_vae == config
    with torch.device("meta"):
        decoder = TinyVAE(config)
    load_part(decoder, directory, "tiny_vae", torch.float32)
    assert all(torch.equal(value, tensors[name]) for name, value in decoder.state_dict().items())
    with torch.device("meta"):
        other = TinyVAE(TinyVAEConfig(widths=(8, 6, 4, 5)))
    with pytest.raises(ValueError, match=r"2 mis-shaped: decoder.20.weight \(4, 4, 3, 3\) instead of \(5, 4"):
        load_part(other, directory, "tiny_vae", torch.float32)


def test_a_pickled_tiny_decoder_stands_in_nobodys_way(diffusers_directory: Path, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(diffusers_directory, directory)
    (directory / "tiny_vae").mkdir()
    (directory / "tiny_vae" / "taew2_1.pth").touch()
    assert fingerprint(directory) == fingerprint(diffusers_directory)
    assert read_config(directory) == read_config(diffusers_directory)
    with pytest.raises(ValueError, match=r"taew2_1.pth is a pickle, .* run `rfengine convert"):
        load_part(nn.Linear(1, 1), directory, "tiny_vae", torch.float32)


def test_part_in_the_wrong_file_is_refused(
    tmp_path: Path, parts: Parts, write_file: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    write_config(tmp_path, PRESETS["tiny"])
    write_file(tmp_path / "vae.safetensors", parts["text_encoder"])
    with pytest.raises(ValueError, match=r"vae.safetensors holds a text_encoder, not a vae"):
        load_part(nn.Linear(1, 1), tmp_path, "vae", torch.float32)


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WanDiT(SMALL)
    write_config(tmp_path, PRESETS["tiny"])

    def marks() -> tuple[str, str]:
        save_weights(tmp_path / "transformer.safetensors", model.state_dict())
        return fingerprint(model), fingerprint(tmp_path)

    first = marks()
    assert first == marks() and len(first[0]) == 64
    with torch.no_grad():
        model.head.head.weight += 1e-3
    second = marks()
    model.to(torch.bfloat16)
    third = marks()
    assert len({first[0], second[0], third[0]}) == len({first[1], second[1], third[1]}) == 3


def test_fingerprint_of_a_module_does_not_depend_on_the_memory_layout() -> None:
    model = nn.Linear(40, 30)
    mark = fingerprint(model)
    model.weight.data = model.weight.data.T.contiguous().T
    assert fingerprint(model) == mark
