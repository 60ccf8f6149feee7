from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rfengine.checkpoint.loader import assign, read_safetensors, save_weights
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.tensor_file import open_safetensors
from rfengine.config import WanConfig
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
    assign(model, open_safetensors(path), dtype, "cpu", "large")
    print((status("VmHWM") - before) / path.stat().st_size, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_loading_never_holds_the_weights_twice(tmp_path: Path) -> None:
    """Peak memory above the start, in file sizes, for a file of about 200 MB in float32."""
    path = tmp_path / "large.safetensors"
    shapes = expected_shapes(WanConfig(dim=1024, ffn_dim=2048, num_heads=8, num_layers=3))
    save_weights(path, {name: torch.ones(shape) for name, shape in shapes.items()})
    assert path.stat().st_size > 180_000_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    cast, same = map(float, done.stdout.split())
    assert 0.4 < cast < 0.7
    assert 0.9 < same < 1.3
