"""The gate without a GPU: its self-check on a bare image, the items of its parts, and its tests part."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_gate
import pytest
import torch
from gate import attention, graphs, kernels, parity, speed, suite, vae
from gate.device import check_corners
from gate.part import AbsentError, Item, Setting, run_items
from gate.record import Record

from rfengine.benchmark.options import ThroughputOptions
from rfengine.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
WHOLE_BENCHES = {"vae"}  # of a model, not of one kernel file
BARE_IMAGE = """
import functools, importlib.machinery, sys
ABSENT = "av diffusers ftfy hypothesis matplotlib nvtx onnx onnxruntime tyro xdist".split()
def find_spec(real, name, path=None, target=None):
    if name.split(".")[0] in ABSENT:
        path = [one for one in (sys.path if path is None else path) if "stand_ins" in one]
    return real(name, path, target)
finder = importlib.machinery.PathFinder
finder.find_spec = functools.partial(find_spec, finder.find_spec)
"""


def run_told(items: list[Item], setting: Setting) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    run_items(items, setting, told.append)
    return told


def small_setting(tmp_path: Path, seconds: float = 60.0) -> Setting:
    return Setting("part", True, time.monotonic() + seconds, tmp_path / "none.json")


@pytest.mark.parametrize("minutes", ["0", "nan", "inf", "-1", "1e308"])
def test_minutes_that_never_begin_or_never_end_are_refused(
    minutes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_gate.py", "--self-check", "--minutes", minutes])
    with pytest.raises(SystemExit):
        gpu_gate.main()
    assert "give more than 0 and at most 1440.0" in capsys.readouterr().err


def test_an_item_that_fails_or_lacks_something_does_not_stop_the_next(tmp_path: Path) -> None:
    def fail() -> Any:
        yield {"ms": 1}
        raise ValueError("it is off")

    def lack() -> Any:
        raise AbsentError("nothing to run it with")

    items = [
        Item("fails", fail),
        Item("lacks", lack),
        Item("long", lambda: [{}], 1e6),
        Item("runs", lambda: [{}]),
    ]
    told = run_told(items, small_setting(tmp_path))
    states = {result["ended"]: result["state"] for result in told if "ended" in result}
    assert states == {"fails": "failed", "lacks": "not run", "long": "not run", "runs": "done"}
    assert {"item": "fails", "ms": 1} in told
    assert {"item": "fails", "failed": "ValueError: it is off"} in told
    assert {"item": "lacks", "not_run": "nothing to run it with"} in told


def test_an_item_that_an_earlier_process_began_is_not_begun_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "gate.json", {})
    record.mark("part", "first", "broken")
    setting = Setting("part", True, time.monotonic() + 60, record.path)
    told = run_told([Item("first", lambda: [{}]), Item("second", lambda: [{}])], setting)
    assert [result["begun"] for result in told if "begun" in result] == ["second"]


def run_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> list[dict[str, Any]]:
    """What the tests part tells of test files, run inside this process' pytest."""
    for name, text in files.items():
        path = tmp_path / "kernels" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "pytest_settings", lambda: "[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(suite, "files_of", lambda _: sorted(tmp_path.rglob("test_*.py")))
    monkeypatch.setattr(suite, "SMALL_COUNT", 100)
    told: list[dict[str, Any]] = []
    suite.run_tests(small_setting(tmp_path), told.append)
    return told


def test_every_test_is_told_of_with_its_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_lacks_a_package(): import no_such_package
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_errs(broken): pass
"""
    unreadable = {"test_lacks.py": "import no_such_package", "test_wrong.py": "1 / 0"}
    told = run_suite(tmp_path, monkeypatch, {"test_a.py": text} | unreadable)
    assert {"chosen": 5} in told
    states = {result["ended"].split("::")[-1]: result["state"] for result in told if "ended" in result}
    assert states == {
        "test_passes": "passed", "test_fails": "failed", "test_lacks_a_package": "not run",
        "test_skipped": "skipped", "test_errs": "failed", "kernels/test_lacks.py": "not run",
        "kernels/test_wrong.py": "failed",
    }  # fmt: skip
    reasons = {result["item"].split("::")[-1]: result for result in told if "item" in result}
    assert "assert 1 == 2" in reasons["test_fails"]["failed"]
    assert reasons["test_lacks_a_package"]["not_run"] == "no_such_package is not installed"
    assert "not today" in reasons["test_skipped"]["skipped"]


def test_shards_share_all_tests_and_those_for_a_gpu_come_first() -> None:
    class Test:
        def __init__(self, nodeid: str, keywords: tuple[str, ...]) -> None:
            self.nodeid, self.keywords, self.path = nodeid, keywords, Path("tests/kernels/test_x.py")

    class BigSetting:
        small, taken = False, frozenset({"2"})

        def __init__(self, shard: int) -> None:
            self.shard = (shard, 3)

    tests = [Test(str(number), ("gpu",) if number > 5 else ()) for number in range(8)]
    chosen = []
    for shard in range(3):
        items = list(tests)
        suite.Reporter(BigSetting(shard), lambda _: None).pytest_collection_modifyitems(None, items)
        assert items[0].nodeid in "670"
        chosen += [item.nodeid for item in items]
    assert sorted(chosen) == ["0", "1", "3", "4", "5", "6", "7"]


def test_pytest_is_not_asked_for_a_version() -> None:
    text = suite.pytest_settings()
    assert "minversion" not in text
    assert "--import-mode=importlib" in text and str(ROOT / "tests") in text and "gpu:" in text


def test_all_files_with_tests_for_a_gpu_are_chosen(tmp_path: Path) -> None:
    setting = Setting("tests", False, time.monotonic() + 60, tmp_path / "none.json")
    names = {path.name for path in suite.files_of(setting)}
    assert {"test_chunk_graphs.py", "test_rms_norm.py", "test_native.py"} <= names
    assert "test_grid.py" not in names


def test_a_story_is_told_apart_by_one_value() -> None:
    latents, frames = torch.zeros(1, 2, 3), torch.zeros(2, 4, dtype=torch.uint8)
    one, other = graphs.Told("here", latents, frames), graphs.Told("there", latents, frames.clone())
    assert graphs.difference(one, other) is None
    other.frames[1, 3] = 9
    assert graphs.difference(one, other) == "there: the frames are up to 9 apart"
    bad = graphs.Told("here", latents / 0, frames)
    assert graphs.difference(bad, bad) == "here: the latents are not finite"


def test_a_wrong_convolution_is_refused() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 5, 24, 30), torch.randn(3, 4, 3, 3, 3)
    found = torch.nn.functional.conv3d(x, weight, padding=(0, 1, 1))
    check_corners(found, x, weight)
    found[:, :, -1, -5:, -5:] += 2
    with pytest.raises(RuntimeError, match="the convolution is wrong"):
        check_corners(found, x, weight)


def test_items_of_every_part_are_found_before_a_gpu_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernels, "measured_ceilings", lambda: None)
    monkeypatch.setattr(parity, "backend_reasons", lambda _: dict.fromkeys(parity.BACKENDS, ""))
    setting = Setting("device", False, time.monotonic() + 60, tmp_path / "none.json")
    from gate_parts import ITEMS

    names = {part: [item.name for item in items(setting)] for part, items in ITEMS.items()}
    assert set(names) | {"tests"} == set(gpu_gate.PARTS)
    for part, found in names.items():
        assert len(found) == len(set(found)), part
    assert len(names["parity"]) == 5 * 3 * 2 + 5 * 2
    assert "linear FP8, FFN up" in names["device"] and "attention SDPA cuDNN, 14040 keys" in names["device"]
    assert names["throughput"] == ["load", "agreement", "frames", "baseline", "engine", *speed.VARIANTS]
    assert sum("shipped" in name for name in names["graphs"]) == 1 and "shipped" in names["graphs"][0]
    assert names["device"][0] == "attention forms"
    own = [Setting("parity", False, setting.stop, setting.record_path, (first, 6)) for first in range(6)]
    shards = [parity.items(each) for each in own]
    assert sorted(item.name for shard in shards for item in shard) == sorted(names["parity"]) and all(shards)


def test_every_part_has_the_time_that_it_takes_on_a_cold_machine() -> None:
    """Estimates for an H100, 10 s of them for the start of a process."""
    needs = {
        "tests": 10 + 420 / 14, "parity": 10 + 51 / 6, "graphs": 10 + 50,
        "throughput": 10 + 45 + 30 + 15 + 40, "flatness": 15 + 100 / 3,
    }  # fmt: skip
    seconds = 60 * gpu_gate.MINUTES - gpu_gate.LAST_SECONDS
    whole = sum(part.share for part in gpu_gate.PARTS.values())
    for name, needed in needs.items():
        assert gpu_gate.PARTS[name].share / whole * seconds > needed, name


def test_parts_that_compile_are_shared_by_processes_that_leave_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setattr(
        gpu_gate, "_run_shard", lambda record, name, stop, small, shard: seen.append((name, shard))
    )
    for cores, tests in ((16, 14), (64, 14), (8, 6), (2, 1), (None, 1)):
        monkeypatch.setattr(gpu_gate.os, "cpu_count", lambda cores=cores: cores)
        seen.clear()
        gpu_gate._run(None, "tests", 0.0, False)
        assert sorted(seen) == [("tests", (shard, tests)) for shard in range(tests)]
    gpu_gate._run(None, "tests", 0.0, True)
    gpu_gate._run(None, "throughput", 0.0, False)
    assert seen[-2:] == [("tests", (0, 1)), ("throughput", (0, 1))]


def test_the_gate_compares_in_few_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(speed, "compare", lambda *given: asked.append(given[2:]))
    engine = SimpleNamespace(pipeline=None, grid=None, decodes=True)
    measured = SimpleNamespace(engine=lambda: engine, setting=SimpleNamespace(small=False))
    assert list(speed._against_baseline(measured)) == [{"comparison": None}] and asked == [(2, True, 3)]


def test_what_the_engine_logs_while_it_tunes_is_told_line_by_line(tmp_path: Path) -> None:
    logger = logging.getLogger("rfengine.tuning.autotune")

    def load() -> Any:
        logger.info("autotune: measures %s", "linear@4x4")
        logger.debug("nobody asked")
        yield {"choice": {}}

    told: list[dict[str, Any]] = []
    items = [Item("load", load, silent_share=0.25), Item("next", lambda: [{}])]
    run_items(items, small_setting(tmp_path), told.append)
    logger.info("after the part")
    assert told[0] == {"chosen": 2} and told[1] == {"begun": "load", "silent_share": 0.25}
    assert told[2] == {"item": "load", "log": "autotune: measures linear@4x4"}
    assert [result["log"] for result in told if "log" in result] == ["autotune: measures linear@4x4"]
    assert {"begun": "next"} in told


def test_forms_of_the_attention_are_told_and_a_refused_one_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(attention, "describe_machine", lambda device: {"gpu": "one"})
    monkeypatch.setattr(attention, "default_cache_path", lambda: tmp_path / "autotune.json")
    found = {"triton": "it did not come back within 25 s", "triton-pointer": ""}
    monkeypatch.setattr(attention, "attention_problems", lambda site, cache: found)
    told = []
    with pytest.raises(RuntimeError, match="^triton: it did not come back within 25 s$"):
        for result in attention.item(Setting("device", False, 0.0, tmp_path / "none.json")).run():
            told.append(result)
    assert told == [{"form": form, "problem": problem} for form, problem in found.items()]


def test_options_of_every_variant_are_options_of_throughput(tmp_path: Path) -> None:
    for changes in speed.VARIANTS.values():
        assert ThroughputOptions(**changes)


def test_memory_is_held_against_what_it_was_after_the_first_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are recorded just before, and recording gives torch's cache of free memory back."""
    held = iter((100, 150, 150, 170))
    monkeypatch.setattr(speed, "memory_bytes", lambda _: next(held))
    monkeypatch.setattr(speed, "FLAT_CHUNKS", 4 * speed.TOLD_EVERY)
    monkeypatch.setattr(speed, "advance_of", lambda _: lambda: 12)
    setting = Setting("flatness", False, time.monotonic() + 60, tmp_path / "none.json")
    engine = SimpleNamespace(device=torch.device("cpu"), pipeline=SimpleNamespace(config=PRESETS["tiny"]))
    told = list(speed.flat_run(SimpleNamespace(engine=lambda: engine), setting))
    assert [result["flat"]["memory_growth_bytes"] for result in told] == [None, 50, 50, 70]


def test_an_item_whose_command_takes_too_long_fails_alone(tmp_path: Path) -> None:
    def slow() -> Any:
        yield {"begun": "well"}
        subprocess.run([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, timeout=0.01)

    told: list[dict[str, Any]] = []
    setting = small_setting(tmp_path)
    run_items([Item("bench_vae", slow), Item("next", lambda: [{"ms": 1}])], setting, told.append)
    (failure,) = (result for result in told if "failed" in result)
    assert failure["item"] == "bench_vae" and "TimeoutExpired" in failure["failed"]
    assert {"item": "next", "ms": 1} in told


def test_what_one_item_leaves_in_a_cycle_is_gone_before_the_next(tmp_path: Path) -> None:
    """An engine of gigabytes would else lie beside the next one."""

    class Engine:
        pass

    lives: list[Any] = []

    def leaves() -> Any:
        engine = Engine()
        engine.itself = engine
        lives.append(weakref.ref(engine))
        yield {"ms": 1}

    setting = small_setting(tmp_path)
    told: list[dict[str, Any]] = []
    items = [Item("one", leaves), Item("two", lambda: [{"gone": lives[0]() is None}])]
    gc.disable()
    try:
        run_items(items, setting, told.append)
    finally:
        gc.enable()
    assert {"item": "two", "gone": True} in told


def test_the_exact_video_of_the_decoders_is_computed_once_in_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []
    decoder = vae._decoder

    def noted(setting: Setting, name: str, dtype: torch.dtype) -> Any:
        asked.append((name, torch.backends.cudnn.allow_tf32))
        return decoder(setting, "plain", dtype)

    def latents(setting: Setting, dtype: torch.dtype, chunk: int) -> torch.Tensor:
        asked.append((str(dtype), torch.backends.cudnn.allow_tf32))
        return right(setting, dtype, chunk)

    right = vae._latents
    monkeypatch.setattr(vae, "_decoder", noted)
    monkeypatch.setattr(vae, "_latents", latents)
    monkeypatch.setattr(vae, "_dtype", lambda _: torch.bfloat16)
    setting = small_setting(tmp_path)
    told = [result for name in ("cudnn", "triton") for result in vae._psnr(setting, name)()]
    assert [result["decoder"] for result in told] == ["cudnn", "triton"]
    assert told[0]["psnr_db"] == told[1]["psnr_db"] > 30
    assert [name for name, _ in asked if "torch" not in name] == ["cudnn", "plain", "triton"]
    assert all(is_coarse for name, is_coarse in asked if "torch" in name)


@pytest.mark.parametrize(("last", "growth"), [(1.0, 0.0), (1.5, 0.5)])
def test_growth_is_that_of_the_last_tenth_over_the_first(last: float, growth: float) -> None:
    assert speed.time_growth([1.0] * 90 + [last] * 10) == pytest.approx(growth)
    assert speed.time_growth([1.0] * 5) is None


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, (variables.pop("PYTHONPATH", ""), str(ROOT))))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_the_self_check_passes_with_what_a_bare_cuda_image_has(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE_IMAGE)
    out = tmp_path / "gate.json"
    finished = run_python(
        "bench/gpu_gate.py", "--self-check", "--out", str(out), "--commit", "abc",
        PYTHONPATH=str(tmp_path), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = json.loads(out.read_text())
    assert results["self_check"] and results["commit"] == "abc" and results["well"]
    assert list(results["parts"]) == list(gpu_gate.PARTS)
    states = {name: set(part["items"].values()) for name, part in results["parts"].items()}
    assert states.pop("tests") == {"passed"} and len(results["parts"]["tests"]["items"]) == suite.SMALL_COUNT
    assert states.pop("device") <= {"done", "not run"}
    assert all(found == {"done"} for found in states.values()), states
    (compared,) = results["parts"]["graphs"]["results"]
    assert compared["equal"] and compared["chunks"] >= 20
    told = results["parts"]["throughput"]["results"]
    kinds = ["choice", "agreement", "frames", "comparison", "throughput"]
    assert [set(result) - {"item"} for result in told[:5]] == [{kind} for kind in kinds]
    assert told[4]["throughput"]["model"] == "tiny" and math.isfinite(told[2]["frames"]["frames_per_s"])
    assert told[4]["throughput"]["agreement"] == told[1]["agreement"]


def test_the_bare_image_of_these_tests_lacks_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE_IMAGE)
    finished = run_python("-c", "import rfengine; import hypothesis", PYTHONPATH=str(tmp_path))
    assert "No module named 'hypothesis'" in finished.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run the gate")
def test_results_of_a_gpu_need_a_file() -> None:
    finished = run_python(
        "-c",
        """
import sys; sys.path.insert(0, "bench")
import torch, gpu_gate
torch.cuda.is_available = lambda: True
sys.argv = ["gpu_gate.py"]
sys.exit(gpu_gate.main())
""",
    )
    assert finished.returncode == 2 and finished.stderr.strip() == "gpu_gate: give --out FILE for the results"


def test_an_unknown_part_is_refused() -> None:
    finished = run_python("bench/gpu_gate.py", "--parts", "device,speed")
    assert finished.returncode == 2 and "there is no part 'speed'" in finished.stderr
    assert gpu_gate.part_names("vae,device") == ["device", "vae"]
