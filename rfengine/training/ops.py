"""The ops of a model that is trained through its streaming cache."""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.ops import Ops, reference


class DifferentiableOps(Ops):
    """The ops of `choice`, but those that write in place let gradients through where one is asked for.

    Passes without gradient run exactly what inference runs; a pass with one writes the chunk through
    autograd, in a view that nobody overwrites before backward (see rollout.py).
    """

    def qk_norm_rope_write(
        self, q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor,
        eps: float, keys: Tensor, values: Tensor, raw_keys: Tensor | None, slots: Tensor,
        mean_squares: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            return super().qk_norm_rope_write(
                q, k, v, weight_q, weight_k, rotation, eps, keys, values, raw_keys, slots, mean_squares
            )
        assert mean_squares is None  # a model that learns is whole
        num_heads = keys.shape[-2]
        if raw_keys is None:
            rotated_q, rotated_k = self.qk_norm_rope(q, k, weight_q, weight_k, rotation, num_heads, eps)
        else:
            raw = self.rms_norm(k, weight_k, eps).unflatten(-1, (num_heads, -1))
            reference.write_frames(raw_keys, raw, slots)
            rotated_k = reference.rotate(raw, rotation)
            normed_q = self.rms_norm(q, weight_q, eps).unflatten(-1, (num_heads, -1))
            rotated_q = reference.rotate(normed_q, rotation)
        reference.write_frames(keys, rotated_k, slots)
        reference.write_frames(values, v.unflatten(-1, (num_heads, -1)), slots)
        return rotated_q

    def flow_step(
        self, tokens: Tensor, x: Tensor, sigmas: Tensor,
        noise: Tensor | None = None, next_sigmas: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if torch.is_grad_enabled() and tokens.requires_grad:
            return reference.flow_step(tokens, x, sigmas, noise, next_sigmas)
        return super().flow_step(tokens, x, sigmas, noise, next_sigmas)
