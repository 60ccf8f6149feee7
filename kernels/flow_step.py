"""One step of the sampler from the head's tokens: unpatchify, x0 = x - sigma * flow, and fresh noise.

    flow[c, f, y, x] = tokens[(f, y / P, x / P), ((y mod P) P + x mod P) C + c]
    x0 = round(x - sigma * flow)                                    in float64
    out = round((1 - next_sigma) * x0 + next_sigma * noise)         in float32

tokens [B, T, P P C], channel fastest; x, noise, out [B, C, F, H, W]; sigma and next_sigma of each latent
frame, or one of each for all. One program for a piece of one row of pixels in all channels, and so of one
frame: it reads along the channels and writes along the pixels, the exchange in between goes through shared
memory. No fused multiply-add, and sigma stays float64: the result is that of the reference bit for bit in
every dtype.
Bound: the launch (a few MB); 8 bytes and 3 float64 operations for each element in 16-bit.
"""

# B batch, T tokens, P patch side, C channels, F latent frames, H height, W width.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfengine.kernels.device import contiguous_rows


@triton.jit(do_not_specialize=["sigmas_f", "next_sigmas_f"])
def _flow_step_kernel(
    tokens, x, noise, out, sigmas, next_sigmas,
    tokens_b, tokens_t,
    x_b, x_c, x_f, x_h, noise_b, noise_c, noise_f, noise_h, out_b, out_c, out_f, out_h,
    frames, height, width, sigmas_f, next_sigmas_f,
    C: tl.constexpr, P: tl.constexpr, HAS_NOISE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    row = (line % height).to(tl.int64)
    frame = (line // height % frames).to(tl.int64)
    b = (line // height // frames).to(tl.int64)
    channel = tl.arange(0, BLOCK_C).to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    mask = (channel < C) & (column < width)
    token = (frame * (height // P) + row // P) * (width // P) + column // P
    feature = ((row % P) * P + column % P) * C + channel
    flow = tl.load(tokens + b * tokens_b + token * tokens_t + feature, mask=mask, other=0.0).to(tl.float64)
    sigma = tl.load(sigmas + frame * sigmas_f)
    own = tl.load(x + b * x_b + channel * x_c + frame * x_f + row * x_h + column, mask=mask, other=0.0)
    dtype: tl.constexpr = out.dtype.element_ty
    # by way of float32, as torch rounds float64 to 16 bits
    result = (own.to(tl.float64) - sigma * flow).to(tl.float32).to(dtype)
    if HAS_NOISE:
        following = tl.load(next_sigmas + frame * next_sigmas_f)
        keep, level = (1.0 - following).to(tl.float32), following.to(tl.float32)
        at = noise + b * noise_b + channel * noise_c + frame * noise_f + row * noise_h + column
        fresh = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        result = (keep * result.to(tl.float32) + level * fresh).to(dtype)
    tl.store(out + b * out_b + channel * out_c + frame * out_f + row * out_h + column, result, mask=mask)


@torch.library.custom_op("rfengine::flow_step", mutates_args=[])
def flow_step(
    tokens: Tensor, x: Tensor, sigmas: Tensor, noise: Tensor | None = None, next_sigmas: Tensor | None = None
) -> Tensor:
    """One step of the sampler from the head's tokens: x0 = x - sigma * flow, then re-noise.

    tokens: [B, T, P * P * C]; x, noise: [B, C, F, H, W]; sigmas, next_sigmas: float64 [F] or [1]. x0 is
    formed in float64 and rounded to the dtype of x; with noise the result is (1 - next_sigma) * x0 +
    next_sigma * noise in float32, rounded; without, x0. A tensor whose last axis is not contiguous is copied
    first; the other strides are free. Raises ValueError when the tokens do not cover the latents.
    """
    batch, channels, frames, height, width = x.shape
    patch = round((frames * height * width / tokens.shape[1]) ** 0.5)
    if (frames * height * width, channels * patch**2) != (tokens.shape[1] * patch**2, tokens.shape[2]):
        raise ValueError(
            f"tokens are {tuple(tokens.shape)} for x of {tuple(x.shape)}; "
            "they must be [B, F H W / P^2, P^2 C]"
        )
    out = x.new_empty(x.shape)
    tokens, x = map(contiguous_rows, (tokens, x))
    fresh = x if noise is None else contiguous_rows(noise)
    following = sigmas if next_sigmas is None else next_sigmas
    # about a thousand elements for each program: enough programs for every SM at a chunk's size (unmeasured)
    block_c = triton.next_power_of_2(channels)
    block_w = max(16, 1024 // block_c)
    _flow_step_kernel[(batch * frames * height, triton.cdiv(width, block_w))](
        tokens, x, fresh, out, sigmas, following,
        *tokens.stride()[:2], *x.stride()[:4], *fresh.stride()[:4], *out.stride()[:4],
        frames, height, width, *(each.stride(0) if each.numel() > 1 else 0 for each in (sigmas, following)),
        C=channels, P=patch, HAS_NOISE=noise is not None, BLOCK_C=block_c, BLOCK_W=block_w,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@flow_step.register_fake
def _(
    tokens: Tensor, x: Tensor, sigmas: Tensor, noise: Tensor | None = None, next_sigmas: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape)
