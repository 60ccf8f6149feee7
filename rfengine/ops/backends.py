"""Which backends a device supports, why the others are unavailable, and the ops that libraries run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re

import torch
from torch import Tensor

from rfengine.ops import cpu, native, reference

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FP8_CAPABILITY = (8, 9)


def backend_reasons(device: torch.device | str) -> dict[str, str]:
    """For every backend by name, why it cannot run on `device`, or "" where it can."""
    on_cuda = torch.device(device).type == "cuda"
    needs_cuda = "" if on_cuda else f"it needs a CUDA device and this one is {torch.device(device).type}"
    return {
        "reference": "",
        "triton": _triton_absence(on_cuda),
        "native": native.absence(device),
        "cudnn": needs_cuda or _cudnn_absence(),
        "flash": needs_cuda or _flash_absence(),
        "cublaslt": needs_cuda,
        "cpu": cpu.absence(device),
    }


def is_hopper(device: torch.device | str) -> bool:
    """Whether `device` is a GPU of compute capability 9."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def fp8_absence(device: torch.device) -> str:
    """Why `device` has no FP8 products, or ""; a CPU computes what they would give."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        return ""
    name = torch.cuda.get_device_name(device)
    return f"{name} has no FP8 products, which come with compute capability 8.9"


def family(backend: str) -> str:
    """The backend that this is a form of: "triton" for "triton-pointer"; any other is its own."""
    return backend.partition("-")[0]


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


def triton_window_attention(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: int, filled_tokens: Tensor, form: str | None = None
) -> Tensor:
    """form: "descriptor" or "pointer"; None leaves it to the kernel."""
    from rfengine.kernels import sink_window_attention as kernel

    return kernel.sink_window_attention(q, keys, values, filled_tokens, form)


def triton_clip_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The window's kernel over a whole clip, all of whose keys are filled. The reference runs where there is
    a mask or a head dim that the kernel is not made for."""
    from rfengine.kernels import sink_window_attention as kernel

    if mask is not None or q.shape[-1] not in kernel.HEAD_DIMS:
        return reference.clip_attention(q, k, v, mask)
    filled = torch.full((1,), k.shape[1], dtype=torch.int32, device=q.device)
    return kernel.sink_window_attention(q, k, v, filled)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return reference.clip_attention(q, k, v, mask)


def cudnn_window_attention(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: int, filled_tokens: Tensor
) -> Tensor:
    return cudnn_attention(q, keys[:, :kv_len], values[:, :kv_len], None)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """flash-attn's; the reference runs where there is a mask."""
    if mask is not None:
        return reference.clip_attention(q, k, v, mask)
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def flash_window_attention(
    q: Tensor, keys: Tensor, values: Tensor, kv_len: int, filled_tokens: Tensor
) -> Tensor:
    return flash_attention(q, keys[:, :kv_len], values[:, :kv_len], None)


def cudnn_causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """torch's convolution of channels-last views, in the dtype of its inputs."""
    result = reference.convolve_frames(x, weight, bias)
    return result if out is None else out.copy_(result)


def native_causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The kernel of csrc/; the reference runs where it does not serve the weight, the dtype or the device."""
    if native.convolution.unserved(tuple(weight.shape), x.dtype, x.device):
        return reference.causal_conv3d(x, weight, bias, out)
    return native.causal_conv3d(x, weight, bias, out)


def cublaslt_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])


def cublaslt_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU in the epilogue of the product, rounded once after it. torch has no gradient of that."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias)):
        return reference.linear_gelu(x, weight, bias)
    product = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return product.unflatten(0, x.shape[:-1])
