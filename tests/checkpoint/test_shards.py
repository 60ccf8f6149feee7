from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rfengine.checkpoint.shards import all_shards, model_files

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
