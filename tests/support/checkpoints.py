"""Names in the files that people have, and random tensors for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rfengine.config import TextConfig


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def original_text_names(config: TextConfig) -> list[str]:
    """Names of the text encoder in the published models_t5_umt5-xxl-enc-bf16.pth."""
    stems = ("norm1", "norm2", "pos_embedding.embedding", "ffn.gate.0", "ffn.fc1", "ffn.fc2",
             *(f"attn.{letter}" for letter in "qkvo"))  # fmt: skip
    blocks = [f"blocks.{block}.{stem}.weight" for block in range(config.num_layers) for stem in stems]
    return ["token_embedding.weight", "norm.weight", *blocks]


def diffusers_vae_names(num_res_blocks: int) -> list[str]:
    """Names that a tensor of AutoencoderKLWan may have, with four levels of num_res_blocks in the encoder."""
    layers = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "resample.1", "time_conv")
    blocks = [
        *(f"encoder.down_blocks.{index}" for index in range(4 * (num_res_blocks + 1))),
        *(f"decoder.up_blocks.{level}.upsamplers.0" for level in range(4)),
        *(
            f"decoder.up_blocks.{level}.resnets.{at}"
            for level in range(4)
            for at in range(num_res_blocks + 1)
        ),
        *(f"{half}.mid_block.resnets.{index}" for half in ("encoder", "decoder") for index in range(2)),
    ]
    ends = (
        "conv_in",
        "norm_out",
        "conv_out",
        *(f"mid_block.attentions.0.{at}" for at in ("norm", "to_qkv", "proj")),
    )
    stems = [
        "quant_conv",
        "post_quant_conv",
        *(f"{half}.{end}" for half in ("encoder", "decoder") for end in ends),
    ]
    stems += [f"{block}.{layer}" for block in blocks for layer in layers]
    return [f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias", "gamma")]
