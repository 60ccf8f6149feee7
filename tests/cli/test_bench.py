"""`rfengine bench`: the options reach bench/throughput.py; without a checkout it is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cli_checks.outcome import fails
from rfengine import cli
from rfengine.cli import bench
from rfengine.evaluation.throughput_options import ThroughputOptions


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    import throughput

    seen: list[ThroughputOptions] = []
    monkeypatch.setattr(throughput, "run", lambda options: seen.append(options) or 0)
    given = ["bench", "--plot", "out.png", "--chunks", "4", "--vae", "none", "--no-autotune", "--json", "-"]
    assert cli.main(given) == 0
    assert seen == [
        ThroughputOptions(plot=Path("out.png"), chunks=4, vae="none", autotune=False, json=Path("-"))
    ]


def test_both_command_lines_read_the_same() -> None:
    from command_line import parse_options

    assert parse_options(ThroughputOptions, []) == ThroughputOptions()


def test_without_a_checkout_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "BENCH", tmp_path / "bench")
    assert "needs the folder bench/ of a checkout" in fails(capsys, 1, "bench")
    assert str(tmp_path / "bench") not in sys.path


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "use cpu, cuda or cuda:N" in fails(capsys, 2, "bench", "--device", "tpu")
