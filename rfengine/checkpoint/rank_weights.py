"""The part of a transformer's weights that one rank holds."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.tensor_parallel import TensorParallel

_MAKES_HEADS = re.compile(r"blocks\.\d+\.(?:(?:self|cross)_attn\.(?:[qkv]\.|norm_[qk]\.)|ffn\.0\.)")
_READS_HEADS = re.compile(r"blocks\.\d+\.(?:(?:self|cross)_attn\.o|ffn\.2)\.(weight|bias)")


def rank_part(name: str, stored: StoredTensor, parallel: TensorParallel) -> StoredTensor:
    """What a rank holds of the tensor `name` of a transformer; nothing is read.

    The results of o and ffn.2 are added up over the ranks, so the first one alone has their biases and the
    others zeros.
    """
    if not parallel.divides:
        return stored
    if _MAKES_HEADS.match(name):
        return stored.part(0, *parallel.span(stored.shape[0]))
    if not (reads := _READS_HEADS.fullmatch(name)):
        return stored
    if reads[1] == "weight":
        return stored.part(1, *parallel.span(stored.shape[1]))
    if parallel.rank == 0:
        return stored
    # read all the same: random weights are drawn in the order in which they are read
    return StoredTensor(stored.shape, stored.dtype, lambda: torch.zeros_like(stored.read(), device="cpu"))


def rank_parts(stored: Mapping[str, StoredTensor], parallel: TensorParallel) -> dict[str, StoredTensor]:
    """rank_part of every tensor."""
    return {name: rank_part(name, each, parallel) for name, each in stored.items()}


def rank_values(name: str, whole: Tensor, parallel: TensorParallel) -> Tensor:
    """rank_part of a tensor in memory, on its device; a copy where it is divided."""
    part = rank_part(name, StoredTensor(tuple(whole.shape), whole.dtype, lambda: whole), parallel)
    return part.read().to(whole.device)


def whole_with(name: str, own: Tensor, shape: tuple[int, ...], parallel: TensorParallel) -> Tensor:
    """A tensor of the whole `shape` with what this rank holds in its place, and zeros elsewhere."""
    whole = own.new_zeros(shape)
    if _MAKES_HEADS.match(name):
        whole[slice(*parallel.span(shape[0]))] = own
    elif (reads := _READS_HEADS.fullmatch(name)) and reads[1] == "weight":
        whole[:, slice(*parallel.span(shape[1]))] = own
    else:
        whole.copy_(own)
    return whole
