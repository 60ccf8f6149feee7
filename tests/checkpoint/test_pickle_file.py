from __future__ import annotations

import os
import random
import re
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from rfengine.checkpoint.pickle_file import LORA_KEYS, MODEL_KEYS, open_pickle


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "attack.pt"
    torch.save({"a": Attack(tmp_path / "trace")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="attack.pt holds more than tensors, and reading it would run code"):
        open_pickle(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_are_read_from_both_torch_formats(tmp_path: Path, zipped: bool) -> None:
    tensor = torch.randn(3, 4)
    torch.save({"a": tensor}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    stored = open_pickle(tmp_path / "a.pt")
    assert stored["a"].shape == (3, 4) and torch.equal(stored["a"].read(), tensor)


def test_first_present_key_is_taken(tmp_path: Path) -> None:
    keys = [*MODEL_KEYS, "other"]
    payload = {key: {"a": torch.full((1,), float(index))} for index, key in enumerate(keys)}
    payload["step"] = 7
    for index, key in enumerate(MODEL_KEYS):
        torch.save(payload, tmp_path / "a.pt")
        assert open_pickle(tmp_path / "a.pt")["a"].read().item() == index
        del payload[key]
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    assert open_pickle(tmp_path / "a.pt")["a"].read().item() == 1
    torch.save(
        {"generator": {"a": torch.ones(1)}, "generator_lora": {"a": torch.zeros(1)}}, tmp_path / "a.pt"
    )
    assert open_pickle(tmp_path / "a.pt", LORA_KEYS)["a"].read().item() == 0


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([torch.ones(1)], "holds a list, not a dictionary of tensors"),
        ({"critic": {"a": torch.ones(1)}, "step": 3}, "has critic, step where tensors are expected"),
        (
            {"generator": {"a": 3}},
            "has a where tensors are expected; .* hold one as generator_ema, generator, model",
        ),
        ({}, "has nothing where tensors are expected"),
        ({3: torch.ones(1)}, "has 3 where tensors are expected"),
    ],
)
def test_other_content_is_explained(tmp_path: Path, payload: object, message: str) -> None:
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        open_pickle(tmp_path / "a.pt")


def test_dictionaries_in_dictionaries_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted, other = {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    for payload in (
        {"ema": wanted, "step": 3},
        {"module": wanted, "global_steps": 3},
        {"state_dict": {"generator": wanted, "critic": other}},
        {"generator": {"module": wanted}, "optimizer": {"state": {}}},
        {"model": other, "ema": {"decay": 0.9, "shadow": wanted}},
    ):
        torch.save(payload, tmp_path / "a.pt")
        assert open_pickle(tmp_path / "a.pt")["a"].read().item() == 1
    assert "a.pt: generator is read, and not critic" in caplog.text
    assert "optimizer" not in caplog.text


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    payload: dict[str, object] = {"a": torch.ones(1)}
    payload["model"] = payload
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt has model where tensors are expected"):
        open_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a", "a.pt.safetensors"])
def test_a_pickle_of_any_name_is_mapped(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / name)
    assert open_pickle(tmp_path / name)["a"].read().tolist() == [0, 1, 2]


def test_a_tensor_that_repeats_its_memory_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"a \(1099511627776,\), which is larger than what the file holds"):
        open_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(2, 2).to_sparse(), "a Tensor in torch.sparse_coo on cpu"),
        (torch.ones(2, device="meta"), "a Tensor in torch.strided on meta"),
    ],
)
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, tensor: torch.Tensor, kind: str) -> None:
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt has a as {kind}, not as a plain tensor"):
        open_pickle(tmp_path / "a.pt")


def test_other_zip_archives_are_named(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "a.pt", weight=numpy.ones(3))
    (tmp_path / "a.pt.npz").rename(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt is a zip archive of weight.npy, not a torch file"):
        open_pickle(tmp_path / "a.pt")
    torch.save({"a": torch.zeros(100)}, tmp_path / "b.pt")
    with (
        zipfile.ZipFile(tmp_path / "b.pt") as plain,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="a.pt is a compressed archive, as torch never writes it"):
        open_pickle(tmp_path / "a.pt")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(ValueError, match="a.pt does not exist"):
        open_pickle(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.pt is empty \(0 bytes\)"):
        open_pickle(path)
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    noise = [random.Random(seed).randbytes(64) for seed in range(40)]
    for content in (whole[: len(whole) // 2], b"hello world, no pickle at all\n", *noise):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.pt is damaged or not a torch file; get it again"):
            open_pickle(path)


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt is safetensors, not a torch pickle; get it as one"):
        open_pickle(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="a.pt is a GGUF file"):
        open_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cpu"])
def test_torch_that_reads_pickles_unsafely_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"torch is {version.replace('+', '.')}; .* from 2.10 on"):
        open_pickle(tmp_path / "a.pt")


def test_pickle_of_another_class_is_refused(tmp_path: Path) -> None:
    torch.save({"args": Namespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt holds more than tensors"):
        open_pickle(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # that of the damaged byte
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bytes_of_chance_in_a_pickle_give_tensors_or_one_sentence(tmp_path: Path, zipped: bool) -> None:
    payload = {"generator_ema": {f"blocks.{index}.w": torch.ones(3, 2) for index in range(3)}, "step": 3}
    path, chance = tmp_path / "a.pt", random.Random(5)
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 2, 4])):
            content[chance.randrange(len(whole))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            open_pickle(path)
        except ValueError as error:
            assert "a.pt" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 30


def test_a_zip_archive_of_several_disks_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1)}, path)
    content = bytearray(path.read_bytes())
    locator = content.rindex(b"PK\x06\x07")
    content[locator + 16] = 9  # the number of disks
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.pt is damaged or not a torch file"):
        open_pickle(path)


def test_a_persistent_id_that_is_no_tuple_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    damaged, count = re.subn(rb"tq.Q", b"K\x01Q", content, count=1, flags=re.DOTALL)  # 1 where a tuple was
    assert count == 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="a.pt is damaged or not a torch file"):
        open_pickle(path)
