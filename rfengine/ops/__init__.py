"""Ops: every op of the engine by its name in reference.py; checks shapes, then calls the backend chosen at
start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rfengine.config import Backend
from rfengine.ops.backends import (
    SIXTEEN_BITS,
    backend_reasons,
    family,
    has_backend,
    implementation,
    is_hopper,
)

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


def _check_convolution(x: Tensor, weight: Tensor) -> None:
    _check(
        x.ndim == 4
        and weight.ndim == 5
        and weight.shape[1] == x.shape[3]
        and x.shape[0] >= weight.shape[2]
        and all(size % 2 for size in weight.shape[2:]),
        f"a weight of {tuple(weight.shape)} does not fit x of {tuple(x.shape)}; "
        "it must be [Cout, Cin, kt, kh, kw] of odd sizes for x [T + kt - 1, H, W, Cin]",
    )


def _check_frames(out: Tensor | None, x: Tensor, weight: Tensor) -> None:
    expected = (x.shape[0] - weight.shape[2] + 1, *x.shape[1:3], weight.shape[0])
    _check(
        out is None or tuple(out.shape) == expected,
        f"out does not fit x of {tuple(x.shape)} under {tuple(weight.shape)}; it must be {expected}",
    )


def _check_pixels(pixels: Tensor) -> None:
    fits = pixels.ndim == 4 and pixels.shape[0] == 3
    _check(fits, f"pixels are {tuple(pixels.shape)}; they must be [3, T, H, W]")


class Ops:
    """The ops of one model, each bound once to the backend that runs it. Signatures and meaning:
    reference.py.

    choice: backend by op; a key of shape_key is the backend of one op for one shape. folds_gate: whether
    a block adds its branch to the residual stream in the product before (gated_linear) rather than in the
    norm after it. Models hold one of these and never call a kernel.
    """

    def __init__(self, choice: Mapping[str, str], folds_gate: bool = False) -> None:
        self.choice = dict(choice)
        self.folds_gate = folds_gate
        self._run = {key: implementation(op_of(key), backend) for key, backend in self.choice.items()}
        self._has_shapes = any(op_of(key) != key for key in self.choice)

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

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._by_shape("linear", *weight.shape)(x, weight, bias)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._by_shape("linear_gelu", *weight.shape)(x, weight, bias)

    def gated_linear(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
        _check_modulation(x, gate)
        _check(
            x.shape == (*y.shape[:2], weight.shape[0]),
            f"x is {tuple(x.shape)} for y of {tuple(y.shape)} and a weight of {tuple(weight.shape)}; "
            "it must be [B, T, N]",
        )
        return self._by_shape("gated_linear", *weight.shape)(x, y, weight, bias, gate)

    def _by_shape(self, op: str, *sizes: int) -> Callable[..., Tensor]:
        """What runs `op` for these sizes; F.linear and the kernels check what they are given."""
        if self._has_shapes:
            return self._run.get(shape_key(op, *sizes)) or self._run[op]
        return self._run[op]

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

    def channel_norm_silu(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gamma: Tensor,
        out: Tensor,
        out_scale: float = 1.0,
    ) -> Tensor:
        _check_same("x", x, "out", out)
        if residual is not None:
            _check_same("x", x, "the residual", residual)
        for name, vector in (("bias", bias), ("gamma", gamma)):
            _check(
                vector is None or vector.shape == x.shape[-1:],
                f"{name} does not fit x of {tuple(x.shape)}; it must have one value for each channel",
            )
        _check(out_scale > 0, f"out_scale is {out_scale}; it must be positive")
        return self._run["channel_norm_silu"](x, bias, residual, gamma, out, out_scale)

    def causal_conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        _check_convolution(x, weight)
        _check_frames(out, x, weight)
        return self._by_shape("causal_conv3d", *weight.shape, *x.shape[1:3])(x, weight, bias, out)

    def causal_conv3d_fp8(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        _check_convolution(x, weight)
        _check_frames(out, x, weight)
        _check(
            x.dtype == weight.dtype == torch.float8_e4m3fn,
            f"x is {x.dtype} and the weight {weight.dtype}; both must be torch.float8_e4m3fn",
        )
        _check(
            tuple(scale.shape) == (weight.shape[0],),
            f"scale is {tuple(scale.shape)}; it must have one value for each of {weight.shape[0]} channels",
        )
        return self._run["causal_conv3d_fp8"](x, weight, scale, bias, out)

    def phase_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = tuple(weight.shape)
        _check(
            x.ndim == 4 and len(shape) == 6 and (*shape[:2], *shape[3:]) == (2, 2, x.shape[3], 2, 2),
            f"a phase weight of {shape} does not fit x of {tuple(x.shape)}; "
            "it must be [2, 2, Cout, Cin, 2, 2] for x [T, H, W, Cin]",
        )
        return self._by_shape("phase_conv", *shape, *x.shape[1:3])(x, weight, bias)

    def frame_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _check_same("q", q, "k", k)
        _check_same("k", k, "v", v)
        _check(q.ndim == 3, f"q is {tuple(q.shape)}; it must be [frames, positions, channels]")
        return self._run["frame_attention"](q, k, v)

    def conv_frame_pack(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _check_convolution(x, weight)
        _check(weight.shape[0] == 3, f"the weight gives {weight.shape[0]} channels; a frame has 3")
        return self._run["conv_frame_pack"](x, weight, bias)

    def conv_frame_pack_nv12(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _check_convolution(x, weight)
        _check(weight.shape[0] == 3, f"the weight gives {weight.shape[0]} channels; a frame has 3")
        _check(
            x.shape[1] % 2 == x.shape[2] % 2 == 0,
            f"frames are {x.shape[1]} x {x.shape[2]}; NV12 needs an even height and width",
        )
        return self._run["conv_frame_pack_nv12"](x, weight, bias)

    def frame_pack(self, pixels: Tensor) -> Tensor:
        _check_pixels(pixels)
        return self._run["frame_pack"](pixels)

    def frame_pack_nv12(self, pixels: Tensor) -> Tensor:
        _check_pixels(pixels)
        _check(
            pixels.shape[2] % 2 == pixels.shape[3] % 2 == 0,
            f"frames are {pixels.shape[2]} x {pixels.shape[3]}; NV12 needs an even height and width",
        )
        return self._run["frame_pack_nv12"](pixels)

    def __deepcopy__(self, memo: dict) -> Ops:
        return self


def shape_key(op: str, *sizes: int) -> str:
    """The key in Ops.choice of `op` for one shape alone, such as "linear@4608x1536".

    sizes: those of the weight; for a convolution, the height and width of its input behind them.
    """
    return f"{op}@{'x'.join(map(str, sizes))}"


def convolution_backend(ops: Ops, op: str, x: Tensor, weight: Tensor) -> str:
    """The backend that runs causal_conv3d or phase_conv of these tensors."""
    return ops.choice.get(shape_key(op, *weight.shape, *x.shape[1:3])) or ops.choice[op]


def op_of(key: str) -> str:
    """The op of a key of Ops.choice."""
    return key.partition("@")[0]


OP_NAMES: tuple[str, ...] = tuple(name for name in vars(Ops) if not name.startswith("_"))
LINEAR_OPS = ("linear", "linear_gelu", "gated_linear")
CONVOLUTION_OPS = ("causal_conv3d", "phase_conv")  # those that several backends have
REFERENCE_OPS = Ops(dict.fromkeys(OP_NAMES, "reference"))


def choose_ops(
    requested: Backend,
    device: torch.device | str,
    overrides: Mapping[str, str] | None = None,
    folds_gate: bool = False,
    dtype: torch.dtype | None = None,
) -> Ops:
    """The ops for `device`: on the requested backend, or on the best there is for "auto" in `dtype`.

    An op that the backend has no form for runs on the reference. overrides: backend by op, or by shape_key
    for one shape of a product or a convolution; runtime/autotune.py measures them, and folds_gate (see Ops).
    Raises RuntimeError when a requested backend cannot run here, with the reason, and ValueError for an op
    that is not there or that an override has no form for.
    """
    overrides = dict(overrides or {})
    reasons = backend_reasons(device)
    for key, backend in overrides.items():
        op = op_of(key)
        if op not in OP_NAMES or (key != op and op not in LINEAR_OPS + CONVOLUTION_OPS):
            raise ValueError(f"there is no op {key!r}; there are {', '.join(OP_NAMES)}")
        if family(backend) in reasons and not has_backend(op, backend):
            raise ValueError(f"{op} has no form for backend {backend!r}; leave it to 'reference'")
    for backend in {requested, *overrides.values()} - {"auto"}:
        reason = reasons.get(family(backend), "it is not built into this version")
        if reason:
            known = ", ".join(("auto", *(name for name, absence in reasons.items() if not absence)))
            raise RuntimeError(f"backend {backend!r} cannot run on {device}: {reason}; use one of {known}")
    choice = (default_choice(device, dtype) if requested == "auto" else _fitting(requested)) | overrides
    logger.info("ops on %s: %s", device, choice)
    return Ops(choice, folds_gate)


def default_choice(device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Backend by op that "auto" stands for on `device` in `dtype`, before anything is measured.

    On Hopper in 16 bits cuDNN attends over the window, which by estimate is a fifth faster than Triton's own
    form (docs/kernels.md); without a dtype nobody knows whether cuDNN serves it.
    """
    reasons = backend_reasons(device)
    choice = _fitting(_best_backend(device, reasons)) | {"clip_attention": "reference"}  # torch's own
    if not reasons["cublaslt"]:  # before Triton's, which nobody has timed
        choice |= {op: "cublaslt" for op in LINEAR_OPS if has_backend(op, "cublaslt")}
    if dtype in SIXTEEN_BITS and not reasons["cudnn"] and is_hopper(device):
        choice["sink_window_attention"] = "cudnn"
    return choice


def _fitting(backend: str) -> dict[str, str]:
    return {op: backend if has_backend(op, backend) else "reference" for op in OP_NAMES}


def _best_backend(device: torch.device | str, reasons: Mapping[str, str]) -> str:
    """Triton on CUDA where it is installed; on a CPU its interpreter is for tests, never a default."""
    return "triton" if torch.device(device).type == "cuda" and not reasons["triton"] else "reference"
