"""doctor: text, JSON and wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rfengine import cli
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.runtime import card_report
from rfengine.runtime.card_presets import Candidate
from rfengine.runtime.memory_plan import MemoryPlan
from support.loras import LAYERS, RANK, pairs, write_lora
from support.models import SMALL
from support.outcome import fails


def test_doctor_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "backends on" in capsys.readouterr().out
    assert cli.main(["doctor", "--json", "--model", "wan-1.3b", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["model"] == "wan-1.3b"


def test_doctor_reports_the_memory_of_loras_or_refuses_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lora(tmp_path / "a.safetensors", pairs(SMALL, LAYERS[:1]))
    doctor = ["doctor", "--model", str(model), "--dtype", "float32", "--lora", f"{path}:0.5"]
    assert cli.main([*doctor, "--json"]) == 0
    host = json.loads(capsys.readouterr().out)["memory"]["host"]
    assert host == {"lora_values": 2 * RANK * 48 * 4, "lora_originals": 48 * 48 * 4}
    assert cli.main(doctor) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {f"{name} 0.0 MiB, in host memory" for name in ("lora values", "lora originals")} <= set(lines)
    assert "does not fit: blocks" in fails(capsys, 2, "doctor", "--lora", path)


def test_doctor_refuses_a_wrong_size_and_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "height is 100 pixels" in fails(capsys, cli.CALLER_ERROR, "doctor", "--height", 100)
    message = fails(capsys, cli.CALLER_ERROR, "doctor", "--model", "wan-14b", "--width", 2**64)
    assert message == "width is 18446744073709551616 pixels; use at most 8192"
    assert "wan-9b" in fails(capsys, cli.CALLER_ERROR, "doctor", "--model", "wan-9b")


def test_doctor_says_which_preset_fits_a_card_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "text_encoder", None)
    doctor = ["doctor", "--model", "wan-1.3b"]
    assert cli.main([*doctor, "--gpu-memory", "12"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "24gb 16gb 12gb 8gb" in lines and "fits no no yes yes" in lines
    assert "--preset auto takes 12gb at 480 x 832 pixels" in lines
    assert cli.main([*doctor, "--gpu-memory", "24", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)["cards"]
    assert cards["takes"] == 0 and cards["refusal"] == ""
    assert [each["fits"] for each in cards["presets"]] == [True] * 4
    assert cards["presets"][0]["needed"] == max(cards["presets"][0]["phases"].values()) + sum(
        cards["presets"][0]["reserve"].values()
    )
    assert cards["presets"][3]["graphs"] == {
        "on": False, "reason": "2 blocks at a time come from host memory"
    }  # fmt: skip


def test_a_card_too_small_for_every_preset_makes_doctor_fail_with_the_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MemoryPlan(
        64, 64, {"transformer": 2**31}, {}, {"loading": 2**31}, {}, {}
    )  # a real one takes seconds
    monkeypatch.setattr(card_report, "planned", lambda preset, config, *_: Candidate(preset, config, plan))
    assert (
        cli.main(["doctor", "--model", "tiny", "--gpu-memory", "1", "--height", "64", "--width", "64"]) == 1
    )
    last = capsys.readouterr().out
    assert "a card of 1.00 GiB is too small for every preset of tiny: 24gb at 64 x 64, the smallest" in last
    assert "needs 2.0 GiB" in last
    assert "take a smaller model or size" in last
    message = fails(capsys, cli.CALLER_ERROR, "doctor", "--gpu-memory", "0")
    assert message == "--gpu-memory is 0.0; it must be at least 0.1"
    assert "streams" in fails(
        capsys, cli.CALLER_ERROR, "doctor", "--model", "skyreels-df-1.3b", "--gpu-memory", "12"
    )


def test_doctor_names_the_file_that_differs_from_the_manifest_until_it_is_renewed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    doctor = ["doctor", "--model", str(directory)]
    assert cli.main(doctor) == 0
    assert "manifest" not in capsys.readouterr().out
    assert cli.main([*doctor, "--renew"]) == 0
    assert "files against manifest.json\n  ok: all 4 are as it says" in capsys.readouterr().out
    content = bytearray((directory / "vae.safetensors").read_bytes())
    content[-3] ^= 16
    (directory / "vae.safetensors").write_bytes(content)
    assert cli.main(doctor) == 1
    assert "files against manifest.json\n  vae.safetensors has another content" in capsys.readouterr().out
    assert cli.main([*doctor, "--json"]) == 1
    files = json.loads(capsys.readouterr().out)["files"]
    assert [name for name, reason in files.items() if reason] == ["vae.safetensors"]
    assert cli.main([*doctor, "--renew"]) == 0


def test_doctor_names_a_damaged_configuration_that_the_manifest_knows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    assert cli.main(["doctor", "--model", str(directory), "--renew"]) == 0
    capsys.readouterr()
    config = directory / "rfengine.json"
    config.write_text(config.read_text().replace('"dim": 48', '"dim": 49'))
    message = fails(capsys, cli.OTHER_ERROR, "doctor", "--model", directory)
    assert "is not a configuration" in message and "rfengine.json has another content" in message


def test_doctor_renews_no_directory_without_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, cli.CALLER_ERROR, "doctor", "--model", tmp_path, "--renew")
    assert "has no rfengine.json" in message and list(tmp_path.iterdir()) == []
    assert "wan-1.3b is no directory" in fails(capsys, 2, "doctor", "--model", "wan-1.3b", "--renew")
