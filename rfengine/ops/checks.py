"""Shape checks of the ops, one for each op that needs one, with the arguments of the op.

Each raises ValueError with the shape found and the shape needed. What F.linear or a kernel checks by itself
is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def require(condition: bool, message: Callable[[], str]) -> None:
    """message: made only where it is needed; every call of an op passes here."""
    if not condition:
        raise ValueError(message())


def _same(name: str, x: Tensor, other_name: str, y: Tensor) -> None:
    require(
        x.shape == y.shape,
        lambda: f"{name} is {tuple(x.shape)} but {other_name} is {tuple(y.shape)}; they must be equal",
    )


def _modulation(x: Tensor, *tables: Tensor | None) -> None:
    require(x.ndim == 3, lambda: f"x is {tuple(x.shape)}; it must be [B, T, D]")
    for table in tables:
        if table is not None:
            _modulates(x, table)


def _modulates(x: Tensor, table: Tensor) -> None:
    (batch, tokens, dim), shape = x.shape, table.shape
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[2] == dim and tokens % shape[1] == 0
    require(
        fits,
        lambda: (
            f"a modulation of {tuple(table.shape)} does not fit x of {tuple(x.shape)}; "
            "it must be [B or 1, F or 1, D]"
        ),
    )


def _rotation(rotation: Tensor, tokens: int, head_dim: int) -> None:
    expected = (2, tokens, head_dim // 2)
    require(
        tuple(rotation.shape) == expected,
        lambda: f"rotation is {tuple(rotation.shape)}; it must be {expected}",
    )


def adaptive_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    _modulation(x, shift, scale)


def gated_residual_adaptive_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> None:
    _same("x", x, "y", y)
    _modulation(x, gate, shift, scale)


def gated_residual_affine_norm(x: Tensor, y: Tensor, gate: Tensor | None, *_: object) -> None:
    _same("x", x, "y", y)
    _modulation(x, gate)


def gated_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None) -> None:
    _modulation(x, gate)
    require(
        x.shape == (*y.shape[:2], weight.shape[0]),
        lambda: (
            f"x is {tuple(x.shape)} for y of {tuple(y.shape)} and a weight of {tuple(weight.shape)}; "
            "it must be [B, T, N]"
        ),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, mean_squares: Tensor | None = None) -> None:
    require(
        weight.shape == x.shape[-1:],
        lambda: f"weight is {tuple(weight.shape)} for x of {tuple(x.shape)}; it must cover the last axis",
    )
    _means_of(mean_squares, x.shape[:-1])


def _means_of(mean_squares: Tensor | None, rows: torch.Size) -> None:
    require(
        mean_squares is None or (mean_squares.shape == rows and mean_squares.is_contiguous()),
        lambda: (
            f"mean_squares are {tuple(mean_squares.shape)} for rows of {tuple(rows)}; give one for each row, "
            "contiguous"
        ),
    )


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> None:
    _same("q", q, "k", k)
    _rotation(rotation, q.shape[1], q.shape[2] // num_heads)


def qk_norm_rope_write(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, eps: float,
    keys: Tensor, values: Tensor, raw_keys: Tensor | None, slots: Tensor, mean_squares: Tensor | None = None,
) -> None:  # fmt: skip
    batch, tokens, dim = q.shape
    _means_of(mean_squares, torch.Size((2, batch, tokens)))
    frames = slots.shape[0] if slots.ndim == 1 else 0
    require(
        slots.dtype == torch.int64 and frames > 0 and tokens % frames == 0,
        lambda: (
            f"slots are {tuple(slots.shape)} in {slots.dtype} for a chunk of {tuple(q.shape)}; "
            "they must be int64 [F], one for each of its frames"
        ),
    )
    frame_tokens = tokens // frames
    require(
        keys.shape == values.shape and (keys.shape[0], keys.shape[2] * keys.shape[3]) == (batch, dim)
        and tokens <= keys.shape[1] and keys.shape[1] % frame_tokens == 0,
        lambda: f"the arena is {tuple(keys.shape)} for a chunk of {tuple(q.shape)}; it must be [B, S, H, E] "
        f"of whole frames of {frame_tokens} tokens, and hold the chunk",
    )  # fmt: skip
    _rotation(rotation, tokens, keys.shape[3])


def sink_window_attention(q: Tensor, keys: Tensor, values: Tensor, kv_len: int, *_: object) -> None:
    _same("keys", keys, "values", values)
    require(
        0 < kv_len <= keys.shape[1],
        lambda: f"kv_len is {kv_len}; the arena holds 1 to {keys.shape[1]} tokens",
    )


def clip_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    _same("k", k, "v", v)


def rephase_keys(raw: Tensor, rotated: Tensor, rotation: Tensor) -> None:
    _same("raw", raw, "rotated", rotated)
    _rotation(rotation, raw.shape[2], raw.shape[4])


def ema_evict(
    sink_keys: Tensor, sink_values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    keys: Tensor, values: Tensor, alpha: float,
) -> None:  # fmt: skip
    _same("the sink", sink_keys, "the evicted chunk", keys)
    _same("the sink's values", sink_values, "the evicted values", values)


def evict_and_rephase(
    raw: Tensor, rotated: Tensor, values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    rotation: Tensor, sink_tokens: int, leaving: int, alpha: float,
) -> None:  # fmt: skip
    _same("raw", raw, "values", values)
    rephase_keys(raw, rotated, rotation)
    last = raw.shape[2] - sink_tokens
    require(
        0 < sink_tokens <= leaving <= last,
        lambda: f"the chunk that leaves starts at token {leaving}; it lies from {sink_tokens} to {last}",
    )


def flow_step(
    tokens: Tensor, x: Tensor, sigmas: Tensor, noise: Tensor | None = None, next_sigmas: Tensor | None = None
) -> None:
    if noise is not None:
        _same("x", x, "noise", noise)
    require(
        (noise is None) == (next_sigmas is None),
        lambda: "noise and next_sigmas are given one without the other; give both or neither",
    )
    _levels("sigmas", sigmas, x)
    if next_sigmas is not None:
        _levels("next_sigmas", next_sigmas, x)


def _levels(name: str, levels: Tensor, x: Tensor) -> None:
    require(
        levels.dtype == torch.float64 and levels.shape in ((1,), (x.shape[2],)),
        lambda: f"{name} do not fit x of {tuple(x.shape)}; they must be float64 [F] or [1]",
    )


def channel_norm_silu(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor, out: Tensor,
    out_scale: float = 1.0,
) -> None:  # fmt: skip
    _same("x", x, "out", out)
    if residual is not None:
        _same("x", x, "the residual", residual)
    _per_channel("gamma", gamma, x)
    if bias is not None:
        _per_channel("bias", bias, x)
    require(out_scale > 0, lambda: f"out_scale is {out_scale}; it must be positive")


def _per_channel(name: str, vector: Tensor, x: Tensor) -> None:
    require(
        vector.shape == x.shape[-1:],
        lambda: f"{name} does not fit x of {tuple(x.shape)}; it must have one value for each channel",
    )


def _convolution(x: Tensor, weight: Tensor) -> None:
    require(
        x.ndim == 4
        and weight.ndim == 5
        and weight.shape[1] == x.shape[3]
        and x.shape[0] >= weight.shape[2]
        and all(size % 2 for size in weight.shape[2:]),
        lambda: (
            f"a weight of {tuple(weight.shape)} does not fit x of {tuple(x.shape)}; "
            "it must be [Cout, Cin, kt, kh, kw] of odd sizes for x [T + kt - 1, H, W, Cin]"
        ),
    )


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> None:
    _convolution(x, weight)
    expected = (x.shape[0] - weight.shape[2] + 1, *x.shape[1:3], weight.shape[0])
    require(
        out is None or tuple(out.shape) == expected,
        lambda: f"out does not fit x of {tuple(x.shape)} under {tuple(weight.shape)}; it must be {expected}",
    )


def causal_conv3d_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> None:
    causal_conv3d(x, weight, bias, out)
    require(
        x.dtype == weight.dtype == torch.float8_e4m3fn,
        lambda: f"x is {x.dtype} and the weight {weight.dtype}; both must be torch.float8_e4m3fn",
    )
    require(
        tuple(scale.shape) == (weight.shape[0],),
        lambda: (
            f"scale is {tuple(scale.shape)}; it must have one value for each of {weight.shape[0]} channels"
        ),
    )


def phase_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    shape = tuple(weight.shape)
    require(
        x.ndim == 4 and len(shape) == 6 and (*shape[:2], *shape[3:]) == (2, 2, x.shape[3], 2, 2),
        lambda: (
            f"a phase weight of {shape} does not fit x of {tuple(x.shape)}; "
            "it must be [2, 2, Cout, Cin, 2, 2] for x [T, H, W, Cin]"
        ),
    )


def frame_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    _same("q", q, "k", k)
    _same("k", k, "v", v)
    require(q.ndim == 3, lambda: f"q is {tuple(q.shape)}; it must be [frames, positions, channels]")


def conv_frame_pack(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _convolution(x, weight)
    require(weight.shape[0] == 3, lambda: f"the weight gives {weight.shape[0]} channels; a frame has 3")


def frame_pack(pixels: Tensor) -> None:
    fits = pixels.ndim == 4 and pixels.shape[0] == 3
    require(fits, lambda: f"pixels are {tuple(pixels.shape)}; they must be [3, T, H, W]")
