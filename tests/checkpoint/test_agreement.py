from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import read_config

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
    read_config(directory)


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
        ({"text.num_layers": 3}, "the checkpoint has dim 96 in 2 layers and the model has dim 96 in 3"),
        ({"text.vocab_size": 4194304}, "1 mis-shaped: shared.weight"),
        ({"text.num_buckets": 64}, "2 mis-shaped: encoder.block.0.layer.0.SelfAttention.relative"),
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
