"""Ops: every op of the engine by its name in reference.py; checks shapes, then calls the backend chosen at
start."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from rfengine.backends import backend_reasons, has_backend, implementation
from rfengine.config import Backend

logger = logging.getLogger(__name__)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_modulation(x: Tensor, *tables: Tensor | None) -> None:
    _check(x.ndim == 3, f"x is {tuple(x.shape)}; it must be [B, T, D]")
    for table in tables:
        if table is None:
            continue
        fits = table.ndim == 3 and table.shape[0] in (1, x.shape[0]) and table.shape[2] == x.shape[2]
        _check(
            fits and x.shape[1] % table.shape[1] == 0,
            f"a modulation of {tuple(table.shape)} does not fit x of {tuple(x.shape)}; "
            "it must be [B or 1, F or 1, D]",
        )


def _check_same(name: str, x: Tensor, other_name: str, y: Tensor) -> None:
    _check(
        x.shape == y.shape,
        f"{name} is {tuple(x.shape)} but {other_name} is {tuple(y.shape)}; they must be equal",
    )


def _check_rotation(rotation: Tensor, tokens: int, head_dim: int) -> None:
    expected = (2, tokens, head_dim // 2)
    _check(tuple(rotation.shape) == expected, f"rotation is {tuple(rotation.shape)}; it must be {expected}")


class Ops:
    """The ops of one model, each bound once to the backend that runs it. Signatures and meaning:
    reference.py.

    choice: backend by op. Models hold one of these and never call a kernel.
    """

    def __init__(self, choice: Mapping[str, str]) -> None:
        self.choice = dict(choice)
        self._run = {name: implementation(name, backend) for name, backend in self.choice.items()}

    def adaptive_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        _check_modulation(x, shift, scale)
        return self._run["adaptive_layer_norm"](x, shift, scale, eps)

    def affine_layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self._run["affine_layer_norm"](x, weight, bias, eps)

    def gated_residual_adaptive_norm(
        self, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        _check_same("x", x, "y", y)
        _check_modulation(x, gate, shift, scale)
        return self._run["gated_residual_adaptive_norm"](x, y, gate, shift, scale, eps)

    def gated_residual_affine_norm(
        self, x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        _check_same("x", x, "y", y)
        _check_modulation(x, gate)
        return self._run["gated_residual_affine_norm"](x, y, gate, weight, bias, eps)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _check(
            weight.shape == x.shape[-1:],
            f"weight is {tuple(weight.shape)} for x of {tuple(x.shape)}; it must cover the last axis",
        )
        return self._run["rms_norm"](x, weight, eps)

    def qk_norm_rope(
        self,
        q: Tensor,
        k: Tensor,
        weight_q: Tensor,
        weight_k: Tensor,
        rotation: Tensor,
        num_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        _check_same("q", q, "k", k)
        _check_rotation(rotation, q.shape[1], q.shape[2] // num_heads)
        return self._run["qk_norm_rope"](q, k, weight_q, weight_k, rotation, num_heads, eps)

    def qk_norm_rope_write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight_q: Tensor,
        weight_k: Tensor,
        rotation: Tensor,
        eps: float,
        keys: Tensor,
        values: Tensor,
        raw_keys: Tensor | None,
    ) -> Tensor:
        batch, tokens, dim = q.shape
        slot = (batch, tokens, *keys.shape[2:])
        _check(
            keys.shape == values.shape == slot and keys.shape[2] * keys.shape[3] == dim,
            f"the slot is {tuple(keys.shape)} for a chunk of {tuple(q.shape)}; it must hold just that chunk",
        )
        _check_rotation(rotation, tokens, keys.shape[3])
        return self._run["qk_norm_rope_write"](
            q, k, v, weight_q, weight_k, rotation, eps, keys, values, raw_keys
        )

    def sink_window_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, kv_len: int, filled_tokens: Tensor
    ) -> Tensor:
        _check_same("keys", keys, "values", values)
        _check(
            0 < kv_len <= keys.shape[1], f"kv_len is {kv_len}; the arena holds 1 to {keys.shape[1]} tokens"
        )
        return self._run["sink_window_attention"](q, keys, values, kv_len, filled_tokens)

    def clip_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        _check_same("k", k, "v", v)
        return self._run["clip_attention"](q, k, v, mask)

    def rephase_keys(self, raw: Tensor, rotated: Tensor, rotation: Tensor) -> None:
        _check_same("raw", raw, "rotated", rotated)
        _check_rotation(rotation, raw.shape[2], raw.shape[4])
        self._run["rephase_keys"](raw, rotated, rotation)

    def ema_evict(
        self,
        sink_keys: Tensor,
        sink_values: Tensor,
        low_keys: Tensor | None,
        low_values: Tensor | None,
        keys: Tensor,
        values: Tensor,
        alpha: float,
    ) -> None:
        _check_same("the sink", sink_keys, "the evicted chunk", keys)
        _check_same("the sink's values", sink_values, "the evicted values", values)
        self._run["ema_evict"](sink_keys, sink_values, low_keys, low_values, keys, values, alpha)

    def unpatchify(self, tokens: Tensor, like: Tensor) -> Tensor:
        return self._run["unpatchify"](tokens, like)

    def flow_step(
        self, tokens: Tensor, x: Tensor, sigma: float, noise: Tensor | None, next_sigma: float
    ) -> Tensor:
        if noise is not None:
            _check_same("x", x, "noise", noise)
        return self._run["flow_step"](tokens, x, sigma, noise, next_sigma)

    def evict_and_rephase(
        self,
        raw: Tensor,
        rotated: Tensor,
        values: Tensor,
        low_keys: Tensor | None,
        low_values: Tensor | None,
        rotation: Tensor,
        sink_tokens: int,
        leaving: int,
        alpha: float,
    ) -> None:
        _check_same("raw", raw, "rotated", rotated)
        _check_same("raw", raw, "values", values)
        _check_rotation(rotation, raw.shape[2], raw.shape[4])
        last = raw.shape[2] - sink_tokens
        _check(
            0 < sink_tokens <= leaving <= last,
            f"the chunk that leaves starts at token {leaving}; it lies from {sink_tokens} to {last}",
        )
        self._run["evict_and_rephase"](
            raw, rotated, values, low_keys, low_values, rotation, sink_tokens, leaving, alpha
        )

    def __deepcopy__(self, memo: dict) -> Ops:
        return self


OP_NAMES: tuple[str, ...] = tuple(name for name in vars(Ops) if not name.startswith("_"))
REFERENCE_OPS = Ops(dict.fromkeys(OP_NAMES, "reference"))


def choose_ops(
    requested: Backend, device: torch.device | str, overrides: Mapping[str, str] | None = None
) -> Ops:
    """The ops for `device`: on the requested backend, or on the best there is for "auto".

    An op that the backend has no form for runs on the reference. overrides: backend by op name, for
    measuring. Raises RuntimeError when a requested backend cannot run here, with the reason, and ValueError
    for an op that is not there or that an override has no form for.
    """
    overrides = dict(overrides or {})
    reasons = backend_reasons(device)
    for op, backend in overrides.items():
        if op not in OP_NAMES:
            raise ValueError(f"there is no op {op!r}; there are {', '.join(OP_NAMES)}")
        if backend in reasons and not has_backend(op, backend):
            raise ValueError(f"{op} has no form for backend {backend!r}; leave it to 'reference'")
    for backend in {requested, *overrides.values()} - {"auto"}:
        reason = reasons.get(backend, "it is not built into this version")
        if reason:
            known = ", ".join(("auto", *(name for name, absence in reasons.items() if not absence)))
            raise RuntimeError(f"backend {backend!r} cannot run on {device}: {reason}; use one of {known}")
    general = _best_backend(device, reasons) if requested == "auto" else requested
    fitting = {op: general if has_backend(op, general) else "reference" for op in OP_NAMES}
    choice = fitting | overrides
    logger.info("ops on %s: %s", device, choice)
    return Ops(choice)


def _best_backend(device: torch.device | str, reasons: Mapping[str, str]) -> str:
    """Triton on CUDA where it is installed; on a CPU its interpreter is for tests, never a default."""
    return "triton" if torch.device(device).type == "cuda" and not reasons["triton"] else "reference"
