"""The context pass of a chunk together with the first step of the next, against the two apart."""

import pytest
import torch

from rfengine.config import CacheConfig
from rfengine.models.dit import WanDiT
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.ops.reference import sink_window_attention
from support.models import SMALL, noise_of, relative_error, small_model, small_runner
from support.streams import Stream, assert_same

CHUNKS = 12
SETTINGS = [
    CacheConfig(),
    CacheConfig(alpha=0.5, window_frames=12),
    CacheConfig(sink_precision="bf16", alpha=0.5),
    CacheConfig(sink="frozen"),
    CacheConfig(sink="frozen", positions="absolute"),
    CacheConfig(sink="none", sink_frames=0),
    CacheConfig(1, 3, "ema", 1, 0.5),
]


@pytest.fixture(scope="module")
def model():
    return small_model()


def exact_latents(config: CacheConfig) -> torch.Tensor:
    stream = Stream(small_runner(small_model().double()), config)
    stream.advance(CHUNKS)
    return torch.cat(list(stream.latents.values()), dim=2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", SETTINGS)
def test_merged_passes_are_as_exact_as_separate_ones(config, dtype):
    """Products of other shapes may be summed in another order, so each is held against float64: merging may
    add no more than the error that the dtype has without it."""
    exact, model = exact_latents(config), small_model().to(dtype)
    errors = []
    for merged in (False, True):
        stream = Stream(small_runner(model, graphs=False, merged_pass=merged), config)
        stream.advance(CHUNKS)
        errors.append(relative_error(torch.cat(list(stream.latents.values()), dim=2), exact))
    separate, together = errors
    assert separate <= 4 * torch.finfo(dtype).eps
    assert together <= 2 * separate


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_the_device_is_told_how_much_each_chunk_sees(model, merged):
    """Kernels read the fill from device memory, the reference its copy on the host."""
    ops = Ops(REFERENCE_OPS.choice)

    def attention(q, keys, values, kv_len, filled_tokens):
        return sink_window_attention(q, keys, values, filled_tokens.item())

    ops._run["sink_window_attention"] = attention
    other = WanDiT(SMALL, ops).eval()
    other.load_state_dict(model.state_dict())
    expected, found = (
        Stream(small_runner(each, merged_pass=merged), CacheConfig()) for each in (model, other)
    )
    for stream in (expected, found):
        stream.advance(6)
    assert_same(found.state(), expected.state())


def plain_and_merged(model, config: CacheConfig) -> tuple[Stream, Stream]:
    return Stream(small_runner(model), config), Stream(small_runner(model, merged_pass=True), config)


@torch.no_grad()
def test_flush_leaves_the_keys_and_values_of_separate_passes(model):
    plain, merged = plain_and_merged(model, CacheConfig(alpha=0.5))
    for count in (1, 2, 3, 1, 4):
        for stream in (plain, merged):
            stream.advance(count)
        expected, found = plain.state(), merged.state()
        assert all(
            relative_error(found[name], expected[name]) <= 3e-6 for name in ("keys", "values", "raw_keys")
        )
    once = merged.state()
    assert_same(merged.state(), once)


@torch.no_grad()
def test_a_pending_pass_keeps_the_text_its_chunk_was_made_with(model):
    plain, merged = plain_and_merged(model, CacheConfig())
    for stream in (plain, merged):
        stream.advance(5)
        stream.set_text(1)
        stream.advance(1)
    assert relative_error(merged.latents[5], plain.latents[5]) <= 3e-6
    assert merged.cache.pending.text is merged.text


@torch.no_grad()
def test_prefill_and_recache_run_a_pending_pass_first(model):
    plain, merged = plain_and_merged(model, CacheConfig(window_frames=12))
    for stream in (plain, merged):
        stream.advance(6)
        stream.runner.recache(stream.cache, stream.latents, stream.text)
        stream.advance(1)
        clean = noise_of(77, 3)[0]
        stream.runner.prefill(stream.cache, stream.cache.plan_chunk(), clean, stream.text)
        stream.advance(2)
    assert relative_error(merged.latents[9], plain.latents[9]) <= 3e-6


@torch.no_grad()
def test_a_cache_with_a_pending_pass_is_not_saved(model):
    _, merged = plain_and_merged(model, CacheConfig())
    merged.advance(2)
    with pytest.raises(RuntimeError, match="context pass of chunk 1 is pending"):
        merged.cache.tensors()
    merged.cache.reset()
    assert merged.cache.pending is None
    assert merged.cache.tensors()["keys"].count_nonzero() == 0


@torch.no_grad()
def test_the_caller_may_change_the_latents_of_a_pending_pass(model):
    plain, merged = plain_and_merged(model, CacheConfig())
    for stream in (plain, merged):
        stream.advance(4)
        stream.latents[3].zero_()
        stream.advance(1)
    assert relative_error(merged.latents[4], plain.latents[4]) <= 3e-6


@torch.no_grad()
def test_a_merged_chunk_whose_callback_fails_can_be_repeated(model):
    smooth, broken = (Stream(small_runner(model, merged_pass=True), CacheConfig(alpha=0.5)) for _ in range(2))
    smooth.advance(6)
    for _ in range(6):
        plan, noise = broken.cache.plan_chunk(), noise_of(broken.cache.next_chunk, 3)
        with pytest.raises(ZeroDivisionError):
            broken.runner.advance(broken.cache, plan, noise, broken.text, on_step=lambda *_: 1 / 0)
        broken.latents[plan.chunk] = broken.runner.advance(broken.cache, plan, noise, broken.text)
    found, expected = broken.state(), smooth.state()
    assert all(relative_error(found[name], expected[name]) <= 3e-6 for name in expected if "low" not in name)


@torch.no_grad()
def test_a_chunk_that_failed_inside_a_merged_pass_is_not_repeated(model, monkeypatch):
    stream = Stream(small_runner(model, merged_pass=True), CacheConfig())
    stream.advance(4)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.blocks[1].cross_attn), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.advance()
    for call in (stream.advance, lambda: stream.runner.flush(stream.cache)):
        with pytest.raises(RuntimeError, match="chunk 4 failed inside a merged pass"):
            call()
    stream.cache.reset()
    stream.advance()
