"""The meaning of every op in plain PyTorch: the oracle that kernels are compared with.

Shapes: B batch, F latent frames, T tokens (F * frame_tokens), D model dim, H heads, E head dim, S arena
tokens, L layers, C latent channels. Arithmetic is float32 at least (float64 stays float64); a result is
rounded once, to the dtype of the op's first tensor, and an op that rounds in between says where.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_E4M3 = 448.0
SMALLEST_UNIT = 2.0**-126  # of what is rounded to e4m3: the reciprocal of a smaller one may be infinite


def widened(x: Tensor) -> Tensor:
    """x as it is computed with: in float32, or in float64 where that is its dtype."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _per_frame(table: Tensor, x: Tensor) -> Tensor:
    """[B, F, D] or [B, 1, D] spread over the tokens of x [B, T, D]."""
    if table.shape[1] == 1:
        return table
    return table.repeat_interleave(x.shape[1] // table.shape[1], dim=1)


def adaptive_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without affine parameters: the modulation of the published model.

    x: [B, T, D]. shift, scale: [B or 1, F or 1, D], one row for each latent frame.
    """
    normed = F.layer_norm(widened(x), x.shape[-1:], eps=eps)
    return (normed * (1 + _per_frame(scale, x))).add_(_per_frame(shift, x)).to(x.dtype)


def affine_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias. x: [B, T, D]; weight, bias: [D]."""
    wide = widened(x)
    return F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * y, rounded to the dtype of x. x, y: [B, T, D]; gate: [B or 1, F or 1, D], or None for 1."""
    if gate is None:
        return (widened(x) + widened(y)).to(x.dtype)
    return (widened(y) * _per_frame(gate, x)).add_(x).to(x.dtype)


def gated_residual_adaptive_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * y, adaptive_layer_norm of it). x may be overwritten; do not use it afterwards."""
    total = gated_residual(x, y, gate)
    return total, adaptive_layer_norm(total, shift, scale, eps)


def gated_residual_affine_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * y, affine_layer_norm of it). x may be overwritten; do not use it afterwards."""
    total = gated_residual(x, y, gate)
    return total, affine_layer_norm(total, weight, bias, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b. x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N]."""
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, in its tanh form, of x W^T + b. A backend rounds once, after the GELU; this one, as
    the published model does, before it as well."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def gated_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * (y W^T + b). A backend rounds once, at the end; this one rounds y W^T + b as well.

    x: [B, T, N]; y: [B, T, K]; gate: [B or 1, F or 1, N], one row for each latent frame, or None for 1.
    """
    return gated_residual(x, F.linear(y, weight, bias), gate)


def rms_norm(x: Tensor, weight: Tensor, eps: float, mean_squares: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, rounded to the dtype of x, then times weight.

    mean_squares: mean(x^2) of each row, [...] without the last axis, where x has a part of the row; without
    gradient.
    """
    wide = widened(x)
    mean = wide.square().mean(dim=-1) if mean_squares is None else mean_squares
    normed = (wide * torch.rsqrt(mean.unsqueeze(-1) + eps)).to(x.dtype)
    return (normed * weight).to(x.dtype)


def row_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] in e4m3 with one scale for each row: (values, scale [..., 1] in float32), x = values *
    scale.

    scale = unit_or_one(max |row| / 448); values are rounded to nearest and saturate at 448. The FP8 forms of
    the norms return row_fp8 of the norm.
    """
    scale = unit_or_one(x.float().abs().amax(-1, keepdim=True) / LARGEST_E4M3)
    return to_e4m3(x.float() / scale), scale


def to_e4m3(x: Tensor) -> Tensor:
    """x rounded to nearest; saturates."""
    return x.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)


def unit_or_one(unit: Tensor) -> Tensor:
    """unit, or 1 where it is smaller than a normal number, such as that of zeros: what is in it is then 0."""
    return torch.where(unit >= SMALLEST_UNIT, unit, 1.0)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate interleaved pairs (2j, 2j + 1): (a, b) -> (a cos - b sin, a sin + b cos).

    x: [..., T, H, E]. rotation: [2, T, E / 2], cosines then sines, float32 or float64.
    """
    cos, sin = widened(rotation).unsqueeze(-2)
    first, second = widened(x).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm of q and k over the whole model dimension, then rotation of every head.

    q, k: [B, T, D]; rotation: [2, T, E / 2]. Returns q, k as [B, T, H, E]. Rounded after the norm and after
    rotation.
    """
    q = rms_norm(q, weight_q, eps).unflatten(-1, (num_heads, -1))
    k = rms_norm(k, weight_k, eps).unflatten(-1, (num_heads, -1))
    return rotate(q, rotation), rotate(k, rotation)


def qk_norm_rope_write(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, eps: float,
    keys: Tensor, values: Tensor, raw_keys: Tensor | None, slots: Tensor, mean_squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Norm and rotate q and k, and write the frames of a chunk to their slots of the arena: rotated keys,
    values and, when given, raw keys.

    q, k, v: [B, T, D]; rotation: [2, T, E / 2]. keys, values, raw_keys: [B, S, H, E], S a multiple of the
    frame's T / F tokens, changed in place; slots: int64 [F], the slot of each frame, which begins at token
    slot * T / F; no two are equal. mean_squares: float32 [2, B, T], those of q and of k where they are parts
    of rows (rms_norm). Returns the rotated q [B, T, H, E]. Raw keys are those after the norm and before
    rotation, already rounded.
    """
    num_heads = keys.shape[-2]
    means = (None, None) if mean_squares is None else mean_squares
    q = rms_norm(q, weight_q, eps, means[0]).unflatten(-1, (num_heads, -1))
    k = rms_norm(k, weight_k, eps, means[1]).unflatten(-1, (num_heads, -1))
    write_frames(keys, rotate(k, rotation), slots)
    write_frames(values, v.unflatten(-1, (num_heads, -1)), slots)
    if raw_keys is not None:
        write_frames(raw_keys, k, slots)
    return rotate(q, rotation)


def write_frames(arena: Tensor, chunk: Tensor, slots: Tensor) -> None:
    """The frames of chunk [B, T, H, E] to their slots of arena [B, S, H, E], in place; slots: int64 [F]."""
    batch, _, *head = chunk.shape
    frames = chunk.view(batch, slots.shape[0], -1, *head).to(arena.dtype)
    arena.view(batch, -1, frames.shape[2], *head).index_copy_(1, slots, frames)


def sink_window_attention(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: int, filled_tokens: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the first kv_len tokens of the arena, without mask.

    q: [B, T, H, E]; keys, values: [B, S, H, E]. Returns [B, T, H, E]. filled_tokens: int32 [1] on the device,
    the same number as kv_len; a backend that is captured in a graph reads it there, this one reads kv_len.
    """
    return _attention(q, keys[:, :kv_len], values[:, :kv_len], None)


def clip_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over a whole clip. q: [B, T, H, E]; k, v: [B, S, H, E]; mask: bool [T, S], True attends, or
    None."""
    return _attention(q, k, v, mask)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


def rephase_keys(raw: Tensor, rotated: Tensor, rotation: Tensor) -> None:
    """Give every key the rotation of its new time index: rotated = rotate(raw), for all layers at once.

    raw: [L, B, S, H, E]; rotated: the same, overwritten; rotation: [2, S, E / 2].
    """
    rotated.copy_(rotate(raw, rotation))


def ema_evict(
    sink_keys: Tensor, sink_values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    keys: Tensor, values: Tensor, alpha: float,
) -> None:  # fmt: skip
    """Fold the evicted chunk into the sink in place: sink = alpha * sink + (1 - alpha) * evicted.

    All tensors: [L, B, S, H, E]; keys before rotation. low_keys, low_values: what rounding took from the
    sink; the sum is then formed in float32 as (sink + low) and split again into its rounded value and the
    rest. Without them the two products and the sum are rounded to the dtype of the sink, as in the published
    code.
    """
    for sink, low, evicted in ((sink_keys, low_keys, keys), (sink_values, low_values, values)):
        if low is None:
            sink.copy_(alpha * sink + (1 - alpha) * evicted)
            continue
        total = alpha * (widened(sink) + widened(low)) + (1 - alpha) * widened(evicted)
        sink.copy_(total)
        low.copy_(total - widened(sink))


def evict_and_rephase(
    raw: Tensor, rotated: Tensor, values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    rotation: Tensor, sink_tokens: int, leaving: int, alpha: float,
) -> None:  # fmt: skip
    """ema_evict of the chunk at token `leaving` into the first sink_tokens tokens, then rephase_keys of all.

    raw, rotated, values: [L, B, S, H, E], the filled part of the arenas, changed in place; the chunk that
    leaves is as long as the sink. low_keys, low_values: [L, B, sink_tokens, H, E] or None. rotation: [2, S, E
    / 2].
    """
    evict_chunk(raw, values, low_keys, low_values, sink_tokens, leaving, alpha)
    rephase_keys(raw, rotated, rotation)


def evict_chunk(
    raw: Tensor, values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    sink_tokens: int, leaving: int, alpha: float,
) -> None:  # fmt: skip
    """The first part of evict_and_rephase."""
    (sink_keys, chunk_keys), (sink_values, chunk_values) = (
        (arena[:, :, :sink_tokens], arena[:, :, leaving : leaving + sink_tokens]) for arena in (raw, values)
    )
    ema_evict(sink_keys, sink_values, low_keys, low_values, chunk_keys, chunk_values, alpha)


def unpatchify(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens of the head to latents: feature (p, q, c), channel fastest.

    tokens: [B, T, P * P * C]; like: [B, C', F, H, W], the latents they were patched from. Returns [B, C, F,
    H, W].
    """
    batch, _, frames, height, width = like.shape
    patch = round((frames * height * width / tokens.shape[1]) ** 0.5)
    rows, columns = height // patch, width // patch
    grid = tokens.reshape(batch, frames, rows, columns, patch, patch, -1)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)


def flow_step(
    tokens: Tensor, x: Tensor, sigmas: Tensor, noise: Tensor | None = None, next_sigmas: Tensor | None = None
) -> Tensor:
    """One step of the sampler from the head's tokens: x0 = x - sigma * flow, then re-noise.

    tokens: [B, T, P * P * C]; x, noise: [B, C, F, H, W]; sigmas, next_sigmas: float64 [F], the level of every
    latent frame, or [1] where all have one. x0 is formed in float64 and rounded to the dtype of x; with noise
    the result is (1 - next_sigma) * x0 + next_sigma * noise in float32, rounded; without it, x0. A frame
    whose two levels are 0 stays as it is.
    """
    flow = unpatchify(tokens, x)
    x0 = (x.double() - sigmas.view(-1, 1, 1) * flow.double()).to(x.dtype)
    if noise is None or next_sigmas is None:
        return x0
    level = next_sigmas.view(-1, 1, 1)
    return ((1 - level).float() * x0.float() + level.float() * noise.float()).to(x.dtype)


def frame_pack(pixels: Tensor) -> Tensor:
    """Decoded pixels [3, T, H, W] in [-1, 1], clamped, to RGB bytes: uint8 [T, H, W, 3].

    A byte is (x + 1) * 127.5 in float32, rounded to nearest, ties to even. Pixels must not be NaN.
    """
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def channel_norm_silu(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor, out: Tensor,
    out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """silu(total / max(L2 norm over C, 1e-12) * sqrt(C) * gamma) / out_scale into `out`; returns total.

    total = x + bias + residual, rounded once to the dtype of x before the norm reads it; x itself without
    both. x, residual: [T, H, W, C]; bias, gamma: [C]. out: a view of the shape of x, overwritten, rounded
    once to its own dtype; float8_e4m3fn saturates at 448. out_scale: the size of the unit of out. x may be
    overwritten; do not use it afterwards.
    """
    total = x
    for term in (bias, residual):
        total = total if term is None else widened(total) + term
    total = total.to(x.dtype)
    wide = widened(total)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    normed = out if out.dtype == wide.dtype else torch.empty_like(wide)
    torch.mul(wide, x.shape[-1] ** 0.5 / norm, out=normed).mul_(gamma)
    activated = F.silu(normed, inplace=True)
    if out_scale != 1:
        activated.div_(out_scale)
    out.copy_(activated.clamp_(-448, 448) if out.dtype == torch.float8_e4m3fn else activated)
    return total


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Convolution over time without padding and over height and width padded with zeros to their size.

    x: [T + kt - 1, H, W, Cin], in front the kt - 1 frames before the chunk; weight: [Cout, Cin, kt, kh, kw],
    any strides; bias: [Cout]. Returns `out` [T, H, W, Cout], overwritten, or a new tensor.
    """
    result = convolve_frames(widened(x), widened(weight), None if bias is None else widened(bias))
    return result.to(x.dtype) if out is None else out.copy_(result)


def causal_conv3d_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """causal_conv3d of 8-bit values, both float8_e4m3fn: the float32 sums times scale [Cout], plus bias.

    scale: float32, the unit of x times that of the channel's weights (channel_fp8). Returns `out` [T, H, W,
    Cout], overwritten and rounded once to its dtype, or a new tensor in bfloat16.
    """
    sums = convolve_frames(x.float(), weight.float(), None).mul_(scale)
    result = sums if bias is None else sums.add_(bias)
    return result.to(torch.bfloat16) if out is None else out.copy_(result)


def channel_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [Cout, ...] in e4m3 with one scale for each channel out: (values, scale [Cout] in float32).

    As row_fp8: scale = unit_or_one(max |weights of the channel| / 448); values are rounded to nearest.
    """
    values, scale = row_fp8(weight.flatten(1))
    return values.view(weight.shape), scale.flatten()


def convolve_frames(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """causal_conv3d in the arithmetic of its inputs; height and width are padded by half of the kernel."""
    padding, channels = tuple(size // 2 for size in weight.shape[3:]), weight.shape[0]
    planes = weight.shape[2] == 1
    if planes:
        x, weight = x.permute(0, 3, 1, 2), weight.squeeze(2)
    else:
        x, weight, padding = x.permute(3, 0, 1, 2).unsqueeze(0), weight, (0, *padding)
    plain = x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if plain and torch.backends.mkldnn.is_available():
        result = _onednn_convolution(x, weight, bias, padding)
    else:
        result = (F.conv2d if planes else F.conv3d)(x, weight, bias, padding=padding)
    result = result.permute(0, 2, 3, 1) if planes else result.squeeze(0).permute(1, 2, 3, 0)
    return result.reshape(*result.shape[:2], -1, channels).contiguous()


def _onednn_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """Convolution of [B, C, ..., W]; F.conv3d sends a small batch of one to a far slower kernel.

    Few output channels leave the lanes of a vector idle. A weight with itself moved one pixel to the right
    beside it gives pixel pairs, [B, 2 * C_out, ..., W / 2], which with channels last is what was asked for.
    """
    channels, ones = weight.shape[0], (1,) * len(padding)
    lanes = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    pixels = next((n for n in (4, 2) if n * channels <= lanes and x.shape[-1] % n == 0), 1)
    if pixels > 1 and weight.shape[-1] % 2:
        weight = torch.cat([F.pad(weight, (n, pixels - 1 - n)) for n in range(pixels)])
        bias = None if bias is None else bias.repeat(pixels)
    else:
        pixels = 1
    return torch.mkldnn_convolution(x, weight, bias, padding, (*ones[1:], pixels), ones, 1)


def phase_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Doubles height and width: every phase of the output has a convolution of 2 x 2 of its own.

    x: [T, H, W, Cin]; weight: [2, 2, Cout, Cin, 2, 2], phase (row a, column b) first; bias: [Cout]. Pixel
    (2i + a, 2j + b) of [T, 2H, 2W, Cout] sums weight[a, b, :, :, r, s] @ x[i + a - 1 + r, j + b - 1 + s] over
    r, s in {0, 1}, with zeros outside, plus bias. Weights are those of fold_upsample_weight.
    """
    return join_phases(widened(x), widened(weight), None if bias is None else widened(bias)).to(x.dtype)


def join_phases(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """phase_conv in the arithmetic of its inputs: one convolution for the four phases, then their places."""
    frames, height, width, _ = x.shape
    every = convolve_frames(
        x, weight.flatten(0, 2).unsqueeze(2), None if bias is None else bias.repeat(4)
    ).unflatten(3, (2, 2, -1))
    out = every.new_empty(frames, height, 2, width, 2, weight.shape[2])
    for row in (0, 1):
        for column in (0, 1):
            phase = every[:, row : row + height, column : column + width, row, column]
            out[:, :, row, :, column] = phase
    return out.reshape(frames, 2 * height, 2 * width, -1)


def fold_upsample_weight(weight: Tensor) -> Tensor:
    """The weight [2, 2, Cout, Cin, 2, 2] of phase_conv that does nearest-2x, then weight [Cout, Cin, 3, 3].

    Of the three taps, phase 0 has the last two on one input pixel and phase 1 the first two; the sums are
    formed in float32 at least and rounded once. Memory is [2, 2, Cout, 2, 2, Cin].
    """
    taps = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=widened(weight).dtype, device=weight.device
    )
    folded = torch.einsum("arm,bsn,oimn->aborsi", taps, taps, widened(weight)).to(weight.dtype)
    return folded.contiguous().permute(0, 1, 2, 5, 3, 4)


def frame_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v inside each frame, one head. All are [T, N, C]."""
    return F.scaled_dot_product_attention(widened(q), widened(k), widened(v)).to(q.dtype)


def conv_frame_pack(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """frame_pack of causal_conv3d, whose sum is not rounded in between: uint8 [T, H, W, 3].

    x: [T + kt - 1, H, W, C], normed and activated; weight: [3, C, kt, kh, kw]; bias: [3].
    """
    return frame_pack(causal_conv3d(widened(x), weight, bias).permute(3, 0, 1, 2))
