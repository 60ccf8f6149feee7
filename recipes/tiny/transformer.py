"""Trains the transformer by flow matching on [clean | noisy] chunks in one pass, under the mask of the cache.

Every layout below lists chunks with the time index they have in the window of nine latent frames, so that all
that is attended to is where the streaming cache would have it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.tiny.muon import Muon
from recipes.tiny.training import StageConfig
from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.schedule import add_noise, shifted
from rfengine.toy.data import LatentDataset
from rfengine.training.arithmetic import cpu_autocast
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.stages import ModelStage

_BATCH, _PASSES = 16, 2  # videos of a step, and its passes, which ranks share
_MUON_RATE = 0.015
_ADAM = AdamConfig(1.5e-3, betas=(0.9, 0.98), weight_decay=0.0, clip=1.0, warm_up=100, fall=0.5)
_FOREGROUND_WEIGHT = 3.0
_CONTEXT_NOISE = 0.12  # largest sigma of the noise on clean chunks, which the model takes for clean
_FULL_NOISE_SHARE = 0.2  # of the noisy chunks start from pure noise, as every chunk does in a stream
_LEAST_UNIFORM = 0.08  # before the shift; the sampler never goes below its last step
_GATE_START = 0.5


@dataclass(frozen=True, slots=True)
class Segment:
    """One chunk in a layout: its place in the video, its first time index, noisy or clean, what it sees.

    `chunk` counts from the start of the video if it is 0 or more and from a late chunk drawn at random if
    below.
    """

    chunk: int
    time: int
    noisy: bool
    attends: tuple[int, ...]


# The first chunk alone, four times with other noise.
START = tuple(Segment(0, 0, True, (index,)) for index in range(4))
# The first three chunks: two clean ones, three noisy ones.
OPENING = (
    Segment(0, 0, False, (0,)),
    Segment(1, 3, False, (0, 1)),
    Segment(0, 0, True, (2,)),
    Segment(1, 3, True, (0, 3)),
    Segment(2, 6, True, (0, 1, 4)),
)
# A late chunk, twice with other noise: it sees the sink and the chunk before it, which saw the sink and one
# more.
# The sink is there twice, since it is six latent frames before the chunk that is denoised, at either time.
LATE = (
    Segment(0, 0, False, (0,)),
    Segment(0, 3, False, (1,)),
    Segment(-3, 3, False, (0, 2)),
    Segment(-2, 6, False, (0, 2, 3)),
    Segment(-1, 9, True, (1, 3, 4)),
    Segment(-1, 9, True, (1, 3, 5)),
)
LAYOUTS = (START, OPENING, LATE)


class ChunkedAttentionOps(Ops):
    """The reference ops with another clip_attention, whose mask must be constant over each pair of chunks:
    plain products over the chunks that are attended to, with no mask. On two CPU cores this takes a third of
    the time of the fused form."""

    def __init__(self, chunk_tokens: int) -> None:
        super().__init__(REFERENCE_OPS.choice)
        self.chunk_tokens = chunk_tokens

    def clip_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As reference.clip_attention: q [B, T, H, E]; k, v [B, S, H, E]; mask bool [T, S], True attends."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if mask is None:
            return _attend(q, k, v).transpose(1, 2)
        size = self.chunk_tokens
        keys, values = k.split(size, 2), v.split(size, 2)
        outputs = []
        for queries, attends in zip(q.split(size, 2), mask[::size, ::size].tolist(), strict=True):
            chosen = [index for index, seen in enumerate(attends) if seen]
            outputs.append(
                _attend(
                    queries,
                    torch.cat([keys[index] for index in chosen], 2),
                    torch.cat([values[index] for index in chosen], 2),
                )
            )
        return torch.cat(outputs, 2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v


def layout_mask(layout: tuple[Segment, ...], chunk_tokens: int) -> Tensor:
    """bool [T, T]: True where a token (row) of the layout may attend."""
    chunks = torch.zeros(len(layout), len(layout), dtype=torch.bool)
    for row, segment in enumerate(layout):
        chunks[row, list(segment.attends)] = True
    return chunks.repeat_interleave(chunk_tokens, 0).repeat_interleave(chunk_tokens, 1)


def layout_weights(progress: float) -> tuple[float, float, float]:
    """How often each of LAYOUTS is drawn at this part of the training: the first chunk first, late ones
    later."""
    return (0.6, 0.35, 0.05) if progress < 0.15 else (0.3, 0.4, 0.3)


class TransformerStage(ModelStage):
    """The transformer of config.model from random weights, on the videos of one dataset.

    The first chunk alone is learnt on the many more videos of `starts`, since it has to follow the text.
    """

    def __init__(
        self, config: StageConfig, videos: LatentDataset, starts: LatentDataset, ranks: Ranks
    ) -> None:
        torch.manual_seed(config.seed)
        model = _fresh_model(config.model)
        matrices = [value for value in model.blocks.parameters() if value.ndim == 2]
        muon = Muon(matrices, lr=_MUON_RATE, weight_decay=0.01)
        learner = Learner("dit", model, _ADAM, config.steps, _PASSES, ranks, muon)
        super().__init__(learner, average_decay=0.998)
        self.config, self.videos, self.starts = config, videos, starts

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        weights = layout_weights(step / self.config.steps)
        layout = random.Random(self.config.step_seed(step)).choices(LAYOUTS, weights)[0]
        generator = torch.Generator().manual_seed(self.config.pass_seed(step, index))
        dataset = self.starts if layout is START else self.videos
        rows = torch.randint(len(dataset.latents), (_BATCH // _PASSES,), generator=generator)
        loss = _loss(self.model, self.config.model, dataset, rows, layout, generator)
        return loss, {"layout": float(LAYOUTS.index(layout))}


def _fresh_model(config: EngineConfig) -> WanDiT:
    tokens = config.cache.chunk_frames * LatentGrid.of(config).frame_tokens
    model = WanDiT(config.model, ChunkedAttentionOps(tokens))
    with torch.no_grad():
        model.head.head.weight.zero_()
        model.head.head.bias.zero_()
        for block in model.blocks:
            block.modulation[:, [2, 5]] += _GATE_START
    return model


def _loss(
    model: nn.Module,
    config: EngineConfig,
    dataset: LatentDataset,
    rows: Tensor,
    layout: tuple[Segment, ...],
    generator: torch.Generator,
) -> Tensor:
    """Weighted squared error of the flow over the noisy chunks of the layout, on the videos `rows` of the
    dataset."""
    size = config.cache.chunk_frames
    clean, weight = _gather(dataset, rows, layout, size, generator)
    noisy = torch.tensor([segment.noisy for segment in layout])
    sigma = torch.where(
        noisy,
        _noisy_sigmas(len(rows), len(layout), config, generator),
        _CONTEXT_NOISE * torch.rand(len(rows), len(layout), generator=generator),
    )
    sigma = sigma.repeat_interleave(size, 1)
    noisy = noisy.repeat_interleave(size)
    broadcast = sigma[:, None, :, None, None]
    noise = torch.randn(clean.shape, generator=generator)
    latents = add_noise(clean, noise, broadcast)
    times = torch.tensor([segment.time + frame for segment in layout for frame in range(size)])
    patch = config.model.patch_size[1]
    tokens = size * (clean.shape[3] // patch) * (clean.shape[4] // patch)
    with cpu_autocast():
        flow = model.forward_clip(
            latents,
            config.schedule.num_train_timesteps * sigma * noisy,
            dataset.texts[dataset.text_rows[rows]].float(),
            time_indices=times,
            mask=layout_mask(layout, tokens),
        )
    error = (flow.float() - (noise - clean))[:, :, noisy].square().mean(1)
    return (error * weight[:, noisy]).mean()


def _gather(
    dataset: LatentDataset,
    rows: Tensor,
    layout: tuple[Segment, ...],
    size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Clean latents [B, C, F, h, w] of the layout and the weights [B, F, h, w] of their cells."""
    chunks = dataset.latents.shape[2] // size
    # one past the chunk that is denoised, from the third on; a layout without late chunks never reads it
    late = torch.randint(3, max(3, chunks) + 1, (len(rows),), generator=generator)
    clean, weight = [], []
    for row, end in zip(rows.tolist(), late.tolist(), strict=True):
        places = [segment.chunk if segment.chunk >= 0 else end + segment.chunk for segment in layout]
        frames = torch.tensor([place * size + frame for place in places for frame in range(size)])
        clean.append(dataset.latents[row][:, frames].float())
        weight.append(1 + (_FOREGROUND_WEIGHT - 1) * dataset.foreground[row][frames].float())
    return torch.stack(clean), torch.stack(weight)


def _noisy_sigmas(batch: int, segments: int, config: EngineConfig, generator: torch.Generator) -> Tensor:
    """Sigmas [batch, segments] by the shifted law the sampler's own steps follow, some of them exactly 1."""
    uniform, full = torch.rand(2, batch, segments, generator=generator)
    sigma = shifted(_LEAST_UNIFORM + (1 - _LEAST_UNIFORM) * uniform, config.schedule.shift)
    return torch.where(full < _FULL_NOISE_SHARE, 1.0, sigma)
