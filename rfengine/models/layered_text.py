"""A UMT5 encoder whose weights are in host memory: its layers come to the device as a prompt reaches them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfengine.models.block_offload import BlockOffload

LAYERS_ON_DEVICE = 2


class LayersOnDemand(nn.ModuleList):
    """Layers whose weights are in host memory. Who iterates over them gets each on `device`, until the next
    one; after the last the device has none of them."""

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        super().__init__(layers)
        self._offload = BlockOffload(list(layers), device, LAYERS_ON_DEVICE)

    def __iter__(self) -> Iterator[nn.Module]:
        try:
            for number in range(len(self)):
                yield self._offload.block(number)
        finally:
            self._offload.release()


class HostEmbedding(nn.Module):
    """Rows of a table in host memory, on the device of the ids."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.cpu(), self.weight).to(ids.device)


def bring_by_layers(model: nn.Module, device: torch.device) -> nn.Module:
    """Let a UMT5EncoderModel in host memory compute on `device`, in place."""
    encoder = model.encoder
    encoder.embed_tokens = HostEmbedding(encoder.embed_tokens)
    encoder.block = LayersOnDemand(encoder.block, device)
    encoder.final_layer_norm.to(device)
    return model
