"""Arguments of every op of kernels/ at the shapes of the engine, in the order the op takes them.

Shapes: L layers, B batch (1), T tokens of a chunk, S tokens of the window, H heads, E head dim, D dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from engine_shapes import Draw, Shapes
from torch import Tensor

Arguments = tuple[Tensor | float | int | bool | str | None, ...]


def _modulated(shapes: Shapes, draw: Draw) -> tuple[Tensor, ...]:
    """Gate, shift and scale [1, 1, D]: strided rows of the model's table, one timestep for the chunk."""
    return draw.table(1, 1, 6, shapes.dim).unbind(2)[2:5]


def adaptive(shapes: Shapes, draw: Draw) -> Arguments:
    _, shift, scale = _modulated(shapes, draw)
    return draw.rows(1, shapes.tokens, shapes.dim), shift, scale, shapes.eps


def affine(shapes: Shapes, draw: Draw) -> Arguments:
    weight, bias = (draw.rows(shapes.dim, scale=0.1, mean=mean) for mean in (1.0, 0.0))
    return draw.rows(1, shapes.tokens, shapes.dim), weight, bias, shapes.eps


def _branches(shapes: Shapes, draw: Draw) -> tuple[Tensor, Tensor]:
    return draw.rows(1, shapes.tokens, shapes.dim), draw.rows(1, shapes.tokens, shapes.dim)


def gated_adaptive(shapes: Shapes, draw: Draw) -> Arguments:
    return *_branches(shapes, draw), *_modulated(shapes, draw), shapes.eps


def gated_affine(shapes: Shapes, draw: Draw) -> Arguments:
    _, weight, bias, eps = affine(shapes, draw)
    return *_branches(shapes, draw), _modulated(shapes, draw)[0], weight, bias, eps


def norm_backward(gate: bool) -> Callable[[Shapes, Draw], Arguments]:
    def inputs(shapes: Shapes, draw: Draw) -> Arguments:
        x, y = _branches(shapes, draw)
        table = draw.table(1, shapes.frames, 6, shapes.dim).unbind(2)
        branch = (y, table[2]) if gate else (None, None)
        return x, *branch, table[3], table[4], y if gate else None, x.clone(), shapes.eps, True

    return inputs


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


def qk_norm_rope_write(keep_raw: bool) -> Callable[[Shapes, Draw], Arguments]:
    def inputs(shapes: Shapes, draw: Draw) -> Arguments:
        q, k, *rest = _queries_keys(shapes, draw)
        slot = slice(shapes.window_tokens - shapes.tokens, shapes.window_tokens)
        views = [_arena(shapes, draw)[0][:, slot] for _ in range(3 if keep_raw else 2)]
        v = draw.rows(1, shapes.tokens, shapes.dim)
        return q, k, v, *rest, shapes.eps, *views, *(() if keep_raw else (None,))

    return inputs


def _arena(shapes: Shapes, draw: Draw, layers: int = 1) -> Tensor:
    return draw.rows(layers, 1, shapes.window_tokens, shapes.heads, shapes.head_dim)


def attention(form: str | None = None) -> Callable[[Shapes, Draw], Arguments]:
    def inputs(shapes: Shapes, draw: Draw) -> Arguments:
        q = draw.rows(1, shapes.tokens, shapes.heads, shapes.head_dim)
        keys, values = (_arena(shapes, draw)[0] for _ in range(2))
        return q, keys, values, _filled(shapes, draw), form

    return inputs


def _filled(shapes: Shapes, draw: Draw) -> Tensor:
    return torch.full((1,), shapes.window_tokens, dtype=torch.int32, device=draw.device)


def attention_backward_query(shapes: Shapes, draw: Draw) -> Arguments:
    q, keys, values, filled, _ = attention()(shapes, draw)
    return q.clone(), q, keys, values, filled, q.clone(), draw.table(1, shapes.heads, shapes.tokens)


def attention_backward_keys(shapes: Shapes, draw: Draw) -> Arguments:
    """The gradient of the keys and values of one slot, that of the chunk."""
    grad, q, keys, values, filled, _, lse = attention_backward_query(shapes, draw)
    return (
        grad,
        q,
        keys,
        values,
        filled,
        lse,
        lse.clone(),
        shapes.window_tokens - shapes.tokens,
        shapes.tokens,
    )


def rephase(shapes: Shapes, draw: Draw) -> Arguments:
    raw, rotated = (_arena(shapes, draw, shapes.layers) for _ in range(2))
    return raw, rotated, draw.angles(shapes.window_tokens, shapes.head_dim)


def _low(shapes: Shapes, draw: Draw, split: bool) -> tuple[Tensor | None, ...]:
    """What rounding took from the sink: at most half a unit in the last place of it."""
    if not split:
        return None, None
    size = (shapes.layers, 1, shapes.sink_tokens, shapes.heads, shapes.head_dim)
    return tuple(draw.rows(*size, scale=2.0**-10) for _ in range(2))


def evict(split: bool) -> Callable[[Shapes, Draw], Arguments]:
    def inputs(shapes: Shapes, draw: Draw) -> Arguments:
        arenas = [_arena(shapes, draw, shapes.layers) for _ in range(2)]
        sink = (arena[:, :, : shapes.sink_tokens] for arena in arenas)
        leaving = (arena[:, :, -shapes.sink_tokens :] for arena in arenas)
        return *sink, *_low(shapes, draw, split), *leaving, shapes.config.cache.alpha

    return inputs


def evict_and_rephase(split: bool) -> Callable[[Shapes, Draw], Arguments]:
    def inputs(shapes: Shapes, draw: Draw) -> Arguments:
        arenas = (_arena(shapes, draw, shapes.layers) for _ in range(3))
        rotation = draw.angles(shapes.window_tokens, shapes.head_dim)
        leaving = shapes.window_tokens - shapes.tokens
        low = _low(shapes, draw, split)
        return *arenas, *low, rotation, shapes.sink_tokens, leaving, shapes.config.cache.alpha

    return inputs


def flow_step(shapes: Shapes, draw: Draw) -> Arguments:
    model, grid = shapes.config.model, shapes.grid
    tokens = draw.rows(1, shapes.tokens, model.out_dim * grid.patch**2)
    x, noise = (
        draw.rows(1, model.out_dim, shapes.frames, grid.latent_height, grid.latent_width) for _ in range(2)
    )
    return tokens, x, 0.9375, noise, 0.8333


def pixels(shapes: Shapes, draw: Draw) -> Arguments:
    frames = shapes.frames * shapes.grid.temporal_stride
    return (draw.rows(3, frames, shapes.grid.height, shapes.grid.width, scale=0.6),)
