from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from rfengine.checkpoint.directories import (
    PARTS,
    CheckpointDirectory,
    all_shards,
    checkpoint_directory,
    inner_directory,
    model_files,
    read_json,
)


def names_of(directory: Path) -> dict[str, list[str]]:
    return {part: [path.name for path in CheckpointDirectory.of(directory).files(part)] for part in PARTS}


def test_original_directory_is_read(wan_directory: Path) -> None:
    assert CheckpointDirectory.of(wan_directory).layout == "wan"
    assert names_of(wan_directory) == {
        "transformer": ["diffusion_pytorch_model.safetensors"],
        "vae": ["Wan2.1_VAE.pth"],
        "text_encoder": ["models_t5_umt5-xxl-enc-bf16.pth"],
        "tiny_vae": [],
    }
    assert CheckpointDirectory.of(wan_directory).tokenizer() == wan_directory / "google" / "umt5-xxl"
    assert CheckpointDirectory.of(wan_directory).settings("transformer")["model_type"] == "t2v"
    assert CheckpointDirectory.of(wan_directory).settings("vae") == {}


def test_diffusers_directory_is_read(diffusers_directory: Path) -> None:
    assert CheckpointDirectory.of(diffusers_directory).layout == "diffusers"
    assert names_of(diffusers_directory) == {
        "transformer": [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)],
        "vae": ["diffusion_pytorch_model.safetensors"],
        "text_encoder": ["model.safetensors"],
        "tiny_vae": [],
    }
    assert CheckpointDirectory.of(diffusers_directory).tokenizer() == diffusers_directory / "tokenizer"
    assert "latents_mean" in CheckpointDirectory.of(diffusers_directory).settings("vae")


def test_parts_of_a_directory_without_transformer_are_found(tmp_path: Path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").touch()
    assert CheckpointDirectory.of(tmp_path).layout == "wan"
    assert names_of(tmp_path) == {
        "transformer": [], "vae": ["Wan2.1_VAE.pth"], "text_encoder": [], "tiny_vae": []
    }  # fmt: skip
    assert CheckpointDirectory.of(tmp_path).tokenizer() is None


@pytest.mark.parametrize(
    "other", ["rfengine.json", "Wan2.1_VAE.pth", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_folder_named_tiny_vae_holds_the_tiny_decoder_in_every_layout(tmp_path: Path, other: str) -> None:
    for name in (other, "tiny_vae/taew2_1.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names_of(tmp_path)["tiny_vae"] == ["taew2_1.safetensors"]


def test_a_tiny_decoder_beside_the_original_files_is_found(tmp_path: Path) -> None:
    for name in ("Wan2.1_VAE.pth", "taew2_1.pth"):
        (tmp_path / name).touch()
    assert names_of(tmp_path)["tiny_vae"] == ["taew2_1.pth"]


def test_a_tiny_decoder_alone_makes_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "taew2_1.pth").touch()
    with pytest.raises(ValueError, match="it holds taew2_1.pth: give that file itself to `rfengine convert`"):
        CheckpointDirectory.of(tmp_path)


def test_safetensors_go_before_a_pickle(tmp_path: Path) -> None:
    for name in ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"):
        (tmp_path / name).touch()
    assert names_of(tmp_path)["vae"] == ["Wan2.1_VAE.safetensors"]


def test_shards_are_found_without_an_index(tmp_path: Path) -> None:
    shards = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for shard in shards:
        (tmp_path / shard).touch()
    assert names_of(tmp_path)["transformer"] == shards
    (tmp_path / shards[1]).unlink()
    with pytest.raises(
        ValueError, match="lacks diffusion_pytorch_model-00002-of-00003.safetensors of 3 shards"
    ):
        CheckpointDirectory.of(tmp_path).files("transformer")


def test_index_names_the_shards_and_stays_inside_the_directory(tmp_path: Path) -> None:
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(ValueError, match="lacks one.safetensors of 1 shards"):
        CheckpointDirectory.of(tmp_path).files("transformer")
    (tmp_path / "one.safetensors").touch()
    assert names_of(tmp_path)["transformer"] == ["one.safetensors"]
    for weight_map in ({"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="has no weight_map of file names beside it"):
            CheckpointDirectory.of(tmp_path).files("transformer")


def test_unknown_directories_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent is not a directory on this machine"):
        CheckpointDirectory.of(tmp_path / "absent")
    with pytest.raises(
        ValueError, match=r"has no rfengine.json, no transformer/ folder and no diffusion_pytorch"
    ):
        CheckpointDirectory.of(tmp_path)
    (tmp_path / "rewardforcing.pt").touch()
    with pytest.raises(
        ValueError, match=r"\(it holds rewardforcing.pt: give that file itself to `rfengine convert`\)"
    ):
        CheckpointDirectory.of(tmp_path)


def test_a_cached_repository_leads_to_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B"
    for name in ("ab12", "cd34"):
        (repository / "snapshots" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has the snapshots ab12, cd34 and refs/main names none; give one"):
        inner_directory(repository)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("cd34\n")
    assert (
        inner_directory(repository) == checkpoint_directory(repository) == repository / "snapshots" / "cd34"
    )
    (repository / "snapshots" / "cd34").rmdir()
    assert inner_directory(repository) == repository / "snapshots" / "ab12"
    assert inner_directory(tmp_path) == tmp_path
    monkeypatch.chdir(repository)
    assert inner_directory(Path(".")) == Path("snapshots/ab12")
    (repository / "Wan2.1_VAE.pth").touch()
    assert inner_directory(repository) == repository


def test_a_link_to_a_file_that_never_came_is_no_absent_part(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    for name in ("Wan2.1_VAE.pth", "google/umt5-xxl", "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to("../blobs/absent")
    message = "is a link to a file that is not there: a download was not finished, so get it again"
    with pytest.raises(ValueError, match=f"Wan2.1_VAE.pth {message}"):
        CheckpointDirectory.of(tmp_path).files("vae")
    with pytest.raises(ValueError, match=f"google/umt5-xxl {message}"):
        CheckpointDirectory.of(tmp_path).tokenizer()
    with pytest.raises(ValueError, match=f"config.json {message}"):
        CheckpointDirectory.of(tmp_path).settings("transformer")


def comfyui(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return directory


def test_the_folders_of_comfyui_are_read(tmp_path: Path) -> None:
    split = comfyui(
        tmp_path / "split_files",
        "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
        "diffusion_models/flux1-dev.safetensors",
        "vae/ae.safetensors",
        "vae/wan_2.1_vae.safetensors",
        "vae/wan2.2_vae.safetensors",
        "text_encoders/umt5_xxl_fp16.safetensors",
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "vae_approx/taew2_1.safetensors",
        "tokenizer/tokenizer.json",
    )
    assert inner_directory(tmp_path) == split and CheckpointDirectory.of(split).layout == "comfyui"
    assert names_of(split) == {
        "transformer": ["wan2.1_t2v_1.3B_fp16.safetensors"],
        "vae": ["wan_2.1_vae.safetensors"],
        "text_encoder": ["umt5_xxl_fp16.safetensors"],
        "tiny_vae": ["taew2_1.safetensors"],
    }
    assert CheckpointDirectory.of(split).tokenizer() == split / "tokenizer"
    split.rename(tmp_path / "models")
    assert inner_directory(tmp_path) == tmp_path / "models"
    (tmp_path / "models").rename(split)
    comfyui(split, "text_encoders/umt5-xxl-enc-bf16.safetensors")
    with pytest.raises(ValueError, match="has umt5-xxl-enc-bf16.safetensors, umt5_xxl_fp16.safetensors, and"):
        CheckpointDirectory.of(split).files("text_encoder")
    comfyui(split, "diffusion_models/wan2.1_t2v_14B_fp16.safetensors")
    assert [path.name for path in CheckpointDirectory.of(split).files("vae")] == ["wan_2.1_vae.safetensors"]


def test_files_of_comfyui_beside_those_of_wan_are_found(tmp_path: Path) -> None:
    comfyui(tmp_path, "diffusion_pytorch_model.safetensors", "wan_2.1_vae.safetensors", "umt5_xxl.gguf")
    assert names_of(tmp_path) == {
        "transformer": ["diffusion_pytorch_model.safetensors"],
        "vae": ["wan_2.1_vae.safetensors"],
        "text_encoder": ["umt5_xxl.gguf"],
        "tiny_vae": [],
    }


def test_json_that_is_none_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert read_json(path) == {}
    for content, message in (
        ("{", "is not valid JSON"),
        ("[1]", "holds a list, not a JSON object"),
        ("", "is not valid"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="config.json is a pipe"):
        read_json(path)
    path.unlink()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="config.json is not UTF-8 at byte 0"):
        read_json(path)


STEM = "diffusion_pytorch_model"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def shards(count: int, variant: str = "", late: str = "", suffix: str = ".safetensors") -> list[str]:
    return [f"{STEM}{variant}-{number:05}-of-{count:05}{late}{suffix}" for number in range(1, count + 1)]


def write_index(folder: Path, names: list[str], name: str) -> None:
    (folder / name).write_text(json.dumps({"weight_map": {str(at): each for at, each in enumerate(names)}}))


def found(folder: Path) -> list[str]:
    return [path.name for path in model_files(folder, STEM)]


@pytest.mark.parametrize(
    ("names", "index"),
    [
        ([f"{STEM}.fp16.safetensors"], ""),
        ([f"{STEM}.SAFETENSORS"], ""),
        ([f"{STEM}.bin"], ""),
        ([f"{STEM}.pth"], ""),
        (shards(2, ".fp16"), f"{STEM}.safetensors.index.fp16.json"),
        (shards(2, ".fp16"), ""),
        (shards(2, "", ".fp16"), ""),
        (shards(6), f"{STEM}.safetensors.index.json"),
        (shards(2, suffix=".bin"), f"{STEM}.bin.index.json"),
        (shards(2, suffix=".bin"), ""),
        (["odd.safetensors"], f"{STEM}.safetensors.index.json"),
    ],
)
def test_every_published_naming_is_found(tmp_path: Path, names: list[str], index: str) -> None:
    touch(tmp_path, *names, "config.json", f"{STEM}_other.safetensors", f"my_{STEM}.safetensors")
    if index:
        write_index(tmp_path, names, index)
    assert found(tmp_path) == names


def test_the_plain_file_goes_before_variants_and_safetensors_before_pickles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, f"{STEM}.bin")
    assert found(tmp_path) == [f"{STEM}.bin"]
    touch(tmp_path, *shards(2, ".fp16"))
    assert found(tmp_path) == shards(2, ".fp16")
    touch(tmp_path, f"{STEM}.safetensors")
    with caplog.at_level(logging.INFO):
        assert found(tmp_path) == [f"{STEM}.safetensors"]
    assert f"{STEM} is read, and not its variant fp16" in caplog.text


def test_several_variants_without_a_plain_file_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors")
    with pytest.raises(ValueError, match="in the variants bf16, fp16 and not plain, so which is meant"):
        found(tmp_path)


def test_of_two_counts_the_whole_one_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, *shards(2), shards(3)[0])
    assert found(tmp_path) == shards(2)
    touch(tmp_path, *shards(3))
    with pytest.raises(ValueError, match="that count 2, 3; keep those of one model"):
        found(tmp_path)


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    index = tmp_path / f"{STEM}.safetensors.index.json"
    for weight_map in (
        {},
        None,
        [],
        {"a": ""},
        {"a": ".."},
        {"a": "x\0"},
        {"a": "b/c.safetensors"},
        {"a": None},
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="has no weight_map of file names beside it"):
            found(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "x" * 3000}}))
    with pytest.raises(ValueError, match="lacks x"):
        found(tmp_path)


def test_a_shard_or_an_index_stands_for_all_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, *shards(3), *shards(2))
    for name in shards(3):
        assert [path.name for path in all_shards(tmp_path / name)] == shards(3)
    assert "is one of 3 shards; all of them are read" in caplog.text
    write_index(tmp_path, shards(3), f"{STEM}.safetensors.index.json")
    assert [path.name for path in all_shards(tmp_path / f"{STEM}.safetensors.index.json")] == shards(3)
    with pytest.raises(ValueError, match="is no shard that .*index.json names"):
        all_shards(tmp_path / shards(2)[0])
    (tmp_path / shards(3)[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks {shards(3)[1]} of 3 shards; get the missing files"):
        all_shards(tmp_path / shards(3)[0])
    assert all_shards(tmp_path / "self_forcing_dmd.pt") == (tmp_path / "self_forcing_dmd.pt",)


def test_a_shard_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    touch(tmp_path, shards(2)[0])
    (tmp_path / shards(2)[1]).symlink_to("absent")
    with pytest.raises(ValueError, match=f"{shards(2)[1]} is a link to a file that is not there"):
        found(tmp_path)
