"""WanDiT: the Wan2.1 transformer, causal over the streaming cache or bidirectional over a whole clip.

Parameter names and shapes are those of the original checkpoints. B batch, F latent frames, T tokens, D model
dim, H heads, E head dim, L layers, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfengine.cache.kv_cache import LayerCache, Read, StreamingKVCache
from rfengine.cache.sink_policy import CachePlan
from rfengine.cache.window_fp8 import LayerFP8, WindowFP8
from rfengine.config import WanConfig
from rfengine.diffusion_forcing_config import FPS_ROWS
from rfengine.models.block_offload import BlockOffload
from rfengine.models.linear import Linear, LinearGELU, Projections, Rows, RowsFP8, Scale
from rfengine.models.weight_layout import lay_out
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.rotary import rotary_table
from rfengine.tensor_parallel import WHOLE, TensorParallel


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


class SelfAttention(Projections):
    """over_cache and over_clip return the attention [B, T, D] before its output projection `o`, which the
    block applies."""

    def pack_weights(self) -> None:
        self.pack(self.q, self.k, self.v)

    def over_cache(self, x: Rows, rotation: Tensor, cache: LayerCache) -> Tensor:
        """Write this chunk's slots of one layer and attend to the window; x [B, T, D], rotation [2, T, E /
        2]."""
        rows = self.project(x, self.q, self.k, self.v)
        q = self.ops.qk_norm_rope_write(
            *rows, self.norm_q.weight, self.norm_k.weight, rotation, self.eps, cache.own_keys,
            cache.own_values, cache.own_raw_keys, cache.slots, self.parallel.mean_squares(*rows[:2]),
        )  # fmt: skip
        if len(cache.reads) == 1:
            return self._attend(q, cache, cache.reads[0]).flatten(2)
        parts = q.split([read.tokens for read in cache.reads], dim=1)
        seen = [self._attend(part, cache, read) for part, read in zip(parts, cache.reads, strict=True)]
        return torch.cat(seen, dim=1).flatten(2)

    def over_window_fp8(
        self, x: Rows, rotation: Tensor, cache: LayerCache, copies: LayerFP8, keeps: bool
    ) -> Rows:
        """over_cache over the e4m3 copies of a full window; keeps: write the chunk's slots of the arena
        too."""
        *units, keys, values, logit_scale = copies
        arenas = (cache.own_keys, cache.own_values, cache.own_raw_keys) if keeps else (None, None, None)
        rows = self.project(x, self.q, self.k, self.v)
        q = self.ops.qk_norm_rope_write_fp8(
            *rows, self.norm_q.weight, self.norm_k.weight, rotation, self.eps,
            *units, keys, values, cache.slots, *arenas, self.parallel.mean_squares(*rows[:2]),
        )  # fmt: skip
        read, in_rows = cache.reads[0], self.o.fp8 is not None
        attended = self.ops.sink_window_attention_fp8(
            q, keys, values, logit_scale, copies.value_unit, read.kv_len, read.filled_tokens,
            self.o.bias.dtype, in_rows,
        )  # fmt: skip
        return RowsFP8(attended[0].flatten(2), attended[1]) if in_rows else attended.flatten(2)

    def _attend(self, q: Tensor, cache: LayerCache, read: Read) -> Tensor:
        return self.ops.sink_window_attention(q, cache.keys, cache.values, read.kv_len, read.filled_tokens)

    def over_clip(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Attend among all tokens of x [B, T, D] where mask [T, T] allows it."""
        return self.ops.clip_attention(*self.rotated(x, rotation), mask).flatten(2)

    def rotated(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of x [B, T, D], each [B, T, H, E]; q and k normed and rotated."""
        q, k, v = self.project(x, self.q, self.k, self.v)
        weights = self.norm_q.weight, self.norm_k.weight
        q, k = self.ops.qk_norm_rope(q, k, *weights, rotation, self.num_heads, self.eps)
        return q, k, v.unflatten(-1, (self.num_heads, -1))

    def write_cache(self, x: Rows, rotation: Tensor, cache: LayerCache) -> None:
        """Write this chunk's slots of one layer and attend to nothing: the same keys and values as
        over_cache."""
        k, v = self.project(x, self.k, self.v)
        weight = self.norm_k.weight
        # no queries here: k is passed twice, and the result is ignored
        self.ops.qk_norm_rope_write(
            k, k, v, weight, weight, rotation, self.eps, cache.own_keys, cache.own_values,
            cache.own_raw_keys, cache.slots, self.parallel.mean_squares(k, k),
        )  # fmt: skip


class CrossAttention(Projections):
    def pack_weights(self) -> None:
        self.pack(self.k, self.v)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, text_len, H, E] of embedded text [B, text_len, D]."""
        keys, values = self.project(text, self.k, self.v)
        keys = self._normed(keys, self.norm_k)
        return keys.unflatten(-1, (self.num_heads, -1)), values.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Rows, keys: Tensor, values: Tensor) -> Tensor:
        """The attention [B, T, D] before its output projection `o`, which the block applies."""
        q = self._normed(self.q(x), self.norm_q).unflatten(-1, (self.num_heads, -1))
        return self.ops.clip_attention(q, keys, values, None).flatten(2)

    def _normed(self, x: Tensor, norm: Scale) -> Tensor:
        return self.ops.rms_norm(x, norm.weight, self.eps, self.parallel.mean_squares(x))


class Block(nn.Module):
    """One transformer block. It takes and returns the residual stream and its norm for the next reader, so
    that every residual addition is fused: with the norm that follows it, or (ops.folds_gate) with the product
    before it. A norm whose reader multiplies in FP8 returns FP8."""

    def __init__(self, config: WanConfig, ops: Ops, parallel: TensorParallel) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.eps
        self.folds_gate = ops.folds_gate and not parallel.divides  # a sum is not there yet in the product
        self.self_attn = SelfAttention(config, ops, parallel)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config, ops, parallel)
        columns = parallel.own(config).ffn_dim
        self.ffn = nn.Sequential(
            LinearGELU(config.dim, columns, ops),
            nn.Identity(),  # the GELU of the checkpoints, which call the next layer ffn.2
            Linear(columns, config.dim, ops, parallel),
        )
        # in place: any other division of a meta tensor imports torch._dynamo, which takes seconds
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim).div_(config.dim**0.5))

    @property
    def reads_fp8(self) -> bool:
        """Whether `normed` is to be in FP8."""
        return self.self_attn.fp8 is not None

    def forward(
        self,
        x: Tensor,
        normed: Rows,
        rows: Sequence[Tensor],
        following: Sequence[Tensor],
        text: tuple[Tensor, Tensor],
        attend: Callable[[SelfAttention, Rows], Rows],
        next_reads_fp8: bool = False,
    ) -> tuple[Tensor, Rows]:
        """x, normed: [B, T, D]; rows: the six of this block, [B, F, D] each; following: shift and scale of
        the next one. attend returns the self-attention before its output projection."""
        _, _, gate, shift, scale, gate_ffn = rows
        expand, _, contract = self.ffn
        x, normed = self._add_affine(x, attend(self.self_attn, normed), gate)
        x, normed = self._add_adaptive(
            x, self.cross_attn(normed, *text), self.cross_attn.o, None, shift, scale, expand.fp8 is not None
        )
        hidden = expand(normed) if contract.fp8 is None else expand.rows_fp8(normed)
        return self._add_adaptive(x, hidden, contract, gate_ffn, *following, next_reads_fp8)

    def _add_affine(self, x: Tensor, y: Rows, gate: Tensor) -> tuple[Tensor, Rows]:
        """(x + gate * projection of y, its norm3). x may be overwritten; do not use it afterwards."""
        projection, norm = self.self_attn.o, (self.norm3.weight, self.norm3.bias, self.eps)
        if self.cross_attn.q.fp8 is not None:
            x, *rows = self.ops.gated_residual_affine_norm_fp8(x, projection(y), gate, *norm)
            return x, RowsFP8(*rows)
        if self.folds_gate and projection.is_plain:
            x = self.ops.gated_linear(x, y, projection.weight, projection.bias, gate)
            return x, self.ops.affine_layer_norm(x, *norm)
        return self.ops.gated_residual_affine_norm(x, projection(y), gate, *norm)

    def _add_adaptive(
        self,
        x: Tensor,
        y: Rows,
        projection: Linear,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        reads_fp8: bool,
    ) -> tuple[Tensor, Rows]:
        """(x + gate * projection of y, its modulated norm). x may be overwritten, as in _add_affine."""
        if reads_fp8:
            x, *rows = self.ops.gated_residual_adaptive_norm_fp8(
                x, projection(y), gate, shift, scale, self.eps
            )
            return x, RowsFP8(*rows)
        if self.folds_gate and projection.is_plain:
            x = self.ops.gated_linear(x, y, projection.weight, projection.bias, gate)
            return x, self.ops.adaptive_layer_norm(x, shift, scale, self.eps)
        return self.ops.gated_residual_adaptive_norm(x, projection(y), gate, shift, scale, self.eps)


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        _, patch_height, patch_width = config.patch_size
        self.head = nn.Linear(config.dim, patch_height * patch_width * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim).div_(config.dim**0.5))


class WanDiT(nn.Module):
    """The transformer of one WanConfig. Latents are [B, C, F, height, width]; the output is the flow, noise -
    x0. left_out_of_fp8: the products of the blocks that are not in FP8; None where none is
    (fp8_products.quantise). offload: where the blocks' weights are in host memory, what brings them
    (block_offload.py). parallel: the rank whose heads and columns it has; the others' run beside it."""

    def __init__(self, config: WanConfig, ops: Ops = REFERENCE_OPS, parallel: TensorParallel = WHOLE) -> None:
        super().__init__()
        self.config, self.ops, self.parallel = config, ops, parallel
        self.left_out_of_fp8: frozenset[str] | None = None
        self.offload: BlockOffload[Block] | None = None
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.fps_embedding:
            self.fps_embedding = nn.Embedding(FPS_ROWS, dim)
            self.fps_projection = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, ops, parallel) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def block(self, number: int) -> Block:
        """Block `number` with its weights on the model's device: with offload, until the next call."""
        return self.blocks[number] if self.offload is None else self.offload.block(number)

    def modulation(self, timesteps: Tensor, fps: int | None = None) -> Modulation:
        """Modulation for timesteps [B, F] or [1, 1], floats from 0 to 1000, never rounded.

        fps: frames per second, for a model with fps_embedding (SkyReels-V2): its row 0 is for 16, row 1 for
        any other rate. The layers get it and the head does not. Raises ValueError where it is absent.
        """
        # rounded to the dtype of the weights, as in SkyReels-V2; Wan2.1 keeps float32
        sinusoid = timestep_sinusoid(timesteps, self.config.freq_dim).to(self.dtype)
        embedded = self.time_embedding(sinusoid)
        rows = self.time_projection(embedded).unflatten(-1, (6, -1)).float()
        if self.config.fps_embedding:
            if fps is None:
                raise ValueError("fps is None and the model is told its frame rate; give it, such as 24")
            row = self.fps_embedding.weight[0 if fps == 16 else 1]
            rows = rows + self.fps_projection(row).unflatten(-1, (6, -1)).float()
        layers = torch.stack([block.modulation.float() + rows for block in self.blocks])
        return Modulation(layers, self.head.modulation.float() + embedded.float().unsqueeze(-2))

    def text_keys_values(self, text_states: Tensor) -> TextKeysValues:
        """Cross-attention keys and values of text states [B, <= text_len, text_dim], once for each prompt.

        Rows up to text_len are zeros: they take part, as in the published model.
        """
        length, limit = text_states.shape[1], self.config.text_len
        if length > limit or text_states.shape[2] != self.config.text_dim:
            raise ValueError(
                f"text states are {tuple(text_states.shape)}; "
                f"the model takes [B, up to {limit}, {self.config.text_dim}]"
            )
        text = self.text_embedding(F.pad(text_states.to(self.dtype), (0, 0, 0, limit - length)))
        pairs = [self.block(layer).cross_attn.keys_values(text) for layer in range(len(self.blocks))]
        return TextKeysValues(torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs]))

    def forward_chunk(
        self,
        latents: Tensor,
        modulation: Modulation,
        text: TextKeysValues,
        cache: StreamingKVCache,
        plan: CachePlan,
        keep_raw: bool = False,
        window: WindowFP8 | None = None,
    ) -> Tensor:
        """Causal pass of one chunk over the cache; overwrites the chunk's slots. Returns tokens [B, T, P * P
        * C].

        latents: [B, C, F, h, w]; modulation: of one timestep, or of one for each of the F frames. keep_raw
        stores the raw keys as well, as the context pass does. window: attention reads these copies of a full
        window instead, and without keep_raw the slots of the arena stay as they are.
        """
        attend = _over_cache(cache, plan, keep_raw, window)
        _, normed = self.run_blocks(latents, modulation, text, attend, len(self.blocks))
        return self.head.head(normed)

    def context_pass(
        self,
        latents: Tensor,
        modulation: Modulation,
        text: TextKeysValues,
        cache: StreamingKVCache,
        plan: CachePlan,
        window: WindowFP8 | None = None,
    ) -> None:
        """Leave the keys and values that forward_chunk with keep_raw leaves; the last layer stops after its
        own.

        latents: [B, C, F, h, w], clean.
        """
        last = len(self.blocks) - 1
        attend = _over_cache(cache, plan, True, window)
        _, normed = self.run_blocks(latents, modulation, text, attend, last)
        view = cache.layer(last, plan, keep_raw=True)
        self.block(last).self_attn.write_cache(normed, cache.query_rotation, view)

    def recache(
        self, frames: dict[int, Tensor], modulation: Modulation, text: TextKeysValues, cache: StreamingKVCache
    ) -> None:
        """Recompute the keys and values of the window under `text` from clean latents, as LongLive does.

        frames: clean latents [B, C, 1, h, w] by number, of the window outside sink and memory, which keep
        their own. Slots are put in order first: each chunk, at its present time index, sees the sink and
        those before.
        """
        plans = cache.rewrite_plans()
        numbers = [range(plan.first_frame, plan.first_frame + plan.frames) for plan in plans]
        if missing := [number for run in numbers for number in run if number not in frames]:
            raise ValueError(f"latents of frame {missing[0]} are needed to recompute the window; keep them")
        for plan, run in zip(plans, numbers, strict=True):
            cache.begin_rewrite(plan)
            clean = torch.cat([frames[number] for number in run], dim=2)
            self.context_pass(clean, modulation, text, cache, plan)

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
            time_indices = torch.arange(frames, dtype=torch.int64, device=latents.device)
        rotation = rotary_table(self.config.head_dim, time_indices, height // patch, width // patch)
        per_frame = timesteps if timesteps.ndim == 2 else timesteps.reshape(batch, 1)
        _, normed = self.run_blocks(
            latents,
            self.modulation(per_frame),
            self.text_keys_values(text_states),
            lambda layer: lambda attention, x: attention.over_clip(x, rotation, mask),
            len(self.blocks),
        )
        return self.ops.unpatchify(self.head.head(normed), latents)

    def run_blocks(
        self,
        latents: Tensor,
        modulation: Modulation,
        text: TextKeysValues,
        attend: Callable[[int], Callable[[SelfAttention, Rows], Rows]],
        count: int,
    ) -> tuple[Tensor, Rows]:
        """Run the first `count` blocks: the residual stream [B, T, D] and its norm for what comes next."""
        patches = patchify(latents.to(self.dtype), self.config.patch_size[1])
        x = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        rows = [layer.unbind(2) for layer in modulation.layers.unbind(0)]
        following = [*(row[:2] for row in rows[1:]), modulation.head.unbind(2)]
        first = (x, *rows[0][:2], self.config.eps)
        reads_fp8 = [*(block.reads_fp8 for block in self.blocks), False]  # the head is in the model's dtype
        if reads_fp8[0]:
            normed: Rows = RowsFP8(*self.ops.adaptive_layer_norm_fp8(*first))
        else:
            normed = self.ops.adaptive_layer_norm(*first)
        keys_values = zip(text.keys.unbind(0), text.values.unbind(0), strict=True)
        parts = zip(rows, following, keys_values, reads_fp8[1:], strict=True)
        for layer, (own, next_rows, pair, in_fp8) in enumerate(islice(parts, count)):
            x, normed = self.block(layer)(x, normed, own, next_rows, pair, attend(layer), in_fp8)
        return x, normed


def _over_cache(
    cache: StreamingKVCache, plan: CachePlan, keep_raw: bool, window: WindowFP8 | None
) -> Callable[[int], Callable[[SelfAttention, Rows], Rows]]:
    """For every layer, attention over the cache as the planned chunk sees it, or over copies of it."""

    def attend(layer: int) -> Callable[[SelfAttention, Rows], Rows]:
        rotation, own = cache.query_rotation, cache.layer(layer, plan, keep_raw)
        if window is None:
            return lambda attention, x: attention.over_cache(x, rotation, own)
        copies = window.layer(layer)
        return lambda attention, x: attention.over_window_fp8(x, rotation, own, copies, keep_raw)

    return attend


def timestep_sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """[..., dim]: cosines first, then sines, of timestep * 10000^(-k / (dim / 2)); float64."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, C, F, H, W] to patches [B, F * H/patch * W/patch, C * patch * patch], in the order of a Conv3d
    weight."""
    batch, channels, frames, height, width = latents.shape
    grid = latents.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * patch * patch)


def pack_weights(model: WanDiT) -> None:
    """Join the query, key and value weights of every attention in memory, for inference: one product each;
    lay out all others.

    In place, and without more memory once done. Call it when the weights are loaded, on their device and in
    their dtype; training never needs it.
    """
    for block in model.blocks:
        for layer in (module for module in block.modules() if isinstance(module, Linear)):
            lay_out(layer.weight, model.ops)
        block.self_attn.pack_weights()
        block.cross_attn.pack_weights()
