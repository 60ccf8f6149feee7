"""The order in which a call is warmed up, recorded and replayed, with torch.cuda replaced by a record."""

from contextlib import contextmanager

import pytest
import torch

from rfengine.runtime.cuda_graph import WARM_UP_CALLS, CapturedCall, graph_pool


class FakeStream:
    def __init__(self, events: list, name: str, priority: int) -> None:
        self.events, self.name, self.priority, self.device = events, name, priority, "device"

    def wait_stream(self, other: "FakeStream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order; a recorded function shows as one too."""
    seen: list[str] = []
    streams = [FakeStream(seen, "current", -1)]

    @contextmanager
    def on_stream(stream):
        before = list(streams)
        streams.append(stream)
        try:
            yield
        finally:
            streams[:] = before

    @contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        seen.append(f"record on {stream.name} of {stream.priority}, pool {pool}, {capture_error_mode}")
        streams.append(stream)
        yield  # a capture that fails leaves its stream current, as torch does
        streams.pop()
        seen.append("recorded")

    class Graph:
        def replay(self) -> None:
            seen.append("replay")

    @contextmanager
    def on_device(device):
        yield

    replaced = {
        "Stream": lambda device, priority: FakeStream(seen, "side", priority),
        "current_stream": lambda device=None: streams[-1],
        "stream": on_stream,
        "graph": recording,
        "CUDAGraph": Graph,
        "device": on_device,
        "graph_pool_handle": lambda: (0, 7),
    }
    for name, fake in replaced.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return seen


def test_a_new_function_is_warmed_up_put_back_and_recorded(events):
    call = CapturedCall(
        lambda: events.append("run") or 5, lambda: events.append("restore"), torch.device("cuda"), (0, 7)
    )
    assert events == [
        "side waits for current",
        *["run"] * WARM_UP_CALLS,
        "current waits for side",
        "restore",
        "record on side of -1, pool (0, 7), thread_local",
        "run",
        "recorded",
    ]
    events.clear()
    assert call.replay() == call.replay() == 5
    assert events == ["replay", "replay"]


def test_a_function_that_has_run_before_is_recorded_at_once(events):
    CapturedCall(lambda: events.append("run"), None, torch.device("cuda"))
    assert events == ["record on side of -1, pool None, thread_local", "run", "recorded"]


def test_after_a_failed_recording_the_stream_is_the_callers_again(events):
    for _ in range(2):  # and the next recording is not kept waiting
        with pytest.raises(ZeroDivisionError):
            CapturedCall(lambda: 1 / 0, None, torch.device("cuda"))
        assert torch.cuda.current_stream().name == "current"


def test_a_pool_is_a_new_handle(events):
    assert graph_pool() == (0, 7)


@pytest.mark.gpu
def test_a_recorded_function_reads_its_static_tensors_anew(monkeypatch):
    x = torch.ones(4, device="cuda")
    total = torch.zeros(4, device="cuda")

    def add() -> torch.Tensor:
        total.add_(x)
        return total * 2

    call = CapturedCall(add, total.zero_, torch.device("cuda"), graph_pool())
    assert total.tolist() == [0] * 4
    x.fill_(3)
    assert call.replay().tolist() == [6] * 4
    assert total.tolist() == [3] * 4


@pytest.mark.gpu
def test_a_function_that_reads_on_the_host_is_refused_and_the_stream_goes_on():
    x = torch.ones(4, device="cuda")
    current = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CapturedCall(lambda: x.sum().item(), None, torch.device("cuda"))
    assert torch.cuda.current_stream() == current
    assert (x + 1).tolist() == [2] * 4
