"""Files as people have them, with every name of the small transformer: what open_part makes of each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.weights_file import open_part, open_weights
from rfengine.config import TextConfig, WanConfig

E4 = torch.float8_e4m3fn
CONFIG = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=1)
TEXT = TextConfig(vocab_size=64, dim=32, attention_dim=16, ffn_dim=24, num_heads=2, num_layers=1)


@pytest.fixture(scope="module")
def model() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(CONFIG)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def read(path: Path, use_ema: bool = True) -> dict[str, Tensor]:
    part, stored = open_part([path], use_ema)
    assert part == "transformer"
    return {name: tensor.read() for name, tensor in stored.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "diffusion_model.", "pipe.dit.", "generator_ema.model.", "module.model."],
)
def test_prefixes_of_other_programs_are_read_in_both_formats(
    tmp_path: Path, model: dict[str, Tensor], prefix: str
) -> None:
    save_file(prefixed(prefix, model), tmp_path / "a.safetensors")
    torch.save({"generator": prefixed(prefix, model)}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert_same(read(tmp_path / name), model)


def test_trainers_pickles_are_read(tmp_path: Path, model: dict[str, Tensor]) -> None:
    other = zeros(model)
    for payload in (
        {"ema": model, "model": other, "step": 3},
        {"module": prefixed("module.", model), "global_steps": 3},
        {"generator": prefixed("model.", model), "critic": prefixed("model.", other), "step": 9},
        {
            "generator": other,
            "critic": other,
            "generator_ema": prefixed("model._fsdp_wrapped_module.", model),
        },
    ):
        torch.save(payload, tmp_path / "a.pt")
        assert_same(read(tmp_path / "a.pt"), model)
    torch.save({"ema": other, "model": model}, tmp_path / "a.pt")
    assert_same(read(tmp_path / "a.pt", use_ema=False), model)


def in_fp8(model: dict[str, Tensor], spelling: str) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in model.items():
        if tensor.ndim == 2 and name.endswith("weight"):
            scale = tensor.abs().max() / 448
            tensors |= {name: (tensor / scale).to(E4), name.removesuffix("weight") + spelling: scale}
        else:
            tensors[name] = tensor.clone()
    return tensors


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_is_multiplied_back(
    tmp_path: Path, model: dict[str, Tensor], spelling: str, prefix: str
) -> None:
    tensors = in_fp8(model, spelling)
    save_file(
        prefixed(prefix, tensors | {"scaled_fp8": torch.zeros(2, dtype=E4)}), tmp_path / "a.safetensors"
    )
    exact = {}
    for name in model:
        scale = tensors.get(name.removesuffix("weight") + spelling, torch.ones(()))
        exact[name] = tensors[name].float() * scale
        torch.testing.assert_close(exact[name], model[name], rtol=1 / 16, atol=float(scale) / 512)
    assert_same(read(tmp_path / "a.safetensors"), exact)


def test_the_header_of_a_quantized_file_counts(tmp_path: Path, model: dict[str, Tensor]) -> None:
    layers = {"blocks.0.ffn.0": {"format": "nvfp4"}}
    save_file(model, tmp_path / "a.safetensors", {"_quantization_metadata": json.dumps({"layers": layers})})
    with pytest.raises(ValueError, match="a.safetensors: blocks.0.ffn.0 is quantized as nvfp4"):
        read(tmp_path / "a.safetensors")


def test_the_vocabulary_in_a_text_encoder_of_comfyui_is_left_out(tmp_path: Path) -> None:
    tensors = {name: torch.ones(shape) for name, shape in expected_shapes(TEXT).items()}
    save_file(tensors | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    part, stored = open_part([tmp_path / "a.safetensors"])
    assert part == "text_encoder" and stored.keys() == tensors.keys()


@pytest.mark.parametrize(("save", "suffix"), [(torch.save, "bin"), (save_file, "safetensors")])
def test_shards_of_either_format_are_one_model(
    tmp_path: Path, model: dict[str, Tensor], save: Callable[..., object], suffix: str
) -> None:
    names = sorted(model)
    first, second = tmp_path / f"0.{suffix}", tmp_path / f"1.{suffix}"
    for path, half in ((first, names[:5]), (second, names[5:])):
        save({name: model[name] for name in half}, path)
    stored = open_weights([first, second])
    assert_same({name: tensor.read() for name, tensor in stored.items()}, model)
    with pytest.raises(ValueError, match=f"holds {names[0]}, which another shard holds as well"):
        open_weights([first, first])


def test_errors_name_the_file(tmp_path: Path, model: dict[str, Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 825, 12) + bytes(4096))
    with pytest.raises(ValueError, match="a.safetensors is a GGUF file"):
        open_part([path])
    for tensors, message in (
        ({"layer1.weight": torch.ones(1)}, "names such as layer1.weight belong to no known layout"),
        (prefixed("critic.", model), "holds critic., and which of them is the model is not clear"),
        (model | prefixed("module.", model), "and another tensor both become"),
        (
            model | {"blocks.0.ffn.0.weight": torch.ones(64, 128, dtype=torch.int64)},
            "has int64 where weights",
        ),
    ):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match=f"a.safetensors.* {message}"):
            open_part([path])
