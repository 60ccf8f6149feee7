"""parity: one JSON line for each file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rfengine import cli
from rfengine.checkpoint.loader import read_safetensors, save_weights
from support.outcome import fails

GOLDEN = Path(__file__).parents[1] / "golden"


def test_parity_prints_one_json_line_for_each_file(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(GOLDEN / name) for name in ("frozen_sink_absolute.safetensors", "vae.safetensors")]
    assert cli.main(["parity", *files, "--device", "cpu", "--dtype", "float32", "--backend", "auto"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == files
    assert [line["kind"] for line in lines] == ["causal", "vae"]
    assert all(line["ok"] and line["max_rel_err"] == max(line["errors"].values()) < 3e-6 for line in lines)
    assert {line["dtype"] for line in lines} == {"float32"}


def test_parity_exits_with_1_when_one_file_is_off_or_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, off = GOLDEN / "self_forcing_global.safetensors", tmp_path / "off.safetensors"
    content = bytearray(good.read_bytes())
    content[-1] ^= 0x40  # the exponent of the last value
    off.write_bytes(content)
    assert cli.main(["parity", str(off)]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False

    assert __file__ in fails(capsys, 1, "parity", __file__)


def test_parity_still_replays_the_files_after_a_damaged_one(capsys: pytest.CaptureFixture[str]) -> None:
    good = GOLDEN / "self_forcing_global.safetensors"
    assert cli.main(["parity", str(GOLDEN / "no"), str(good)]) == 1
    damaged, replayed = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert damaged["ok"] is False and damaged["max_rel_err"] is None and "does not exist" in damaged["error"]
    assert replayed["ok"] is True and replayed["file"] == str(good)


def test_parity_without_files_or_on_a_missing_backend_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "0 files are given" in fails(capsys, cli.CALLER_ERROR, "parity")
    assert "'native' cannot run on cpu" in fails(
        capsys, cli.OTHER_ERROR, "parity", GOLDEN / "vae.safetensors", "--backend", "native"
    )


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), TypeError("a\nb"), OverflowError("wide")])
def test_every_file_gets_its_line_whatever_goes_wrong(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("rfengine.parity.replay.replay", fail)
    assert cli.main(["parity", "one", "two"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == ["one", "two"]
    assert all(not line["ok"] and line["error"].startswith(type(error).__name__) for line in lines)


def test_what_is_no_file_gets_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, zero = tmp_path / "pipe", tmp_path / "zero"
    os.mkfifo(pipe)
    zero.symlink_to("/dev/zero")
    messages = {
        tmp_path / "no": "does not exist",
        tmp_path: "is a directory",
        pipe: "is a pipe",
        zero: "is a device",
    }
    assert cli.main(["parity", *map(str, messages)]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == list(map(str, messages))
    for line, message in zip(lines, messages.values(), strict=True):
        assert line["ok"] is False and message in line["error"] and line["file"] in line["error"]


@pytest.mark.parametrize("values", [{"seed": "1"}, {"alpha": True}, {"alpha": None}, {"chunks": 10**400}])
def test_a_damaged_header_is_one_line_and_one_sentence(
    values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = read_safetensors(GOLDEN / "ema_sink.safetensors")
    path = tmp_path / "damaged.safetensors"
    save_weights(path, tensors, {"config": json.dumps(json.loads(metadata["config"]) | values)})
    assert cli.main(["parity", str(path)]) == 1
    captured = capsys.readouterr()
    line = json.loads(captured.out)
    assert line["ok"] is False and f"its header's {next(iter(values))}" in line["error"]
    assert captured.err == f"rfengine: error: {line['error']}\n"
