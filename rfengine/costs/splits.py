"""What it costs to divide one stream among several cards: bytes that they send each other, milliseconds on a
link, and the floor of a chunk.

Tensor parallelism adds up three results of a block over the ranks, [T, D] in two bytes, and the mean squares
of its norms over heads, three float32 a token; a ring sends each of them 2 (n - 1) / n times from every card.
A decoder on a card of its own is sent the latents. Milliseconds are bytes over the link's rate; the time that
a message takes however short it is stands in no data sheet and is not counted, only how many there are. No
two parts run at once, but for the decoder on a card of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.checkpoint.rank_weights import rank_parts
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.config import WanConfig
from rfengine.costs.chunk import ChunkWork
from rfengine.costs.memory import text_bytes
from rfengine.costs.ops import HALF, SINGLE
from rfengine.costs.rates import GPU, floor_ms
from rfengine.tensor_parallel import TensorParallel

SUMS_OF_ROWS = 3  # of a block: after o of both attentions, and after ffn.2
MEAN_SQUARES = 3  # of a token in a block: self-attention's q and k, cross-attention's q
SUMS_OF_SQUARES = 2  # of a block


@dataclass(frozen=True, slots=True)
class Split:
    """One way to divide a stream. held: bytes of weights and cache on each rank's card. sent: bytes that each
    card sends for a chunk; messages: collectives, or copies, of a chunk. denoise_ms, decode_ms: floors of a
    chunk on a card, without what is sent. apart: the decoder has a card of its own."""

    name: str
    cards: int
    held: int
    sent: int
    messages: int
    denoise_ms: float
    decode_ms: float
    ranks: int
    apart: bool

    def link_ms(self, gb_per_s: float) -> float:
        return self.sent / gb_per_s / 1e6

    def chunk_ms(self, gb_per_s: float) -> float:
        """The floor of a chunk in a stream, over a link of that rate."""
        denoising = self.denoise_ms + (self.link_ms(gb_per_s) if self.ranks > 1 else 0.0)
        return max(denoising, self.decode_ms) if self.apart else denoising + self.decode_ms


def splits(work: ChunkWork, gpu: GPU, cards: int) -> list[Split]:
    """The chunk `work` on one card, and every way to have it on `cards` of them. Raises ValueError where
    there is none."""
    found = [_split("one card", work, gpu, 1, False)]
    if cards == 2:
        found.append(_split("the decoder on a card of its own", work, gpu, 1, True))
    if _divides(work, cards):
        found.append(_split(f"{cards} ranks", work, gpu, cards, False))
    if cards > 2 and _divides(work, cards - 1):
        found.append(_split(f"{cards - 1} ranks and the decoder's card", work, gpu, cards - 1, True))
    if len(found) == 1:
        model = work.shapes.config.model
        raise ValueError(
            f"{cards} cards cannot share {model.num_heads} heads and {model.ffn_dim} feed-forward columns "
            "evenly, with or without a card for the decoder; give another number of them"
        )
    return found


def _divides(work: ChunkWork, ranks: int) -> bool:
    model = work.shapes.config.model
    return not (model.num_heads % ranks or model.ffn_dim % ranks)


def _split(name: str, work: ChunkWork, gpu: GPU, ranks: int, apart: bool) -> Split:
    own = replace(work, ranks=ranks)
    denoise, decode = (
        sum(floor_ms(part, gpu) for part in own.parts() if part.decodes == decodes)
        for decodes in (False, True)
    )
    summed, messages = _summed(own) if ranks > 1 else (0, 0)
    latents = _latent_bytes(work) if apart else 0
    return Split(
        name, ranks + apart, _held(own), summed + latents, messages + apart, denoise, decode, ranks, apart
    )


def _summed(work: ChunkWork) -> tuple[int, int]:
    """Bytes that a rank sends for the sums of a chunk, and their number."""
    shapes, calls = work.shapes, work.layer_calls
    block = SUMS_OF_ROWS * shapes.chunk * HALF + MEAN_SQUARES * shapes.tokens * SINGLE
    sent = block * calls * 2 * (work.ranks - 1) // work.ranks
    return sent, (SUMS_OF_ROWS + SUMS_OF_SQUARES) * calls


def _latent_bytes(work: ChunkWork) -> int:
    shapes = work.shapes
    grid, channels = shapes.grid, shapes.config.model.out_dim
    return HALF * channels * shapes.frames * grid.latent_height * grid.latent_width


def _held(work: ChunkWork) -> int:
    """Weights in 16 bits, cache and text of a rank; without the VAE and the text encoder."""
    config, parallel = work.shapes.config, TensorParallel(0, work.ranks)
    weights = _transformer_bytes(config.model, torch.bfloat16, parallel)
    cache = StreamingKVCache(
        config.model, config.cache, work.shapes.grid, dtype=torch.bfloat16, device="meta", parallel=parallel
    )
    kept = sum(tensor.nbytes for tensor in cache.tensors().values())
    return weights + kept + text_bytes(work.own.config.model, torch.bfloat16)


def _transformer_bytes(model: WanConfig, dtype: torch.dtype, parallel: TensorParallel) -> int:
    """Of the transformer's weights; of several ranks, of one."""
    whole = {name: StoredTensor(shape, dtype, _unread) for name, shape in expected_shapes(model).items()}
    return sum(part.nbytes for part in rank_parts(whole, parallel).values())


def _unread() -> Tensor:
    raise AssertionError("only the shape of a tensor is asked for")
