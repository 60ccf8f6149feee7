"""Weights of eight and fewer bits: scaled FP8 is multiplied back, every other form is refused by its name.

The names are those of ComfyUI (scale_weight and the flag scaled_fp8; weight_scale and comfy_quant of its
QUANTIZATION.md), of DeepSeek (weight_scale_inv), and of the packages that the errors name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.files import strict_json

METADATA_KEY = "_quantization_metadata"  # in the header of a safetensors file
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_FP8_SETTINGS = frozenset({"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"})
_SCALES = re.compile(r"(.+\.)(?:scale_weight|weight_scale|weight_scale_inv)")
_INPUT_SCALES = re.compile(r"(.+\.)(?:scale_input|input_scale)")
_LAYER_FORMAT = re.compile(r"(.+\.)comfy_quant")
_FLAG = re.compile(r"(?:.+\.)?scaled_fp8")
_MOST_FORMAT_BYTES = 1 << 16

# What a name of another form has in it, and whose it is.
_FORMS = (
    (r"\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$", "bitsandbytes (NF4 or FP4)"),
    (r"\.(?:SCB|weight_format)$", "bitsandbytes (int8)"),
    (r"\.(?:wscales|wtscale|wcscales|smooth_factor|smooth_factor_orig|proj_down|proj_up)$", "SVDQuant"),
    (r"\.(?:qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.weight_scale_2$", "NVFP4"),
    (r"\.weight_scalar$", "hybrid MXFP8"),
    (r"\.pre_quant_scale$", "AWQ (pre_quant_scale)"),
    (r"\.weight\._(?:data|scale|shift)$|\.(?:output_scale)$", "optimum-quanto"),
    (r"\.(?:weight_qdata|_weight_qdata|tensor_impl|int_data|weight\.tensor_impl.*)$", "torchao"),
    (r"\.(?:W_q|W_q_stream)$", "HQQ"),
)  # fmt: skip


def dequantized(tensors: Mapping[str, StoredTensor], label: str) -> dict[str, StoredTensor]:
    """`tensors` with every scaled FP8 weight multiplied by its scale, in float32, when it is read.

    FP8 without a scale stays as it is. The scales of activations, which weights alone do not need, and the
    flags are left out. label: the file, for errors. Raises ValueError for any other quantized form and for
    integers, by their names, and for a scale that does not belong to its weight.
    """
    _refuse_other_forms(tensors, label)
    kept = dict(tensors)
    for name, stored in tensors.items():
        if _FLAG.fullmatch(name):
            del kept[name]
        elif match := _LAYER_FORMAT.fullmatch(name):
            del kept[name]
            _check_format(_read_format(stored, f"{label}: {name}"), f"{label}: {match[1].rstrip('.')}")
        elif match := _INPUT_SCALES.fullmatch(name):
            if f"{match[1]}weight" in tensors:
                del kept[name]
        elif (match := _SCALES.fullmatch(name)) and (weight := f"{match[1]}weight") in tensors:
            del kept[name]
            if kept[weight] is not tensors[weight]:
                raise ValueError(f"{label} has two scales for {weight}; get a file that has one")
            kept[weight] = _scaled(weight, tensors[weight], name, stored, label)
    _refuse_integers(kept, label)
    return kept


def check_metadata(metadata: Mapping[str, str], label: str) -> None:
    """Refuse what the header of a safetensors file says of layers that are not plain or scaled FP8.

    Raises ValueError with the name of the form.
    """
    if METADATA_KEY not in metadata:
        return
    try:
        layers = strict_json(metadata[METADATA_KEY])["layers"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{label} has a damaged {METADATA_KEY} in its header; get it again") from error
    for layer, settings in layers:
        _check_format(settings, f"{label}: {layer}")


def _check_format(settings: Any, label: str) -> None:
    form = settings.get("format") if isinstance(settings, dict) else None
    if form not in _FP8_FORMATS:
        raise ValueError(
            f"{label} is quantized as {form}, which is not read; use the model in 16 bits or in FP8"
        )
    others = sorted(set(map(str, settings)) - _FP8_SETTINGS)
    if others:
        raise ValueError(
            f"{label} is FP8 with {list_names(others)}, which is not read; use the model in 16 bits"
        )


def _read_format(stored: StoredTensor, label: str) -> Any:
    if stored.dtype != torch.uint8 or len(stored.shape) != 1 or stored.nbytes > _MOST_FORMAT_BYTES:
        raise ValueError(f"{label} is {stored.dtype} {stored.shape} and no text in JSON; get the file again")
    try:
        return strict_json(bytes(stored.read().tolist()).decode())
    except ValueError as error:
        raise ValueError(f"{label} is no text in JSON; get the file again") from error


def _refuse_other_forms(tensors: Mapping[str, StoredTensor], label: str) -> None:
    for pattern, form in _FORMS:
        found = [name for name in tensors if re.search(pattern, name)]
        if found:
            raise ValueError(
                f"{label} is quantized by {form} (it has {list_names(found)}), which is not read; use the "
                "model in 16 bits or in FP8"
            )


def _refuse_integers(tensors: Mapping[str, StoredTensor], label: str) -> None:
    integers = [name for name, stored in tensors.items() if not stored.dtype.is_floating_point]
    if integers:
        kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in integers}))
        raise ValueError(
            f"{label} has {kinds} where weights are floating-point: {list_names(integers)}; use the model in "
            "16 bits or in FP8"
        )


def _scaled(
    name: str, weight: StoredTensor, scale_name: str, scale: StoredTensor, label: str
) -> StoredTensor:
    if not scale.dtype.is_floating_point or scale.dtype in _FP8:
        raise ValueError(
            f"{label} has {scale_name} in {scale.dtype}, a block format that is not read; use the model in "
            "16 bits or in FP8 with one scale for a tensor"
        )
    if not weight.dtype.is_floating_point:
        return weight  # refused with the other integers, by its own dtype
    grid = _scale_grid(weight.shape, scale.shape)
    if grid is None:
        raise ValueError(
            f"{label} has {scale_name} {scale.shape} for {name} {weight.shape}, which is no scale for the "
            "tensor, for rows or for even blocks; get the file again"
        )

    def read() -> Tensor:
        factors = scale.read().float()
        if not (torch.isfinite(factors) & (factors > 0)).all():
            raise ValueError(f"{label} has scales in {scale_name} that are no positive numbers; get it again")
        return _multiplied(weight.read().float(), factors, grid)

    return StoredTensor(weight.shape, torch.float32, read)


def _scale_grid(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """How many scales are along the rows and the columns of a weight; None where they do not fit.

    Blocks are of a power of two, as every published form has them: an edge block that is cut would
    otherwise look like smaller blocks.
    """
    if math.prod(scale) == 1:
        return 1, 1
    rows, *rest = weight or (1,)
    columns = math.prod(rest)
    if scale in ((rows,), (rows, *(1,) * len(rest))):
        return rows, 1
    if len(weight) != 2 or len(scale) != 2:
        return None
    for length, count in zip(weight, scale, strict=True):
        if count < 1 or length % count or (count > 1 and (length // count) & (length // count - 1)):
            return None
    return (scale[0], scale[1]) if columns else None


def _multiplied(weight: Tensor, factors: Tensor, grid: tuple[int, int]) -> Tensor:
    """The weight times its scales, in place."""
    rows, columns = grid
    flat = weight.reshape(rows, weight.shape[0] // rows if weight.ndim else 1, columns, -1)
    flat.mul_(factors.reshape(rows, 1, columns, 1))
    return flat.reshape(weight.shape)
