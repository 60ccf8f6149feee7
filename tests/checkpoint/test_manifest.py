"""The manifest: any change of any byte is noticed, and a hostile manifest is refused in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.convert import convert
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.fp8_table import TABLE_FILE, FP8Table
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.manifest import check_sizes, differences, read_manifest, verify, write_manifest
from rfengine.presets import PRESETS


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Something like a checkpoint directory, with its manifest."""
    write_config(tmp_path, PRESETS["tiny"])
    save_weights(tmp_path / "vae.safetensors", {"a": torch.arange(6.0)})
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"pieces")
    write_manifest(tmp_path)
    return tmp_path


def edited(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_the_manifest_of_the_shipped_model_is_up_to_date() -> None:
    tiny = checkpoint_directory("tiny")
    verify(tiny)
    assert read_manifest(tiny).keys() == {
        "rfengine.json", "transformer.safetensors", "vae.safetensors", "text_encoder.safetensors",
        "tiny_vae.safetensors",
    }  # fmt: skip


def test_every_file_of_the_directory_is_listed(directory: Path) -> None:
    (directory / ".hidden").touch()
    (directory / "tensorrt").mkdir()  # what export-vae builds for one machine
    (directory / "tensorrt" / "engine.safetensors").touch()
    (directory / TABLE_FILE).touch()
    write_manifest(directory)
    listed = read_manifest(directory)
    assert listed.keys() == {"rfengine.json", "vae.safetensors", "tokenizer/spiece.model"}
    assert listed["tokenizer/spiece.model"]["size"] == 6
    assert differences(directory) == dict.fromkeys(listed, "")


def test_a_table_that_calibrate_writes_leaves_a_checkpoint_as_it_was(directory: Path) -> None:
    write_manifest(directory)
    for settings in ("1 video", "some videos"):  # calibrated, and calibrated again
        FP8Table("0" * 64, 0.1, (), {}, settings).write(directory / TABLE_FILE)
        verify(directory)
        write_manifest(directory)
    check_sizes(directory)


@pytest.mark.parametrize("name", ["rfengine.json", "vae.safetensors", "tokenizer/spiece.model"])
def test_a_flipped_bit_in_any_file_is_named(directory: Path, name: str) -> None:
    content = bytearray((directory / name).read_bytes())
    content[-1] ^= 1
    (directory / name).write_bytes(content)
    assert differences(directory)[name] == "has another content (sha256)"
    check_sizes(directory)
    with pytest.raises(
        ValueError, match=f"{name} has another content .* run `rfengine doctor --model .* --renew"
    ):
        verify(directory)
    write_manifest(directory)
    verify(directory)


def test_another_size_and_absent_files_are_noticed_in_loading(directory: Path) -> None:
    def load(where: Path) -> object:
        return Checkpoint.open(where).load(lambda: nn.Linear(1, 1), "vae", torch.float32)

    with (directory / "tokenizer" / "spiece.model").open("ab") as file:
        file.write(b"!")
    (directory / "vae.safetensors").unlink()
    message = "vae.safetensors is absent, tokenizer/spiece.model has 7 bytes instead of 6"
    for call in (check_sizes, verify, load):
        with pytest.raises(ValueError, match=message.replace("/", ".")):
            call(directory)


def test_a_source_with_another_size_than_its_manifest_is_not_converted(directory: Path) -> None:
    with (directory / "tokenizer" / "spiece.model").open("ab") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match="spiece.model has 7 bytes instead of 6"):
        convert(directory, directory / "out")
    assert not (directory / "out").exists()


def test_what_loading_reads_and_nobody_listed_fails_verification_alone(directory: Path) -> None:
    save_weights(directory / "tiny_vae.safetensors", {"a": torch.ones(1)})
    (directory / "README.md").write_text("what this is")
    check_sizes(directory)
    with pytest.raises(ValueError, match=r"manifest.json: tiny_vae.safetensors is not listed; get it again"):
        verify(directory)


def test_a_directory_without_manifest_loads_and_cannot_be_verified(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    check_sizes(directory)
    assert differences(directory) is None
    with pytest.raises(ValueError, match="has no manifest.json to verify it by"):
        verify(directory)


def test_links_of_a_download_cache_are_followed(directory: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in directory.glob("*.*"):
        (snapshot / path.name).symlink_to(path)
    (snapshot / "tokenizer").symlink_to(directory / "tokenizer")
    verify(snapshot)


def test_pipes_and_devices_in_the_place_of_files_stop_nothing(directory: Path) -> None:
    (directory / "vae.safetensors").unlink()
    os.mkfifo(directory / "vae.safetensors")
    assert differences(directory)["vae.safetensors"] == "is no ordinary file"
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="manifest.json is a device"):
        check_sizes(directory)


NAMES = [
    "../other.json",
    "/etc/passwd",
    "a//b",
    "./a",
    "a/../b",
    "",
    ".",
    "a\nb",
    "manifest.json",
    "x" * 1001,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_of_the_directory_are_refused(directory: Path, name: str) -> None:
    edited(directory, lambda values: values["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(ValueError, match="manifest.json is damaged: the name .* inside the directory"):
        check_sizes(directory)


WRONG = [None, True, -1, 2**63, 1.0, "1", [], {}, {"size": 1}, {"size": 1, "sha256": "0" * 64, "more": 1}]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_wrong_values_anywhere_in_the_manifest_are_refused(directory: Path, value: object) -> None:
    whole = json.loads((directory / "manifest.json").read_text())
    entry = whole["files"]["rfengine.json"]
    damaged = [
        value, whole | {"format": value}, whole | {"more": value}, {"format": 1},
        *([] if value == {} else [whole | {"files": value}]),
        whole | {"files": {"a": value}}, whole | {"files": {"a": entry | {"size": value}}},
        whole | {"files": {"a": entry | {"sha256": value}}},
    ]  # fmt: skip
    for values in damaged:
        (directory / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"manifest.json is damaged: .* --renew"):
            check_sizes(directory)


def test_text_that_is_no_manifest_is_refused(directory: Path) -> None:
    path = directory / "manifest.json"
    good = path.read_text()
    twice = good.replace('"vae.safetensors"', '"rfengine.json"')
    for text, message in (
        ("", "Expecting value"),
        ("[" * 100_000, "too deep"),
        (twice, "'rfengine.json' twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            check_sizes(directory)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        check_sizes(directory)
    with path.open("wb") as file:
        file.truncate(90_000_000)
    with pytest.raises(ValueError, match="has more than the 10000000 bytes"):
        check_sizes(directory)
