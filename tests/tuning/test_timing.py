"""What a call is recorded on to be timed, with torch.cuda replaced by a record."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from rfengine.tuning.timing import capture_calls


@contextmanager
def on_stream(stream):
    yield


def test_after_a_failed_recording_a_small_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one backend that cannot be recorded would spoil torch's default generator for all that follow."""
    own = SimpleNamespace(device=torch.device("cpu"), wait_stream=lambda other: None)
    ended: list[bool] = []

    @contextmanager
    def recording(graph, pool=None, stream=None, capture_error_mode="global"):
        try:
            yield
        except TypeError:
            ended.append(False)
            raise
        ended.append(True)

    replaced = {
        "Stream": lambda: own, "stream": on_stream, "current_stream": lambda: own,
        "synchronize": lambda: None, "CUDAGraph": object, "graph": recording,
        "graph_pool_handle": lambda: (0, 1),
    }  # fmt: skip
    for name, fake in replaced.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda index, pool: None, raising=False)
    calls: list[int] = []

    def fails_the_fourth_time(value: int) -> None:
        calls.append(value)
        if len(calls) == 4:
            raise TypeError("not while it is recorded")

    with pytest.raises(TypeError, match="not while it is recorded"):
        capture_calls(fails_the_fourth_time, [(1,), (2,)])
    assert ended == [False, True]


def test_calls_are_recorded_on_a_stream_of_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own capture stream is of the device that was recorded on first: an engine that decodes on a
    second GPU is tuned on both."""
    current = [0]
    seen: list[tuple[int, int]] = []

    def new_stream() -> SimpleNamespace:
        return SimpleNamespace(device=current[0], wait_stream=lambda other: None)

    @contextmanager
    def recording(graph, pool=None, stream=None, capture_error_mode="global"):
        assert stream is not None
        seen.append((current[0], stream.device))
        yield

    replaced = {
        "Stream": new_stream, "stream": on_stream, "current_stream": lambda: new_stream(),
        "synchronize": lambda: None, "CUDAGraph": object, "graph": recording,
        "graph_pool_handle": lambda: (0, 1),
    }  # fmt: skip
    for name, fake in replaced.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    calls: list[int] = []
    for device in (0, 1):
        current[0] = device
        capture_calls(calls.append, [(1,), (2,)])
    assert seen == [(0, 0), (1, 1)]
    assert calls == [1, 2, 1, 1, 2] * 2
