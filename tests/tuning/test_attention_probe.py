"""Forms of the attention in processes of their own: one that hangs, ends, is wrong, or never comes to run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rfengine import ops
from rfengine.ops import reference
from rfengine.tuning import attention_probe, autotune
from rfengine.tuning import candidates as tuning_candidates
from rfengine.tuning.attention_probe import Verdict, main, probe, probe_candidates
from rfengine.tuning.candidates import TuningShapes, attention_case
from rfengine.tuning.record import CaseKey, TuningCache, describe_machine
from rfengine.tuning.trials import Trials
from support.models import GRID, small_pipeline

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KEY = CaseKey("sink_window_attention", (6, 14, 2, 8), "float32", ("cudnn", "triton"))
FORMS = ("triton", "triton-descriptor", "triton-pointer")
SAYS = "import os, time; print('begun', flush=True)\n"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the process of each backend runs in the place of the probe."""
    found: dict[str, str] = {}
    command = lambda key, backend, device: [sys.executable, "-S", "-c", found[backend]]  # noqa: E731
    monkeypatch.setattr(attention_probe, "_command", command)
    return found


def test_each_form_has_a_verdict(scripts: dict[str, str]) -> None:
    scripts |= {
        "triton": SAYS, "exit": SAYS + "os._exit(3)", "fault": SAYS + "os.kill(os.getpid(), 11)",
        "raises": SAYS + "raise KeyError('shared')", "wrong": SAYS + "print('wrong: it is far off')",
        "absent": "raise ImportError('no torch')",
    }  # fmt: skip
    assert probe(KEY, list(scripts), CPU) == {
        "triton": Verdict(""),
        "exit": Verdict("its process ended with exit 3: begun"),
        "fault": Verdict("its process ended with signal SIGSEGV: begun"),
        "raises": Verdict("its process ended with exit 1: KeyError: 'shared'"),
        "wrong": Verdict("it is far off"),
        "absent": Verdict("its process ended with exit 1: ImportError: no torch", was_run=False),
    }


def test_a_form_that_hangs_is_ended_and_one_that_never_begins_is_not_blamed(scripts: dict[str, str]) -> None:
    scripts |= {"triton": SAYS + "time.sleep(300)", "triton-pointer": "import time; time.sleep(300)"}
    hung, slow = probe(KEY, list(scripts), CPU, limit_s=1.0).values()
    assert hung == Verdict("it did not come back within 1 s")
    assert slow == Verdict("it did not come back within 1 s", was_run=False)


def test_without_a_python_nothing_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    (verdict,) = probe(KEY, ["triton"], CPU).values()
    assert not verdict.was_run and "/no/such/python" in verdict.problem


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> TuningShapes:
    """The shapes of a small stream on a GPU of compute capability 9, as far as cases go."""
    reasons = dict.fromkeys(ops.backend_reasons("cpu"), "") | {"flash": "it is not installed"}
    for module in (tuning_candidates, ops):
        monkeypatch.setattr(module, "backend_reasons", lambda device: reasons)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(tuning_candidates, "implementation", lambda op, backend: backend)
    return TuningShapes(small_pipeline().config, GRID, torch.bfloat16, GPU)


def test_every_form_is_tried_once_and_the_record_keeps_what_became_of_it(
    tmp_path: Path, hopper: TuningShapes, scripts: dict[str, str]
) -> None:
    scripts |= {
        "triton": SAYS + "os.kill(os.getpid(), 11)", "triton-descriptor": SAYS,
        "triton-pointer": "raise OSError('no memory')",
    }  # fmt: skip
    cache = TuningCache(tmp_path / "autotune.json", describe_machine(CPU))
    case = tuning_candidates.window_attention_case(hopper)
    untried = probe_candidates(case, Trials(cache))
    assert untried.keys() == {"triton-pointer"}
    assert untried["triton-pointer"].startswith("it could not be tried: its process ended with exit 1")
    scripts |= {"triton": "never", "triton-descriptor": "never", "triton-pointer": SAYS}
    assert probe_candidates(case, Trials(TuningCache(cache.path, cache.machine))) == {}
    refused = Trials(TuningCache(cache.path, cache.machine)).refused(case.key)
    assert refused.keys() == {"triton"} and "SIGSEGV" in refused["triton"]
    kept = {each.backend: each.reason for each in TuningCache(cache.path, cache.machine).decisions()}
    assert kept["triton-descriptor"] == kept["triton-pointer"] == "right" and "SIGSEGV" in kept["triton"]


def test_a_start_leaves_out_the_forms_that_did_not_come_through(
    tmp_path: Path, hopper: TuningShapes, scripts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts |= {name: SAYS + "os._exit(3)" for name in FORMS[:2]} | {"triton-pointer": "raise OSError"}
    attention = tuning_candidates.window_attention_case(hopper)
    seen = []

    def decide(case, timer, trials, left_out):
        seen.append(dict(left_out) | trials.refused(case.key))
        return autotune.Decision(case.key, "cudnn", "it is all there is")

    monkeypatch.setattr(autotune, "decide", decide)
    cache = TuningCache(tmp_path / "autotune.json", describe_machine(CPU))
    autotune._decide_all([attention], [], cache, lambda run, sets: lambda: 1.0)
    assert list(attention.candidates) == ["cudnn", *FORMS] and sorted(seen[0]) == sorted(FORMS)
    assert cache.find(attention.key) is None  # one could not be tried, so the next start asks again
    scripts["triton-pointer"] = SAYS
    autotune._decide_all([attention], [], cache, lambda run, sets: lambda: 1.0)
    assert sorted(seen[1]) == sorted(FORMS[:2]) and cache.find(attention.key) is not None


def test_nothing_is_tried_for_another_op_or_without_a_gpu(tmp_path: Path, hopper: TuningShapes) -> None:
    trials = Trials(TuningCache(tmp_path / "autotune.json", describe_machine(CPU)))
    attention, *others, _ = tuning_candidates.transformer_cases(hopper)
    assert attention.key.name == "sink_window_attention"
    for case in (*others, replace(attention, device=CPU)):
        assert attention_probe.probe_candidates(case, trials) == {}


def test_the_process_says_that_it_runs_and_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["triton", "cpu", "float32", "40", "60", "2", "64"]

    def attend(q, keys, values, kv_len, filled):
        out = reference.sink_window_attention(q, keys, values, kv_len)
        return torch.cat((out[:, :-1], 2 * out[:, -1:]), 1) if spoiled else out

    monkeypatch.setattr(attention_probe, "implementation", lambda op, backend: attend)
    for spoiled in (False, True):
        main(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "begun" and lines[1:] == lines[-1:] * spoiled
    assert lines[1].startswith("wrong: result 0 is ") and "from float64" in lines[1]


def test_a_result_of_nan_or_of_another_shape_is_a_problem() -> None:
    case = attention_case((300, 14, 2, 8), torch.float32, CPU)
    inputs = case.make_inputs(torch.Generator().manual_seed(0))
    right = reference.sink_window_attention
    assert case.problem(right, inputs) == ""
    assert "nan from float64" in case.problem(lambda *given: right(*given) * float("nan"), inputs)
    assert case.problem(lambda *given: right(*given)[:, :3], inputs) == (
        "result 0 is (1, 3, 2, 8), not (1, 150, 2, 8)"
    )


def test_the_command_runs_this_module_at_the_shape_of_the_key() -> None:
    command = attention_probe._command(KEY, "triton-pointer", torch.device("cuda", 1))
    assert command[1:4] == ["-P", "-m", "rfengine.tuning.attention_probe"]
    assert command[4:] == ["triton-pointer", "cuda:1", "float32", "6", "14", "2", "8"]
