"""`rfengine bench`: the options reach the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from rfengine import cli
from rfengine.benchmark.options import ThroughputOptions
from rfengine.config import RuntimeConfig
from support.outcome import fails


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from rfengine.benchmark import throughput

    seen: list[ThroughputOptions] = []
    monkeypatch.setattr(throughput, "run", lambda options: seen.append(options) or 0)
    given = ["bench", "--plot", "out.png", "--chunks", "4", "--no-decode", "--no-autotune", "--json", "-"]
    assert cli.main(given) == 0
    assert seen == [
        ThroughputOptions(
            plot=Path("out.png"),
            chunks=4,
            decode=False,
            runtime=RuntimeConfig(autotune=False),
            json=Path("-"),
        )
    ]


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "use cpu, cuda or cuda:N" in fails(capsys, 2, "bench", "--device", "tpu")
