"""The runner against recomputation of the whole clip, and the properties of a long stream."""

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.config import CacheConfig, WanConfig
from rfengine.models.dit import WanDiT
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.ops.reference import sink_window_attention, unpatchify
from support.models import GRID, SMALL, noise_of, small_cache, small_model, small_runner, text_states

CHUNKS = 7


def visible_chunks(config: CacheConfig, chunk: int) -> list[int]:
    """Chunks that a chunk attends to while nothing was averaged."""
    window = config.past_frames // config.chunk_frames
    sink = [earlier for earlier in range(config.sink_frames // config.chunk_frames) if earlier <= chunk]
    return sorted({*sink, *range(max(0, chunk - window + 1), chunk + 1)})


def clip_mask(config: CacheConfig, chunks: int) -> torch.Tensor:
    tokens = config.chunk_frames * GRID.frame_tokens
    mask = torch.zeros(chunks, chunks, dtype=torch.bool)
    for chunk in range(chunks):
        mask[chunk, visible_chunks(config, chunk)] = True
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(3, 21, "none", 0, positions="absolute"),
        CacheConfig(3, 9, "none", 0, positions="absolute"),
        CacheConfig(3, 9, "none", 0, positions="relative"),
        CacheConfig(3, 9, "frozen", 3, positions="absolute"),
        CacheConfig(1, 4, "frozen", 2, positions="absolute"),
        CacheConfig(2, 4, "none", 0, positions="relative"),
        CacheConfig(3, 21, "ema", 3, positions="relative"),
    ],
)
def test_streaming_equals_recomputation(config):
    model, cache = small_model(), small_cache(config)
    runner, text = small_runner(model), model.text_keys_values(text_states())
    clean = []
    for chunk in range(CHUNKS):
        plan = cache.plan_chunk()
        noise = noise_of(chunk, config.chunk_frames)
        cache.begin_chunk(plan)
        tokens = model.forward_chunk(noise[0], runner.steps[0].modulation, text, cache, plan)
        streamed = unpatchify(tokens, noise[0])
        clip = torch.cat([*clean, noise[0]], dim=2)
        timesteps = torch.zeros(1, clip.shape[2])
        timesteps[:, -config.chunk_frames :] = 1000.0
        whole = model.forward_clip(clip, timesteps, text_states(), mask=clip_mask(config, chunk + 1))
        assert relative_error(streamed, whole[:, :, -config.chunk_frames :]) <= 3e-6
        clean.append(runner.advance(cache, plan, noise, text))


def run(config: CacheConfig, chunks: int, model=None) -> torch.Tensor:
    model = model or small_model()
    cache, runner, text = small_cache(config), small_runner(model), model.text_keys_values(text_states())
    out = [
        runner.advance(cache, cache.plan_chunk(), noise_of(c, config.chunk_frames), text)
        for c in range(chunks)
    ]
    return torch.cat(out, dim=2)


def test_relative_and_absolute_positions_agree_while_the_window_holds_the_history():
    relative = run(CacheConfig(3, 21, "none", 0, positions="relative"), 7)
    absolute = run(CacheConfig(3, 21, "none", 0, positions="absolute"), 7)
    averaged = run(CacheConfig(3, 21, "ema", 3, positions="relative"), 7)
    assert relative_error(absolute, relative) <= 3e-6
    assert relative_error(averaged, relative) <= 3e-6


def test_positions_disagree_once_the_window_has_moved_under_a_sink():
    relative = run(CacheConfig(3, 9, "frozen", 3, positions="relative"), 5)
    absolute = run(CacheConfig(3, 9, "frozen", 3, positions="absolute"), 5)
    assert relative_error(absolute[:, :, :9], relative[:, :, :9]) <= 3e-6
    assert relative_error(absolute[:, :, 9:], relative[:, :, 9:]) > 1e-4


def test_alpha_of_one_is_a_frozen_sink():
    averaged = run(CacheConfig(3, 9, "ema", 3, alpha=1.0), 6)
    frozen = run(CacheConfig(3, 9, "frozen", 3), 6)
    assert torch.equal(averaged, frozen)


def test_the_first_three_chunks_do_not_depend_on_alpha():
    slow, quick = run(CacheConfig(alpha=0.999), 4), run(CacheConfig(alpha=0.5), 4)
    assert torch.equal(slow[:, :, :9], quick[:, :, :9])
    assert relative_error(slow[:, :, 9:], quick[:, :, 9:]) > 1e-4


@torch.no_grad()
def test_a_batch_advances_like_single_streams():
    from rfengine.cache.kv_cache import StreamingKVCache

    model = small_model()
    runner = small_runner(model)
    prompts = torch.cat([text_states(1), text_states(2)])
    both = StreamingKVCache(SMALL, CacheConfig(), GRID, batch=2)
    alone = [small_cache(CacheConfig()) for _ in range(2)]
    for chunk in range(5):
        noise = torch.cat([noise_of(chunk, 3), noise_of(50 + chunk, 3)], dim=1)
        together = runner.advance(both, both.plan_chunk(), noise, model.text_keys_values(prompts))
        for row, cache in enumerate(alone):
            text = model.text_keys_values(prompts[row : row + 1])
            single = runner.advance(cache, cache.plan_chunk(), noise[:, row : row + 1], text)
            assert relative_error(together[row : row + 1], single) <= 3e-6


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_a_stream_goes_on_past_latent_frame_1024(positions):
    model = small_model(WanConfig(24, 24, 1, 1, text_dim=16, text_len=8, in_dim=4, out_dim=4))
    config = CacheConfig(8, 24, "frozen", 8, positions=positions)
    from rfengine.cache.kv_cache import StreamingKVCache

    cache, runner = StreamingKVCache(model.config, config, GRID), small_runner(model)
    text = model.text_keys_values(text_states())
    for chunk in range(135):
        latents = runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 8), text)
    assert cache.next_chunk * config.chunk_frames > 1024
    assert latents.isfinite().all() and 0.1 < latents.std() < 10


@torch.no_grad()
def test_the_device_reads_how_much_each_chunk_sees():
    """Kernels read the fill from device memory, the reference its copy on the host."""
    model, ops = small_model(), Ops(REFERENCE_OPS.choice)

    def attention(q, keys, values, kv_len, filled_tokens):
        return sink_window_attention(q, keys, values, filled_tokens.item())

    ops._run["sink_window_attention"] = attention
    other = WanDiT(SMALL, ops).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(CacheConfig(), 6, other), run(CacheConfig(), 6, model))


def by_frame(chunks: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return dict(enumerate(torch.cat([chunks[chunk] for chunk in sorted(chunks)], dim=2).split(1, dim=2)))


def test_recache_under_the_same_text_changes_nothing():
    for config in (
        CacheConfig(window_frames=15),
        CacheConfig(sink="frozen", positions="absolute", window_frames=15),
    ):
        model, cache = small_model(), small_cache(config)
        runner, text = small_runner(model), model.text_keys_values(text_states())
        latents = {}
        for chunk in range(4):
            latents[chunk] = runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), text)
        before = {name: cache.chronological(getattr(cache, name)).clone() for name in ("keys", "values")}
        runner.recache(cache, by_frame(latents), text)
        for name, expected in before.items():
            assert relative_error(cache.chronological(getattr(cache, name)), expected) <= 3e-6


def test_recache_gives_the_window_the_new_text():
    """With one layer keys and values do not depend on the history, so they can be recomputed chunk by
    chunk."""
    model = small_model(WanConfig(48, 64, 2, 1, text_dim=16, text_len=8, in_dim=4, out_dim=4))
    from rfengine.cache.kv_cache import StreamingKVCache

    cache, runner = StreamingKVCache(model.config, CacheConfig(window_frames=12), GRID), small_runner(model)
    old, new = (model.text_keys_values(text_states(seed)) for seed in (1, 2))
    latents = {}
    for chunk in range(6):
        latents[chunk] = runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), old)
    sink = cache.values[:, :, : 3 * GRID.frame_tokens].clone()
    runner.recache(cache, by_frame(latents), new)
    assert torch.equal(cache.values[:, :, : 3 * GRID.frame_tokens], sink)
    assert cache.held == [0, 1, 2, *range(9, 18)]
    plan = cache.plan_chunk()
    assert plan.slots == (3, 4, 5) and plan.evicts


def test_recache_makes_the_next_chunk_follow_the_new_text():
    model = small_model()
    old, new = (model.text_keys_values(text_states(seed)) for seed in (1, 2))

    def last_chunk(recache: bool) -> torch.Tensor:
        cache, runner, latents = small_cache(CacheConfig()), small_runner(model), {}
        for chunk in range(5):
            latents[chunk] = runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), old)
        if recache:
            runner.recache(cache, by_frame(latents), new)
        return runner.advance(cache, cache.plan_chunk(), noise_of(9, 3), new)

    assert relative_error(last_chunk(True), last_chunk(False)) > 1e-4


def test_recache_without_the_latents_is_refused():
    model, cache = small_model(), small_cache(CacheConfig())
    runner, text = small_runner(model), model.text_keys_values(text_states())
    for chunk in range(3):
        runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), text)
    with pytest.raises(ValueError, match="latents of frame 3 are needed"):
        runner.recache(cache, {}, text)


def test_a_failed_chunk_can_be_repeated_with_the_same_plan():
    model, config = small_model(), CacheConfig(alpha=0.5)
    runner, text = small_runner(model), model.text_keys_values(text_states())
    smooth, broken = small_cache(config), small_cache(config)
    for chunk in range(6):
        noise = noise_of(chunk, 3)
        expected = runner.advance(smooth, smooth.plan_chunk(), noise, text)
        plan = broken.plan_chunk()
        with pytest.raises(ZeroDivisionError):
            runner.advance(broken, plan, noise, text, on_step=lambda *_: 1 / 0)
        assert torch.equal(runner.advance(broken, plan, noise, text), expected)


def test_noise_of_another_step_count_is_refused():
    model, cache = small_model(), small_cache(CacheConfig())
    with pytest.raises(ValueError, match="noise holds 3 draws; 2 denoising steps"):
        small_runner(model).advance(cache, cache.plan_chunk(), noise_of(0, 3, steps=3), None)


def test_a_step_callback_may_replace_the_latents():
    model, cache = small_model(), small_cache(CacheConfig())
    runner, text = small_runner(model), model.text_keys_values(text_states())
    seen = []

    def on_step(step, timestep, latents):
        seen.append((step, timestep))
        return torch.zeros_like(latents) if step == 1 else None

    out = runner.advance(cache, cache.plan_chunk(), noise_of(0, 3), text, on_step)
    assert seen == [(0, 1000.0), (1, pytest.approx(833.3333))]
    assert torch.equal(out, torch.zeros_like(out))


def test_a_chunk_is_an_ordinary_tensor_and_records_no_gradient():
    model, cache = small_model(), small_cache(CacheConfig())
    runner, text = small_runner(model), model.text_keys_values(text_states())
    seen = []
    for chunk, watched in enumerate((False, True, False)):
        on_step = (lambda *step: seen.append(step[2])) if watched else None
        x0 = runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), text, on_step)
        seen.append(x0.add_(0))
    assert len(seen) == 3 + runner.num_steps
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in seen)
