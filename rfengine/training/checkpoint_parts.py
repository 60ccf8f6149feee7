"""What a training reads from checkpoint directories, and the directory it leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.destination import new_directory
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import load_part, read_config, save_weights, write_config
from rfengine.checkpoint.manifest import MANIFEST_FILE, write_manifest
from rfengine.checkpoint.text_encoder import open_text_encoder
from rfengine.config import EngineConfig, WanConfig
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops

Encode = Callable[[list[str]], Tensor]  # texts to states [N, L, D]
_KEPT_STATES = 1 << 28  # numbers of text states that stay in memory


def load_transformer(
    source: str, config: WanConfig, ops: Ops, device: torch.device, dtype: torch.dtype = torch.float32
) -> WanDiT:
    """A transformer from a checkpoint directory, or with fresh weights where source is ""."""
    if not source:
        with torch.device(device):
            return WanDiT(config, ops).to(dtype)
    with torch.device("meta"):
        model = WanDiT(config, ops)
    load_part(model, checkpoint_directory(source), "transformer", dtype, device)
    return model


def load_vae(base: str, engine: EngineConfig, device: torch.device) -> WanVAE:
    """The frozen VAE: bfloat16 on CUDA, as in inference, else float32."""
    with torch.device("meta"):
        vae = WanVAE(engine.vae)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    load_part(vae, checkpoint_directory(base), "vae", dtype, device)
    return vae.eval().requires_grad_(False)


def text_states_of(base: str, engine: EngineConfig, device: torch.device) -> Encode:
    """Texts to states [N, L, D] on the CPU, by the text encoder of `base`; the last ones are kept.

    Raises ValueError where `base` has no text encoder or no tokenizer.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = open_text_encoder(checkpoint_directory(base), engine, device, dtype)
    limit = max(1, _KEPT_STATES // (engine.model.text_len * engine.model.text_dim))

    @lru_cache(maxsize=limit)
    def states(text: str) -> Tensor:
        return encoder.encode([text], "cpu", torch.float32)[0]

    return lambda texts: torch.stack([states(text) for text in texts])


def base_engine(base: str = "tiny") -> EngineConfig:
    """The configuration of a checkpoint directory, with the statistics of its latents."""
    return read_config(checkpoint_directory(base))


def export_checkpoint(
    weights: Mapping[str, Tensor], engine: EngineConfig, base: str, destination: Path
) -> None:
    """Write a directory that Pipeline and load_transformer read: `weights` in float16 as the transformer, and
    the VAE, the text encoder and the tokenizer of `base`, with a manifest of all.

    It is whole or not there: what `destination` held stays until the new one is. RuntimeError when it cannot
    be written.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().half().contiguous() for name, value in weights.items()}
    with new_directory(destination) as directory:
        for path in checkpoint_directory(base).iterdir():
            if path.is_file() and path.name != MANIFEST_FILE and not path.name.startswith("transformer"):
                shutil.copyfile(path, directory / path.name)
            elif path.is_dir() and path.name == "tokenizer":
                shutil.copytree(path, directory / path.name)
        write_config(directory, engine)
        save_weights(directory / "transformer.safetensors", halves)
        write_manifest(directory)
