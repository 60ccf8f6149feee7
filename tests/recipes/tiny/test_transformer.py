import dataclasses

import pytest
import torch

from recipes.tiny.training import StageConfig, train
from recipes.tiny.transformer import (
    LATE,
    LAYOUTS,
    OPENING,
    START,
    ChunkedAttentionOps,
    Segment,
    TransformerStage,
    _loss,
    layout_mask,
    layout_weights,
)
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import PRESETS, CacheConfig, EngineConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.ops import REFERENCE_OPS
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
    model: WanDiT, chunks: list[torch.Tensor], noisy: torch.Tensor, timestep: float, text: torch.Tensor
):
    """The flow of `noisy` as the chunk after the clean `chunks`, over the engine's own cache."""
    cache = StreamingKVCache(CONFIG.model, CONFIG.cache, GRID, 1, torch.float64)
    keys_values = model.text_keys_values(text)
    for latents in chunks:
        plan = cache.plan_chunk()
        cache.begin_chunk(plan)
        model.forward_chunk(
            latents, model.modulation(torch.zeros(1, 1)), keys_values, cache, plan, keep_raw=True
        )
        cache.commit(plan)
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


def test_a_noisy_chunk_never_changes_the_clean_ones(model: WanDiT):
    chunks = [random_latents() for _ in range(3)]
    text = torch.randn(1, 16, 96, dtype=torch.float64)
    one = layout_flow(model, LATE, chunks, random_latents(), 1000.0, text).unflatten(2, (6, -1))
    other = layout_flow(model, LATE, chunks, random_latents(), 1000.0, text).unflatten(2, (6, -1))
    assert torch.equal(one[:, :, :4], other[:, :, :4])
    assert not torch.equal(one[:, :, 4:], other[:, :, 4:])


def test_layouts_are_all_drawn_and_late_ones_more_often_later():
    assert len(layout_weights(0.0)) == len(LAYOUTS) == len(layout_weights(1.0))
    assert layout_weights(1.0)[2] > layout_weights(0.0)[2] > 0


def test_training_lowers_the_loss_and_continues_where_it_stopped(tmp_path):
    torch.manual_seed(0)
    videos, frames = 6, 12
    dataset = LatentDataset(
        latents=torch.randn(videos, 8, 1, 1, 1).expand(-1, -1, frames, 4, 6).half(),
        foreground=torch.zeros(videos, frames, 4, 6, dtype=torch.bool),
        texts=torch.randn(2, 16, 96).half(),
        open_texts=torch.randn(2, 16, 96).half(),
        text_rows=torch.tensor([0, 1] * 3),
    )
    engine: EngineConfig = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1))

    def trained(steps: int) -> dict[str, torch.Tensor]:
        config = StageConfig("dit", engine, steps, 0)
        stage = TransformerStage(config, dataset, dataset, Ranks())
        train(config, stage, tmp_path, Ranks())
        return stage.model.state_dict()

    model = WanDiT(engine.model)
    model.load_state_dict(trained(100))
    with torch.no_grad():
        rows = torch.arange(videos)
        loss = _loss(model, engine, dataset, rows, OPENING, torch.Generator().manual_seed(1))
    untrained = 1 + float(dataset.latents.float().square().mean())  # of a model whose head is zero
    assert float(loss) < 0.9 * untrained
    resumed, again = trained(101), trained(101)  # the second finds nothing left to do
    assert any(not torch.equal(resumed[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(again[name], value) for name, value in resumed.items())


def assert_agree(query_tokens: int, key_tokens: int, chunk_tokens: int, mask: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    shapes = [(2, tokens, 3, 10) for tokens in (query_tokens, key_tokens, key_tokens)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    found = ChunkedAttentionOps(chunk_tokens).clip_attention(*inputs, mask)
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
    assert_agree(7 * len(layout), 7 * len(layout), 7, layout_mask(layout, 7))


def test_without_a_mask_every_key_is_seen():
    assert_agree(12, 5, 4, None)
