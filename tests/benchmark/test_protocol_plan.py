"""What `rfengine bench --protocol` refuses before anything is loaded, and what it plans."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rfengine import memory
from rfengine.benchmark.measured_engine import MeasuredEngine
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.protocols import plan
from rfengine.benchmark.protocols.plan import planned
from rfengine.benchmark.protocols.table import PROTOCOLS
from rfengine.config import RuntimeConfig
from rfengine.costs.memory import fp8_weight_bytes
from rfengine.presets import PRESETS
from support.outcome import fails

SMALLEST = ThroughputOptions(device="cpu", model="tiny", height=32, width=32, chunks=2)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(MeasuredEngine, "load", load)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("speed",), 2, "--protocol is 'speed'; use all or any of dit-4-passes, dit-context"),
        (("latency,",), 2, "--protocol is ''; use all or any of"),
        (("full-decoder", "--vae", "tiny"), 2, "--vae tiny contradicts the protocol full-decoder, which is"),
        (("tiny-decoder", "--vae", "tensorrt"), 2, "--vae tensorrt contradicts the protocol tiny-decoder"),
        (
            ("tiny-decoder", "--vae-precision", "bf16"),
            2,
            "--vae-precision bf16 contradicts the protocol tiny",
        ),
        (("all", "--no-decode"), 2, "--no-decode contradicts the protocol tiny-decoder, which makes frames"),
        (
            ("dit-context", "--system", "longlive"),
            2,
            "--system longlive contradicts the protocol dit-context",
        ),
        (("latency", "--compare", "baseline"), 2, "--compare is baseline beside --protocol latency"),
        (("latency", "--plot", "parts.png"), 2, "--plot is parts.png beside --protocol latency"),
        (("latency", "--height", "33"), 2, "must be a multiple of 16"),
        (("latency", "--graphs"), 1, "CUDA graphs need a CUDA device"),
        (("latency", "--model", "no/such"), 2, "no/such"),
        (("latency", "--json", "."), 2, "--json is ., a directory; name an ordinary file"),
        (("latency", "--json", "/proc/none/a.json"), 2, "cannot be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    arguments: tuple[str, ...],
    status: int,
    sentence: str,
    nothing_is_loaded: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sentence in fails(capsys, status, "bench", "--device", "cpu", "--protocol", *arguments)


def test_a_window_that_memory_does_not_hold_is_refused_before_anything_is_loaded(
    nothing_is_loaded: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Window 9 of the random model fits into it, and window 21 does not."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 37 * 2**30)
    call = ("bench", "--device", "cpu", "--model", "wan-1.3b", "--dtype", "float32", "--protocol")
    message = fails(capsys, 1, *call, "dit-context")
    assert "the protocol dit-context, 480 x 832 pixels with a window of 21 latent frames" in message
    assert (
        "37.0 GiB free; choose a smaller --height and --width, or protocols with a smaller window" in message
    )
    options = replace(SMALLEST, model="wan-1.3b", height=None, width=None, dtype="float32")
    assert len(planned(replace(options, protocol=("dit-window-9",)))) == 1


def test_memory_is_that_of_the_precision_which_is_asked_for(
    nothing_is_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 on a CPU, whose default has twice the bytes, and FP8, whose weights lie beside the others."""

    def needed(**named: Any) -> int:
        found = []
        monkeypatch.setattr(plan, "require_memory", lambda needed, *given: found.append(needed))
        large = {"model": "wan-1.3b", "height": None, "width": None, "protocol": ("latency",)}
        planned(replace(SMALLEST, **large, **named))
        return found[0]

    sixteen_bits = needed(dtype="bfloat16")
    assert needed(runtime=RuntimeConfig(precision="bf16")) == sixteen_bits < needed()
    config = PRESETS["wan-1.3b"].model
    more = needed(dtype="bfloat16", runtime=RuntimeConfig(precision="fp8")) - sixteen_bits
    assert more == fp8_weight_bytes(config, torch.bfloat16) > config.num_layers * config.dim**2


def test_a_video_is_not_promised_where_nothing_can_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="the protocol file writes a video and PyAV is not installed"):
        planned(replace(SMALLEST, protocol=("file",)))


def test_a_video_is_not_promised_where_the_disk_cannot_hold_it(
    nothing_is_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(SMALLEST, protocol=("file",))
    bytes_of_video = PROTOCOLS["file"].frames * 32 * 32 * 3 // 2
    for free, refused in ((bytes_of_video, False), (bytes_of_video - 1, True)):
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if refused:
            with pytest.raises(RuntimeError, match="GiB are free; name a folder with more in TMPDIR"):
                planned(options)
        else:
            assert len(planned(options)) == 1

    def absent() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(plan.tempfile, "gettempdir", absent)
    with pytest.raises(RuntimeError, match="no temporary folder can be written; name one in TMPDIR"):
        planned(options)
