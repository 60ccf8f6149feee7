"""The tables of the toy study, against numbers of small sets that are worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rfengine.evaluation.report import Interval, bootstrap_mean
from studies.toy.record import Record, read_records
from studies.toy.setting import OWN_SINK, WITH_EVICTION
from studies.toy.tables import LEAST_MARKED, measure, render, tables

FULL, PAIRED = "Full captions", "Paired differences, full captions"
STAYS = f"a scene that stays, {WITH_EVICTION}"
STUDENTS = "a scene that stays, each student under the sink that it was trained with"
Values = dict[tuple[int, int], dict[str, float]]


def write_clips(
    folder: Path,
    model: str,
    values: Values,
    fidelity: tuple[float, ...] = (),
    captions: str = "full",
) -> None:
    videos = [
        {"prompt": prompt, "seed": seed, "captions": captions, "values": entry}
        for (prompt, seed), entry in values.items()
    ]
    entry = {"kind": "clips", "model": model, "settings": {"steps": 5}}
    entry |= {"fidelity": {captions: list(fidelity)}, "videos": videos}
    (folder / f"clips_{model}.json").write_text(json.dumps(entry))


def write_streams(folder: Path, model: str, sink: str, values: Values, scenario: str = "stays") -> None:
    videos = [
        {"prompt": prompt, "seed": seed, "values": entry, "curves": {"reward": [[0, 0.5]]}}
        for (prompt, seed), entry in values.items()
    ]
    entry = {"kind": "streams", "model": model, "sink": sink, "scenario": scenario}
    entry |= {"settings": {}, "videos": videos}
    (folder / f"streams_{model}_{sink}_{scenario}.json").write_text(json.dumps(entry))


def rewards(*values: float) -> Values:
    """One sampling seed of a prompt each."""
    return {(prompt, 0): {"reward": value} for prompt, value in enumerate(values)}


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The cells of the table below a heading by their row, the heads under ""."""
    part = text.split(f"### {title}\n", 1)[1].split("\n#")[0]
    lines = [line for line in part.splitlines() if line.startswith("|") and "---" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row: rest for row, *rest in cells}


def intervals(records: list[Record], title: str) -> dict[str, dict[str, Interval]]:
    """The numbers of one table by row and column, where there are any."""
    (table,) = [table for table in tables(records) if table.title == title]
    measured = {
        row: {name: measure(samples, name) for name in table.columns} for row, samples in table.rows.items()
    }
    return {row: {name: one for name, one in found.items() if one} for row, found in measured.items()}


def note_of(text: str, title: str) -> str:
    part = text.split(f"### {title}\n", 1)[1].split("\n#")[0]
    (note,) = [line for line in part.splitlines() if line.startswith("n, clusters")]
    return note


def test_sampling_seeds_of_a_prompt_are_one_cluster(tmp_path: Path) -> None:
    first = {(0, seed): {"reward": value} for seed, value in enumerate((0.0, 0.1, 0.2, 0.3))}
    write_clips(tmp_path, "dmd", first | {(1, 0): {"reward": 1.0}})
    records = read_records(tmp_path)
    found = intervals(records, FULL)["dmd"]["reward"]
    expected = bootstrap_mean([0.15, 1.0])  # not the 0.32 of five single videos
    assert found.mean == pytest.approx(0.575) and found.count == 2
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (
        note_of(render(records), "Full captions") == "n, clusters x sampling seeds: 2 x 1 to 4 in every row."
    )


def test_training_seeds_are_pooled_as_clusters_of_their_own(tmp_path: Path) -> None:
    write_clips(tmp_path, "dmd", rewards(0.0, 0.2))
    write_clips(tmp_path, "dmd_seed1", rewards(0.4, 1.0))
    write_clips(tmp_path, "re_dmd_0.5", rewards(0.1, 0.3))
    write_clips(tmp_path, "re_dmd_0.5_seed2", rewards(9.0, 9.0))  # no dmd of this training seed
    records = read_records(tmp_path)
    found = intervals(records, FULL)
    assert found.keys() == {"dmd", "re_dmd_0.5"}
    assert found["dmd"]["reward"].mean == pytest.approx(0.4) and found["dmd"]["reward"].count == 4
    paired = intervals(records, PAIRED)["re_dmd_0.5 minus dmd"]["reward"]
    assert paired.mean == pytest.approx(0.1) and paired.count == 2


def test_pairing_finds_a_difference_that_prompts_would_hide(tmp_path: Path) -> None:
    spread = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    gains = (0.01, 0.02, 0.03, 0.01, 0.02, 0.03)
    write_clips(tmp_path, "dmd", rewards(*spread))
    write_clips(tmp_path, "re_dmd_0.5", rewards(*(a + b for a, b in zip(spread, gains, strict=True))))
    records = read_records(tmp_path)
    found = intervals(records, FULL)
    paired = intervals(records, PAIRED)["re_dmd_0.5 minus dmd"]["reward"]
    expected = bootstrap_mean(gains)
    assert paired.mean == pytest.approx(0.02)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    # unpaired, the intervals overlap
    assert found["re_dmd_0.5"]["reward"].low < found["dmd"]["reward"].high
    cell = rows_of(render(records), "Paired differences, full captions")["re_dmd_0.5 minus dmd"][0]
    assert cell.startswith("**+0.020** [+0.0")


def test_only_videos_that_both_models_have_are_paired(tmp_path: Path) -> None:
    mine = {
        (0, 0): {"reward": 1.0},
        (0, 1): {"reward": 5.0},
        (1, 0): {"agreement": 0.5},
        (2, 0): {"reward": 2.0},
    }
    theirs = {(0, 0): {"reward": 0.5}, (1, 0): {"reward": 0.5, "agreement": 0.25}, (2, 0): {"reward": 1.7}}
    write_clips(tmp_path, "re_dmd_0.2", mine)
    write_clips(tmp_path, "dmd", theirs)
    records = read_records(tmp_path)
    paired = intervals(records, PAIRED)["re_dmd_0.2 minus dmd"]
    assert paired["reward"].mean == pytest.approx((0.5 + 0.3) / 2) and paired["reward"].count == 2
    assert paired["agreement"] == Interval(0.25, None, None, 1)
    text = render(records)
    title = "Paired differences, full captions"
    assert rows_of(text, title)["re_dmd_0.2 minus dmd"][1] == "+25.0"
    assert note_of(text, title).endswith("3 x 1, reward 2 x 1, agreement 1 x 1 in every row.")


def test_bold_needs_an_interval_without_zero_and_enough_clusters(tmp_path: Path) -> None:
    def cell(gains: tuple[float, ...]) -> str:
        write_clips(tmp_path, "dmd", rewards(*[0.0] * len(gains)))
        write_clips(tmp_path, "re_dmd_0.5", rewards(*gains))
        text = render(read_records(tmp_path))
        return rows_of(text, "Paired differences, full captions")["re_dmd_0.5 minus dmd"][0]

    enough = LEAST_MARKED
    assert cell((-0.5, -0.4) * (enough // 2)).startswith("**-0.450** [-0.")
    assert "**" not in cell((-0.5, 0.4) * (enough // 2))
    assert "**" not in cell((-0.5, -0.4) * (enough // 2 - 1))


def test_missing_values_leave_their_cells_columns_and_rows_out(tmp_path: Path) -> None:
    write_clips(tmp_path, "start", {(0, 0): {"reward": 0.5, "colour": None}, (1, 0): {"reward": 0.7}})
    write_clips(tmp_path, "dmd", {(0, 0): {"colour": 1}, (1, 0): {"colour": 0}, (2, 0): {"shape": 1}})
    write_clips(tmp_path, "no_eviction", {(0, 0): {"size": 1}})  # which no table has
    text = render(read_records(tmp_path))
    rows = rows_of(text, "Full captions")
    assert rows[""] == ["reward", "colour, %", "shape, %"] and list(rows) == ["", "start", "dmd"]
    assert rows["start"][1:] == ["-", "-"] and rows["start"][0].startswith("0.600 [0.5")
    assert (
        rows["dmd"][0] == "-" and rows["dmd"][1].startswith("50.0 [0.0, 100.0]") and rows["dmd"][2] == "100.0"
    )
    assert note_of(text, "Full captions") == (
        "n, clusters x sampling seeds: start: 2 x 1; dmd: 3 x 1, colour 2 x 1, shape 1 x 1."
    )
    assert "Open captions" not in text and "Paired" not in text.split("## ", 1)[1] and "Sinks" not in text


def test_fidelity_is_a_mean_over_sampling_seeds_with_its_range(tmp_path: Path) -> None:
    write_clips(tmp_path, "dmd", rewards(0.5), (0.30, 0.50, 0.40))
    write_clips(tmp_path, "re_dmd_0.5", rewards(0.5), (0.20, 0.45, 0.10))
    records = read_records(tmp_path)
    text = render(records)
    assert rows_of(text, "Full captions")["dmd"][1] == "0.4 (0.3 to 0.5)"
    assert note_of(text, "Full captions").endswith("1 x 1, fidelity from 3 values in every row.")
    paired = rows_of(text, "Paired differences, full captions")["re_dmd_0.5 minus dmd"][1]
    assert paired == "-0.15 (-0.3 to -0.05)"  # -0.10, -0.05, -0.30; never bold
    assert intervals(records, FULL)["dmd"]["fidelity"] == Interval(pytest.approx(0.4), 0.3, 0.5, 3)


def test_models_columns_and_pairs_stand_in_the_order_of_the_study(tmp_path: Path) -> None:
    names = (
        "reward",
        "agreement",
        "colour",
        "shape",
        "direction",
        "speed",
        "all",
        "fast",
        "flow_speed",
        "size",
    )
    models = (
        "teacher",
        "re_dmd_0.2",
        "no_eviction",
        "dmd",
        "re_dmd_1",
        "start",
        "re_dmd_0.5",
        "re_dmd_0.5_seed1",
        WITH_EVICTION,
        "sink_none",
    )
    for model in models:
        write_clips(tmp_path, model, {(0, 0): dict.fromkeys(names, 0.5)}, (0.1,))
    text = render(read_records(tmp_path))
    assert text.splitlines()[2] == "Written by python studies/toy/run.py --tables"
    rows = rows_of(text, "Full captions")
    order = ["start", "teacher", "dmd", "re_dmd_1", "re_dmd_0.5", "re_dmd_0.2"]
    order += ["sink_none", WITH_EVICTION, "no_eviction"]
    assert list(rows) == ["", *order]
    assert rows[""] == [
        *("reward", "flow speed", "fidelity", "agreement, %", "colour, %", "shape, %", "direction, %"),
        *("speed, %", "all, %"),
    ]
    paired = [f"{model} minus dmd" for model in ("re_dmd_1", "re_dmd_0.5", "re_dmd_0.2")]
    pairs = rows_of(text, "Paired differences, full captions")
    paired += ["dmd minus start", f"{WITH_EVICTION} minus start", f"dmd minus {WITH_EVICTION}"]
    assert list(pairs) == ["", *paired, f"no_eviction minus {WITH_EVICTION}"]
    assert pairs[""][3] == "agreement, points"


def test_open_captions_have_the_fast_share_and_no_speed(tmp_path: Path) -> None:
    values = {(prompt, 0): {"fast": prompt % 2, "speed": 1, "colour": 1} for prompt in range(4)}
    write_clips(tmp_path, "dmd", values, captions="open")
    text = render(read_records(tmp_path))
    rows = rows_of(text, "Open captions")
    assert rows[""] == ["fast, %", "colour, %"] and rows["dmd"][0].startswith("50.0 [")
    assert "### Full captions" not in text


def test_sinks_stand_below_true_videos_and_are_paired(tmp_path: Path) -> None:
    found = {"none": 0.1, "frozen": 0.2, "ema_0.9": 0.4, "ema_0.99": 0.5, "ema_0.9_bf16": 0.7}
    for sink, value in reversed(found.items()):
        write_streams(tmp_path, WITH_EVICTION, sink, rewards(value, value + 0.1))
    write_streams(tmp_path, WITH_EVICTION, "none", rewards(0.1), "pans")
    write_streams(tmp_path, "world", "true", rewards(0.9, 0.9))
    records = read_records(tmp_path)
    text = render(records)
    assert list(rows_of(text, STAYS)) == ["", "true", *found]
    assert list(rows_of(text, f"a scene that pans, {WITH_EVICTION}")) == ["", "none"]
    assert f"Paired differences, a scene that pans, {WITH_EVICTION}" not in text and "### world" not in text
    ema = ("ema_0.9", "ema_0.99", "ema_0.9_bf16")
    expected = {
        f"{sink} minus {other}": found[sink] - found[other] for other in ("frozen", "none") for sink in ema
    }
    expected["ema_0.9_bf16 minus ema_0.9"] = 0.3
    assert list(rows_of(text, f"Paired differences, {STAYS}")) == ["", *expected]
    paired = intervals(records, f"Paired differences, {STAYS}")
    assert {row: cells["reward"].mean for row, cells in paired.items()} == pytest.approx(expected)


def test_students_are_compared_under_the_sink_they_were_trained_with(tmp_path: Path) -> None:
    for sink, values in {"none": (0.2, 0.4), "frozen": (0.5, 0.6), OWN_SINK: (0.9, 0.9)}.items():
        write_streams(tmp_path, WITH_EVICTION, sink, rewards(*values))
    write_streams(tmp_path, "sink_frozen", "frozen", rewards(0.1, 0.4))
    write_streams(tmp_path, "no_eviction", OWN_SINK, rewards(0.3))
    write_streams(tmp_path, "no_eviction", "none", rewards(0.8))
    write_streams(tmp_path, "world", "true", rewards(1.0))
    records = read_records(tmp_path)
    found = intervals(records, STUDENTS)
    assert list(found) == ["sink_frozen", WITH_EVICTION, "no_eviction"]
    assert found[WITH_EVICTION]["reward"].mean == pytest.approx(0.9)
    assert found["no_eviction"]["reward"] == Interval(pytest.approx(0.3), None, None, 1)
    paired = intervals(records, f"Paired differences, {STUDENTS}")
    assert paired[f"sink_frozen minus {WITH_EVICTION}"]["reward"].mean == pytest.approx((-0.8 - 0.5) / 2)


def test_no_record_is_said_in_a_sentence(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []
    assert "No record is there yet." in render([])
