"""The gate without a GPU: commands that fail, hang or crash, what it reads of them, and its self-check."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_gate
from bench.gpu_gate import Command, Part, Setting, read_json, read_tests, run_gate
from bench.kernel_cases import CASES
from rfengine.benchmark.protocols.plan import protocol_names
from rfengine.benchmark.protocols.table import PROTOCOLS

ROOT = Path(__file__).resolve().parents[2]
BARE_IMAGE = """
import functools, importlib.machinery
ABSENT = "av diffusers hypothesis matplotlib nvtx onnx onnxruntime pytest_benchmark xdist".split()
def find_spec(real, name, path=None, target=None):
    return None if name.split(".")[0] in ABSENT else real(name, path, target)
finder = importlib.machinery.PathFinder
finder.find_spec = functools.partial(find_spec, finder.find_spec)
"""
ONE_PROCESS = """
import contextlib, json, os, runpy, sys
from pathlib import Path
from bench import gpu_gate
os.environ.update(gpu_gate.SMALL_ENVIRONMENT)
from rfengine.benchmark import agreement, comparison, steady, throughput
agreement.checked_chunks = lambda pipeline: 1
comparison.recorded_chunks = steady.recorded_chunks = lambda cache: 1
comparison.ROUNDS = steady.SETTLED_CHUNKS = throughput.PROFILED_CHUNKS = 1
commands, folder = json.loads(sys.argv[1]), sys.argv[2]
for place, (first, *rest) in enumerate(commands):
    sys.argv = [first, *rest] if first != "-m" else rest
    run = runpy.run_path if first != "-m" else runpy.run_module
    with Path(folder, f"{place}.out").open("w") as output, contextlib.redirect_stdout(output):
        try:
            run(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, (sys.argv, ended.code)
"""


def script(name: str, code: str, **options: Any) -> Command:
    return Command(name, (sys.executable, "-c", code), **options)


def run_parts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: dict[str, list[Command]],
    seconds: float = 60.0,
    processes: int = 1,
) -> dict[str, Any]:
    """The record, read from its file, of parts of equal weight that are these commands."""
    made = {
        name: Part(1, lambda _, commands=commands: commands, processes) for name, commands in parts.items()
    }
    monkeypatch.setattr(gpu_gate, "PARTS", made)
    monkeypatch.setattr(gpu_gate, "LAST_SECONDS", 0.0)
    monkeypatch.setattr(gpu_gate, "LEAST_SECONDS", 0.5)
    path = tmp_path / "gate.json"
    run_gate(path, {"parts": {}}, list(parts), seconds, Setting(True, tmp_path))
    return json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(constant))["parts"]


def test_results_are_read_from_the_output_or_from_a_file(tmp_path, monkeypatch):
    figures = tmp_path / "figures.json"
    write = f"open({str(figures)!r}, 'w').write('{{\"ms\": NaN}}'); print('a table')"
    commands = [
        script("lines", "print('{\"a\": 1}'); print('{\"b\": 2}')"),
        script("file", write, json=figures),
    ]
    found = run_parts(tmp_path, monkeypatch, {"one": commands})["one"]
    assert found["commands"]["lines"]["results"] == [{"a": 1}, {"b": 2}]
    assert found["commands"]["file"]["results"] == {"ms": None}
    assert {outcome["state"] for outcome in found["commands"].values()} == {"done"}
    assert (tmp_path / "file.out").read_text() == "a table\n" and found["seconds"] > 0


def test_figures_of_an_earlier_run_are_not_those_of_a_command_that_crashes(tmp_path, monkeypatch):
    figures = tmp_path / "bench.json"
    figures.write_text('{"frames_per_s": 99.0}')
    commands = [script("bench", "raise ValueError('out of memory')", json=figures)]
    found = run_parts(tmp_path, monkeypatch, {"bench": commands})["bench"]["commands"]["bench"]
    assert found["state"] == "failed" and not found["results"]


def test_a_command_that_fails_or_crashes_keeps_its_results_and_costs_no_other(tmp_path, monkeypatch):
    commands = [
        script("raises", "print('{\"a\": 1}'); raise ValueError('out of luck')"),
        script("crashes", "import os; os.kill(os.getpid(), 11)"),
        script("absent", "1 / 0", absence="nvcc is absent"),
        script("runs", "print(7)"),
    ]
    found = run_parts(tmp_path, monkeypatch, {"one": commands})["one"]["commands"]
    assert found["raises"]["state"] == "failed" and found["raises"]["results"] == {"a": 1}
    assert "exit 1" in found["raises"]["reason"] and "out of luck" in found["raises"]["reason"]
    assert found["crashes"]["reason"].startswith("signal SIGSEGV")
    assert found["absent"] == {"state": "not run", "reason": "nvcc is absent"}
    assert found["runs"] | {"seconds": 0} == {"state": "done", "seconds": 0, "results": 7}


def test_a_command_that_hangs_is_killed_with_all_it_started_and_costs_its_part(tmp_path, monkeypatch):
    hang = """
import subprocess, time
print(subprocess.Popen(['sleep', '300']).pid, flush=True)
time.sleep(300)
"""
    parts = {"one": [script("hangs", hang), script("waits", "pass")], "two": [script("runs", "print(7)")]}
    started = time.monotonic()
    found = run_parts(tmp_path, monkeypatch, parts, seconds=4)
    assert time.monotonic() - started < 20
    hung = found["one"]["commands"]["hangs"]
    assert hung["state"] == "cut short" and hung["reason"].startswith("killed after 2 s")
    assert found["one"]["commands"]["waits"] == {"state": "not run", "reason": "no time was left"}
    assert found["two"]["commands"]["runs"]["state"] == "done"
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # a killed process is there until it is waited for
            os.kill(hung["results"], 0)
            time.sleep(0.1)


def test_commands_of_a_part_run_beside_each_other(tmp_path, monkeypatch):
    """Each waits for the file of the other."""
    meet = """
import pathlib, time
pathlib.Path({0!r}).touch()
while not pathlib.Path({1!r}).exists():
    time.sleep(0.01)
"""
    names = [str(tmp_path / name) for name in "ab"]
    commands = [script("a", meet.format(*names)), script("b", meet.format(*reversed(names)))]
    found = run_parts(tmp_path, monkeypatch, {"one": commands}, processes=2)["one"]["commands"]
    assert [outcome["state"] for outcome in found.values()] == ["done", "done"]


def test_the_record_is_whole_after_every_command_and_an_interrupt_kills_what_runs(tmp_path, monkeypatch):
    def interrupt(path: Path, record: dict[str, Any]) -> None:
        save(path, record)
        raise KeyboardInterrupt

    save = gpu_gate.save
    monkeypatch.setattr(gpu_gate, "save", interrupt)
    pid = tmp_path / "pid"
    long = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    with pytest.raises(KeyboardInterrupt):
        wait = f"import os, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.01)"
        run_parts(tmp_path, monkeypatch, {"one": [script("long", long), script("short", wait)]}, processes=2)
    assert list(json.loads((tmp_path / "gate.json").read_text())["parts"]["one"]["commands"]) == ["short"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), signal.SIGCONT)


def test_json_with_other_lines_and_cut_off_lines_is_read():
    assert read_json('{"a": [Infinity, 1.5]}') == {"a": [None, 1.5]}
    assert read_json('a line\n{"a": 1}\n{"cut off": ') == [{"a": 1}]
    assert read_json("") == []


def test_outcomes_of_pytest_are_read_from_a_run_that_ended_and_from_one_that_was_killed(tmp_path):
    text = """
import os, pytest
@pytest.mark.parametrize("size", ["a b"])
def test_passes(size): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_errs(broken): pass
def test_dies():
    if "DIES" in os.environ: os._exit(9)
"""
    path = tmp_path / "test_it.py"
    path.write_text(text)
    call = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull, str(path)]
    environment = os.environ | {"COLUMNS": "300", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    whole, killed = (
        read_tests(subprocess.run(call, capture_output=True, text=True, env=environment | more).stdout)
        for more in ({}, {"DIES": "1"})
    )
    counts = {"passed": 2, "failed": 1, "error": 1, "skipped": 1}
    assert whole | counts == whole and whole["running"] is None and len(whole["failures"]) == 2
    assert whole["failures"][0].endswith("test_fails - assert 1 == 2")
    assert killed | counts | {"passed": 1} == killed and killed["running"].endswith("::test_dies")
    assert [line.split("::")[-1] for line in killed["failures"]] == ["test_fails", "test_errs"]


def test_commands_for_a_gpu_are_made_before_one_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(
        gpu_gate,
        "backend_reasons",
        lambda _: (
            dict.fromkeys(["native", "flash"], "no") | dict.fromkeys(["reference", "triton", "cudnn"], "")
        ),
    )
    monkeypatch.setattr(gpu_gate.shutil, "which", lambda tool: tool)
    made = {name: part.commands(Setting(False, tmp_path, 30)) for name, part in gpu_gate.PARTS.items()}
    for commands in made.values():
        assert len({command.name for command in commands}) == len(commands)
    assert [command.name for command in made["device"]] == ["doctor", "first start", "native build"]
    assert "ARCHS=90a" in made["device"][2].arguments[-1]
    names = {command.name: command for command in made["tests"]}
    assert {"kernels/test_rms_norm", "ops/test_native", "runtime/test_chunk_graphs"} <= names.keys()
    assert "test_grid" not in names and "runtime/test_gpu_stream" not in names
    assert (
        "gpu" in names["ops/test_native"].arguments and "gpu" not in names["kernels/test_rms_norm"].arguments
    )
    assert len(made["parity"]) == 8 and sum(bool(command.absence) for command in made["parity"]) == 3
    assert made["bench"][0].arguments[-4:-2] == ("--chunks", "30")
    protocols = [",".join(gpu_gate.PROTOCOL_COMMANDS[command.name][0]) for command in made["protocols"]]
    assert protocol_names(tuple(protocols)) and set(",".join(protocols).split(",")) == set(PROTOCOLS)
    assert all(
        protocol in command.arguments for protocol, command in zip(protocols, made["protocols"], strict=True)
    )
    latency = next(command for command in made["protocols"] if command.name == "latency")
    assert latency.arguments[-4:-2] == ("--chunks", "100")  # fewer have no 99th percentile
    assert [command.absence for command in made["fp8"]] == ["", "", ""]
    assert all({"--compare", "--precision"} <= {*command.arguments} for command in made["fp8"])
    attention, kernels = (made[name][0].arguments for name in ("attention", "kernels"))
    assert "sink_window_attention_descriptor" in attention and "rms_norm" in kernels
    assert {case.name for case in CASES} <= {*attention} ^ {*kernels}


def test_the_parts_fill_the_minutes_and_leave_cores():
    """Estimates for an H100 with a warm Triton cache, each with 10 s for the start of a process."""
    needs = {
        "device": 10 + 45, "tests": 10 + 50, "parity": 10 + 20, "graphs": 10 + 35, "bench": 10 + 20 + 30 + 60,
    }  # fmt: skip
    seconds = 60 * gpu_gate.MINUTES - gpu_gate.LAST_SECONDS
    assert sum(gpu_gate.PARTS[name].seconds for name in gpu_gate.GATE_PARTS) <= seconds
    assert {*gpu_gate.PARTS} - {"fp8", "protocols"} == {*gpu_gate.GATE_PARTS}
    assert all(gpu_gate.PARTS[name].seconds > needed for name, needed in needs.items())
    assert max(1, (os.cpu_count() or 1) - gpu_gate.CORES_LEFT) >= gpu_gate.WORKERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (["--minutes", minutes], "give more than 0 and at most 1440")
            for minutes in ("0", "nan", "inf", "-1")
        ),
        (["--parts", "device", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu_gate.main(["--self-check", *arguments])
    assert message in capsys.readouterr().err


def test_results_of_a_gpu_need_a_file(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        gpu_gate.main([])
    assert "give --out FILE for the results" in capsys.readouterr().err


def run_in_a_bare_image(folder: Path, *arguments: str) -> None:
    """Run Python on arguments where the packages that a bare CUDA image lacks cannot be found."""
    (folder / "sitecustomize.py").write_text(BARE_IMAGE)
    variables = {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    finished = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=os.environ | variables
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.slow
def test_the_self_check_passes_with_what_a_bare_cuda_image_has(tmp_path):
    """A part with pytest and one with JSON in a file. The others are run below."""
    out = tmp_path / "gate.json"
    parts = ["tests", "attention", "kernels"]
    run_in_a_bare_image(
        tmp_path, "bench/gpu_gate.py", "--self-check", "--out", str(out), "--commit", "abc", "--parts", *parts
    )
    record = json.loads(out.read_text())
    assert record["self_check"] and record["commit"] == "abc" and record["well"]
    assert list(record["parts"]) == parts
    outcomes = {
        name: outcome for part in record["parts"].values() for name, outcome in part["commands"].items()
    }
    assert {outcome["state"] for outcome in outcomes.values()} == {"done"}
    assert outcomes["test_flow_step"]["results"]["passed"] == 3
    for name in ("attention", "kernels"):
        assert [case["wrong"] for case in outcomes[name]["results"]["cases"]] == [""]


@pytest.mark.slow
def test_other_commands_of_the_self_check_pass_with_what_a_bare_cuda_image_has(tmp_path):
    """In one process, which imports torch once; where a benchmark takes or checks many chunks, one is
    enough."""
    setting = Setting(True, tmp_path)
    device, parity, graphs, bench, vae, protocols = (
        gpu_gate.PARTS[name].commands(setting)
        for name in ("device", "parity", "graphs", "bench", "vae", "protocols")
    )
    assert [command.name for command in device] == ["doctor", "first start", "native build"]
    assert device[2].absence in ("a self-check builds nothing", "it is built already")
    commands = [
        command.arguments[1:] for command in (*device[:2], *parity, *graphs, *bench, *vae, *protocols)
    ]
    run_in_a_bare_image(tmp_path, "-c", ONE_PROCESS, json.dumps(commands), str(tmp_path))
    doctor, start, replay, stream = ((tmp_path / f"{place}.out").read_text() for place in range(4))
    assert json.loads(doctor)["packages"]["torch"] == importlib.metadata.version("torch")
    assert read_json(start)["refused"] == {}
    assert read_json(replay)["ok"] and read_tests(stream)["passed"] == 1
    figures = json.loads(bench[0].json.read_text())
    assert figures["model"] == "tiny" and "comparison" in figures
    assert json.loads(vae[0].json.read_text())["model"] == "tiny"
    measured = [record for command in protocols for record in json.loads(command.json.read_text())]
    assert [record["protocol"] for record in measured] == [
        "full-decoder",
        "tiny-decoder",
        "latency",
        "first-frame",
    ]
