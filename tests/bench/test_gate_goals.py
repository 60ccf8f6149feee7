"""What the results of a gate come to: goals met, missed or not measured, and the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_gate
import pytest
from gate.goals import CACHE_MS, ROW_SHARE, Goal, judge
from gate.record import Record
from gate.summary import summarise
from kernel_cases import CASES_BY_NAME

from rfengine.costs.rates import GPUS
from rfengine.costs.shapes import Shapes


def results_of(**parts: list[dict[str, Any]]) -> dict[str, Any]:
    told = {name: {"items": {}, "results": results} for name, results in parts.items()}
    return {"self_check": False, "parts": told}


def goal(name: str, results: dict[str, Any]) -> Goal:
    (found,) = [one for one in judge(results) if one.name.startswith(name)]
    return found


def row(case: str, contender: str, milliseconds: float, share: float | None = None) -> dict[str, Any]:
    timing = {"median_ms": milliseconds, "p95_ms": milliseconds, "runs": 60}
    shares = {"share_of_copy": share, "share_of_product": 0.5}
    return {"case": case, "candidate": contender, "timing": timing, **shares}


@pytest.mark.parametrize(("own", "met"), [(0.9, True), (1.06, False)])
def test_attention_is_held_against_the_faster_of_its_rivals(own: float, met: bool) -> None:
    rivals = [
        row("sink_window_attention", name, ms)
        for name, ms in (("SDPA cuDNN", 1.5), ("FlashAttention-3", 1.0))
    ]
    slow = row("sink_window_attention", "SDPA efficient", 0.1)  # no rival of this goal
    kernels = [row("sink_window_attention", "rfengine", own), *rivals, slow]
    assert goal("attention", results_of(kernels=kernels)).met is met
    assert goal("attention", results_of(kernels=kernels[:1])).met is None


def test_row_kernel_is_held_against_a_large_copy() -> None:
    for share, met in ((0.85, True), (0.84, False)):
        results = results_of(kernels=[row("rms_norm", "rfengine", 0.01, share)])
        assert goal("rms_norm,", results).met is met


def test_eviction_and_rotation_are_held_against_their_goal_together() -> None:
    def met(*rows: dict[str, Any]) -> bool | None:
        return goal("ema_evict and rephase_keys", results_of(kernels=list(rows))).met

    rephase = row("rephase_keys", "rfengine", CACHE_MS - 0.8)
    assert met(row("ema_evict", "rfengine", 0.8), rephase)
    assert met(row("ema_evict", "rfengine", 0.81), rephase) is False
    assert met(rephase) is None
    assert met(rephase, row("evict_and_rephase", "rfengine", CACHE_MS - 0.1))


def test_the_goal_of_eviction_and_rotation_is_above_their_floor() -> None:
    case = CASES_BY_NAME["evict_and_rephase"]
    floor_ms = case.floor_bytes(Shapes()) / GPUS["h100"].tb_per_s / 1e9
    assert floor_ms < ROW_SHARE * CACHE_MS


def throughput_told(**changes: Any) -> list[dict[str, Any]]:
    figures = {
        "frames_per_s": 40.0, "frames_per_s_without_vae": 60.0, "first_frame_ms": 390.0, "weights": "random",
        "chunks": 40, "chunk_ms_p50": 300.0, "chunk_ms_p99": 310.0, "parts": [],
    } | changes  # fmt: skip
    ratio = {"ratio": {"median": 2.4, "min": 2.3, "max": 2.6}}
    return [{"frames": figures}, {"comparison": {"end_to_end": ratio, "without_vae": ratio}}]


def flat_told(chunks: int, **changes: Any) -> list[dict[str, Any]]:
    flat = {"chunks": chunks, "frames_per_s": 40.0, "chunk_ms_p50": 300.0, "chunk_ms_p99": 320.0}
    grown = {"memory_growth_bytes": 0, "time_growth": 0.01} | changes
    return [{"flat": flat | {"chunks": 25} | grown}, {"flat": flat | grown}]


def test_speed_goals_are_judged_by_what_was_measured() -> None:
    results = results_of(throughput=throughput_told(), flatness=flat_told(1000, memory_growth_bytes=512))
    assert goal("frames per second, full VAE", results).met
    assert goal("frames per second on the way", results).met is False
    assert goal("times as fast", results).met is False
    assert goal("first frame", results).met
    assert goal("p99 over p50", results).met is False  # of the long run
    assert goal("growth of chunk time", results).met
    assert goal("growth of memory", results).met is False


def test_a_short_run_is_told_and_judges_nothing() -> None:
    results = results_of(throughput=throughput_told(), flatness=flat_told(75))
    for name in ("p99 over p50", "growth of chunk time", "growth of memory"):
        assert goal(name, results).met is None
    assert goal("growth of chunk time", results).note == "75 of 1000 chunks were run: +1.00%"


def test_graphs_must_all_be_equal() -> None:
    def told(*equal: bool) -> dict[str, Any]:
        results = [{"item": "shipped bfloat16", "chunks": 30, "equal": one} for one in equal]
        return results_of(graphs=results)

    assert goal("graph replay", told(True, True)).met
    assert goal("graph replay", told(True, False)).met is False
    assert goal("graph replay", told()).met is None
    broken = told(True)
    broken["parts"]["graphs"]["results"].append({"failed": "RuntimeError: no capture"})
    assert goal("graph replay", broken).met is False
    cut_short = told(True)
    cut_short["parts"]["graphs"]["results"].append({"failed": "stopped after 60 s, its share of the time"})
    assert goal("graph replay", cut_short).met
    small = results_of(graphs=[{"item": "small float32", "chunks": 30, "equal": True}])
    assert goal("graph replay", small).met is None


def test_decoders_are_judged_by_their_faster_form() -> None:
    told = [{"decoder": "cudnn", "ms": 120.0}, {"decoder": "cudnn", "ms": 108.0}, {"psnr_db": None}]
    results = results_of(
        vae=[*told, {"decoder": "triton", "psnr_db": 49.0}, {"decoder": "fp8", "psnr_db": 46.0}]
    )
    assert goal("full decoder with cuDNN", results).met
    assert goal("full decoder with FP8", results).met is None
    assert goal("bfloat16 against float32", results).met is False
    assert goal("FP8 against float32", results).met


def test_nothing_is_measured_by_an_empty_run_or_a_self_check() -> None:
    measured = results_of(throughput=throughput_told(), flatness=flat_told(1000))
    for results in (results_of(), measured | {"self_check": True}):
        goals = judge(results)
        assert {one.met for one in goals} == {None}
        assert {one.issue for one in goals} == {3, 4, 5}
        assert all("not measured" in str(one) for one in goals)


def test_summary_tells_of_what_went_wrong(tmp_path: Path) -> None:
    record = Record(tmp_path / "gate.json", {})
    record.note(**gpu_gate.head_of(True, 8, "abc") | {"self_check": False})
    record.mark("tests", "a::b", "failed")
    record.add("tests", {"item": "a::b", "failed": "assert 1 == 2"})
    record.mark("tests", "a::c", "passed")
    record.mark("kernels", "rms_norm", "failed")
    record.add("kernels", {"item": "rms_norm", "failed": "AssertionError: far off"})
    record.mark("parity", "vae triton float32", "done")
    apart = {"ok": False, "max_rel_err": 0.5, "tolerance": 3e-6}
    record.add("parity", {"item": "vae triton float32"} | apart)
    text, well = summarise(record.results)
    assert not well
    assert "1 failed, 1 passed" in text
    assert "FAILED tests, a::b: assert 1 == 2" in text
    assert "FAILED kernels, rms_norm: AssertionError: far off" in text
    assert "APART parity, vae triton float32: 0.5, allowed 3e-06" in text


def test_what_there_was_no_time_for_is_no_failure_and_a_hang_is_one(tmp_path: Path) -> None:
    def results(failed: str) -> dict[str, Any]:
        record = Record(tmp_path / "gate.json", gpu_gate.head_of(True, 8, "abc") | {"self_check": False})
        ratio = dict.fromkeys(("median", "min", "max"), 3)
        record.add("throughput", {"comparison": {"end_to_end": {"ratio": ratio}}})
        record.count("parity", 40)
        for item in ("ema_sink", "vae"):
            record.mark("parity", item, "broken" if item == "vae" else "done")
        record.add("parity", {"failed": failed, "items": ["vae"]})
        record.add("vae", {"failed": "no time was left"})
        return record.results

    text, well = summarise(results("stopped after 23 s, its share of the time"))
    assert well and "FAILED" not in text
    assert "parity      2 of 40 begun: 1 cut short, 1 done" in text and "vae         nothing" in text
    small = results("stopped after 23 s, its share of the time") | {"self_check": True}
    assert summarise(small)[0].endswith("self-check passed, as far as there was time")
    text, well = summarise(results("ended after 12 s without a word"))
    assert not well and "FAILED parity, vae: ended after 12 s without a word" in text
    assert "2 of 40 begun: 1 broken, 1 done" in text


def test_what_was_not_measured_is_no_failure_and_what_was_missed_is() -> None:
    def well(told: list[dict[str, Any]]) -> bool:
        return summarise(gpu_gate.head_of(True, 8, "abc") | results_of(throughput=told))[1]

    comparison = {"end_to_end": {"ratio": {"median": 2.5, "min": 2.4, "max": 2.6}}}
    assert well([{"comparison": comparison}])
    assert not well([{"comparison": comparison}, {"failed": "RuntimeError: no", "item": "frames"}])
    assert not well(throughput_told())  # 40 frames/s are not 46
    assert not well([])
