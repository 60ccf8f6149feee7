"""The commands of the fleet study, at a size that proves nothing but that they run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rfengine.costs.memory import memory_needs
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS
from studies.fleet import measure, run, scenarios
from studies.fleet.capacity import snapshot_bytes
from studies.fleet.measure import RESULTS, MeasureOptions
from studies.fleet.run import RunOptions, read_records
from studies.fleet.service_times import CHUNK_SECONDS, computed


def test_every_scenario_runs_and_gives_the_same_record_again(tmp_path: Path) -> None:
    small = {
        "card": {"most": 2, "seconds": 60.0},
        "admission": {"hours": 0.2, "loads": (8,), "runs": 1},
        "day": {"mean": 2, "rules": (None, 0), "hours": 1.0, "runs": 1},
        "loss": {"kinds": ((24, 8, 10.0),), "viewers": 6, "runs": 1},
        "ten_thousand": {"viewers": 30, "seconds": 260.0},
    }
    assert {*small, "tiny"} == set(scenarios.SCENARIOS)
    for name, given in small.items():
        first, again = (scenarios.SCENARIOS[name](1, **given) for _ in range(2))
        assert json.dumps(first) == json.dumps(again), name
        assert first["rows"], name


def test_a_card_with_too_many_sessions_stalls_for_the_time_that_it_lacks() -> None:
    """Each session gets a chunk of CHUNK_SECONDS in every round of turns, and stands still for the rest."""
    for row in scenarios.card(2, most=4, seconds=600.0)["rows"]:
        round_s = row["sessions"] * computed(row["precision"]).steady_s
        expected = max(0.0, 1 - CHUNK_SECONDS / round_s) * 3600
        assert row["stall_s_an_hour"] == pytest.approx(expected, rel=0.02, abs=20.0)


def test_two_seeds_share_no_run() -> None:
    assert not set(scenarios._seeds(0, 10)) & set(scenarios._seeds(1, 10))


def test_the_command_writes_a_record_and_the_plot_beside_it(tmp_path: Path) -> None:
    for path in RESULTS.glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "tiny.json").unlink()
    run.run(RunOptions(scenario=("tiny",), seed=3, results=tmp_path))
    record = json.loads((tmp_path / "tiny.json").read_text())
    assert record["seed"] == 3 and record["scenario"] == "tiny" and len(record["rows"]) == 12
    assert record["command"] == "python -m studies.fleet.run --scenario tiny --seed 3"
    assert set(record["versions"]) == {"python", "simpy"}
    assert (tmp_path / "fleet.png").read_bytes()[:4] == b"\x89PNG"


def test_one_scenario_elsewhere_is_kept_without_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run(RunOptions(scenario=("tiny",), seed=3, results=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]
    assert "no record of card, admission, day, loss, ten_thousand" in capsys.readouterr().out


def test_the_options_name_every_scenario() -> None:
    assert run.Scenario.__args__ == tuple(scenarios.SCENARIOS)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record of tiny, card, admission.*--scenario tiny card"):
        read_records(tmp_path)


@pytest.fixture
def same_threads() -> Iterator[None]:
    """The command sets torch's threads, of a process that it has to itself."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("same_threads")
def test_the_server_is_measured_and_its_record_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "HEIGHT", 96)
    monkeypatch.setattr(measure, "WIDTH", 160)
    measure.run(MeasureOptions(sessions=(2,), chunks=8, rounds=1, output=tmp_path / "record.json"))
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["alone"]["turn_later_s"]) == 6 and len(record["alone"]["outside_s"]) == 7
    assert set(record["sessions"]) == {"1", "2"} and len(record["sessions"]["2"]["first_fragment_s"]) == 2
    assert all(second > 0 for second in record["sessions"]["2"]["chunk_s"])
    assert record["network"]["enlarged"]["bits_a_second"] > record["network"]["tiny"]["bits_a_second"] > 0
    config, dtype = PRESETS["tiny"], torch.float32
    grid = LatentGrid.of(config)
    needs = memory_needs(config, grid, dtype)
    computed = snapshot_bytes(config, grid, needs, dtype, ahead=False)  # with one thread no stream is
    assert record["snapshot_bytes"] == computed
    times = scenarios.measured(record)
    found = scenarios.predicted(times, 2, 8, 20, 0)
    alone = sum(scenarios.predicted(times, 1, 8, 20, 0)["chunk_s"]) / (20 * 7)
    assert sum(found["chunk_s"]) / len(found["chunk_s"]) == pytest.approx(2 * alone, rel=0.5)


@pytest.mark.parametrize("wrong", [{"chunks": 7}, {"rounds": 0}, {"sessions": ()}, {"threads": 0}])
def test_sizes_that_cannot_be_measured_are_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        measure.run(MeasureOptions(**wrong, output=tmp_path / "record.json"))
    assert not (tmp_path / "record.json").exists()


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        run.run(RunOptions(seed=-1))
