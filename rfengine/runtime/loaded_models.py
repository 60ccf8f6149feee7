"""The models of a checkpoint in memory, as every kind of pipeline loads them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import DTypeName, EngineConfig, RuntimeConfig
from rfengine.models.dit import WanDiT
from rfengine.models.fp8_products import quantise
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops
from rfengine.runtime.decoders import OpenDecoder, opener, require_decoder
from rfengine.runtime.loaded_transformer import load_transformer
from rfengine.runtime.model_precision import require_precision
from rfengine.runtime.options import decode_device, model_dtype, present_device
from rfengine.runtime.ranks import FirstRankText, NoFrames
from rfengine.tensor_parallel import WHOLE, TensorParallel

if TYPE_CHECKING:
    from rfengine.models.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the models of a pipeline are: the transformer on `device`, the VAE on `decoding`. dtype: of the
    transformer and the text encoder."""

    device: torch.device
    decoding: torch.device
    text_device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        runtime: RuntimeConfig,
        device: str | torch.device | None,
        dtype: DTypeName | torch.dtype | None,
        text_device: str | torch.device | None,
    ) -> Placement:
        """What a pipeline is asked for, with the defaults of present_device and model_dtype; the text encoder
        is on `device` where nothing else is said. No weights are needed.

        Raises ValueError for a dtype that is none, RuntimeError for a device that is absent or on which the
        decoder or the precision in `runtime` cannot run.
        """
        target = present_device(device)
        decoding = present_device(decode_device(runtime, target))
        require_decoder(runtime, decoding)
        require_precision(runtime, target)
        return cls(target, decoding, torch.device(text_device or target), model_dtype(runtime, dtype, target))


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
    place: Placement,
    text_cache: str | Path | None = None,
    left_out: Collection[str] = (),
    parallel: TensorParallel = WHOLE,
) -> LoadedModels:
    """Read the weights of `checkpoint`, which can take minutes. config: the checkpoint's, its settings
    perhaps replaced. ops: of the transformer. left_out: products that stay out of FP8.

    text_cache: as Checkpoint.text_encoder takes it. parallel: the rank whose part of the transformer is read;
    the first one alone has the text encoder and decodes. Raises as Checkpoint.load and opener do.
    """
    dtype, device = place.dtype, place.device
    transformer = load_transformer(checkpoint, config, ops, dtype, device, parallel)
    if config.runtime.multiplies_fp8:
        quantise(transformer, left_out)
    vae = checkpoint.load(lambda: WanVAE(config.vae), "vae", torch.float32, place.decoding).eval()
    open_decoder = opener(checkpoint, config, vae, dtype, place.decoding)
    encoder = None
    if parallel.rank == 0:
        encoder = checkpoint.text_encoder(place.text_device, dtype, text_cache, config.runtime)
    if parallel.divides:
        encoder = FirstRankText(encoder, parallel, (config.model.text_len, config.model.text_dim), device)
    return LoadedModels(transformer, vae, encoder, NoFrames if parallel.rank else open_decoder)
