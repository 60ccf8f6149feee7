"""WanDiT: the Wan2.1 transformer, causal over the streaming cache or bidirectional over a whole clip (spec
1).

Parameter names and shapes are those of the original checkpoints (spec 1.2). B batch, F latent frames, T
tokens, D model dim, H heads, E head dim, L layers, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfengine.cache.kv_cache import CachePlan, LayerCache, StreamingKVCache
from rfengine.config import WanConfig
from rfengine.models.embeddings import patchify, rotary_table, timestep_sinusoid
from rfengine.ops import REFERENCE_OPS, Ops


@dataclass(frozen=True, slots=True)
class Modulation:
    """Shift, scale and gate rows for every layer and for the head, in float32.

    layers: [L, B or 1, F or 1, 6, D], in the order shift, scale, gate of attention, then of the feed-forward
    part.
    head: [B or 1, F or 1, 2, D], shift and scale.
    """

    layers: Tensor
    head: Tensor


@dataclass(frozen=True, slots=True)
class TextKeysValues:
    """Cross-attention keys and values of one prompt for every layer: [L, B, text_len, H, E] each."""

    keys: Tensor
    values: Tensor


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.num_heads, self.eps = ops, config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (Scale(config.dim) for _ in range(2))

    def over_cache(self, x: Tensor, rotation: Tensor, cache: LayerCache) -> Tensor:
        """Write this chunk's slot of one layer and attend to the window; x [B, T, D], rotation [2, T, E /
        2]."""
        q = self.ops.qk_norm_rope_write(
            self.q(x), self.k(x), self.v(x), self.norm_q.weight, self.norm_k.weight, rotation, self.eps,
            cache.slot_keys, cache.slot_values, cache.slot_raw_keys,
        )  # fmt: skip
        return self.o(
            self.ops.sink_window_attention(
                q, cache.keys, cache.values, cache.kv_len, cache.filled_tokens
            ).flatten(2)
        )

    def over_clip(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Attend among all tokens of x [B, T, D] where mask [T, T] allows it."""
        q, k = self.ops.qk_norm_rope(
            self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, rotation, self.num_heads, self.eps
        )
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        return self.o(self.ops.clip_attention(q, k, v, mask).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.num_heads, self.eps = ops, config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (Scale(config.dim) for _ in range(2))

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, text_len, H, E] of embedded text [B, text_len, D]."""
        keys = self.ops.rms_norm(self.k(text), self.norm_k.weight, self.eps)
        return keys.unflatten(-1, (self.num_heads, -1)), self.v(text).unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.ops.rms_norm(self.q(x), self.norm_q.weight, self.eps).unflatten(-1, (self.num_heads, -1))
        return self.o(self.ops.clip_attention(q, keys, values, None).flatten(2))


class Scale(nn.Module):
    """The weight of an RMS norm, kept apart so that the op can fuse it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Block(nn.Module):
    """One transformer block. It takes and gives the residual stream and its norm for the next reader, so that
    every residual addition is fused with the norm that follows it."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.eps
        self.self_attn = SelfAttention(config, ops)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config, ops)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        rows: Tensor,
        following: Tensor,
        text: tuple[Tensor, Tensor],
        attend: Callable[[SelfAttention, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """x, normed: [B, T, D]; rows: [B, F, 6, D] of this block; following: [B, F, 2, D], shift and scale
        next."""
        _, _, gate, shift, scale, gate_ffn = rows.unbind(2)
        y = attend(self.self_attn, normed)
        x, normed = self.ops.gated_residual_affine_norm(
            x, y, gate, self.norm3.weight, self.norm3.bias, self.eps
        )
        y = self.cross_attn(normed, *text)
        x, normed = self.ops.gated_residual_adaptive_norm(x, y, None, shift, scale, self.eps)
        return self.ops.gated_residual_adaptive_norm(
            x, self.ffn(normed), gate_ffn, *following.unbind(2), self.eps
        )


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        _, patch_height, patch_width = config.patch_size
        self.head = nn.Linear(config.dim, patch_height * patch_width * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)


class WanDiT(nn.Module):
    """The transformer of one WanConfig. Latents are [B, C, F, height, width]; the output is the flow, noise -
    x0."""

    def __init__(self, config: WanConfig, ops: Ops = REFERENCE_OPS) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def modulation(self, timesteps: Tensor) -> Modulation:
        """Modulation for timesteps [B, F] or [1, 1], floats from 0 to 1000, never rounded (spec 1.4, steps 3
        to 6)."""
        sinusoid = timestep_sinusoid(timesteps, self.config.freq_dim).to(self.dtype)
        embedded = self.time_embedding(sinusoid)
        rows = self.time_projection(embedded).unflatten(-1, (6, -1)).float()
        layers = torch.stack([block.modulation.float() + rows for block in self.blocks])
        return Modulation(layers, self.head.modulation.float() + embedded.float().unsqueeze(-2))

    def text_keys_values(self, text_states: Tensor) -> TextKeysValues:
        """Cross-attention keys and values of text states [B, <= text_len, text_dim], once for each prompt.

        Rows up to text_len are zeros: they take part, as in the published model (spec 1.4, step 4).
        """
        length, limit = text_states.shape[1], self.config.text_len
        if length > limit or text_states.shape[2] != self.config.text_dim:
            raise ValueError(
                f"text states are {tuple(text_states.shape)}; "
                f"the model takes [B, up to {limit}, {self.config.text_dim}]"
            )
        text = self.text_embedding(F.pad(text_states.to(self.dtype), (0, 0, 0, limit - length)))
        pairs = [block.cross_attn.keys_values(text) for block in self.blocks]
        return TextKeysValues(torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs]))

    def forward_chunk(
        self,
        latents: Tensor,
        modulation: Modulation,
        text: TextKeysValues,
        cache: StreamingKVCache,
        plan: CachePlan,
        keep_raw: bool = False,
    ) -> Tensor:
        """Causal pass of one chunk over the cache; overwrites the chunk's slot. Returns tokens [B, T, P * P *
        C].

        latents: [B, C, chunk_frames, h, w]. keep_raw stores the raw keys as well: the context pass does.
        """

        def attend(layer: int) -> Callable[[SelfAttention, Tensor], Tensor]:
            return lambda attention, x: attention.over_cache(
                x, cache.query_rotation, cache.layer(layer, plan, keep_raw)
            )

        return self._run_blocks(latents, modulation, text, attend)

    def forward_clip(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text_states: Tensor,
        time_indices: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Pass over a whole clip: bidirectional without mask (the teacher). Returns the flow [B, C, F, h, w].

        latents: [B, C, F, h, w]; timesteps: [B], or [B, F] with one for each latent frame; text_states: [B,
        <= text_len, text_dim]; time_indices: integers [F], 0.. by default; mask: bool [T, T], True where a
        query (row) may attend.
        """
        batch, _, frames, height, width = latents.shape
        patch = self.config.patch_size[1]
        if time_indices is None:
            time_indices = torch.arange(frames, device=latents.device)
        rotation = rotary_table(self.config.head_dim, time_indices, height // patch, width // patch)
        per_frame = timesteps if timesteps.ndim == 2 else timesteps.reshape(batch, 1)
        tokens = self._run_blocks(
            latents,
            self.modulation(per_frame),
            self.text_keys_values(text_states),
            lambda layer: lambda attention, x: attention.over_clip(x, rotation, mask),
        )
        return self.ops.unpatchify(tokens, latents)

    def _run_blocks(
        self,
        latents: Tensor,
        modulation: Modulation,
        text: TextKeysValues,
        attend: Callable[[int], Callable[[SelfAttention, Tensor], Tensor]],
    ) -> Tensor:
        patches = patchify(latents.to(self.dtype), self.config.patch_size[1])
        x = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        rows = modulation.layers
        following = [*rows[1:, :, :, :2], modulation.head]
        shift, scale = rows[0, :, :, :2].unbind(2)
        normed = self.ops.adaptive_layer_norm(x, shift, scale, self.config.eps)
        for layer, block in enumerate(self.blocks):
            keys_values = (text.keys[layer], text.values[layer])
            x, normed = block(x, normed, rows[layer], following[layer], keys_values, attend(layer))
        return self.head.head(normed)
