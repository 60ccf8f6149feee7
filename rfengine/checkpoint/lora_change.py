"""What a LoRA does to one tensor, and the tensor with the changes of several, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rfengine.checkpoint.tensor_file import StoredTensor


@dataclass(frozen=True, slots=True)
class LoraChange:
    """What one LoRA does to one tensor W of the transformer, at scale s.

    W + s * (factor * up @ down + factor * bias + difference), each where it is there. whole takes the place
    of W; it has no scale.
    """

    factor: float = 1.0  # alpha / rank, or alpha / sqrt(rank)
    down: StoredTensor | None = None  # [rank, in]
    up: StoredTensor | None = None  # [out, rank]
    bias: StoredTensor | None = None  # [out], of `up`
    difference: StoredTensor | None = None
    whole: StoredTensor | None = None

    def tensors(self) -> dict[str, StoredTensor]:
        """Those that are there, by field."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, StoredTensor)}

    def in_memory(self) -> LoraChange:
        """The same with every tensor read, once, and kept in its dtype."""
        kept = {name: stored.read().clone().contiguous() for name, stored in self.tensors().items()}
        return replace(self, **{name: StoredTensor.of(tensor) for name, tensor in kept.items()})

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors().values())


def merged(weight: Tensor, changes: Sequence[tuple[float, LoraChange]]) -> Tensor:
    """`weight` with the changes at their scales, added up in float32 in the order given; float32, on its
    device. At most one of them has a whole tensor."""

    def values(stored: StoredTensor) -> Tensor:
        return stored.read().to(weight.device).float()

    whole = next((change.whole for _, change in changes if change.whole is not None), None)
    value = weight.float() if whole is None else values(whole)
    for scale, change in changes:
        factor = scale * change.factor
        if change.down is not None and change.up is not None:
            value = merge_lora(value, values(change.down), values(change.up), factor)
        if change.bias is not None:
            value = value + factor * values(change.bias)
        if change.difference is not None:
            value = value + scale * values(change.difference)
    return value


def add_changes(
    tensors: dict[str, StoredTensor], changes: Mapping[str, Sequence[tuple[float, LoraChange]]]
) -> None:
    """Replace the changed tensors in `tensors` by merged ones, which are computed when they are read."""

    def read(weight: StoredTensor, parts: Sequence[tuple[float, LoraChange]]) -> Tensor:
        return merged(weight.read(), parts)

    for name, parts in changes.items():
        weight = tensors[name]
        tensors[name] = StoredTensor(weight.shape, torch.float32, partial(read, weight, parts))


def merge_lora(weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """weight + scale * up @ down in float32, whatever the dtypes given.

    weight: [out, in]; down: [rank, in]; up: [out, rank]. Those of a convolution have more axes, which are
    flattened behind the first. On CUDA the product is in TF32 where the caller has allowed that.
    """
    with torch.autocast(weight.device.type, enabled=False):  # a caller's would round to 16 bits
        flat, inner, outer = (tensor.float().flatten(1) for tensor in (weight, down, up))
        return torch.addmm(flat, outer, inner, alpha=scale).reshape(weight.shape)
