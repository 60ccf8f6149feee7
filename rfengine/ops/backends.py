"""Backends: which can run on a device and why another cannot, and the function that runs an op on one."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rfengine.ops import native, reference

# File in kernels/ of every op that has a Triton form; an op that is not here runs on the reference.
_TRITON_FILES = {
    "adaptive_layer_norm": "adaptive_layer_norm",
    "affine_layer_norm": "affine_layer_norm",
    "gated_residual_adaptive_norm": "gated_residual_norm",
    "gated_residual_affine_norm": "gated_residual_norm",
    "rms_norm": "rms_norm",
    "qk_norm_rope": "qk_norm_rope",
    "qk_norm_rope_write": "qk_norm_rope",
    "sink_window_attention": "sink_window_attention",
    "clip_attention": "sink_window_attention",
    "rephase_keys": "rephase_keys",
    "ema_evict": "ema_evict",
    "evict_and_rephase": "evict_and_rephase",
    "flow_step": "flow_step",
    "frame_pack": "frame_pack",
    "frame_pack_nv12": "frame_pack",
    "linear": "linear",
    "linear_gelu": "linear",
    "gated_linear": "linear",
    "channel_norm_silu": "channel_norm_silu",
    "causal_conv3d": "causal_conv3d",
    "causal_conv3d_fp8": "causal_conv3d",
    "phase_conv": "phase_conv",
    "frame_attention": "frame_attention",
    "conv_frame_pack": "conv_frame_pack",
    "conv_frame_pack_nv12": "conv_frame_pack",
}
# forms of Triton's window attention besides the one it takes by itself: backends "triton-descriptor", ...
_ATTENTION_FORMS = ("descriptor", "pointer")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_NATIVE_OPS = ("evict_and_rephase",)
_ATTENTION_OPS = ("sink_window_attention", "clip_attention")
_CUBLASLT_OPS = ("linear", "linear_gelu")
_CONVOLUTION_OPS = ("causal_conv3d", "phase_conv")


def backend_reasons(device: torch.device | str) -> dict[str, str]:
    """Every backend by name, with the reason why it cannot run on `device`, or "" where it can."""
    on_cuda = torch.device(device).type == "cuda"
    needs_cuda = "" if on_cuda else f"it needs a CUDA device and this one is {torch.device(device).type}"
    return {
        "reference": "",
        "triton": _triton_absence(on_cuda),
        "native": native.absence(device),
        "cudnn": needs_cuda or _cudnn_absence(),
        "flash": needs_cuda or _flash_absence(),
        "cublaslt": needs_cuda,
    }


def is_hopper(device: torch.device | str) -> bool:
    """Whether `device` is a GPU of compute capability 9."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def family(backend: str) -> str:
    """The backend that this is a form of: "triton" for "triton-pointer"; any other is its own."""
    return backend.partition("-")[0]


def has_backend(op: str, backend: str) -> bool:
    """Whether `op` has a form for `backend`."""
    name, _, form = backend.partition("-")
    if form:
        return op == "sink_window_attention" and name == "triton" and form in _ATTENTION_FORMS
    if backend == "triton":
        return op in _TRITON_FILES
    if backend == "native":
        return op in _NATIVE_OPS
    if backend == "cublaslt":
        return op in _CUBLASLT_OPS
    if backend == "cudnn" and op in _CONVOLUTION_OPS:
        return True
    return backend == "reference" or op in _ATTENTION_OPS


def implementation(op: str, backend: str) -> Callable:
    """The function that runs `op` on `backend`, with the signature of the op in reference.py."""
    if backend == "reference":
        return getattr(reference, op)
    if backend == "native":
        return getattr(native, op)
    if backend == "cublaslt":
        return _cublaslt_linear if op == "linear" else _cublaslt_linear_gelu
    if backend == "cudnn" and op in _CONVOLUTION_OPS:
        return _cudnn_causal_conv3d if op == "causal_conv3d" else reference.join_phases
    if backend in ("cudnn", "flash"):
        return _library_attention(op, _cudnn_attention if backend == "cudnn" else _flash_attention)
    form = backend.partition("-")[2] or None
    module = importlib.import_module(f"rfengine.kernels.{_TRITON_FILES[op]}")
    if op == "clip_attention":
        return _triton_clip_attention(module.sink_window_attention, module.HEAD_DIMS)
    kernel = getattr(module, op)
    if op != "sink_window_attention":
        return kernel

    def window_attention(
        q: Tensor, keys: Tensor, values: Tensor, kv_len: int, filled_tokens: Tensor
    ) -> Tensor:
        return kernel(q, keys, values, filled_tokens, form)

    return window_attention


def _triton_clip_attention(attend: Callable[..., Tensor], head_dims: Sequence[int]) -> Callable:
    """The attention of the window over a whole clip: all its keys are filled. With a mask, or a head the
    kernel is not made for, the reference."""

    def clip_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None or q.shape[-1] not in head_dims:
            return reference.clip_attention(q, k, v, mask)
        return attend(q, k, v, torch.full((1,), k.shape[1], dtype=torch.int32, device=q.device))

    return clip_attention


def _triton_absence(on_cuda: bool) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install rfengine[triton]"
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 for Triton's slow interpreter on a CPU"
    return "" if on_cuda else _interpreter_absence()


def _interpreter_absence() -> str:
    """Triton 3.6 makes numbers of arrays of one element, which numpy 2.4 refuses; 3.7.0 runs with it."""
    try:
        triton, numpy = (importlib.metadata.version(package) for package in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:  # a build of Triton under another name
        return ""
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return ""
    return f"the interpreter of Triton {triton} fails with numpy {numpy}: pip install 'numpy<2.4'"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _cudnn_absence() -> str:
    return "" if torch.backends.cudnn.is_available() else "this torch was built without cuDNN"


def _flash_absence() -> str:
    present = importlib.util.find_spec("flash_attn") is not None
    return "" if present else "flash-attn is not installed: pip install rfengine[flash]"


def _library_attention(
    op: str, attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
) -> Callable:
    """The op on a library's attention, which takes q, k, v [B, T, H, E] and a mask or None."""
    if op == "clip_attention":
        return attend

    def window_attention(
        q: Tensor, keys: Tensor, values: Tensor, kv_len: int, filled_tokens: Tensor
    ) -> Tensor:
        return attend(q, keys[:, :kv_len], values[:, :kv_len], None)

    return window_attention


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return reference.clip_attention(q, k, v, mask)


def _cudnn_causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The op on torch's convolution of channels-last views, in the dtype of its inputs."""
    result = reference.convolve_frames(x, weight, bias)
    return result if out is None else out.copy_(result)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return reference.clip_attention(q, k, v, mask)
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _cublaslt_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])


def _cublaslt_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU in the epilogue of the product, rounded once after it. torch has no gradient of that."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias)):
        return reference.linear_gelu(x, weight, bias)
    product = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return product.unflatten(0, x.shape[:-1])
