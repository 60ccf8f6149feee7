"""Goals: what a record says of them, its summary, and the committed table of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.goals import RESULTS, Goal, failures_of, judge, main, read_records, render, summarise
from bench.kernel_cases import CASES_BY_NAME
from bench.vae_decoders import FP8_ROW, OURS
from rfengine.costs.rates import GPUS
from rfengine.costs.shapes import Shapes


def record_of(**results: Any) -> dict[str, Any]:
    """A record whose parts have one command of their own name, or those that are given."""
    parts = {
        name: {"commands": {name: {"state": "done", "seconds": 1.0, "results": found}}, "seconds": 90.0}
        for name, found in results.items()
    }
    for name in ("vae", "graphs", "fp8"):
        if name in results:
            commands = {key: {"state": "done", "results": found} for key, found in results[name].items()}
            parts[name] = {"commands": commands, "seconds": 9.0}
    return {
        "self_check": False, "date": "2026-11-20 10:00 UTC", "minutes": 8.0, "device": "X", "commit": "abc",
        "torch": "2.11", "triton": "3.6", "cuda": "13.0", "cudnn": 91000, "driver": "580.1",
        "before": {"sm_clock_mhz": 1980.0}, "after": {}, "parts": parts,
    }  # fmt: skip


def goal(name: str, **results: Any) -> Goal:
    (found,) = [one for one in judge(record_of(**results)) if one.name.startswith(name)]
    return found


def kernels(*rows: tuple[str, str, float], share: float | None = None) -> dict[str, Any]:
    """Results of kernels.py from case, candidate and milliseconds."""
    made = [
        {"case": case, "candidate": candidate, "timing": {"median_ms": ms}, "share_of_copy": share}
        for case, candidate, ms in rows
    ]
    return {"cases": [{"case": row["case"], "wrong": "", "rows": [row]} for row in made]}


BENCH = {
    "frames_per_s": 40.0, "first_frame_ms": 390.0, "weights": "random", "chunks": 100, "chunk_ms_p50": 300.0,
    "chunk_ms_p99": 320.0, "time_growth": 0.01, "memory_growth_bytes": 512,
    "comparison": {"end_to_end": {"ratio": {"median": 2.4, "min": 2.3, "max": 2.6}}},
}  # fmt: skip


@pytest.mark.parametrize(("own", "met"), [(0.9, True), (1.06, False), (None, None)])
def test_attention_is_compared_with_the_faster_of_its_rivals(own, met):
    case = "sink_window_attention"
    rivals = [(case, "SDPA cuDNN", 1.5), (case, "FlashAttention-3", 1.0), (case, "SDPA efficient", 0.1)]
    found = goal("attention", attention=kernels(*rivals, *([] if own is None else [(case, "rfengine", own)])))
    assert found.met is met and found.note == "FlashAttention-3"


@pytest.mark.parametrize(("share", "met"), [(0.85, True), (0.84, False)])
def test_a_row_kernel_is_compared_with_a_large_copy(share, met):
    assert goal("rms_norm,", kernels=kernels(("rms_norm", "rfengine", 0.01), share=share)).met is met


def test_eviction_and_rotation_have_one_goal_above_their_floor():
    def met(*rows: tuple[str, float]) -> bool | None:
        return goal("ema_evict", kernels=kernels(*((case, "rfengine", ms) for case, ms in rows))).met

    assert met(("ema_evict", 0.8), ("rephase_keys", 1.7))
    assert met(("ema_evict", 0.81), ("rephase_keys", 1.7)) is False
    assert met(("rephase_keys", 1.7)) is None
    assert met(("rephase_keys", 1.7), ("evict_and_rephase", 2.4))
    floor_ms = CASES_BY_NAME["evict_and_rephase"].floor_bytes(Shapes()) / GPUS["h100"].tb_per_s / 1e9
    assert floor_ms < 0.85 * 2.5


def test_speed_is_judged_by_what_was_measured():
    met = {name: goal(name, bench=BENCH).met for name in ("frames per second, full", "first frame", "p99")}
    assert met == {"frames per second, full": True, "first frame": True, "p99": False}
    assert goal("frames per second on the way", bench=BENCH).met is False
    ratio = goal("times as fast as the eager", bench=BENCH)
    assert ratio.met is False and ratio.note == "2.30 to 2.60"
    assert goal("chunk with the full VAE", bench=BENCH).met
    assert goal("p99", bench=BENCH | {"chunks": 99}).met is None


def test_fp8_is_judged_beside_the_same_engine_without_it():
    beside = {"comparison": {"end_to_end": {"ratio": {"median": 1.3, "min": 1.2, "max": 1.31}}}}
    both = {"fp8": beside, "fp8 with its decoder": {"frames_per_s": 59.0}}
    assert goal("times as fast in FP8", fp8=both).met
    assert goal("times as fast in FP8", fp8=both).note == "1.20 to 1.31"
    assert goal("frames per second, FP8 with its decoder", fp8=both).met is False
    assert goal("times as fast in FP8", bench=BENCH).met is None


def test_growth_is_judged_over_a_thousand_chunks():
    short, long = BENCH, BENCH | {"chunks": 1000}
    assert goal("growth of chunk time", bench=short).met is None
    assert goal("growth of chunk time", bench=short).note == "over 100 chunks: 0.01"
    assert goal("growth of chunk time", bench=long).met
    assert goal("growth of memory", bench=long).met is False


@pytest.mark.parametrize(
    ("tests", "met"), [({"passed": 3}, True), ({"passed": 2, "failed": 1}, False), ({"running": "a"}, None)]
)
def test_graphs_must_all_be_equal(tests, met):
    assert goal("graph replay", graphs={"stream": tests}).met is met


def test_decoders_are_judged_by_their_faster_form_and_their_worst_frames():
    def rows(ms: float, db: float) -> dict[str, Any]:
        names = (OURS, f"{OURS}, CUDA graph", FP8_ROW)
        return {
            "decoders": [{"decoder": name, "chunk_ms": ms + n, "psnr_db": db} for n, name in enumerate(names)]
        }

    vae = {"triton": rows(91.0, 49.0), "cudnn": rows(109.0, 52.0)}
    assert goal("full decoder with cuDNN", vae=vae).reached == 109.0
    assert goal("full decoder with Triton", vae=vae).met is False
    assert goal("full decoder with FP8", vae=vae).reached == 93.0
    assert goal("tiny decoder", vae=vae).met is None
    assert goal("bfloat16 from float32", vae=vae).met is False


def test_nothing_is_measured_by_an_empty_record_or_a_self_check():
    for record in (record_of(), record_of(bench=BENCH) | {"self_check": True}):
        assert {one.met for one in judge(record)} == {None}
        assert all("not measured" in str(one) for one in judge(record))


def with_outcome(record: dict[str, Any], part: str, command: str, **outcome: Any) -> dict[str, Any]:
    record["parts"].setdefault(part, {"commands": {}})["commands"][command] = outcome
    return record


def test_the_summary_names_what_went_wrong_and_running_out_of_time_is_no_failure():
    met = {"comparison": {"end_to_end": {"ratio": dict.fromkeys(("median", "min", "max"), 3)}}}
    record = record_of(bench=met)
    with_outcome(
        record, "tests", "kernels/test_x", state="cut short", reason="killed after 70 s: a", results=[]
    )
    with_outcome(record, "vae", "cudnn", state="not run", reason="no time was left")
    text, well = summarise(record)
    assert well and "FAILED" not in text and "1 cut short" in text and "not run: no time was left" in text
    tests = {"passed": 7, "failed": 1, "failures": ["FAILED a::b - assert 1 == 2"]}
    with_outcome(record, "tests", "kernels/test_y", state="failed", reason="exit 1: x", results=tests)
    with_outcome(record, "kernels", "kernels", state="failed", reason="signal SIGSEGV: y", results=[])
    text, well = summarise(record)
    assert not well and "tests: 7 passed, 1 failed, 0 skipped" in text
    assert failures_of(record) == [
        "FAILED tests, FAILED a::b - assert 1 == 2", "FAILED kernels, kernels: signal SIGSEGV: y"
    ]  # fmt: skip


def test_a_missed_goal_and_a_record_without_a_met_one_are_not_well():
    assert not summarise(record_of(bench=BENCH))[1]  # 40 frames/s are not 46
    assert not summarise(record_of())[1]


def test_protocols_alone_have_no_goals_and_are_well_unless_they_fail_or_none_was_run():
    record = record_of() | {"parts": {}}
    with_outcome(record, "protocols", "transformer", state="not run", reason="no time was left")
    assert summarise(record)[1] is False
    with_outcome(record, "protocols", "file", state="done", results=[])
    assert summarise(record)[1]
    with_outcome(record, "protocols", "clips", state="failed", reason="exit 1: a", results=[])
    assert not summarise(record)[1]


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_committed_text_shows_goals_met_missed_and_not_measured(tmp_path):
    record = record_of(bench=BENCH | {"first_frame_ms": 512.0})
    with_outcome(record, "vae", "cudnn", state="failed", reason="exit 1: a | b", results=[])
    write(tmp_path, "a.json", record)
    lines = render(read_records(tmp_path)).splitlines()
    assert "met: frames per second, full VAE, at least 36, reached 40.000 (random)" in lines
    assert "NOT met: first frame, ms, at most 400, reached 512.000" in lines
    assert "not measured: tiny decoder, ms per chunk, at most 8" in lines
    assert "bench     1 done; 90 s" in lines
    assert "FAILED vae, cudnn: exit 1: a | b" in lines
    assert any(line.startswith("X; torch 2.11, Triton 3.6, CUDA 13.0") and "abc" in line for line in lines)


def test_the_newest_record_comes_first_and_without_one_nothing_is_claimed(tmp_path):
    assert "every GPU figure of this project is unmeasured" in render(read_records(tmp_path))
    for name, date in (("a", "2026-11-20"), ("b", "2026-12-01"), ("c", "2026-11-30")):
        write(tmp_path, f"{name}.json", record_of() | {"date": date})
    assert list(read_records(tmp_path)) == ["b.json", "c.json", "a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json is no JSON"),
        ([1], "a.json holds no results of gpu_gate.py"),
        ({"parts": {}}, "a.json holds no results of gpu_gate.py"),
        (record_of() | {"self_check": True}, "a.json is a self-check"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    write(tmp_path, "a.json", content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path)


def test_the_committed_table_says_what_the_committed_records_say():
    assert (RESULTS / "README.md").read_text() == render(read_records(RESULTS))


def test_a_table_out_of_date_is_reported_and_written_again(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["goals.py", "--folder", str(tmp_path), *arguments])
        return main()

    write(tmp_path, "a.json", record_of())
    assert run("--check") == 1
    assert "out of date" in capsys.readouterr().err
    assert run() == 0
    assert run("--check") == 0
    write(tmp_path, "b.json", "no")
    assert run() == 2
    assert capsys.readouterr().err.startswith("goals: b.json is no JSON")
