import dataclasses
import math
import random

import pytest
import torch

from recipes.tiny.noise import VALUES
from recipes.tiny.training import StageConfig, train
from recipes.tiny.transformer import (
    CLIP,
    LATE,
    LATER_TEXTS,
    LAYOUTS,
    OPENING,
    START,
    Batch,
    ChunkedAttentionOps,
    Segment,
    TextShares,
    TransformerStage,
    draw_batch,
    flow_loss,
    layout_mask,
    noise_levels,
)
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig, EngineConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.ops import REFERENCE_OPS
from rfengine.presets import PRESETS
from rfengine.toy.data import LatentDataset
from rfengine.training.parallel import Ranks

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    model=WanConfig(
        dim=24,
        ffn_dim=32,
        num_heads=2,
        num_layers=3,
        text_dim=96,
        text_len=16,
        freq_dim=32,
        in_dim=8,
        out_dim=8,
    ),
    cache=CacheConfig(alpha=1.0),  # a sink that stands still, as the layouts have it
    height=32,
    width=48,
)
GRID = LatentGrid.of(CONFIG)
CHUNK_TOKENS = CONFIG.cache.chunk_frames * GRID.frame_tokens


@pytest.fixture
def model() -> WanDiT:
    torch.manual_seed(0)
    model = WanDiT(CONFIG.model).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.6)
    return model.requires_grad_(False)


def streamed_flow(
    model: WanDiT,
    chunks: list[torch.Tensor],
    noisy: torch.Tensor,
    timestep: float,
    text: torch.Tensor,
    before: torch.Tensor | None = None,
    recached: bool = False,
) -> torch.Tensor:
    """The flow of `noisy` as the chunk after the clean `chunks`, over the engine's own cache.

    before: the text of the clean chunks where it is another. recached: the window is recomputed under `text`.
    """
    cache = StreamingKVCache(CONFIG.model, CONFIG.cache, GRID, 1, torch.float64)
    keys_values = model.text_keys_values(text)
    earlier = keys_values if before is None else model.text_keys_values(before)
    for latents in chunks:
        plan = cache.plan_chunk()
        cache.begin_chunk(plan)
        model.forward_chunk(latents, model.modulation(torch.zeros(1, 1)), earlier, cache, plan, keep_raw=True)
        cache.commit(plan)
    if recached:
        frames = dict(enumerate(torch.cat(chunks, dim=2).split(1, dim=2)))
        model.recache(frames, model.modulation(torch.zeros(1, 1)), keys_values, cache)
    plan = cache.plan_chunk()
    cache.begin_chunk(plan)
    tokens = model.forward_chunk(
        noisy, model.modulation(torch.tensor([[timestep]])), keys_values, cache, plan
    )
    return model.ops.unpatchify(tokens, noisy)


def layout_flow(model: WanDiT, layout: tuple[Segment, ...], chunks: list[torch.Tensor], noisy: torch.Tensor,
                timestep: float, text: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """The flow of every segment when each noisy one holds `noisy`; late chunks count from the one being
    denoised."""
    size, end = CONFIG.cache.chunk_frames, len(chunks) + 1
    parts = [
        noisy if segment.noisy else chunks[segment.chunk if segment.chunk >= 0 else end + segment.chunk]
        for segment in layout
    ]
    times = torch.tensor([segment.time + frame for segment in layout for frame in range(size)])
    steps = torch.tensor([[timestep * segment.noisy for segment in layout for _ in range(size)]])
    mask = layout_mask(layout, CHUNK_TOKENS)
    if isinstance(model.ops, ChunkedAttentionOps):
        model.ops.attends = tuple(segment.attends for segment in layout)
    return model.forward_clip(torch.cat(parts, 2), steps, text, time_indices=times, mask=mask)


def random_latents() -> torch.Tensor:
    size = (1, 8, CONFIG.cache.chunk_frames, GRID.latent_height, GRID.latent_width)
    return torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("layout", "past", "segment"),
    [
        (START, 0, 0),
        (START, 0, 3),
        (OPENING, 0, 2),
        (OPENING, 1, 3),
        (OPENING, 2, 4),
        (LATE, 3, 4),
        (LATE, 3, 5),
    ],
)
def test_each_noisy_chunk_sees_what_the_streaming_cache_would_show_it(
    model: WanDiT, layout: tuple[Segment, ...], past: int, segment: int
):
    chunks = [random_latents() for _ in range(max(past, 2) if layout is OPENING else past)]
    noisy, text = random_latents(), torch.randn(1, 16, 96, dtype=torch.float64)
    expected = streamed_flow(model, chunks[:past], noisy, 833.25, text)
    flow = layout_flow(model, layout, chunks, noisy, 833.25, text)
    found = flow.unflatten(2, (len(layout), -1))[:, :, segment]
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())  # rotations are float32


@pytest.mark.parametrize("recached", [False, True])
def test_behind_a_switch_chunks_read_the_old_text_or_the_new_one(model: WanDiT, recached: bool):
    chunks, noisy = [random_latents() for _ in range(3)], random_latents()
    old, new = torch.randn(2, 1, 16, 96, dtype=torch.float64)
    expected = streamed_flow(model, chunks, noisy, 833.25, new, old, recached)
    ops = ChunkedAttentionOps(CHUNK_TOKENS)
    renewed = [recached and segment.chunk != 0 for segment in LATE]
    ops.texts = torch.tensor(
        [[int(new or segment.noisy) for segment, new in zip(LATE, renewed, strict=True)]]
    )
    chunked = WanDiT(CONFIG.model, ops).double().eval().requires_grad_(False)
    chunked.load_state_dict(model.state_dict())
    flow = layout_flow(chunked, LATE, chunks, noisy, 833.25, torch.cat([old, new]))
    found = flow.unflatten(2, (len(LATE), -1))[:, :, 4]
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def switching(switch: int) -> LatentDataset:
    """One video of five chunks, whose latents tell the chunk, and whose second scene begins with `switch`."""
    rows = [[0, 1]] * switch + [[2, 3]] * (5 - switch)
    return LatentDataset(
        latents=torch.arange(15).half()[None, None, :, None, None].expand(1, 2, 15, 2, 2),
        foreground=torch.zeros(1, 15, 2, 2, dtype=torch.bool),
        texts=torch.arange(1, 5).half()[:, None, None].expand(4, 3, 4),
        text_rows=torch.tensor([rows]),
        places=torch.tensor([[0.25, 0.5, 0.75]]),
        values=torch.arange(3.0)[None, :, None, None].expand(1, 3, len(VALUES), 2),
    )


def test_a_batch_has_the_text_of_each_chunk_and_does_not_teach_a_recached_one():
    batch = draw_batch(switching(2), 400, OPENING, 3, LATER_TEXTS, random.Random(0))
    assert (batch.clean[:, 0, ::3, 0, 0] == torch.tensor([0.0, 3, 0, 3, 6])).all()
    soft = torch.tensor([False, False, False, False, True])
    recached = torch.tensor([False, True, False, False, True])  # the first chunk is the sink
    read = batch.states[batch.texts, 0, 0]  # 1 and 2 are texts of the first scene, 3 and 4 of the second
    is_soft = ((read > 2) == soft).all(1)
    assert (is_soft | ((read > 2) == recached).all(1)).all() and 0.4 < is_soft.float().mean() < 0.6
    assert {tuple(sorted(set(row))) for row in read.tolist()} == {(1.0, 3.0), (2.0, 4.0)}
    assert len(batch.states) == 2 * 400
    taught = batch.weight[:, ::3, 0, 0] > 0
    assert taught[is_soft].all() and (taught[~is_soft] == soft).all()


def test_late_chunks_often_follow_a_switch_and_clips_stay_within_a_scene():
    ends = draw_batch(switching(3), 400, LATE, 3, LATER_TEXTS, random.Random(0)).clean[:, 0, -1, 0, 0]
    assert set(ends.tolist()) == {8, 11, 14} and (ends == 8).float().mean() < 0.25
    early = draw_batch(switching(1), 60, LATE, 3, LATER_TEXTS, random.Random(0)).clean[:, 0, -1, 0, 0]
    assert set(early.tolist()) == {8, 11, 14}
    clips = draw_batch(switching(1), 100, CLIP, 3, TextShares(0.3, 0.1), random.Random(1))
    assert set(clips.clean[:, 0, 0, 0, 0].tolist()) == {3, 6}
    empty = ~clips.states.flatten(1).any(1)  # which leaves all to chance
    assert (clips.values[empty] == 2).all()  # those of no text
    is_open = clips.states[:, 0, 0] % 2 == 0  # the second text of a scene
    assert (clips.values[~empty & is_open] == 1).all() and (clips.values[~empty & ~is_open] == 0).all()
    assert 0.2 < is_open[~empty].float().mean() < 0.5
    starts = draw_batch(switching(1), 400, START, 3, TextShares(0.6, 0.15), random.Random(1)).values[:, 0, 0]
    assert 0.55 < (starts == 1).float().mean() < 0.65  # an open text
    assert 0.1 < (starts == 2).float().mean() < 0.2  # no text at all
    assert len(clips.states) == 100 and 0.8 < clips.states.flatten(1).any(1).float().mean() < 0.97


class Recorder(torch.nn.Module):
    """Stands for the transformer: remembers its inputs, and predicts no flow."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.device = ChunkedAttentionOps(CHUNK_TOKENS), torch.device("cpu")

    def forward_clip(self, x: torch.Tensor, *_: torch.Tensor, **__: torch.Tensor) -> torch.Tensor:
        self.x = x
        return torch.zeros_like(x)


@pytest.mark.parametrize(("layout", "first"), [(START, 0), (START, 3), (OPENING, 2)])
def test_pure_noise_of_a_first_chunk_tells_where_the_video_begins(layout: tuple[Segment, ...], first: int):
    torch.manual_seed(0)
    turns, recorder = torch.rand(6, 3), Recorder()
    for level, told in ((1.0, True), (0.999, False)):
        batch = Batch(
            clean=torch.zeros(6, 8, 3 * len(layout), 4, 6),
            weight=torch.ones(6, 3 * len(layout), 4, 6),
            states=torch.zeros(6, 16, 96),
            texts=torch.zeros(6, len(layout), dtype=torch.int64),
            places=turns,
            values=torch.full((6, len(VALUES), 2), torch.nan),
        )
        levels = torch.full((6, len(layout)), level)
        flow_loss(recorder, CONFIG, batch, layout, levels, torch.Generator().manual_seed(0))
        means = recorder.x[:, :6, 3 * first : 3 * first + 3].mean((2, 3, 4)).unflatten(1, (3, 2))
        found = torch.atan2(means[..., 1], means[..., 0]) / (2 * math.pi) % 1
        assert (((found - turns + 0.5) % 1 - 0.5).abs().max() < 1e-4) == told


def test_a_noisy_chunk_never_changes_the_clean_ones(model: WanDiT):
    chunks = [random_latents() for _ in range(3)]
    text = torch.randn(1, 16, 96, dtype=torch.float64)
    one = layout_flow(model, LATE, chunks, random_latents(), 1000.0, text).unflatten(2, (6, -1))
    other = layout_flow(model, LATE, chunks, random_latents(), 1000.0, text).unflatten(2, (6, -1))
    assert torch.equal(one[:, :, :4], other[:, :, :4])
    assert not torch.equal(one[:, :, 4:], other[:, :, 4:])


def test_training_lowers_the_loss_and_continues_where_it_stopped(tmp_path):
    torch.manual_seed(0)
    videos, frames = 6, 12
    dataset = LatentDataset(
        latents=torch.randn(videos, 8, 1, 1, 1).expand(-1, -1, frames, 4, 6).half(),
        foreground=torch.zeros(videos, frames, 4, 6, dtype=torch.bool),
        texts=torch.randn(4, 16, 96).half(),
        text_rows=torch.tensor([[0, 1], [2, 3]])[:, None].expand(2, frames // 3, 2).repeat(3, 1, 1),
        places=torch.rand(videos, 3),
        values=torch.full((videos, 3, len(VALUES), 2), torch.nan),
    )
    engine: EngineConfig = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1))

    def trained(steps: int) -> dict[str, torch.Tensor]:
        config = StageConfig("teacher", engine, steps, 0)
        stage = TransformerStage(config, dataset, dataset, Ranks())
        train(config, stage, tmp_path, Ranks())
        return stage.model.state_dict()

    model = WanDiT(engine.model, ChunkedAttentionOps(CHUNK_TOKENS))
    model.load_state_dict(trained(100))
    with torch.no_grad():
        batch = draw_batch(dataset, 6, OPENING, 3, LATER_TEXTS, random.Random(1))
        generator = torch.Generator().manual_seed(1)
        levels = noise_levels(6, OPENING, engine, generator)
        loss = flow_loss(model, engine, batch, OPENING, levels, generator)
    untrained = 1 + float(dataset.latents.float().square().mean())  # of a model whose head is zero
    assert float(loss) < 0.9 * untrained
    resumed, again = trained(101), trained(101)  # the second finds nothing left to do
    assert any(not torch.equal(resumed[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(again[name], value) for name, value in resumed.items())


def test_all_passes_of_a_compiled_stage_are_compiled(monkeypatch: pytest.MonkeyPatch):
    passes: list[int] = []

    def counted(function, dynamic: bool):
        assert not dynamic  # every layout has sizes of its own
        return lambda *arguments, **named: passes.append(1) or function(*arguments, **named)

    monkeypatch.setattr(torch, "compile", counted)
    dataset = LatentDataset(
        latents=torch.zeros(1, 8, 12, 4, 6).half(),
        foreground=torch.zeros(1, 12, 4, 6, dtype=torch.bool),
        texts=torch.zeros(2, 16, 96).half(),
        text_rows=torch.tensor([[[0, 1]] * 4]),
        places=torch.zeros(1, 3),
        values=torch.full((1, 3, len(VALUES), 2), torch.nan),
    )
    engine = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1))
    stage = TransformerStage(StageConfig("teacher", engine, 3, 0), dataset, dataset, Ranks(), compiled=True)
    for step in range(3):
        stage.update(step)
    assert len(passes) == 3


def assert_agree(
    query_tokens: int, key_tokens: int, chunk_tokens: int, layout: tuple[Segment, ...] | None
) -> None:
    torch.manual_seed(0)
    shapes = [(2, tokens, 3, 10) for tokens in (query_tokens, key_tokens, key_tokens)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    ops, mask = ChunkedAttentionOps(chunk_tokens), layout and layout_mask(layout, chunk_tokens)
    ops.attends = tuple(segment.attends for segment in layout or ())
    found = ops.clip_attention(*inputs, mask)
    expected = REFERENCE_OPS.clip_attention(*inputs, mask)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_masked_attention(layout: tuple[Segment, ...]):
    assert_agree(7 * len(layout), 7 * len(layout), 7, layout)


def test_without_a_mask_every_key_is_seen():
    assert_agree(12, 5, 4, None)
