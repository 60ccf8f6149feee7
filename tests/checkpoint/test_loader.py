from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rfengine.checkpoint.loader import assign, open_part, open_weights, read_safetensors, save_weights
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.tensor_file import open_safetensors
from rfengine.config import TextConfig, WanConfig
from rfengine.models.dit import WanDiT

SMALL = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=16, freq_dim=8, in_dim=4, out_dim=4)


def on_meta(config: WanConfig = SMALL) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(config)


def load(module: nn.Module, path: Path, dtype: torch.dtype | None, check_finite: bool = False) -> None:
    assign(module, open_safetensors(path), dtype, "cpu", str(path), check_finite)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_weights(tmp_path / "small.safetensors", WanDiT(SMALL).state_dict())
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_weights_are_assigned_in_the_dtype_asked_for(weights: Path, dtype: torch.dtype | None) -> None:
    model = on_meta()
    load(model, weights, dtype)
    stored = load_file(weights)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
        assert torch.equal(parameter, stored[name].to(dtype or torch.float32))


def test_frozen_parameters_stay_frozen(weights: Path) -> None:
    model = on_meta().requires_grad_(False)
    load(model, weights, torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_missing_unexpected_and_misshaped_tensors_are_listed(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights)
    del tensors["blocks.1.ffn.2.bias"]
    tensors |= {"surprise": torch.ones(2), "head.head.bias": torch.ones(17)}
    save_weights(tmp_path / "wrong.safetensors", tensors)
    with pytest.raises(ValueError) as caught:
        load(on_meta(), tmp_path / "wrong.safetensors", torch.float32)
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
        load(model, weights, torch.float32)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_values_that_are_not_finite_are_found_when_asked(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights)
    tensors["head.head.bias"][3] = 70_000.0
    save_weights(tmp_path / "large.safetensors", tensors)
    load(on_meta(), tmp_path / "large.safetensors", torch.bfloat16, check_finite=True)
    with pytest.raises(ValueError, match=r"head.head.bias has values that are not finite in torch.float16"):
        load(on_meta(), tmp_path / "large.safetensors", torch.float16, check_finite=True)


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
        load(on_meta(), tmp_path / "whole.safetensors", torch.float32)


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
    load(module, tmp_path / "tied.safetensors", torch.float32)
    assert module.first.weight is module.second.weight and torch.equal(module.first.weight, tensor)


def test_buffer_that_no_checkpoint_holds_is_reported(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("table", torch.ones(2), persistent=False)
    save_weights(tmp_path / "linear.safetensors", nn.Linear(2, 2).state_dict())
    with pytest.raises(RuntimeError, match="buffers table are in no checkpoint; build them outside the meta"):
        load(module, tmp_path / "linear.safetensors", torch.float32)


def test_saved_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "n": torch.arange(4)}
    save_weights(tmp_path / "a.safetensors", tensors, {"note": "x"})
    back, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt", "note": "x"}
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


PEAK = """
import os, sys, torch
from pathlib import Path
from rfengine.checkpoint.loader import assign
from rfengine.checkpoint.tensor_file import open_safetensors
from torch import nn

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
        model = nn.Sequential(*(nn.Linear(2048, 1024, bias=False) for _ in range(12)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present
    before = status("VmRSS")
    assign(model, open_safetensors(path), dtype, "cpu", "large")
    print((status("VmHWM") - before) / path.stat().st_size, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_loading_never_holds_the_weights_twice(tmp_path: Path) -> None:
    """Peak memory above the start, in file sizes, for a file of 100 MB in float32."""
    path = tmp_path / "large.safetensors"
    save_weights(path, {f"{index}.weight": torch.ones(1024, 2048) for index in range(12)})
    assert path.stat().st_size > 100_000_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    cast, same = map(float, done.stdout.split())
    assert 0.4 < cast < 0.7
    assert 0.9 < same < 1.3


# files as people have them, with every name of a small transformer
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
