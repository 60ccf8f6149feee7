"""Trains the transformer by flow matching, on whole clips and on [clean | noisy] chunks under the mask of the
cache, in one pass each.

Every layout below lists chunks with the time index they have in the window of nine latent frames, so that all
that is attended to is where the streaming cache would have it. So one model is both the bidirectional teacher
and a causal one, with which the student begins. Every chunk reads a text of its own: behind a switch the
chunks before it keep the old text (a soft switch) or read the new one (a recached one).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.tiny.muon import Muon
from recipes.tiny.noise import telling_noise, told_turns
from recipes.tiny.training import CPU, StageConfig, cell_weight
from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.schedule import add_noise, shifted
from rfengine.toy.data import LatentDataset
from rfengine.training.arithmetic import fast_autocast
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.stages import ModelStage

_BATCH = 16  # videos of a step
_CONTEXT_NOISE = 0.15  # largest sigma of the noise on clean chunks, which the model takes for clean
_FULL_NOISE_SHARE = 0.15  # of the noisy chunks start from pure noise, as every chunk does in a stream
_FULL_NOISE_START = 0.5  # of the first chunks alone, for which that noise tells what is open
_AFTER_SWITCH_SHARE = 0.6  # of the late chunks of a video with a switch follow it at once or as the second
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


class TextShares(NamedTuple):
    """Of the videos of a layout, how many read a text that leaves something open, and how many none at all:
    their first chunks read all from the noise."""

    open: float
    empty: float


@dataclass(frozen=True, slots=True)
class FlowPlan:
    """What a FlowStage draws and how it learns. weights: how often each of `layouts` is drawn, and texts:
    what its videos read. muon_rate, muon_decay: of the matrices in the blocks; `adam` is for everything
    else."""

    layouts: tuple[tuple[Segment, ...], ...]
    weights: tuple[float, ...]
    texts: tuple[TextShares, ...]
    adam: AdamConfig
    muon_rate: float
    muon_decay: float


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
# Three chunks in a row that all see each other, at one noise level: a clip as the teacher denoises it. It
# never begins a video, whose first latent stands for one frame: under much noise that could not be told, so
# the first chunk is a clip of its own, START.
CLIP = tuple(Segment(index - 3, 3 * index, True, (0, 1, 2)) for index in range(3))
LAYOUTS = (START, OPENING, LATE, CLIP)
LATER_TEXTS = TextShares(0.4, 0.0)  # of OPENING and LATE
_PLAN = FlowPlan(
    LAYOUTS,
    (0.4, 0.15, 0.2, 0.25),  # the first and the last are what the teacher judges by
    (TextShares(0.3, 0.4), LATER_TEXTS, LATER_TEXTS, TextShares(0.3, 0.1)),
    AdamConfig(1.5e-3, betas=(0.9, 0.98), weight_decay=0.0, clip=1.0, warm_up=100, fall=0.9),
    muon_rate=0.015,
    muon_decay=0.01,
)


class ChunkedAttentionOps(Ops):
    """The reference ops with another clip_attention, among the chunks of a layout: plain products over the
    chunks that are attended to, with no mask. On two CPU cores this takes a third of the time of the fused
    form.

    attends: of every chunk those that it sees, which stand for the mask. texts: integers [B, chunks], which
    of all texts each chunk reads; None for one text a video.
    """

    def __init__(self, chunk_tokens: int) -> None:
        super().__init__(REFERENCE_OPS.choice)
        self.chunk_tokens = chunk_tokens
        self.attends: tuple[tuple[int, ...], ...] = ()
        self.texts: Tensor | None = None

    def clip_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As reference.clip_attention: q [B, T, H, E]; k, v [B, S, H, E]; no mask where k and v are those of
        texts, and any mask for that of the layout."""
        if mask is None:
            return self._over_texts(q, k, v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        size = self.chunk_tokens
        keys, values = k.split(size, 2), v.split(size, 2)
        outputs = []
        for queries, chosen in zip(q.split(size, 2), self.attends, strict=True):
            outputs.append(
                _attend(
                    queries,
                    torch.cat([keys[index] for index in chosen], 2),
                    torch.cat([values[index] for index in chosen], 2),
                )
            )
        return torch.cat(outputs, 2).transpose(1, 2)

    def _over_texts(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.texts is None:
            return _attend(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
        chosen = [
            part.index_select(0, self.texts.flatten()).unflatten(0, self.texts.shape) for part in (k, v)
        ]
        queries = q.unflatten(1, (-1, self.chunk_tokens))
        return _attend(*(part.transpose(2, 3) for part in (queries, *chosen))).transpose(2, 3).flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v


def layout_mask(layout: tuple[Segment, ...], chunk_tokens: int) -> Tensor:
    """bool [T, T]: True where a token (row) of the layout may attend."""
    chunks = torch.zeros(len(layout), len(layout), dtype=torch.bool)
    for row, segment in enumerate(layout):
        chunks[row, list(segment.attends)] = True
    return chunks.repeat_interleave(chunk_tokens, 0).repeat_interleave(chunk_tokens, 1)


class FlowStage(ModelStage):
    """Flow matching of `model`, whose ops are ChunkedAttentionOps, on videos laid out by `plan`.

    The first chunk alone is learnt on the many more videos of `starts`, since it has to follow the text; all
    else on `videos`. compiled: each layout's pass by torch.compile, which needs a C++ compiler.
    """

    def __init__(
        self,
        config: StageConfig,
        plan: FlowPlan,
        model: WanDiT,
        videos: LatentDataset,
        starts: LatentDataset,
        ranks: Ranks,
        compiled: bool,
    ) -> None:
        if compiled:
            model.forward_clip = torch.compile(model.forward_clip, dynamic=False)
        learner = flow_learner(config, model, plan.adam, plan.muon_rate, plan.muon_decay, ranks)
        super().__init__(learner, 0.998)
        self.config, self.plan, self.videos, self.starts = config, plan, videos, starts

    def levels(self, count: int, layout: tuple[Segment, ...], generator: torch.Generator) -> Tensor:
        """Sigmas [count, S] of the chunks of a layout."""
        raise NotImplementedError

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        choices = random.Random(self.config.step_seed(step))
        drawn = list(zip(self.plan.layouts, self.plan.texts, strict=True))
        layout, texts = choices.choices(drawn, self.plan.weights)[0]
        engine, dataset = self.config.model, self.starts if layout is START else self.videos
        batch = draw_batch(dataset, _BATCH, layout, engine.cache.chunk_frames, texts, choices)
        generator = torch.Generator().manual_seed(self.config.pass_seed(step, index))
        levels = self.levels(_BATCH, layout, generator)
        loss = flow_loss(self.model, engine, batch, layout, levels, generator)
        return loss, {"layout": float(self.plan.layouts.index(layout))}


class TransformerStage(FlowStage):
    """The transformer of config.model from random weights; see FlowStage."""

    def __init__(
        self,
        config: StageConfig,
        videos: LatentDataset,
        starts: LatentDataset,
        ranks: Ranks,
        device: torch.device = CPU,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(config.seed)
        model = _fresh_model(config.model).to(device)
        super().__init__(config, _PLAN, model, videos, starts, ranks, compiled)

    def levels(self, count: int, layout: tuple[Segment, ...], generator: torch.Generator) -> Tensor:
        return noise_levels(count, layout, self.config.model, generator)


def flow_learner(
    config: StageConfig, model: WanDiT, adam: AdamConfig, muon_rate: float, muon_decay: float, ranks: Ranks
) -> Learner:
    """Learns the matrices in the blocks of a model by Muon and all else by `adam`."""
    matrices = [value for value in model.blocks.parameters() if value.ndim == 2]
    muon = Muon(matrices, lr=muon_rate, weight_decay=muon_decay)
    return Learner(config.name, model, adam, config.steps, 1, ranks, muon)


def chunk_tokens(config: EngineConfig) -> int:
    """Tokens of one chunk."""
    return config.cache.chunk_frames * LatentGrid.of(config).frame_tokens


def _fresh_model(config: EngineConfig) -> WanDiT:
    model = WanDiT(config.model, ChunkedAttentionOps(chunk_tokens(config)))
    with torch.no_grad():
        model.head.head.weight.zero_()
        model.head.head.bias.zero_()
        for block in model.blocks:
            block.modulation[:, [2, 5]] += _GATE_START
    return model


class Batch(NamedTuple):
    """B videos in a layout of S chunks: clean latents [B, C, F, h, w], the weights [B, F, h, w] of their
    cells, the states [N, text_len, D] of all their texts, which of these each chunk reads, [B, S], where the
    videos begin, [B, PLACES], and what the text of the first chunk leaves open, [B, VALUES, 2]."""

    clean: Tensor
    weight: Tensor
    states: Tensor
    texts: Tensor
    places: Tensor
    values: Tensor


def draw_batch(
    dataset: LatentDataset,
    count: int,
    layout: tuple[Segment, ...],
    size: int,
    shares: TextShares,
    choices: random.Random,
) -> Batch:
    """size: latent frames of a chunk. A video whose texts are recached teaches nothing about what is before
    the switch."""
    clean, weight, states, texts, places, values = [], [], [], [], [], []
    while len(clean) < count:
        row = choices.randrange(len(dataset.latents))
        scenes = dataset.text_rows[row, :, 0].tolist()
        end = _end_of_layout(layout, scenes, choices)
        chunks = [segment.chunk if segment.chunk >= 0 else end + segment.chunk for segment in layout]
        last = scenes[chunks[-1]]
        if layout is CLIP and scenes[chunks[0]] != last:
            continue
        recached = choices.random() < 0.5
        # a stream that recaches recomputes its window, and leaves the sink, the first chunk, as it is
        renewed = [
            recached and chunk > 0 and not part.noisy for chunk, part in zip(chunks, layout, strict=True)
        ]
        read = [scenes[chunk] == last or new for chunk, new in zip(chunks, renewed, strict=True)]
        learns = [scenes[chunk] == last or not recached for chunk in chunks]
        frames = torch.tensor([chunk * size + frame for chunk in chunks for frame in range(size)])
        taught = torch.tensor(learns).repeat_interleave(size)[:, None, None]
        clean.append(dataset.latents[row][:, frames].float())
        weight.append(taught * cell_weight(dataset.foreground[row][frames]))
        places.append(dataset.places[row])
        kind = choices.random()
        said, is_open = float(kind >= shares.empty), kind < shares.empty + shares.open
        values.append(dataset.values[row, int(is_open) if said else 2])
        new, old = dataset.text_rows[row, [chunks[-1], chunks[0]], int(is_open)]
        texts.append([len(states) + (not reads_new) for reads_new in read])
        listed = [new, old] if layout in (OPENING, LATE) else [new]  # as many for all batches of a layout
        states += [said * dataset.texts[text].float() for text in listed]
    stacked = [torch.stack(part) for part in (clean, weight, states)]
    return Batch(*stacked, torch.tensor(texts), torch.stack(places), torch.stack(values))


def _end_of_layout(layout: tuple[Segment, ...], scenes: list[int], choices: random.Random) -> int:
    """One past the last chunk of a layout's late ones; a layout without late chunks does not ask."""
    if layout[-1].chunk >= 0:
        return 0
    switch = next((place for place, row in enumerate(scenes) if row != scenes[0]), 0)
    after = [end for end in (switch + 1, switch + 2) if 3 < end <= len(scenes)]
    if layout is LATE and switch and after and choices.random() < _AFTER_SWITCH_SHARE:
        return choices.choice(after)
    return choices.randint(4 if layout is CLIP else 3, len(scenes))


def flow_loss(
    model: WanDiT,
    config: EngineConfig,
    batch: Batch,
    layout: tuple[Segment, ...],
    levels: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Weighted squared error of the flow over the noisy chunks of the layout, on the model's device. levels:
    sigmas [B, S], of which those of the noisy chunks count; the model's ops are ChunkedAttentionOps.

    A first chunk that is pure noise tells what its text leaves open (noise.py); at lower levels, where a
    sampler has drawn new noise, it does not.
    """
    size, count, device = config.cache.chunk_frames, len(batch.clean), model.device
    noisy = torch.tensor([segment.noisy for segment in layout])
    clean_levels = _CONTEXT_NOISE * torch.rand(count, len(layout), generator=generator)
    sigma = torch.where(noisy, levels, clean_levels).repeat_interleave(size, 1).to(device)
    noisy = noisy.repeat_interleave(size).to(device)
    noise = torch.randn(batch.clean.shape, generator=generator)
    noise = _telling_starts(noise, batch, layout, levels, generator).to(device)
    times = torch.tensor([segment.time + frame for segment in layout for frame in range(size)], device=device)
    clean, weight, states, texts, *_ = (part.to(device) for part in batch)
    model.ops.texts = None if len(states) == count else texts
    model.ops.attends = tuple(segment.attends for segment in layout)
    with fast_autocast(device):
        flow = model.forward_clip(
            add_noise(clean, noise, sigma[:, None, :, None, None]),
            config.schedule.num_train_timesteps * sigma * noisy,
            states,
            time_indices=times,
            mask=layout_mask(layout, chunk_tokens(config)),
        )
    error = (flow.float() - (noise - clean))[:, :, noisy].square().mean(1)
    return (error * weight[:, noisy]).mean()


def _telling_starts(
    noise: Tensor, batch: Batch, layout: tuple[Segment, ...], levels: Tensor, generator: torch.Generator
) -> Tensor:
    """The noise [B, C, F, h, w] of the layout's chunks; first chunks at a level of 1 tell what is open."""
    chunks = list(noise.chunk(len(layout), dim=2))
    for index, segment in enumerate(layout):
        if segment.noisy and segment.chunk == 0:
            full = (levels[:, index] == 1)[:, None, None, None, None]
            told = telling_noise(chunks[index], batch.places, told_turns(batch.values, generator))
            chunks[index] = torch.where(full, told, chunks[index])
    return torch.cat(chunks, dim=2)


def noise_levels(
    count: int, layout: tuple[Segment, ...], config: EngineConfig, generator: torch.Generator
) -> Tensor:
    """Sigmas [count, S] by the shifted law the sampler's own steps follow, some of them exactly 1; one for
    all chunks of a clip."""
    chunks = 1 if layout is CLIP else len(layout)
    uniform, full = torch.rand(2, count, chunks, generator=generator)
    share = _FULL_NOISE_START if layout is START else _FULL_NOISE_SHARE
    levels = torch.where(full < share, 1.0, shifted(uniform, config.schedule.shift))
    return levels.expand(-1, len(layout))
