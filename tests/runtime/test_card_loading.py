"""Loading under a preset: what it takes, what it refuses, and what follows an out-of-memory error."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import RuntimeConfig
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import ByteTokenizer, TextEncoder
from rfengine.pipeline import Pipeline
from rfengine.presets import PRESETS
from rfengine.rehearsal import longest_prompt
from rfengine.runtime import card_loading, engine, memory_plan
from rfengine.runtime.card_presets import CARD_PRESETS, Candidate
from rfengine.runtime.chunk_runner import ChunkRunner

AUTO = RuntimeConfig(preset="auto", overlap=False)
MIB = 2**20


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings; a server that ran before in this process has left the package's logger at INFO."""
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


class CappedAllocator(TorchDispatchMode):
    """Raises torch.OutOfMemoryError, as CUDA's allocator does, where the tensors made inside it would
    together be more than `cap` bytes. refused: how often."""

    def __init__(self, cap: int) -> None:
        super().__init__()
        self.cap, self.taken, self.refused = cap, 0, 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            is_real = isinstance(leaf, torch.Tensor) and type(leaf).__name__ != "FakeTensor"
            if is_real and not leaf.is_meta:
                self._take(leaf.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        if self.taken + size > self.cap:
            self.refused += 1
            raise torch.OutOfMemoryError(f"tried to allocate {size} bytes beside {self.taken} of {self.cap}")
        self.taken += size

        def freed(_: object) -> None:
            self.taken -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """Plans that take no time: a preset needs 10 MiB less than the one before, a smaller size 100 less."""
    made = []
    numbers = {preset.name: number for number, preset in enumerate(CARD_PRESETS)}

    def planned(preset, config, *_):  # noqa: ANN001, ANN202
        size = (1000 - 10 * numbers[preset.name] - 100 * (config.height < 64)) * MIB
        plan = memory_plan.MemoryPlan(config.height, config.width, {}, {}, {"all": size}, {}, {})
        made.append(Candidate(preset, config, plan))
        return made[-1]

    monkeypatch.setattr(card_loading, "planned", planned)
    return made


def put_in_host_memory(monkeypatch: pytest.MonkeyPatch, free: int, needed: dict[str, int]) -> None:
    """`free` bytes of it, of which the presets take what `needed` says."""
    planned = card_loading.planned

    def with_host(preset, *others):  # noqa: ANN001, ANN202
        made = planned(preset, *others)
        plan = dataclasses.replace(made.plan, host={"text_encoder": needed[preset.name]})
        return dataclasses.replace(made, plan=plan)

    monkeypatch.setattr(card_loading, "planned", with_host)
    sizes = iter([1000 * MIB])
    monkeypatch.setattr(card_loading, "free_memory", lambda device: next(sizes, free))


def set_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(card_loading, "free_memory", lambda device: size)


@pytest.mark.parametrize(
    ("free", "preset"), [(1000, "24gb"), (999, "16gb"), (989, "12gb"), (979, "8gb"), (970, "8gb")]
)
def test_auto_takes_the_first_that_fits(monkeypatch: pytest.MonkeyPatch, free: int, preset: str) -> None:
    set_free(monkeypatch, free * MIB)
    pipeline = Pipeline.from_pretrained("tiny", runtime=AUTO)
    runtime = pipeline.config.runtime
    assert runtime.preset == preset and (pipeline.config.height, pipeline.config.width) == (64, 64)
    options = next(each.options for each in CARD_PRESETS if each.name == preset)
    for name in ("text_encoder", "text_weights", "block_weights", "block_buffers", "vae"):
        assert getattr(runtime, name) == getattr(options, name), name
    assert (pipeline.model.offload is not None) == (preset == "8gb")


def test_a_smaller_size_comes_last_and_becomes_the_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_free(monkeypatch, 900 * MIB)
    pipeline = Pipeline.from_pretrained("tiny", runtime=AUTO)
    (line,) = warnings_in(caplog)  # a person who asked for no size sees which one it is
    assert line == "preset auto takes 24gb at 48 x 48: 0.88 GiB by its plan; none fits at 64 x 64"
    assert pipeline.config.runtime.preset == "24gb"
    assert (pipeline.config.height, pipeline.config.width) == (48, 48)
    assert next(pipeline.stream("a red circle")).frames.shape[1:3] == (48, 48)


def test_a_size_that_is_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 969 * MIB)
    with pytest.raises(RuntimeError, match=r"too small for every preset of tiny: 8gb at 64 x 64"):
        Pipeline.from_pretrained("tiny", runtime=AUTO, size=(64, 64))


def test_a_card_too_small_for_every_preset_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, plans: list[Candidate]
) -> None:
    set_free(monkeypatch, 100 * MIB)
    monkeypatch.setattr("rfengine.checkpoint.checkpoint.Checkpoint.load", None)  # nothing is read
    message = r"cpu has 0\.10 GiB free, which is too small .* 8gb at 16 x 16, the smallest, needs 0\.8 GiB"
    with pytest.raises(RuntimeError, match=message) as refused:
        Pipeline.from_pretrained("tiny", runtime=AUTO)
    assert "of all" not in str(refused.value)  # of which no other was planned
    assert len(plans) == 1  # each takes seconds


def test_auto_takes_nothing_that_host_memory_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_host_memory(monkeypatch, 500, {"24gb": 900, "16gb": 400, "12gb": 400, "8gb": 700})
    assert Pipeline.from_pretrained("tiny", runtime=AUTO).config.runtime.preset == "16gb"


def test_where_host_memory_has_no_room_at_all_the_error_has_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_in_host_memory(monkeypatch, 512 * MIB, dict.fromkeys(("24gb", "16gb", "12gb", "8gb"), 1024 * MIB))
    message = r"8gb at 64 x 64 fits into cpu and keeps 1\.0 GiB in host memory, of which 0\.5 GiB are free; "
    with pytest.raises(RuntimeError, match=message):
        Pipeline.from_pretrained("tiny", runtime=AUTO, size=(64, 64))


PLACES = {
    "loading": (WanDiT, "__init__"),
    "opening a stream": (StreamingKVCache, "__init__"),
    "the first chunk": (ChunkRunner, "advance"),
}


@pytest.mark.parametrize("place", PLACES)
def test_after_an_out_of_memory_error_the_next_smaller_preset_loads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    owner, name = PLACES[place]
    made = failing_once(monkeypatch, owner, name)
    with caplog.at_level(logging.WARNING, card_loading.__name__):
        pipeline = Pipeline.from_pretrained("tiny", runtime=AUTO)
    assert pipeline.config.runtime.preset == "16gb"
    (line,) = warnings_in(caplog)
    assert line == (
        "memory ran out under 24gb at 64 x 64 (no memory is left); 16gb at 64 x 64 is loaded instead"
    )
    assert len(made) == (0 if place == "loading" else 2)
    assert all(each() is None for each in made)  # nothing of the first is there
    assert pipeline.generate("a red circle", num_frames=9).frames.shape[0] == 9


def failing_once(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> list[weakref.ref[torch.nn.Module]]:
    """Let a method fail at its first call; the models that there were then."""
    original: Callable[..., object] = getattr(owner, name)
    models: list[weakref.ref[torch.nn.Module]] = []
    built, failures = [], []
    init = Pipeline.__init__

    def noting(self, config, model, vae, *others):  # noqa: ANN001, ANN202
        built[:] = [weakref.ref(model), weakref.ref(vae)]
        init(self, config, model, vae, *others)

    def fails(*arguments: object, **options: object) -> object:
        if not failures:
            failures.append(name)
            models.extend(built)
            raise torch.OutOfMemoryError("no memory is left")
        return original(*arguments, **options)

    monkeypatch.setattr(Pipeline, "__init__", noting)
    monkeypatch.setattr(owner, name, fails)
    return models


def test_a_capped_allocator_ends_with_what_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Real allocations beyond the cap fail, wherever they are; what a failed attempt took is free again."""
    monkeypatch.setattr(engine, "keep_freed_memory", lambda: None)  # a block that is never touched
    Pipeline.from_pretrained("tiny", runtime=dataclasses.replace(AUTO, preset="8gb")).stream("a red circle")
    gc.collect()
    with caplog.at_level(logging.WARNING), CappedAllocator(30 * MIB) as allocator:
        pipeline = Pipeline.from_pretrained("tiny", runtime=AUTO)
        assert pipeline.config.runtime.preset == "16gb"  # 25.6 MiB by the plan, where 24gb takes 33.2
        assert len(warnings_in(caplog)) == allocator.refused == 1
        assert pipeline.generate("a red circle", num_frames=33).frames.shape[0] == 33
        own = allocator.taken
        del pipeline
        gc.collect()
        assert allocator.taken < 1 * MIB < own


def test_where_nothing_smaller_is_left_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def fails(self, *others):  # noqa: ANN001, ANN202
        attempts.append(self)
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(ChunkRunner, "advance", lambda *_, **__: fails(None))
    with pytest.raises(torch.OutOfMemoryError, match=r"8gb at 64 x 64, the smallest preset \(no memory"):
        Pipeline.from_pretrained("tiny", runtime=AUTO, size=(64, 64))
    assert len(attempts) == len(CARD_PRESETS)


@pytest.mark.parametrize(
    "words",
    ["CUBLAS_STATUS_ALLOC_FAILED", "CUDA_ERROR_OUT_OF_MEMORY", "DefaultCPUAllocator: can't allocate memory"],
)
def test_a_shortage_that_a_library_puts_in_words_is_one(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    original, failures = ChunkRunner.advance, []

    def fails(*arguments: object, **options: object) -> object:
        if not failures:
            failures.append(words)
            try:
                raise RuntimeError(f"an error: {words}")
            except RuntimeError:  # as where the recording of a graph ends by it
                raise RuntimeError("the capture was invalidated")  # noqa: B904
        return original(*arguments, **options)

    monkeypatch.setattr(ChunkRunner, "advance", fails)
    assert Pipeline.from_pretrained("tiny", runtime=AUTO).config.runtime.preset == "16gb"


def test_host_memory_that_runs_out_is_a_shortage_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original, failures = ChunkRunner.advance, []

    def fails(*arguments: object, **options: object) -> object:
        if not failures:
            failures.append("once")
            raise MemoryError
        return original(*arguments, **options)

    monkeypatch.setattr(ChunkRunner, "advance", fails)
    assert Pipeline.from_pretrained("tiny", runtime=AUTO).config.runtime.preset == "16gb"


def test_a_prompt_that_changes_is_in_the_rehearsal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is where a plan has its peak."""
    original, prompts = TextEncoder.encode, []

    def encode(self, texts, *others):  # noqa: ANN001, ANN202
        prompts.append(texts)
        if len(prompts) == 2:
            raise torch.OutOfMemoryError("no memory is left")
        return original(self, texts, *others)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    pipeline = Pipeline.from_pretrained("tiny", runtime=AUTO)
    assert pipeline.config.runtime.preset == "16gb" and len(prompts) == 4
    (line,) = warnings_in(caplog)  # and no warning about the prompt of a stream that nobody sees
    assert "16gb at 64 x 64 is loaded instead" in line
    tokens = ByteTokenizer().encode(prompts[0], pipeline.config.model.text_len)[1].sum()
    assert tokens > 0.95 * pipeline.config.model.text_len


def test_the_rehearsed_prompt_has_as_many_tokens_as_published_models_take() -> None:
    assert longest_prompt(PRESETS["wan-1.3b"]).split() == ["a"] * 511  # and the end


def test_pinned_memory_of_a_failed_load_is_given_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept by size otherwise, and the next configuration takes other sizes."""
    called = []
    for owner, name in (
        (torch.cuda, "synchronize"),
        (torch.cuda, "empty_cache"),
        (torch._C, "_host_emptyCache"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name: called.append(name), raising=False)
    card_loading._free(torch.device("cuda", 0))
    assert called == ["synchronize", "empty_cache", "_host_emptyCache"]


def test_an_interrupted_load_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def interrupted(*_: object, **__: object) -> None:
        attempts.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(ChunkRunner, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Pipeline.from_pretrained("tiny", runtime=AUTO)
    assert len(attempts) == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(ChunkRunner, "advance", fails)
    with pytest.raises(RuntimeError, match="of another kind"):
        Pipeline.from_pretrained("tiny", runtime=AUTO)


def test_a_named_preset_says_what_it_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    for name, line in (
        ("24gb", []), ("16gb", ["preset 16gb goes without its block_weights and needs more memory than"]),
    ):  # fmt: skip
        caplog.clear()
        Pipeline.from_pretrained("tiny", runtime=RuntimeConfig(preset=name, precision="fp8"))
        found = [each for each in warnings_in(caplog) if "goes without" in each]
        assert len(found) == len(line) and all(map(str.startswith, found, line))


def test_without_auto_an_out_of_memory_error_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(StreamingKVCache, "__init__", fails)
    pipeline = Pipeline.from_pretrained("tiny", runtime=RuntimeConfig(preset="12gb"))
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        pipeline.stream("a red circle")
