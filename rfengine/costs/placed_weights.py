"""Bytes of the weights of transformer and text encoder where a RuntimeConfig has them: on the device, and in
host memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rfengine.checkpoint.shapes import expected_shapes
from rfengine.config import EngineConfig
from rfengine.models.block_offload import offloaded_bytes
from rfengine.models.dit import WanDiT
from rfengine.models.int8_products import transformer_in_int8
from rfengine.models.layered_text import LAYERS_ON_DEVICE

BLOCK_STAYS = ("modulation",)  # of a block whose weights are in host memory: all of them are read at once
_LAYER = "encoder.block.{}."


@dataclass(frozen=True, slots=True)
class PlacedBytes:
    """device: of the weights that are there at once; working: the part of them that is memory of working
    blocks. host: of those that are in host memory for good; pinned: the part of them that a GPU copies from,
    in blocks of one size."""

    device: int
    host: int = 0
    working: int = 0
    pinned: int = 0


def transformer_weights(config: EngineConfig, dtype: torch.dtype) -> PlacedBytes:
    """Of the transformer with its products in int8 and its blocks in host memory, where config.runtime says
    so; without FP8 copies. Nothing is allocated."""
    runtime = config.runtime
    with torch.device("meta"):
        model = WanDiT(config.model).to(dtype)
        if runtime.block_weights == "int8":
            model = transformer_in_int8(model)
    total = sum(parameter.nbytes for parameter in model.parameters())
    if not runtime.block_buffers:
        return PlacedBytes(total)
    moved = sum(
        parameter.nbytes
        for block in model.blocks
        for name, parameter in block.named_parameters()
        if name not in BLOCK_STAYS
    )
    block, count = offloaded_bytes(model.blocks[0], BLOCK_STAYS), len(model.blocks)
    working = min(runtime.block_buffers, count) * block
    return PlacedBytes(total - moved + working, count * block, working, count * block)


def text_encoder_weights(config: EngineConfig, dtype: torch.dtype) -> PlacedBytes:
    """Of the text encoder, with its products in int8 and its layers in host memory, where config.runtime says
    so. device: while it encodes."""
    runtime, text = config.runtime, config.text
    is_int8 = runtime.text_weights == "int8"
    sizes = {name: _bytes_of(name, shape, dtype, is_int8) for name, shape in expected_shapes(text).items()}
    total = sum(sizes.values())
    if runtime.text_encoder != "layers":
        return PlacedBytes(total)
    layer = sum(size for name, size in sizes.items() if name.startswith(_LAYER.format(0)))
    on_device = min(LAYERS_ON_DEVICE, text.num_layers) * layer + text.dim * dtype.itemsize  # the last norm
    return PlacedBytes(on_device, total - text.dim * dtype.itemsize, pinned=text.num_layers * layer)


def _bytes_of(name: str, shape: tuple[int, ...], dtype: torch.dtype, is_int8: bool) -> int:
    """Of one tensor of the text encoder; a product's has two axes, and so have the tables, which stay."""
    is_product = len(shape) == 2 and name.startswith("encoder.block.") and "relative_attention" not in name
    if is_product and is_int8:
        return math.prod(shape) + shape[0] * dtype.itemsize
    widened = dtype == torch.float16 and name.endswith(".wo.weight")
    return math.prod(shape) * (torch.float32.itemsize if widened else dtype.itemsize)
