import pytest
import torch

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.cache.position import CachePosition
from rfengine.cache.sink_policy import EMPTY, CachePlan
from rfengine.config import CacheConfig
from rfengine.rotary import rotary_table
from support.models import GRID, SMALL, small_cache

FRAMES = GRID.frame_tokens


def advance_with_frame_numbers(cache: StreamingKVCache) -> CachePlan:
    """One chunk whose raw keys and values are the numbers of its latent frames; returns the plan."""
    plan = cache.plan_chunk()
    cache.begin_chunk(plan)
    numbers = torch.arange(plan.first_frame, plan.first_frame + plan.frames).float()
    for arena in (cache.keys, cache.values, cache.raw_keys):
        if arena is not None:
            arena.unflatten(2, (-1, FRAMES))[:, :, cache.write_slots] = numbers.view(1, 1, -1, 1, 1, 1)
    cache.commit(plan)
    return plan


def query_time(plan: CachePlan) -> int:
    return plan.times[plan.slots[0] - plan.start]


def frame_numbers(cache: StreamingKVCache) -> list[float]:
    return cache.chronological(cache.values)[0, 0, ::FRAMES, 0, 0].tolist()


def test_trace_of_the_published_setting():
    cache = small_cache(CacheConfig(alpha=0.999))
    plans = [advance_with_frame_numbers(cache) for _ in range(2)]
    assert [plan.evicts for plan in plans] == [False, False]
    assert frame_numbers(cache) == [0, 1, 2, 3, 4, 5]
    assert [query_time(plan) for plan in plans] == [0, 3]
    expected_sink = {3: 0.003, 4: 0.009, 5: 0.018, 6: 0.030}
    for chunk in range(2, 7):
        plan = advance_with_frame_numbers(cache)
        assert query_time(plan) == 6 and sorted(plan.times) == list(range(9))
        assert plan.evicts == (chunk >= 3)
        window = frame_numbers(cache)
        assert window[3:] == [
            3 * chunk - 3,
            3 * chunk - 2,
            3 * chunk - 1,
            3 * chunk,
            3 * chunk + 1,
            3 * chunk + 2,
        ]
        if chunk in expected_sink:
            assert window[0] == pytest.approx(expected_sink[chunk], abs=5e-4)
            raw_sink = cache.raw_keys[0, 0, 0, 0, 0].item()
            assert raw_sink == pytest.approx(window[0], abs=1e-6)


def test_time_indices_follow_the_age_of_a_slot_not_its_place():
    cache = small_cache(CacheConfig(window_frames=12))
    plans = [advance_with_frame_numbers(cache) for _ in range(7)]
    assert [plan.slots[0] for plan in plans] == [0, 3, 6, 9, 3, 6, 9]
    assert plans[4].times == (0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8)
    assert plans[5].times == (0, 1, 2, 6, 7, 8, 9, 10, 11, 3, 4, 5)


def test_absolute_positions_never_end():
    config = CacheConfig(sink="frozen", positions="absolute")
    cache = small_cache(config)
    held = (0, 1, 2, *range(2994, 3000))
    cache.load(cache.tensors(), CachePosition(1000, 3000, held))
    plan = cache.plan_chunk()
    assert plan.times == (0, 1, 2, 3000, 3001, 3002, 2997, 2998, 2999) and query_time(plan) == 3000
    cache.begin_chunk(plan)
    angle = torch.tensor([3000.0, 3001.0, 3002.0], dtype=torch.float64).cos().float()
    assert torch.equal(cache.query_rotation[0, ::FRAMES, 0], angle)


def test_frozen_sink_keeps_the_first_frames_and_drops_the_rest():
    cache = small_cache(CacheConfig(sink="frozen", positions="absolute"))
    for _ in range(6):
        advance_with_frame_numbers(cache)
    assert frame_numbers(cache) == [0, 1, 2, 12, 13, 14, 15, 16, 17]


def test_no_sink_keeps_the_last_frames_only():
    for positions in ("relative", "absolute"):
        cache = small_cache(CacheConfig(sink="none", sink_frames=0, positions=positions))
        plans = [advance_with_frame_numbers(cache) for _ in range(6)]
        assert frame_numbers(cache) == list(range(9, 18))
        assert query_time(plans[-1]) == (6 if positions == "relative" else 15)


@pytest.mark.parametrize(("chunk", "window"), [(1, 3), (1, 7), (2, 8), (5, 15)])
def test_any_chunk_length_and_window(chunk, window):
    cache = small_cache(CacheConfig(chunk, window, sink_frames=chunk, alpha=1.0))
    for number in range(3 * window):
        plan = advance_with_frame_numbers(cache)
        assert query_time(plan) == min(number * chunk, window - chunk)
    last = 3 * window * chunk
    assert frame_numbers(cache) == [*range(chunk), *range(last - window + chunk, last)]


def test_a_repeated_begin_folds_nothing_twice():
    cache = small_cache(CacheConfig(alpha=0.5))
    for _ in range(3):
        advance_with_frame_numbers(cache)
    plan = cache.plan_chunk()
    cache.begin_chunk(plan)
    once = cache.values.clone()
    cache.begin_chunk(plan)
    assert torch.equal(cache.values, once)
    assert once[0, 0, 0, 0, 0].item() == 1.5


def test_a_reset_cache_is_a_new_one():
    cache, new = small_cache(CacheConfig(alpha=0.5)), small_cache(CacheConfig(alpha=0.5))
    for _ in range(5):
        advance_with_frame_numbers(cache)
    arena = cache.keys
    for tensor in cache.tensors().values():
        tensor.fill_(7)
    cache.reset()
    assert cache.keys is arena
    for name, tensor in new.tensors().items():
        assert torch.equal(cache.tensors()[name], tensor), name
    for _ in range(6):
        plan = advance_with_frame_numbers(cache)
        assert plan == advance_with_frame_numbers(new)
        filled = plan.filled * FRAMES
        assert torch.equal(cache.rotation[:, :filled], new.rotation[:, :filled])
        assert torch.equal(cache.query_rotation, new.query_rotation)
        assert torch.equal(cache.values, new.values)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_every_slot_is_shown_the_rotation_of_its_time(positions):
    cache = small_cache(CacheConfig(sink="frozen", positions=positions, window_frames=12))
    for _ in range(7):
        plan = advance_with_frame_numbers(cache)
        for slot, time in enumerate(plan.times):
            expected = rotary_table(SMALL.head_dim, torch.tensor([time]), 2, 3)
            assert torch.equal(cache.rotation[:, slot * FRAMES : (slot + 1) * FRAMES], expected)


def test_planning_changes_nothing():
    cache = small_cache(CacheConfig())
    assert cache.plan_chunk() == cache.plan_chunk()
    assert cache.held == [EMPTY] * 9 and cache.next_chunk == cache.next_frame == 0


def test_calls_out_of_order_are_refused():
    cache = small_cache(CacheConfig())
    plan = cache.plan_chunk()
    with pytest.raises(RuntimeError, match="has not begun"):
        cache.commit(plan)
    cache.begin_chunk(plan)
    with pytest.raises(RuntimeError, match="commit it before"):
        cache.plan_chunk()
    cache.commit(plan)
    with pytest.raises(RuntimeError, match="the plan is for chunk 0 but chunk 1"):
        cache.begin_chunk(plan)


def test_raw_keys_exist_only_where_positions_move():
    assert small_cache(CacheConfig()).raw_keys is not None
    assert small_cache(CacheConfig(sink="frozen", positions="absolute")).raw_keys is None


def test_bf16_sink_precision_has_no_second_tensor():
    assert "sink_low_keys" in small_cache(CacheConfig()).tensors()
    assert "sink_low_keys" not in small_cache(CacheConfig(sink_precision="bf16")).tensors()


def test_memory_of_the_shipped_setting_is_two_and_a_half_gigabytes():
    from rfengine.grid import LatentGrid
    from rfengine.presets import PRESETS

    config = PRESETS["wan-1.3b"]
    cache = StreamingKVCache(
        config.model, config.cache, LatentGrid.of(config), dtype=torch.bfloat16, device="meta"
    )
    mebibytes = (cache.keys.nbytes + cache.values.nbytes) / 2**20
    assert mebibytes == pytest.approx(2468, abs=1)


def test_a_saved_state_of_another_size_is_refused():
    cache = small_cache(CacheConfig())
    other = small_cache(CacheConfig(window_frames=12))
    with pytest.raises(ValueError, match="keys of the saved cache is"):
        cache.load(other.tensors(), other.position)
    with pytest.raises(ValueError, match="raw_keys of the saved cache is missing"):
        tensors = cache.tensors()
        del tensors["raw_keys"]
        cache.load(tensors, cache.position)


def test_arena_follows_the_model_and_the_grid():
    cache = small_cache(CacheConfig())
    assert cache.keys.shape == (SMALL.num_layers, 1, 9 * FRAMES, SMALL.num_heads, SMALL.head_dim)
