"""doctor: text, JSON and wrong input."""

from __future__ import annotations

import json

import pytest

from cli_checks.outcome import fails
from rfengine import cli


def test_doctor_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "backends on" in capsys.readouterr().out
    assert cli.main(["doctor", "--json", "--model", "wan-1.3b", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["model"] == "wan-1.3b"


def test_doctor_refuses_a_wrong_size_and_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "height is 100 pixels" in fails(capsys, cli.CALLER_ERROR, "doctor", "--height", 100)
    assert "wan-9b" in fails(capsys, cli.CALLER_ERROR, "doctor", "--model", "wan-9b")
