"""What the program around the engine has set in torch changes nothing, and is there again afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, cycle, repeat

import numpy
import pytest
import torch

from rfengine import Pipeline
from rfengine.config import RuntimeConfig
from rfengine.host_state import ordinary, own_state
from support.models import small_pipeline, with_runtime

Setting = Callable[[], AbstractContextManager[object]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Setting] = {
    **{str(dtype): lambda dtype=dtype: default_dtype(dtype)
       for dtype in (torch.bfloat16, torch.float64)},
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "enable_grad": torch.enable_grad,
    "device": lambda: torch.device("meta"),
    "default_device": lambda: default_device("meta"),
    "deterministic": deterministic,
}  # fmt: skip


def session(pipe: Pipeline, settings: Iterator[Setting]) -> list[numpy.ndarray]:
    """Every way to use a stream, each call under the next setting: frames and latents."""
    found = []

    def call(run: Callable[[], object]) -> object:
        with next(settings)():
            return run()

    def take(stream: object) -> None:
        found.append(call(lambda: next(stream)).frames)
        found.append(stream.latents.numpy())

    stream = call(lambda: pipe.stream("a circle", seed=3))
    for _ in range(3):
        take(stream)
    call(lambda: stream.set_prompt("a green square", "soft"))
    take(stream)
    call(lambda: stream.set_prompt("two triangles", "recache"))
    take(stream)
    snapshot = call(stream.snapshot)
    call(lambda: stream.set_prompt("a circle", "hard"))
    take(stream)
    restored = call(lambda: pipe.restore(snapshot))
    for _ in range(2):
        take(restored)
    clip = numpy.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=numpy.uint8)
    take(call(lambda: pipe.stream("a circle", start_frames=clip)))
    halved = call(
        lambda: pipe("a circle", 9, callback_on_step_end=lambda *a: {"latents": a[3]["latents"] / 2})
    )
    return [*found, halved.frames]


@pytest.fixture(scope="module", params=["plain", "overlapped"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return with_runtime(small_pipeline(), RuntimeConfig(overlap=request.param == "overlapped"))


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> list[numpy.ndarray]:
    return session(pipe, repeat(nullcontext))


@pytest.mark.parametrize(
    ("name", "inside"),
    [*((name, "all") for name in SETTINGS), ("inference_mode", "even"), ("inference_mode", "odd")],
)
def test_a_stream_is_the_same_bit_for_bit_whatever_the_caller_has_set(pipe, expected, name, inside):
    setting = SETTINGS[name]
    order = {"all": [setting], "even": [setting, nullcontext], "odd": [nullcontext, setting]}[inside]
    found = session(pipe, cycle(order))
    for frames, wanted in zip(found, expected, strict=True):
        assert numpy.array_equal(frames, wanted)


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return Pipeline.from_pretrained("tiny", "cpu")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_pipeline_is_loaded_the_same_whatever_the_caller_has_set(plain, name):
    with SETTINGS[name]():
        loaded = Pipeline.from_pretrained("tiny", "cpu")
        states = loaded.text_encoder.encode(["a red circle"])
    assert torch.equal(states, plain.text_encoder.encode(["a red circle"]))
    modules = [(loaded.model, plain.model), (loaded.vae, plain.vae)]
    pairs = chain.from_iterable(
        zip(one.parameters(), other.parameters(), strict=True) for one, other in modules
    )
    runners = (each._engine.runner for each in (loaded, plain))
    tables = zip(*([step.modulation.layers for step in runner.steps] for runner in runners), strict=True)
    for one, other in chain(pairs, tables):
        assert one.dtype == other.dtype and torch.equal(one, other) and not one.is_inference()


def test_what_the_caller_has_set_is_there_again_after_a_call_and_after_an_error():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError), own_state():
            assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            raise KeyError
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    with torch.enable_grad():
        with own_state():
            pass
        assert torch.is_grad_enabled()


def test_only_a_tensor_of_inference_mode_is_copied():
    with torch.inference_mode():
        made = torch.zeros(2)
    assert not ordinary(made).is_inference()
    plain = torch.zeros(2)
    assert ordinary(plain) is plain


def test_random_states_of_the_host_are_left_alone(pipe):
    numbers, state = numpy.random.get_state()[1].copy(), torch.get_rng_state()
    next(pipe.stream("a circle"))
    assert (numbers == numpy.random.get_state()[1]).all() and torch.equal(state, torch.get_rng_state())
