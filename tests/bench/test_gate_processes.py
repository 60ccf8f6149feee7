"""Parts of the gate as processes: what becomes of one that raises, hangs, prints garbage or is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gpu_gate
import pytest
from gate.part import Setting
from gate.processes import ProcessFailedError, run_part, stream_lines
from gate.record import Record, read_line
from gate.summary import summarise

BEGIN = "import json, os, sys, time\ntell = lambda **told: print(json.dumps(told), flush=True)\n"


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "gate.json", {"self_check": False})


def saved(record: Record) -> dict[str, Any]:
    """What is in the file, read as strictly as JSON is written."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(record.path.read_text(), parse_constant=refuse)


def run_script(record: Record, script: str, seconds: float = 20.0, silent_share: float = 0.9) -> Any:
    """Run a part that is this Python; returns what of it is in the file."""
    command = [sys.executable, "-c", BEGIN + script, str(record.path)]
    run_part(record, "part", command, time.monotonic() + seconds, silent_share)
    return saved(record)["parts"]["part"]


def test_what_a_part_tells_is_kept(record: Record) -> None:
    part = run_script(record, "tell(begun='a'); tell(item='a', ms=2); tell(ended='a', state='done')")
    assert part == {"items": {"a": "done"}, "results": [{"item": "a", "ms": 2}]}


def test_a_part_that_raises_keeps_what_it_told(record: Record) -> None:
    part = run_script(record, "tell(begun='a'); tell(item='a', ms=2); raise ValueError('out of luck')")
    assert part["items"] == {"a": "broken"}
    assert part["results"][0] == {"item": "a", "ms": 2}
    assert part["results"][1]["items"] == ["a"]
    assert "exit 1" in part["results"][1]["failed"] and "out of luck" in part["results"][1]["failed"]


def test_a_part_that_hangs_is_killed_at_its_limit_with_all_it_started(record: Record) -> None:
    sleeper = "import subprocess; child = subprocess.Popen(['sleep', '300'])\n"
    started = time.monotonic()
    script = sleeper + "tell(begun='a'); tell(item='a', child=child.pid); time.sleep(300)"
    part = run_script(record, script, seconds=7, silent_share=2)
    assert time.monotonic() - started < 30
    assert part["items"] == {"a": "broken"}
    assert "its share of the time" in part["results"][-1]["failed"]
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # a killed process is there until it is waited for
            os.kill(part["results"][0]["child"], 0)
            time.sleep(0.1)


def test_a_silent_part_is_ended_and_goes_on_behind_what_it_hung_in(record: Record) -> None:
    script = """
for item in "abc":
    if item in json.load(open(sys.argv[1]))["parts"].get("part", {}).get("items", {}):
        continue
    tell(begun=item)
    if item == "b":
        time.sleep(300)
    tell(ended=item, state="done")
"""
    part = run_script(record, script, seconds=30, silent_share=0.15)
    assert part["items"] == {"a": "done", "b": "broken", "c": "done"}
    (failure,) = part["results"]
    assert failure["items"] == ["b"] and "without a word" in failure["failed"]


def test_an_item_may_have_a_share_of_silence_of_its_own(record: Record) -> None:
    """Loading tells of every contest, so it is known to hang long before its part's time is up."""
    script = """
for item, share in (("load", 0.05), ("frames", None)):
    if item in json.load(open(sys.argv[1]))["parts"].get("part", {}).get("items", {}):
        continue
    tell(**{"begun": item} | ({"silent_share": share} if share else {}))
    time.sleep(300 if item == "load" else 1.5)
    tell(ended=item, state="done")
"""
    started = time.monotonic()
    part = run_script(record, script, seconds=20, silent_share=0.9)
    assert time.monotonic() - started < 15
    assert part["items"] == {"load": "broken", "frames": "done"}
    assert part["results"][0]["failed"] == "ended after 1 s without a word"


def test_how_many_items_were_chosen_is_counted_over_all_processes(record: Record) -> None:
    for _ in range(2):
        part = run_script(record, "tell(chosen=3); tell(begun='a'); tell(ended='a', state='done')")
    assert part["chosen"] == 6 and part["results"] == []


def test_a_part_that_prints_garbage_leaves_json(record: Record) -> None:
    script = """
os.write(1, b"\\xff\\xfe no text\\n{not json}\\n[1, 2]\\n42\\n{\\"begun\\": 7}\\n")
tell(begun="a"); tell(item="a", ms=float("nan"), rate=float("inf")); tell(ended="a", state="done")
os.write(1, b'{"ended": "never begun", "state": "done"}\\n{"cut off": ')
"""
    part = run_script(record, script)
    assert part["items"] == {"a": "done", "never begun": "done"}
    assert {"item": "a", "ms": None, "rate": None} in part["results"]
    assert sum("no_result" in result for result in part["results"]) == 3


def test_a_part_that_tells_no_result_at_all_is_a_failure(record: Record) -> None:
    part = run_script(record, "print('all is well')")
    assert part["results"][-1] == {"failed": "told nothing that is a result", "items": []}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_part_killed_by_a_signal_is_told_of(record: Record, number: signal.Signals) -> None:
    part = run_script(record, f"tell(begun='a'); os.kill(os.getpid(), {int(number)}); time.sleep(60)")
    assert part["items"] == {"a": "broken"}
    assert part["results"][-1]["failed"].startswith(f"signal {number.name}")


def test_a_part_that_dies_before_its_first_item_is_not_tried_for_ever(record: Record) -> None:
    part = run_script(record, "sys.exit('no module')")
    assert len(part["results"]) == 1 and "no module" in part["results"][0]["failed"]


def test_a_part_without_time_is_not_started(record: Record) -> None:
    assert run_script(record, "tell(begun='a')", seconds=1)["results"] == [{"failed": "no time was left"}]


def test_what_a_failed_process_last_said_is_kept() -> None:
    with pytest.raises(ProcessFailedError, match=r"exit 3: .*the last words"):
        script = "import sys; print('the last words', file=sys.stderr); sys.exit(3)"
        list(stream_lines([sys.executable, "-c", script], 30, 30))


def test_a_record_forgets_an_earlier_run_of_its_name(tmp_path: Path) -> None:
    Record(tmp_path / "gate.json", {}).mark("device", "copy", "done")
    Record(tmp_path / "gate.json", {})
    setting = Setting("device", True, time.monotonic() + 60, tmp_path / "gate.json")
    assert not setting.taken


def test_faulty_parts_do_not_hurt_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole gate, over a script in the place of gate_parts.py that goes wrong in many ways."""
    script = (
        BEGIN
        + """
part = sys.argv[1]
tell(begun=part)
if part == "device":
    raise RuntimeError("no such device")
if part == "parity":
    time.sleep(300)
if part == "graphs":
    os.write(1, os.urandom(4000) + b"\\n")
if part == "throughput":
    os.kill(os.getpid(), 11)
if part == "vae":
    tell(item=part, decoder="tiny", ms=7.0, frames=12, graph=True)
tell(ended=part, state="done")
"""
    )
    (tmp_path / "gate_parts.py").write_text(script)
    monkeypatch.setattr(gpu_gate, "BENCH", tmp_path)
    record = Record(tmp_path / "gate.json", gpu_gate.head_of(True, 1, "abc") | {"self_check": False})
    names = ["device", "parity", "graphs", "throughput", "vae"]
    monkeypatch.setitem(gpu_gate.PARTS, "parity", gpu_gate.Part(30, 0.3))
    gpu_gate.run_gate(record, names, 60, True)
    results = saved(record)
    states = {name: results["parts"][name]["items"][name] for name in names}
    assert states == {
        "device": "broken", "parity": "broken", "graphs": "done", "throughput": "broken", "vae": "done",
    }  # fmt: skip
    text, well = summarise(results)
    assert not well
    assert "no such device" in text and "SIGSEGV" in text and "without a word" in text
    assert "met          tiny decoder, ms per chunk: 7.000" in text


def test_values_that_json_lacks_become_null() -> None:
    assert read_line('{"a": NaN, "b": [Infinity, -Infinity, 1.5]}') == {"a": None, "b": [None, None, 1.5]}
    assert read_line("7") is None and read_line("no") is None
