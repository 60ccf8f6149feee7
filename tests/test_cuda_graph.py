"""The order in which a call is warmed up, recorded and replayed, with torch.cuda replaced by a record."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from rfengine import cuda_graph
from rfengine.cuda_graph import WARM_UP_CALLS, CapturedCall, graph_pool


class FakeStream:
    def __init__(self, events: list, name: str, device: object = "device") -> None:
        self.events, self.name, self.device = events, name, device

    def wait_stream(self, other: "FakeStream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was done, in order; a recorded function shows as one too."""
    seen: list[str] = []
    streams = [FakeStream(seen, "default")]
    default, made = streams[0], iter(range(9))
    cuda_graph._side_stream.cache_clear()

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
        seen.append(f"record on {stream.name}, pool {pool}, {capture_error_mode}")
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
        "Stream": lambda device: FakeStream(seen, f"side {next(made)} of {device}"),
        "default_stream": lambda device: default,
        "current_stream": lambda device=None: streams[-1],
        "stream": on_stream,
        "graph": recording,
        "CUDAGraph": Graph,
        "device": on_device,
        "graph_pool_handle": lambda: (0, 7),
    }
    for name, fake in replaced.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def end(index: int, pool: tuple[int, int]) -> None:
        raise RuntimeError("not currently recording to mempool_id")  # the end of the capture has closed it

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    yield seen
    cuda_graph._side_stream.cache_clear()


def test_a_new_function_is_warmed_up_put_back_and_recorded(events):
    call = CapturedCall(
        lambda: events.append("run") or 5, lambda: events.append("restore"), torch.device("cuda"), (0, 7)
    )
    assert events == [
        "side 0 of device waits for default",
        *["run"] * WARM_UP_CALLS,
        "default waits for side 0 of device",
        "restore",
        "record on side 0 of device, pool (0, 7), thread_local",
        "run",
        "recorded",
    ]
    events.clear()
    assert call.replay() == call.replay() == 5
    assert events == ["replay", "replay"]


def test_a_function_that_has_run_before_is_recorded_at_once(events):
    CapturedCall(lambda: events.append("run"), None, torch.device("cuda"))
    assert events == ["record on side 0 of device, pool (0, 7), thread_local", "run", "recorded"]


def test_graphs_of_one_stream_are_recorded_on_one_stream(events):
    """A pool's free memory is kept by stream: on a stream for each, graphs would share none of it."""
    own = FakeStream(events, "own")
    for _ in range(2):
        CapturedCall(lambda: None, None, torch.device("cuda"), (0, 7))
        with torch.cuda.stream(own):
            CapturedCall(lambda: None, None, torch.device("cuda"), (0, 7))
    recorded = [event.split(",")[0] for event in events if event.startswith("record on")]
    assert recorded == ["record on side 0 of device", "record on own"] * 2


def test_after_a_failed_recording_the_stream_is_the_callers_again(events):
    for _ in range(2):  # and the next recording is not kept waiting
        with pytest.raises(ZeroDivisionError):
            CapturedCall(lambda: 1 / 0, None, torch.device("cuda"))
        assert torch.cuda.current_stream().name == "default"


@pytest.mark.parametrize("healing_fails", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_after_a_failed_recording_a_small_graph_is_recorded_and_the_error_is_the_first(
    events, monkeypatch, healing_fails, error
):
    """torch's default generator stays in its state of capturing until a capture ends well."""

    def fail() -> None:
        events.append("run")
        if healing_fails:
            monkeypatch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("lost")))
        raise error("no such thing")

    own = FakeStream(events, "own", "cpu")
    with torch.cuda.stream(own), pytest.raises(error, match="no such thing"):
        CapturedCall(fail, None, torch.device("cuda"), (0, 5))
    healing = ["record on own, pool None, thread_local", "recorded"]
    assert events == ["record on own, pool (0, 5), thread_local", "run", *([] if healing_fails else healing)]


@pytest.mark.parametrize("given", [None, (0, 5)])
@pytest.mark.parametrize("is_closed", [False, True])
def test_after_a_failed_recording_the_allocator_records_to_its_pool_no_more(
    events, monkeypatch, given, is_closed
):
    """torch's allocator keeps what another stream has used until no capture is under way."""

    def end(index: int, pool: tuple[int, int]) -> None:
        events.append(f"end of pool {pool} on {index}")
        if is_closed:
            raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: events.append("release"), raising=False)
    monkeypatch.setattr(cuda_graph, "_record_an_addition", lambda stream: events.append("heal"))
    own = FakeStream(events, "own", torch.device("cuda", 1))
    with torch.cuda.stream(own), pytest.raises(ZeroDivisionError):
        CapturedCall(lambda: 1 / 0, None, torch.device("cuda"), given)
    pool = given or (0, 7)
    assert events == [
        f"record on own, pool {pool}, thread_local", f"end of pool {pool} on 1",
        *([] if is_closed else ["release"]), "heal",
    ]  # fmt: skip


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
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_second_graph_of_a_pool_takes_no_more_memory(own_stream):
    device = torch.device("cuda", torch.cuda.current_device())
    x, pool = torch.ones(2**24, device=device), graph_pool()
    with torch.cuda.stream(torch.cuda.Stream(device) if own_stream else None):
        x.exp().log().sum()
        calls = [CapturedCall(lambda: x.exp().log().sum(), None, device, pool)]
        before = torch.cuda.memory_reserved(device)
        calls.append(CapturedCall(lambda: x.exp().log().sum(), None, device, pool))
        assert torch.cuda.memory_reserved(device) <= before
        assert calls[0].replay().item() == calls[1].replay().item()


@pytest.mark.gpu
def test_a_function_that_reads_on_the_host_is_refused_and_the_stream_goes_on():
    x = torch.ones(4, device="cuda")
    current = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CapturedCall(lambda: x.sum().item(), None, torch.device("cuda"))
    assert torch.cuda.current_stream() == current
    assert (x + 1).tolist() == [2] * 4
    assert torch.randn(4, device="cuda").isfinite().all()  # the default generator is no longer recorded


@pytest.mark.gpu
def test_after_a_failed_recording_memory_that_another_stream_has_used_is_given_back():
    device, other = torch.device("cuda", torch.cuda.current_device()), torch.cuda.Stream()
    with pytest.raises(RuntimeError):
        CapturedCall(lambda: torch.ones(4, device=device).sum().item(), None, device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    for _ in range(3):
        used = torch.empty(2**22, device=device)
        used.record_stream(other)
        del used
        torch.cuda.synchronize()
    torch.cuda.empty_cache()  # looks which events have passed
    assert torch.cuda.memory_allocated(device) <= before
