"""The stored tensors of a model with weights in int8: rounded as they are read, one by one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.models.int8_products import SCALE_SUFFIX
from rfengine.ops.reference_int8 import channel_int8


def with_int8(
    stored: Mapping[str, StoredTensor], module: nn.Module, dtype: torch.dtype
) -> Mapping[str, StoredTensor]:
    """`stored`, with the weights that `module` has in int8 in that form, each with its scale in `dtype`.

    stored: of the whole model. A rank takes its part of what is rounded, whose scales are of whole channels
    then, as on one rank alone.
    """
    changed = dict(stored)
    for name, parameter in module.named_parameters():
        if parameter.dtype == torch.int8 and name in stored and stored[name].dtype.is_floating_point:
            changed[name], changed[f"{name}{SCALE_SUFFIX}"] = _rounded(stored[name], dtype)
    return changed


def _rounded(stored: StoredTensor, dtype: torch.dtype) -> tuple[StoredTensor, StoredTensor]:
    """The values and the scale of one weight, of all rows or of some. Whoever reads the values and then the
    scale of the same rows has them read once."""
    kept: dict[tuple[int, int], Tensor] = {}

    def rounded(start: int, stop: int) -> tuple[Tensor, Tensor]:
        is_whole = (start, stop) == (0, stored.shape[0])
        return channel_int8((stored if is_whole else stored.part(0, start, stop)).read(), dtype)

    def values(start: int = 0, stop: int = stored.shape[0]) -> Tensor:
        found, scale = rounded(start, stop)
        kept.clear()
        kept[start, stop] = scale
        return found

    def scale(start: int = 0, stop: int = stored.shape[0]) -> Tensor:
        return kept.pop((start, stop)) if (start, stop) in kept else rounded(start, stop)[1]

    return (
        StoredTensor(stored.shape, torch.int8, values, values),
        StoredTensor(stored.shape[:1], dtype, scale, scale),
    )
