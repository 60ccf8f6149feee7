"""Graph mode against eager mode, bit for bit, with CUDA graphs replaced by tapes of ops that run on a CPU."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig
from rfengine.models.dit import WanDiT
from rfengine.models.fp8_products import quantise, refresh
from rfengine.ops import choose_ops
from rfengine.runtime import chunk_runner
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule
from support.models import GRID, SMALL, TWO_STEPS, noise_of, small_model, small_runner, text_states
from support.streams import Stream, assert_same
from support.tape import TapedCall, taped_programs

FOR_KERNELS = replace(SMALL, dim=128)  # the attention kernel has a head dim of 64 or 128
CHUNKS = 12
SETTINGS = [
    CacheConfig(),
    CacheConfig(alpha=0.5, window_frames=12),
    CacheConfig(sink_precision="bf16", alpha=0.5),
    CacheConfig(sink="frozen", positions="absolute"),
    CacheConfig(sink="none", sink_frames=0),
    CacheConfig(window_frames=12, sink="frozen", memory_rates=(0.01, 0.5)),
    CacheConfig(4, 18, "frozen", 6),
    CacheConfig(2, 9, "ema", 3, alpha=0.5),
    CacheConfig(sink="frozen", eviction="similarity"),
]


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[TapedCall]:
    """Every program that is recorded in the test; a GPU test records real graphs."""
    return [] if "gpu" in request.keywords else taped_programs(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return small_model()


def in_both_modes(model, config: CacheConfig, scenario) -> None:
    """What `scenario` does to a stream leaves the same latents and cache with graphs and without."""
    states = []
    for graphs in (False, True):
        stream = Stream(small_runner(model, graphs=graphs), config)
        scenario(stream)
        states.append(stream.state())
    assert_same(*states)


@torch.no_grad()
@pytest.mark.parametrize("config", SETTINGS)
def test_replayed_chunks_equal_eager_ones_bit_for_bit(model, config, tapes):
    # the window is filled; then a chunk runs op by op, one is recorded, and the others are replayed
    in_both_modes(model, config, lambda stream: stream.advance(config.filling_chunks + 9))
    assert len(tapes) == 1


@torch.no_grad()
def test_a_prompt_switch_reaches_the_graphs(model, tapes):
    def scenario(stream: Stream) -> None:
        stream.advance(8)
        stream.set_text(1)
        stream.advance(3)
        stream.set_text(2)
        stream.recache()
        stream.advance(6)

    in_both_modes(model, CacheConfig(window_frames=12), scenario)
    assert tapes


@torch.no_grad()
def test_restoring_a_snapshot_into_a_cache_with_graphs_continues_it(model, tapes):
    stream = Stream(small_runner(model, graphs=True), CacheConfig(alpha=0.5))
    stream.advance(8)
    saved = {name: value.clone() for name, value in stream.cache.tensors().items()}
    position = stream.cache.position
    stream.advance(5)
    expected, recorded = stream.state(), len(tapes)
    stream.cache.load(saved, position)
    stream.advance(5)
    assert_same(stream.state(), expected)
    assert recorded == 1


@torch.no_grad()
def test_two_interleaved_streams_do_not_disturb_each_other(model, tapes):
    def alone(seed: int, config: CacheConfig) -> dict[str, torch.Tensor]:
        stream = Stream(small_runner(model, graphs=False), config, seed)
        stream.set_text(seed)
        stream.advance(CHUNKS)
        return stream.state()

    runner, configs = (
        small_runner(model, graphs=True),
        (CacheConfig(), CacheConfig(window_frames=12)),
    )
    streams = [Stream(runner, config, seed) for seed, config in enumerate(configs)]
    for seed, stream in enumerate(streams):
        stream.set_text(seed)
    for _ in range(CHUNKS):
        for stream in streams:
            stream.advance()
    assert len(tapes) == 2
    for seed, stream in enumerate(streams):
        assert_same(stream.state(), alone(seed, configs[seed]))


@torch.no_grad()
def test_after_a_reset_the_graphs_serve_the_next_video(model, tapes):
    runner = small_runner(model, graphs=True)
    stream, fresh = (Stream(runner, CacheConfig(alpha=0.5)) for _ in range(2))
    stream.advance(9)
    recorded = len(tapes)
    stream.cache.reset()
    stream.advance(CHUNKS)
    assert len(tapes) == recorded == 1
    stream.latents = {chunk: stream.latents[chunk] for chunk in range(CHUNKS)}
    fresh.advance(CHUNKS)
    assert_same(stream.state(), fresh.state())


@torch.no_grad()
def test_chunks_with_a_callback_mix_with_replayed_ones(model, tapes):
    def scenario(stream: Stream) -> None:
        stream.advance(7)
        stream.advance(2, on_step=lambda step, timestep, latents: latents * 0.5 if step == 0 else None)
        stream.advance(3)

    in_both_modes(model, CacheConfig(), scenario)
    assert tapes


@torch.no_grad()
def test_what_advance_returns_is_not_overwritten(model):
    stream = Stream(small_runner(model, graphs=True), CacheConfig())
    stream.advance(CHUNKS)
    copies = {chunk: latents.clone() for chunk, latents in stream.latents.items()}
    stream.advance(4)
    assert all(torch.equal(stream.latents[chunk], copy) for chunk, copy in copies.items())


@torch.no_grad()
def test_a_recorded_program_reads_nothing_that_belongs_to_the_caller(model, tapes):
    stream = Stream(small_runner(model, graphs=True), CacheConfig())
    given = []

    def remember(runner, cache, plan, noise, text, on_step=None, clean=None):
        given.extend([noise, text.keys, text.values])
        return ChunkRunner.advance(runner, cache, plan, noise, text, on_step, clean)

    stream.runner.advance = remember.__get__(stream.runner)
    stream.advance(CHUNKS)
    read = [tape.tape.read_from_outside() for tape in tapes]
    callers = {tensor.untyped_storage().data_ptr() for tensor in [*given, *stream.latents.values()]}
    assert not callers & set.union(*read)
    cache = stream.cache
    arenas = [cache.keys, cache.values, cache.raw_keys, cache.query_rotation, cache.write_slots]
    assert {tensor.untyped_storage().data_ptr() for tensor in arenas} <= read[0]


@torch.no_grad()
def test_a_failed_recording_leaves_the_cache_as_it_was(model, monkeypatch):
    broken, smooth = (
        Stream(small_runner(model, graphs=graphs), CacheConfig(alpha=0.5)) for graphs in (True, False)
    )

    def record(function, *_):
        with monkeypatch.context() as patch:
            patch.setattr(type(model.ops), "flow_step", lambda *_: 1 / 0)
            TapedCall(function, None, None)

    monkeypatch.setattr(chunk_runner, "CapturedCall", record)
    for stream in (broken, smooth):
        stream.advance(4)
    with pytest.raises(ZeroDivisionError):
        broken.advance()
    broken.runner.graphs = False
    for stream in (broken, smooth):
        stream.advance(4)
    assert_same(broken.state(), smooth.state())


@torch.no_grad()
def test_graphs_are_freed_with_their_cache(model, monkeypatch):
    class Recorded:
        """Keeps what CapturedCall keeps: the result."""

        def __init__(self, function, *_) -> None:
            call = TapedCall(function, None, None)
            self.result = call.result
            call.tape.play()

        def replay(self):
            return self.result

    pools = []
    monkeypatch.setattr(chunk_runner, "CapturedCall", Recorded)
    monkeypatch.setattr(chunk_runner, "graph_pool", lambda: pools.append(len(pools)) or len(pools))
    runner = small_runner(model, graphs=True)
    first, second = (Stream(runner, CacheConfig()) for _ in range(2))
    first.advance(7)
    second.advance(3)
    graphs = weakref.ref(next(iter(runner._graph_by_cache.values())))
    del first
    gc.collect()
    assert graphs() is None
    second.advance(4)
    assert len(pools) == 2  # the old pool went with the last graph in it
    third = Stream(runner, CacheConfig())
    third.advance(7)
    assert len(pools) == 2 and len(runner._graph_by_cache) == 2


def on_cuda(graphs: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = WanDiT(FOR_KERNELS, choose_ops("auto", "cuda")).to("cuda", torch.bfloat16).eval()
    runner, config = small_runner(model, graphs=graphs), CacheConfig(alpha=0.5)
    cache = StreamingKVCache(FOR_KERNELS, config, GRID, dtype=model.dtype, device="cuda", ops=model.ops)
    texts, states = [model.text_keys_values(text_states(seed).cuda()) for seed in range(3)], {}
    for chunk in range(2 * CHUNKS):
        if chunk == CHUNKS:
            cache.reset()
        text = texts[chunk // 9]
        noise = noise_of(chunk, 3).to("cuda", model.dtype)
        states[f"latents.{chunk}"] = runner.advance(cache, cache.plan_chunk(), noise, text)
    if graphs:
        assert runner._graph_by_cache[cache].call is not None
    return states | {name: value.clone() for name, value in cache.tensors().items()}


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graphs_equal_eager_launches_bit_for_bit():
    assert_same(on_cuda(graphs=True), on_cuda(graphs=False))


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graphs_can_be_recorded_again_after_all_were_freed():
    model = WanDiT(SMALL).to("cuda").eval()
    runner, text = small_runner(model, graphs=True), model.text_keys_values(text_states().cuda())
    for _ in range(3):
        cache = StreamingKVCache(SMALL, CacheConfig(), GRID, device="cuda")
        for chunk in range(8):
            latents = runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3).cuda(), text)
        assert latents.isfinite().all()
        del cache
        gc.collect()


@torch.no_grad()
@pytest.mark.parametrize("config", [CacheConfig(alpha=0.5), CacheConfig(sink="frozen", positions="absolute")])
@pytest.mark.parametrize("passes", [(), (1,), (0, 1, 2)], ids=["linears", "one pass", "every pass"])
def test_chunks_in_fp8_are_replayed_too(config, passes, tapes):
    """Products in FP8, and attention over copies of the window; a weight that changes reaches the graph."""
    states = []
    for graphs in (False, True):
        model = small_model()
        quantise(model)
        stream = Stream(ChunkRunner(model, FlowSchedule(TWO_STEPS), graphs, passes), config)
        stream.advance(config.filling_chunks + 4)
        for block in model.blocks:
            block.ffn[0].weight.mul_(1.1)
            block.self_attn.norm_k.weight.mul_(3.0)
        refresh(model)
        stream.runner.refresh()
        stream.advance(4)
        states.append(stream.state())
    assert_same(*states)
    assert len(tapes) == 1
