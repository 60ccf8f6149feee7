from __future__ import annotations

import os
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch

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
