"""Arguments of every op of kernels/ at the shapes of the engine, in the order the op takes them.

Shapes: L layers, B batch (1), T tokens of a chunk, S tokens of the window, H heads, E head dim, D dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rfengine.costs.shapes import Shapes, VaeLevel
from rfengine.ops.reference_fp8 import product_reach
from rfengine.ops.reference_fp8_attention import aligned_tokens
from rfengine.ops.reference_int8 import channel_int8

Arguments = tuple[Tensor | float | int | bool | str | torch.dtype | None, ...]


def _modulated(shapes: Shapes, draw: Draw, by_frame: bool = False) -> tuple[Tensor, ...]:
    """Gate, shift and scale [1, 1, D]: strided rows of the model's table, one timestep for the chunk, or by
    frame [1, F, D]."""
    return draw.table(1, shapes.frames if by_frame else 1, 6, shapes.dim).unbind(2)[2:5]


def adaptive(shapes: Shapes, draw: Draw, by_frame: bool = False) -> Arguments:
    _, shift, scale = _modulated(shapes, draw, by_frame)
    return draw.rows(1, shapes.tokens, shapes.dim), shift, scale, shapes.eps


def affine(shapes: Shapes, draw: Draw) -> Arguments:
    weight, bias = (draw.rows(shapes.dim, scale=0.1, mean=mean) for mean in (1.0, 0.0))
    return draw.rows(1, shapes.tokens, shapes.dim), weight, bias, shapes.eps


def _branches(shapes: Shapes, draw: Draw) -> tuple[Tensor, Tensor]:
    return draw.rows(1, shapes.tokens, shapes.dim), draw.rows(1, shapes.tokens, shapes.dim)


def gated_adaptive(shapes: Shapes, draw: Draw, by_frame: bool = False) -> Arguments:
    return *_branches(shapes, draw), *_modulated(shapes, draw, by_frame), shapes.eps


def gated_affine(shapes: Shapes, draw: Draw) -> Arguments:
    _, weight, bias, eps = affine(shapes, draw)
    return *_branches(shapes, draw), _modulated(shapes, draw)[0], weight, bias, eps


def norm_backward(shapes: Shapes, draw: Draw, gate: bool) -> Arguments:
    x, y = _branches(shapes, draw)
    table = draw.table(1, shapes.frames, 6, shapes.dim).unbind(2)
    branch = (y, table[2]) if gate else (None, None)
    return x, *branch, table[3], table[4], y if gate else None, x.clone(), shapes.eps, True


def rms(shapes: Shapes, draw: Draw) -> Arguments:
    x, weight, _, eps = affine(shapes, draw)
    return x, weight, eps


def rms_backward(shapes: Shapes, draw: Draw) -> Arguments:
    x, weight, eps = rms(shapes, draw)
    return x, weight, x.clone(), eps


def _queries_keys(shapes: Shapes, draw: Draw) -> tuple[Tensor, ...]:
    q, k = _branches(shapes, draw)
    weights = (draw.rows(shapes.dim, scale=0.1, mean=1.0) for _ in range(2))
    return q, k, *weights, draw.angles(shapes.tokens, shapes.head_dim)


def qk_norm_rope(shapes: Shapes, draw: Draw) -> Arguments:
    return *_queries_keys(shapes, draw), shapes.heads, shapes.eps


def qk_norm_rope_backward(shapes: Shapes, draw: Draw) -> Arguments:
    grads = (draw.rows(1, shapes.tokens, shapes.heads, shapes.head_dim) for _ in range(2))
    return *grads, *_queries_keys(shapes, draw), shapes.eps


def rms_part(shapes: Shapes, draw: Draw) -> Arguments:
    """Of rows that lie in parts on several cards."""
    x, *rest = rms(shapes, draw)
    return x, *rest, draw.table(*x.shape[:-1]).square()


def qk_norm_rope_write_part(shapes: Shapes, draw: Draw) -> Arguments:
    return *qk_norm_rope_write(shapes, draw, keep_raw=True), draw.table(2, 1, shapes.tokens).square()


def qk_norm_rope_write_fp8_part(shapes: Shapes, draw: Draw) -> Arguments:
    given = qk_norm_rope_write_fp8(shapes, draw, into_arena=True)
    return *given, draw.table(2, 1, shapes.tokens).square()


def qk_norm_rope_write(shapes: Shapes, draw: Draw, keep_raw: bool) -> Arguments:
    q, k, *rest = _queries_keys(shapes, draw)
    arenas = [_arena(shapes, draw)[0] for _ in range(3 if keep_raw else 2)]
    v = draw.rows(1, shapes.tokens, shapes.dim)
    window = shapes.window_tokens * shapes.frames // shapes.tokens
    slots = torch.arange(window - shapes.frames, window, device=draw.device)
    return q, k, v, *rest, shapes.eps, *arenas, *(() if keep_raw else (None,)), slots


def _arena(shapes: Shapes, draw: Draw, layers: int = 1) -> Tensor:
    return draw.rows(layers, 1, shapes.window_tokens, shapes.heads, shapes.head_dim)


def attention(shapes: Shapes, draw: Draw) -> Arguments:
    q = draw.rows(1, shapes.tokens, shapes.heads, shapes.head_dim)
    keys, values = (_arena(shapes, draw)[0] for _ in range(2))
    return q, keys, values, shapes.window_tokens, _filled(shapes, draw)


def _copies(shapes: Shapes, draw: Draw, layers: int) -> tuple[Tensor, ...]:
    """key_mean, value_unit, keys_fp8 and values_fp8 of that many layers."""
    size = (layers, 1, shapes.heads, shapes.head_dim)
    keys = draw.e4m3(layers, 1, shapes.window_tokens, *size[2:], scale=64.0)
    values = draw.e4m3(*size, aligned_tokens(shapes.window_tokens), scale=8.0)
    return draw.table(*size), draw.table(*size[:3]).abs_(), keys, values


def _unit(draw: Draw, size: float, count: int = 1) -> Tensor:
    return torch.full((count,), size, dtype=torch.float32, device=draw.device)


def window_fp8(shapes: Shapes, draw: Draw) -> Arguments:
    arenas = (_arena(shapes, draw, shapes.layers) for _ in range(2))
    copies = _copies(shapes, draw, shapes.layers)
    unit = _unit(draw, 2.0**-5, shapes.layers)
    return *arenas, unit, *copies, shapes.window_tokens, _filled(shapes, draw)


def qk_norm_rope_write_fp8(shapes: Shapes, draw: Draw, into_arena: bool) -> Arguments:
    q, k, v, *rest, keys, values, raw, slots = qk_norm_rope_write(shapes, draw, keep_raw=True)
    copies = (copy[0] for copy in _copies(shapes, draw, 1))
    units = _unit(draw, 2.0**-5), _unit(draw, 2.0**-5)
    return q, k, v, *rest, *units, *copies, slots, *((keys, values, raw) if into_arena else ())


def attention_fp8(shapes: Shapes, draw: Draw, rows: bool = False, form: str | None = None) -> Arguments:
    q = draw.e4m3(1, shapes.tokens, shapes.heads, shapes.head_dim, scale=64.0)
    _, unit, keys, values = (copy[0] for copy in _copies(shapes, draw, 1))
    scale = _unit(draw, 2.0**-12 * shapes.head_dim**-0.5)
    given = q, keys, values, scale, unit, shapes.window_tokens, _filled(shapes, draw), torch.bfloat16, rows
    return given if form is None else (*given, form)


def _filled(shapes: Shapes, draw: Draw) -> Tensor:
    return torch.full((1,), shapes.window_tokens, dtype=torch.int32, device=draw.device)


def attention_backward_query(shapes: Shapes, draw: Draw) -> Arguments:
    q, keys, values, _, filled = attention(shapes, draw)
    return q.clone(), q, keys, values, filled, q.clone(), draw.table(1, shapes.heads, shapes.tokens)


def attention_backward_keys(shapes: Shapes, draw: Draw) -> Arguments:
    """The gradient of the keys and values of one slot, that of the chunk."""
    grad, q, keys, values, filled, _, lse = attention_backward_query(shapes, draw)
    first = shapes.window_tokens - shapes.tokens
    return grad, q, keys, values, filled, lse, lse.clone(), first, shapes.tokens


def rephase(shapes: Shapes, draw: Draw) -> Arguments:
    raw, rotated = (_arena(shapes, draw, shapes.layers) for _ in range(2))
    return raw, rotated, draw.angles(shapes.window_tokens, shapes.head_dim)


def _low(shapes: Shapes, draw: Draw, split: bool) -> tuple[Tensor | None, ...]:
    """What rounding took from the sink: at most half a unit in the last place of it."""
    if not split:
        return None, None
    size = (shapes.layers, 1, shapes.sink_tokens, shapes.heads, shapes.head_dim)
    return tuple(draw.rows(*size, scale=2.0**-10) for _ in range(2))


def evict(shapes: Shapes, draw: Draw, split: bool) -> Arguments:
    arenas = [_arena(shapes, draw, shapes.layers) for _ in range(2)]
    sink = (arena[:, :, : shapes.sink_tokens] for arena in arenas)
    leaving = (arena[:, :, -shapes.sink_tokens :] for arena in arenas)
    return *sink, *_low(shapes, draw, split), *leaving, shapes.config.cache.alpha


def evict_and_rephase(shapes: Shapes, draw: Draw, split: bool) -> Arguments:
    arenas = (_arena(shapes, draw, shapes.layers) for _ in range(3))
    rotation = draw.angles(shapes.window_tokens, shapes.head_dim)
    leaving = shapes.window_tokens - shapes.tokens
    low = _low(shapes, draw, split)
    return *arenas, *low, rotation, shapes.sink_tokens, leaving, shapes.config.cache.alpha


def flow_step(shapes: Shapes, draw: Draw, by_frame: bool = False) -> Arguments:
    model, grid = shapes.config.model, shapes.grid
    tokens = draw.rows(1, shapes.tokens, model.out_dim * grid.patch**2)
    x, noise = (
        draw.rows(1, model.out_dim, shapes.frames, grid.latent_height, grid.latent_width) for _ in range(2)
    )
    frames = shapes.frames if by_frame else 1
    sigmas, next_sigmas = (
        torch.full((frames,), level, dtype=torch.float64, device=draw.device) for level in (0.9375, 0.8333)
    )
    return tokens, x, sigmas, noise, next_sigmas


def pixels(shapes: Shapes, draw: Draw) -> Arguments:
    frames = shapes.frames * shapes.grid.temporal_stride
    return (draw.rows(3, frames, shapes.grid.height, shapes.grid.width, scale=0.6),)


def linear(shapes: Shapes, draw: Draw, outputs: Callable[[Shapes], int]) -> Arguments:
    """The product of a chunk's rows [1, T, D]."""
    size = outputs(shapes), shapes.dim
    weight = draw.rows(*size, scale=shapes.dim**-0.5)
    return draw.rows(1, shapes.tokens, shapes.dim), weight, draw.rows(size[0])


def linear_int8(shapes: Shapes, draw: Draw, outputs: Callable[[Shapes], int]) -> Arguments:
    """linear with its weight in int8 and a scale for each output."""
    x, weight, bias = linear(shapes, draw, outputs)
    return x, *channel_int8(weight, weight.dtype), bias


def gated_linear(shapes: Shapes, draw: Draw, inner: Callable[[Shapes], int]) -> Arguments:
    """The product that leads back to the residual stream, with one gate for the chunk."""
    x, y = draw.rows(1, shapes.tokens, shapes.dim), draw.rows(1, shapes.tokens, inner(shapes))
    weight = draw.rows(shapes.dim, inner(shapes), scale=inner(shapes) ** -0.5)
    return x, y, weight, draw.rows(shapes.dim), _modulated(shapes, draw)[0]


def _product_fp8(draw: Draw, tokens: int, inputs: int, outputs: int, parts: int = 1) -> tuple[Tensor, ...]:
    """Rows in e4m3 [1, T, K] with a scale for each of so many parts, the weight in e4m3 with a scale for each
    output, and the bias: a result of about normal values."""
    x = draw.e4m3(1, tokens, inputs, scale=100)
    row_scale = draw.scales(0.01, 1, tokens, parts)
    weight_scale = draw.scales(0.01 * inputs**-0.5, outputs)
    return x, row_scale, draw.e4m3(outputs, inputs, scale=100), weight_scale, draw.rows(outputs)


def linear_fp8(
    shapes: Shapes, draw: Draw, outputs: Callable[[Shapes], int], inner: Callable[[Shapes], int],
    has_heads: bool = False,
) -> Arguments:  # fmt: skip
    """inner: the inputs of the product. has_heads: its rows have a scale for each head."""
    parts = shapes.heads if has_heads else 1
    return _product_fp8(draw, shapes.tokens, inner(shapes), outputs(shapes), parts)


def linear_heads_fp8(shapes: Shapes, draw: Draw) -> Arguments:
    _, _, *layer = _product_fp8(draw, 1, shapes.dim, shapes.dim)
    return draw.rows(1, shapes.tokens, shapes.dim), *layer, shapes.heads


def linear_gelu_rows_fp8(shapes: Shapes, draw: Draw) -> Arguments:
    x, row_scale, *layer = _product_fp8(draw, shapes.tokens, shapes.dim, shapes.config.model.ffn_dim)
    return x, row_scale, *layer, product_reach(*layer)


def gelu_rows_fp8(shapes: Shapes, draw: Draw) -> Arguments:
    """In units of the size that a product of normal weights has, in which nothing saturates."""
    y = draw.rows(shapes.tokens, shapes.config.model.ffn_dim)
    reach = torch.tensor([shapes.dim**0.5, 0.01], dtype=torch.float32, device=draw.device)
    return y, draw.scales(0.01, shapes.tokens, 1), reach


def _weight(draw: Draw, channels_out: int, channels: int, *kernel: int) -> Tensor:
    """A convolution's weight [Cout, Cin, *kernel], in memory [Cout, *kernel, Cin]."""
    fan_in = channels * math.prod(kernel)
    return draw.rows(channels_out, *kernel, channels, scale=fan_in**-0.5).movedim(-1, 1)


def _halo(level: VaeLevel, draw: Draw, before: int = 2) -> Tensor:
    return draw.rows(level.frames + before, level.height, level.width, level.channels)


def causal_conv3d(shapes: Shapes, draw: Draw, level: int) -> Arguments:
    size = shapes.vae_levels[level]
    weight = _weight(draw, size.channels, size.channels, 3, 3, 3)
    return _halo(size, draw), weight, draw.rows(size.channels)


def causal_conv3d_fp8(shapes: Shapes, draw: Draw, level: int) -> Arguments:
    size = shapes.vae_levels[level]
    x = draw.e4m3(size.frames + 2, size.height, size.width, size.channels)
    weight = draw.e4m3(size.channels, 3, 3, 3, size.channels).movedim(-1, 1)
    return x, weight, draw.table(size.channels).abs(), draw.rows(size.channels)


def time_conv(shapes: Shapes, draw: Draw) -> Arguments:
    """The temporal doubling after the level of the latents, into the even and the odd frames."""
    size = shapes.vae_levels[0]
    weight = _weight(draw, 2 * size.channels, size.channels, 3, 1, 1)
    return _halo(size, draw), weight, draw.rows(2 * size.channels)


def phase_conv(shapes: Shapes, draw: Draw, level: int) -> Arguments:
    """The upsampling in front of a level, which halves the channels."""
    before, after = shapes.vae_levels[level - 1 : level + 1]
    channels = before.channels
    x = draw.rows(after.frames, before.height, before.width, channels)
    weight = draw.rows(2, 2, channels // 2, 2, 2, channels, scale=(4 * channels) ** -0.5)
    return x, weight.permute(0, 1, 2, 5, 3, 4), draw.rows(channels // 2)


def channel_norm_silu(shapes: Shapes, draw: Draw, level: int) -> Arguments:
    size = shapes.vae_levels[level]
    x, residual = (_halo(size, draw, before=0) for _ in range(2))
    gamma = draw.rows(size.channels, scale=0.1, mean=1.0)
    return x, draw.rows(size.channels), residual, gamma, _halo(size, draw)[2:]


def channel_norm_silu_fp8(shapes: Shapes, draw: Draw, level: int) -> Arguments:
    """The same in front of a convolution in e4m3, whose unit lets nothing saturate."""
    *given, out = channel_norm_silu(shapes, draw, level)
    return *given, torch.zeros_like(out, dtype=torch.float8_e4m3fn), 2.0**-4


def frame_attention(shapes: Shapes, draw: Draw) -> Arguments:
    size = shapes.vae_levels[0]
    qkv = draw.rows(size.frames, size.height * size.width, 3 * size.channels)
    return qkv.chunk(3, dim=-1)


def conv_frame_pack(shapes: Shapes, draw: Draw) -> Arguments:
    size = shapes.vae_levels[-1]
    return _halo(size, draw), _weight(draw, 3, size.channels, 3, 3, 3), draw.rows(3, scale=0.1)


@dataclass(frozen=True)
class Draw:
    """Makes inputs: random where there is a seed, else left as allocated, for compiling alone."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    generator: torch.Generator | None = None

    def rows(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal values in the dtype of the model."""
        if self.generator is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        values = torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)
        return values.mul_(scale).add_(mean)

    def table(self, *shape: int) -> Tensor:
        """Normal values in float32."""
        return replace(self, dtype=torch.float32).rows(*shape, scale=0.2)

    def e4m3(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values rounded to e4m3; `scale` should keep them below 448."""
        if self.generator is None:
            return replace(self, dtype=torch.float8_e4m3fn).rows(*shape)
        return self.rows(*shape, scale=scale).to(torch.float8_e4m3fn)

    def scales(self, unit: float, *shape: int) -> Tensor:
        """Positive float32 numbers around `unit`."""
        return self.table(*shape).exp().mul_(unit)

    def angles(self, tokens: int, head_dim: int) -> Tensor:
        """Cosines and sines [2, tokens, E / 2]."""
        turn = self.table(tokens, head_dim // 2)
        return torch.stack((turn.cos(), turn.sin())) if self.generator else turn.new_empty(2, *turn.shape)
