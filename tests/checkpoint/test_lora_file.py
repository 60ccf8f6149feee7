from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rfengine.checkpoint.lora_file import open_lora
from rfengine.checkpoint.tensor_file import StoredTensor, write_safetensors

NAMES = [f"base_model.model.blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
TENSORS = {name: torch.ones(2, 2) for name in NAMES}
CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8})


def write(path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {name: StoredTensor.of(tensor) for name, tensor in TENSORS.items()}, metadata)
    return path


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_directory_and_file_are_the_same_adapter(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    (tmp_path / "adapter_config.json").write_text(CONFIG)
    for path in (tmp_path, tmp_path / name):
        opened = open_lora(path)
        assert opened.label == str(tmp_path / name) and opened.tensors.keys() == TENSORS.keys()
        assert [each.scale(("blocks.0.ffn.0",), 2) for each in opened.statements] == [4.0]


def test_pickle_in_a_directory_is_read_with_its_config(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(CONFIG)
    opened = open_lora(tmp_path)
    assert opened.tensors.keys() == TENSORS.keys() and opened.statements[0].alpha == 8.0


def test_config_and_header_are_both_stated(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", {"lora_alpha": "16"})
    (tmp_path / "adapter_config.json").write_text(CONFIG)
    assert [each.alpha for each in open_lora(tmp_path).statements] == [8.0, 16.0]


def test_links_of_a_cache_go_by_the_name_as_given(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "5e9f"
    write(blobs / "aaaa")
    (blobs / "bbbb").write_text(CONFIG)
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_model.safetensors").symlink_to(blobs / "aaaa")
    (snapshot / "adapter_config.json").symlink_to(blobs / "bbbb")
    for path in (snapshot, snapshot / "adapter_model.safetensors"):
        assert open_lora(path).statements[0].alpha == 8.0
    (blobs / "bbbb").unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json is a link to a file that is not there"):
        open_lora(snapshot)


def test_content_and_not_the_suffix_says_the_format(tmp_path: Path) -> None:
    torch.save({"generator_lora": TENSORS}, tmp_path / "lora.safetensors")
    assert open_lora(tmp_path / "lora.safetensors").tensors.keys() == TENSORS.keys()
    write(tmp_path / "lora.pt", {"lora_alpha": "16"})
    assert open_lora(tmp_path / "lora.pt").statements[0].alpha == 16.0


def test_directory_without_or_with_two_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors .* \(it holds nothing\)"):
        open_lora(tmp_path)
    write(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"\(it holds style.safetensors\); give the file of the LoRA itself"):
        open_lora(tmp_path)
    write(tmp_path / "adapter_model.safetensors")
    write(tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors and pytorch_lora_weights.safetensors; gi"
    ):
        open_lora(tmp_path)


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.safetensors does not exist"):
        open_lora(tmp_path / "no.safetensors")
