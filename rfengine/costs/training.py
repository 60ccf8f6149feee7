"""FLOPs of the forward passes of a training, and the parameters of adapters; a multiply-add is two FLOPs.

Products alone are counted: norms, rotations and the time embedding are not.
"""

from __future__ import annotations

from functools import lru_cache

from rfengine.config import EngineConfig, WanConfig
from rfengine.costs.chunk import block_linears, prompt_parts
from rfengine.costs.vae import decode_work
from rfengine.grid import LatentGrid


def adapter_parameters(model: WanConfig, rank: int) -> int:
    """Parameters of adapters of `rank` for every linear of the blocks."""
    attention, ffn = 8 * 2 * model.dim, 2 * (model.dim + model.ffn_dim)
    return model.num_layers * rank * (attention + ffn)


def pass_flops(model: WanConfig, tokens: int, keys: int) -> float:
    """A forward of `tokens` that attend to `keys` tokens each: products of the blocks, patches and head."""
    linears = 2 * sum(inputs * outputs for inputs, outputs in block_linears(model).values())
    attention = 4 * model.dim * (keys + model.text_len)
    patch = model.patch_size[0] * model.patch_size[1] * model.patch_size[2]
    ends = 2 * model.dim * patch * (model.in_dim + model.out_dim)
    return float(tokens * (model.num_layers * (linears + attention) + ends))


def text_flops(model: WanConfig) -> float:
    """Keys and values of one prompt, for every layer."""
    return float(sum(part.flops for part in prompt_parts(model)))


def clip_flops(engine: EngineConfig, model: WanConfig, frames: int) -> float:
    """A forward over a whole clip of one sample, its text included."""
    tokens = frames * LatentGrid.of(engine).frame_tokens
    return pass_flops(model, tokens, tokens) + text_flops(model)


@lru_cache(maxsize=8)
def decode_flops(engine: EngineConfig, frames: int) -> float:
    """Decoding `frames` latent frames of one video at the engine's size, chunk by chunk."""
    size, grid = engine.cache.chunk_frames, LatentGrid.of(engine)
    first, other = (2 * decode_work(engine.vae, grid, size, first).multiply_adds for first in (True, False))
    return float(first + (frames // size - 1) * other)
