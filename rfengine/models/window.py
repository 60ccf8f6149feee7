"""A pass over a window of latent frames, each with its own timestep: bidirectional, or causal block by block.

The pass of diffusion forcing (SkyReels-V2, arXiv 2504.13074): there is no cache, and time is counted from the
start of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.models.dit import Modulation, SelfAttention, TextKeysValues, WanDiT
from rfengine.rotary import rotary_table


def window_flow(
    model: WanDiT,
    latents: Tensor,
    modulation: Modulation,
    text: TextKeysValues,
    block_frames: int | None = None,
) -> Tensor:
    """The flow [B, C, F, h, w] of a window of latents [B, C, F, h, w], in the dtype of the model.

    modulation: a row for each latent frame, or one for all. block_frames: a frame attends to its own block of
    as many frames and to those before it; None lets every frame attend to all, whatever the timesteps.
    """
    _, _, frames, height, width = latents.shape
    _, patch, _ = model.config.patch_size
    rows, columns = height // patch, width // patch
    time = torch.arange(frames, dtype=torch.int64, device=latents.device)
    rotation = rotary_table(model.config.head_dim, time, rows, columns)
    block = frames if block_frames is None else block_frames

    def attend(attention: SelfAttention, x: Tensor) -> Tensor:
        return over_blocks(attention, x, rotation, block * rows * columns)

    _, normed = model.run_blocks(latents, modulation, text, lambda layer: attend, len(model.blocks))
    return model.ops.unpatchify(model.head.head(normed), latents)


def over_blocks(attention: SelfAttention, x: Tensor, rotation: Tensor, block_tokens: int) -> Tensor:
    """Self-attention [B, T, D] of x before its output projection: each block of `block_tokens` tokens attends
    to itself and to those before it. The last may be shorter.

    Keys are cut where a mask would hide them: no mask of T x T is made, and what it would hide is not
    computed.
    """
    q, k, v = attention.rotated(x, rotation)
    parts = []
    for start in range(0, x.shape[1], block_tokens):
        end = min(start + block_tokens, x.shape[1])
        parts.append(attention.ops.clip_attention(q[:, start:end], k[:, :end], v[:, :end], None))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(2)
