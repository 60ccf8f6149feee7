"""What a training reads from checkpoint directories, and the directory it leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.manifest import MANIFEST_FILE, write_manifest
from rfengine.config import EngineConfig, WanConfig
from rfengine.files import new_directory
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
    return Checkpoint.open(source).load(lambda: WanDiT(config, ops), "transformer", dtype, device)


def load_vae(base: str, engine: EngineConfig, device: torch.device) -> WanVAE:
    """The frozen VAE: bfloat16 on CUDA, as in inference, else float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = Checkpoint.open(base).load(lambda: WanVAE(engine.vae), "vae", dtype, device)
    return vae.eval().requires_grad_(False)


def text_states_of(base: str, engine: EngineConfig, device: torch.device) -> Encode:
    """Texts to states [N, L, D] on the CPU, by the text encoder of `base`; the last ones are kept.

    Raises ValueError where `base` has no text encoder or no tokenizer.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = replace(Checkpoint.open(base), config=engine).text_encoder(device, dtype)
    limit = max(1, _KEPT_STATES // (engine.model.text_len * engine.model.text_dim))

    @lru_cache(maxsize=limit)
    def states(text: str) -> Tensor:
        return encoder.encode([text], "cpu", torch.float32)[0]

    return lambda texts: torch.stack([states(text) for text in texts])


def base_engine(base: str = "tiny") -> EngineConfig:
    """The configuration of a checkpoint directory, with the statistics of its latents."""
    return Checkpoint.open(base).config


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
