"""Contenders that raise, hang, end their process or break the device, and the starts after them."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rfengine.tuning import autotune
from rfengine.tuning.autotune import cached_decisions, decide
from rfengine.tuning.candidates import TuningCase
from rfengine.tuning.record import CaseKey, TuningCache, describe_machine
from rfengine.tuning.trials import LostDeviceError, Trials, is_lost

CPU = torch.device("cpu")
ILLEGAL = "an illegal memory access was encountered"


def double(x):
    return 2 * x


def case(key="rms_norm", **candidates):
    """Contenders by name, the default first, that have to double [1, 20, 4]."""
    return TuningCase(
        CaseKey(key, (20, 4), "float32", tuple(candidates)), candidates, CPU,
        lambda generator: (torch.randn(1, 20, 4, generator=generator),), 320, double,
        lambda arguments: arguments, lambda _, returned: (returned,),
    )  # fmt: skip


def timer(run, sets):
    def sample():
        run(*sets[0])
        return 1.0

    return sample


def hold(path, *cases):
    cache = TuningCache(Path(path), describe_machine(CPU))
    return autotune._decide_all(cases, [], cache, timer)


def started(path: Path, bad: Callable[[Tensor], object]) -> int:
    """The number of a process that holds a case, and has come as far as the first run of `bad`."""
    heard, said = os.pipe()
    process = os.fork()
    if not process:

        def say_and_run(x):
            os.write(said, b"begun")
            return bad(x)

        try:
            hold(path, case(plain=double, bad=say_and_run, late=double))
        finally:
            os._exit(99)
    assert os.read(heard, 5) == b"begun"
    for end in (heard, said):
        os.close(end)
    return process


def ended(process: int) -> int:
    """The exit code, or the number of the signal below zero."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def hang(x):
    signal.pause()


def fault(x):
    faulthandler.disable()  # pytest's would print all that runs here
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(x):
    os._exit(3)


def never(x):
    raise AssertionError("it was to be left out")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("shared"), AssertionError(), TypeError("no such argument"), AttributeError("launch"),
        ZeroDivisionError("by zero"), Exception("of a kind nobody knows"), torch.OutOfMemoryError("20 GiB"),
    ],
)  # fmt: skip
def test_a_candidate_that_raises_anything_is_refused_with_it(error):
    def bad(x):
        raise error

    decision = decide(case(bad=bad, plain=double), timer)
    assert decision.backend == "plain"
    assert decision.refused["bad"] == f"{type(error).__name__}: {str(error).strip()}"


def test_a_candidate_that_raises_only_while_it_is_timed_is_refused():
    runs = []

    def tired(x):
        runs.append(x)
        if len(runs) > 7:
            raise KeyError("cache")
        return 2 * x

    decision = decide(case(plain=double, tired=tired), timer)
    assert decision.backend == "plain" and "KeyError" in decision.refused["tired"]
    assert set(decision.milliseconds) == {"plain"}


def test_an_interrupted_trial_is_no_refusal(tmp_path):
    def interrupted(x):
        raise KeyboardInterrupt

    path = tmp_path / "autotune.json"
    with pytest.raises(KeyboardInterrupt):
        hold(path, case(plain=double, late=interrupted))
    assert list(tmp_path.iterdir()) == []
    (decision,) = hold(path, case(plain=double, late=double))
    assert not decision.refused


@pytest.mark.parametrize(("bad", "code"), [(hang, -signal.SIGKILL), (fault, -signal.SIGSEGV), (leave, 3)])
def test_after_a_candidate_that_did_not_come_back_the_next_start_goes_round_it(tmp_path, caplog, bad, code):
    path = tmp_path / "autotune.json"
    process = started(path, bad)
    if bad is hang:
        os.kill(process, signal.SIGKILL)  # as a limit of time ends it
    assert ended(process) == code
    (decision,) = hold(path, case(plain=double, bad=never, late=double))
    assert decision.backend == "plain" and list(decision.refused) == ["bad"]
    assert decision.refused["bad"].startswith("it did not come back") and str(path) in decision.refused["bad"]
    assert "bad is left out in rms_norm at 20x4 in float32: it did not come back" in caplog.text
    assert list(tmp_path.iterdir()) == [path]
    # and for good, whatever it is compared with
    (again,) = hold(path, case(bad=never, third=double))
    assert again.backend == "third" and "did not come back" in again.refused["bad"]


def test_what_did_not_come_back_is_tried_again_after_the_kernels_changed(tmp_path):
    path = tmp_path / "autotune.json"
    ended(started(path, leave))
    machine = describe_machine(CPU) | {"kernels": "others"}
    (decision,) = autotune._decide_all(
        [case(plain=double, bad=double)], [], TuningCache(path, machine), timer
    )
    assert not decision.refused


def test_the_trial_file_of_a_process_that_lives_refuses_nothing(tmp_path):
    path = tmp_path / "autotune.json"
    process = started(path, hang)
    try:
        (decision,) = hold(path, case(plain=double, bad=double))
        assert not decision.refused
    finally:
        os.kill(process, signal.SIGKILL)
        ended(process)


def test_a_trial_file_that_is_being_made_refuses_nothing(tmp_path):
    """Between the making of a file and its lock another process may look."""
    path = tmp_path / "autotune.json"
    asked = case(plain=double, late=double)
    found = Trials(TuningCache(path, describe_machine(CPU)))
    trial = found._trial_path(asked.key, "late")
    trial.with_name(f".{trial.name}.1-0.partial").touch()
    assert not found.refused(asked.key)


@pytest.mark.parametrize("start", ["CUDA error: ", "Triton Error [CUDA]: "])
def test_a_candidate_that_breaks_the_device_ends_the_start_and_the_next_goes_round_it(tmp_path, start):
    def bad(x):
        raise RuntimeError(start + ILLEGAL)

    path = tmp_path / "autotune.json"
    with pytest.raises(LostDeviceError) as lost:
        hold(path, case(plain=double, bad=bad, late=never))
    assert str(lost.value) == (
        f"bad has broken the device in rms_norm at 20x4 in float32 (RuntimeError: {start}{ILLEGAL}); nothing "
        "runs on it until this process is started again, and then bad is left out there"
    )
    (decision,) = hold(path, case(plain=double, bad=never, late=double))
    assert decision.backend == "plain" and "it broke the device" in decision.refused["bad"]
    assert any("broke the device" in str(each) for each in cached_decisions(CPU, path))


def test_any_error_after_which_the_device_does_nothing_is_its_loss(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: unknown")

    refusal = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(torch.device("cuda"), refusal)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert is_lost(torch.device("cuda"), refusal) and not is_lost(CPU, refusal)


def test_where_nothing_can_be_written_candidates_are_tried_without_a_trial_file(tmp_path, caplog):
    (tmp_path / "file").touch()
    (decision,) = hold(tmp_path / "file" / "autotune.json", case(plain=double, late=double))
    assert decision.backend == "plain"
