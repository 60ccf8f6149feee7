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
    """`stored`, with the weights that `module` has in int8 in that form, each with its scale in `dtype`."""
    changed = dict(stored)
    for name, parameter in module.named_parameters():
        if parameter.dtype == torch.int8 and name in stored and stored[name].dtype.is_floating_point:
            changed[name], changed[f"{name}{SCALE_SUFFIX}"] = _rounded(stored[name], dtype)
    return changed


def _rounded(stored: StoredTensor, dtype: torch.dtype) -> tuple[StoredTensor, StoredTensor]:
    """The values and the scale of one weight. Whoever reads the values and then the scale has it read
    once."""
    kept: list[Tensor] = []

    def values() -> Tensor:
        rounded, scale = channel_int8(stored.read(), dtype)
        kept[:] = [scale]
        return rounded

    def scale() -> Tensor:
        return kept.pop() if kept else channel_int8(stored.read(), dtype)[1]

    return (
        StoredTensor(stored.shape, torch.int8, values), StoredTensor(stored.shape[:1], dtype, scale)
    )  # fmt: skip
