"""The parts of the toy study: what runs, what is left as it is, what a failure and an interrupt leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from studies.toy.parts import Part, run_parts, study_parts
from studies.toy.setting import CPU, GPU, SIZES, Setting

MAKE = """
import pathlib, sys
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(folder / "order", "a") as order:
    order.write(name + "\\n")
if name.startswith("bad"):
    sys.exit("no luck")
(folder / name).write_text("made")
"""


def part(folder: Path, name: str, *needs: str) -> Part:
    return Part(name, needs, folder / name, lambda setting: None)


def run(folder: Path, *parts: Part, workers: int = 2) -> tuple[list[str], list[str]]:
    """The parts that are missing in the end and the order in which the others were made."""
    reports: list[str] = []
    missing = run_parts(parts, ["-c", MAKE, str(folder)], workers, folder / "output", reports.append)
    order = folder / "order"
    return missing, order.read_text().split() if order.exists() else []


def test_a_part_waits_for_what_it_needs(tmp_path: Path) -> None:
    missing, order = run(tmp_path, part(tmp_path, "c", "b"), part(tmp_path, "b", "a"), part(tmp_path, "a"))
    assert not missing
    assert order == ["a", "b", "c"]


def test_a_part_whose_result_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("from before")
    missing, order = run(tmp_path, part(tmp_path, "a"), part(tmp_path, "b", "a"))
    assert not missing
    assert order == ["b"]
    assert (tmp_path / "a").read_text() == "from before"


def test_a_failure_leaves_out_what_depends_on_it_alone(tmp_path: Path) -> None:
    parts = part(tmp_path, "bad"), part(tmp_path, "worse", "bad"), part(tmp_path, "good")
    missing, order = run(tmp_path, *parts, workers=1)
    assert missing == ["bad", "worse"]
    assert order == ["bad", "good"]
    assert "no luck" in (tmp_path / "output" / "bad.txt").read_text()


def test_an_interrupt_stops_the_processes_that_run(tmp_path: Path) -> None:
    waits = "import pathlib, sys, time; time.sleep(60); (pathlib.Path(sys.argv[1]) / sys.argv[2]).touch()"

    def interrupt(text: str) -> None:
        if "begins" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parts([part(tmp_path, "long")], ["-c", waits, str(tmp_path)], 1, tmp_path / "output", interrupt)
    assert not (tmp_path / "long").exists()


@pytest.mark.parametrize("name", SIZES, ids=lambda name: f"{name} size")
def test_every_part_comes_after_those_it_needs(name: str, tmp_path: Path) -> None:
    parts = study_parts(Setting(SIZES[name], tmp_path / "base", tmp_path, torch.device("cpu"), 1))
    seen: set[str] = set()
    for entry in parts.values():
        assert seen.issuperset(entry.needs), entry.name
        seen.add(entry.name)
    assert len({entry.result for entry in parts.values()}) == len(parts)


def test_the_gpu_size_trains_the_full_grid_three_times(tmp_path: Path) -> None:
    def trained(size) -> list[str]:
        parts = study_parts(Setting(size, tmp_path / "base", tmp_path, torch.device("cpu"), 1))
        return [name for name in parts if name.startswith(("dmd", "re_dmd", "sink", "no_eviction"))]

    sinks = ["sink_none", "sink_frozen", "sink_ema_0.9", "sink_ema_0.99", "sink_ema_0.999"]
    assert trained(CPU) == ["dmd", "re_dmd_0.5", "re_dmd_0.2", "re_dmd_0.05", *sinks, "no_eviction"]
    assert len(trained(GPU)) == 3 * 11
    assert "re_dmd_0.1_seed2" in trained(GPU)
