"""LoRA files of random values, in the forms that people have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.layouts import diffusers_transformer_from_wan
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.config import WanConfig

RANK, ALPHA = 2, 4.0
# every kind of linear layer: attention, feed-forward part, time and text embeddings, head
LAYERS = (
    "blocks.0.self_attn.q", "blocks.0.self_attn.v", "blocks.1.self_attn.k", "blocks.0.cross_attn.k",
    "blocks.1.cross_attn.v", "blocks.1.ffn.0", "blocks.0.ffn.2", "time_embedding.0", "time_projection.1",
    "text_embedding.2", "head.head",
)  # fmt: skip


def pairs(
    config: WanConfig, layers: Sequence[str] = LAYERS, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Down [RANK, in] and up [out, RANK] of each layer, large enough to change the frames of a stream."""
    shapes, generator = expected_shapes(config), torch.Generator().manual_seed(100 + seed)

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    found = {}
    for layer in layers:
        outputs, inputs = shapes[f"{layer}.weight"][:2]
        found[layer] = (drawn(RANK, inputs), drawn(outputs, RANK))
    return found


def _named(
    layers: Mapping[str, tuple[Tensor, Tensor]], name: Callable[[str], str], down: str, up: str
) -> dict[str, Tensor]:
    tensors = {}
    for layer, values in layers.items():
        for leaf, value in zip((down, up), values, strict=True):
            tensors[f"{name(layer)}.{leaf}"] = value
    return tensors


def _alphas(layers: Mapping[str, object], name: Callable[[str], str]) -> dict[str, Tensor]:
    return {f"{name(layer)}.alpha": torch.tensor(ALPHA) for layer in layers}


def write_lora(path: Path, layers: Mapping[str, tuple[Tensor, Tensor]], form: str = "kohya") -> Path:
    """One file or directory of the form, with ALPHA stated as that form does; returns what to give as the
    path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if form in ("kohya", "fun"):
        prefix = "lora_unet_" if form == "kohya" else "lora_unet__"

        def name(layer: str) -> str:
            return prefix + layer.replace(".", "_")

        tensors = _named(layers, name, "lora_down.weight", "lora_up.weight") | _alphas(layers, name)
        save_weights(path, tensors, {"ss_network_module": "networks.lora_wan"})
    elif form == "comfyui":

        def name(layer: str) -> str:
            return f"diffusion_model.{layer}"

        save_weights(path, _named(layers, name, "lora_A.weight", "lora_B.weight") | _alphas(layers, name))
    elif form == "diffusers":

        def name(layer: str) -> str:
            return f"transformer.{diffusers_transformer_from_wan(f'{layer}.weight').removesuffix('.weight')}"

        stated = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
        tensors = _named(layers, name, "lora_A.weight", "lora_B.weight")
        save_weights(path, tensors, {"lora_adapter_metadata": json.dumps(stated)})
    else:
        path.mkdir()
        write_peft(path, layers, {"r": RANK, "lora_alpha": ALPHA})
    return path


def write_peft(folder: Path, layers: Mapping[str, tuple[Tensor, Tensor]], options: dict[str, object]) -> None:
    """adapter_model.safetensors and adapter_config.json with the options."""
    tensors = _named(layers, lambda layer: f"base_model.model.{layer}", "lora_A.weight", "lora_B.weight")
    save_weights(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "bias": "none", **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
