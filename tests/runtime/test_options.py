"""What of the runtime is on for a device, and the reason."""

from __future__ import annotations

import pytest
import torch

from rfengine.config import RuntimeConfig
from rfengine.runtime.options import decode_device, runtime_switches

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def switched_on(runtime: RuntimeConfig, device: torch.device) -> set[str]:
    return {name for name, switch in runtime_switches(runtime, device).items() if switch.on}


def test_on_cuda_graphs_overlap_and_tuning_are_on_and_on_a_cpu_nothing_is() -> None:
    assert switched_on(RuntimeConfig(), CUDA) == {"graphs", "overlap", "autotune"}
    assert switched_on(RuntimeConfig(), CPU) == set()


def test_a_cpu_of_which_torch_has_several_threads_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime_switches(RuntimeConfig(), CPU)["overlap"].reason == "the default on a CPU with 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert switched_on(RuntimeConfig(), CPU) == {"overlap"}
    assert runtime_switches(RuntimeConfig(), CPU)["overlap"].reason == "the default on a CPU with 2 threads"
    assert switched_on(RuntimeConfig(overlap=False), CPU) == set()


def test_each_can_be_asked_for_and_switched_off() -> None:
    off = RuntimeConfig(graphs=False, overlap=False, autotune=False)
    assert switched_on(off, CUDA) == set()
    asked = RuntimeConfig(overlap=True)
    assert switched_on(asked, CPU) == {"overlap"}


def test_every_switch_has_its_reason() -> None:
    reasons = {
        name: switch.reason
        for name, switch in runtime_switches(
            RuntimeConfig(graphs=False, decode_device="cuda:1"), CUDA
        ).items()
    }
    assert reasons["graphs"] == "switched off" and reasons["overlap"] == "the default on cuda"
    assert reasons["decode_device"] == "asked for: cuda:1"
    assert runtime_switches(RuntimeConfig(), CPU)["autotune"].reason.endswith("CUDA only and this is cpu")


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(RuntimeError, match="graphs are asked for on cpu; CUDA graphs need a CUDA device"):
        runtime_switches(RuntimeConfig(graphs=True), CPU)
    with pytest.raises(RuntimeError, match="decode_device is cuda:1 and the model runs on cpu; use two of"):
        runtime_switches(RuntimeConfig(decode_device="cuda:1"), CPU)


def test_the_models_device_decodes_unless_another_is_named() -> None:
    assert decode_device(RuntimeConfig(), CUDA) == CUDA
    assert decode_device(RuntimeConfig(decode_device="cuda:1"), CUDA) == torch.device("cuda", 1)
