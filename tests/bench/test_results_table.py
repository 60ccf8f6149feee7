"""bench/results/README.md: what it says of runs, what it refuses, and that the committed one is current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from results_table import RESULTS, main, read_runs, render


def run_of(date: str, **changes: Any) -> dict[str, Any]:
    figures = {
        "frames_per_s": 41.25, "chunk_ms_p50": 290.0, "chunk_ms_p99": 300.0, "chunks": 30,
        "first_frame_ms": 512.0, "weights": "random",
    }  # fmt: skip
    return {
        "self_check": False, "date": date, "minutes": 8.0, "device": "GPU X", "commit": "abc",
        "torch": "2.11", "triton": "3.6", "cuda": "13.0", "cudnn": 91000, "driver": "580.1",
        "before": {"sm_clock_mhz": 1980.0}, "after": {},
        "parts": {
            "throughput": {"items": {"frames": "done"}, "results": [{"frames": figures}], "seconds": 90.0},
            "vae": {"items": {"tiny": "broken"}, "results": [{"failed": "a | b\nc", "items": ["tiny"]}]},
        },
    } | changes  # fmt: skip


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_goals_are_told_as_met_missed_and_not_measured(tmp_path: Path) -> None:
    write(tmp_path, "a.json", run_of("2026-11-20 10:00 UTC"))
    lines = render(read_runs(tmp_path)).splitlines()
    assert "| 4 | frames per second, full VAE | at least 36 | 41.250 | met (random) |" in lines
    assert "| 4 | first frame, ms | at most 400 | 512.000 | NOT met |" in lines
    assert "| 5 | tiny decoder, ms per chunk | at most 8 |  | not measured |" in lines
    assert "- throughput: 1 done in 90 s" in lines
    assert "1 failures; the first: FAILED vae, tiny: a / b c" in lines
    assert any("commit `abc`" in line and "sm_clock_mhz 1980.0; after: unknown" in line for line in lines)


def test_the_newest_run_comes_first(tmp_path: Path) -> None:
    for name, date in (("a", "2026-11-20"), ("b", "2026-12-01"), ("c", "2026-11-30")):
        write(tmp_path, f"{name}.json", run_of(date))
    assert list(read_runs(tmp_path)) == ["b.json", "c.json", "a.json"]


def test_without_a_run_nothing_is_claimed(tmp_path: Path) -> None:
    assert "every GPU figure of this project is unmeasured" in render(read_runs(tmp_path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "a.json is no JSON"),
        ([1], "a.json holds no results of gpu_gate.py"),
        ({"parts": {}}, "a.json holds no results of gpu_gate.py"),
        (run_of("2026-11-20", self_check=True), "a.json is a self-check"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, told: str) -> None:
    write(tmp_path, "a.json", content)
    with pytest.raises(ValueError, match=told):
        read_runs(tmp_path)


def test_the_committed_table_says_what_the_committed_files_say() -> None:
    assert (RESULTS / "README.md").read_text() == render(read_runs(RESULTS))


def test_a_table_out_of_date_is_told_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["results_table.py", "--folder", str(tmp_path), *arguments])
        return main()

    write(tmp_path, "a.json", run_of("2026-11-20"))
    assert run("--check") == 1
    assert "out of date" in capsys.readouterr().err
    assert run() == 0
    assert run("--check") == 0
    write(tmp_path, "b.json", "no")
    assert run() == 2
    assert capsys.readouterr().err.startswith("results_table: b.json is no JSON")
