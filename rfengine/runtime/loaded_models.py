"""The models of a checkpoint in memory, as every kind of pipeline loads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import EngineConfig
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops
from rfengine.runtime.decoders import OpenDecoder, opener

if TYPE_CHECKING:
    from rfengine.models.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class LoadedModels:
    """transformer and text_encoder are in the dtype that was asked for; vae has its encoder in float32 and
    its decoder in the dtype that open_decoder's decoders run in."""

    transformer: WanDiT
    vae: WanVAE
    text_encoder: TextEncoder
    open_decoder: OpenDecoder


def load_models(
    checkpoint: Checkpoint,
    config: EngineConfig,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    decoding: torch.device,
    text_device: str | torch.device | None = None,
    text_cache: str | Path | None = None,
) -> LoadedModels:
    """Read the weights of `checkpoint`, which can take minutes. config: the checkpoint's, its settings
    perhaps replaced. ops: of the transformer.

    device, decoding: of the transformer, and of the VAE. text_device: of the text encoder, else `device`;
    text_cache: as Checkpoint.text_encoder takes it. Raises as Checkpoint.load and opener do.
    """
    transformer = checkpoint.load(lambda: WanDiT(config.model, ops), "transformer", dtype, device).eval()
    if device.type == "cuda":  # on a CPU one product is no faster than three
        pack_weights(transformer)
    vae = checkpoint.load(lambda: WanVAE(config.vae), "vae", torch.float32, decoding).eval()
    encoder = checkpoint.text_encoder(torch.device(text_device or device), dtype, text_cache)
    return LoadedModels(transformer, vae, encoder, opener(checkpoint, config, vae, dtype, decoding))
