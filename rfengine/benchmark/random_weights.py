"""A pipeline without a checkpoint: seeded random weights made on the device, and random text states.

What a chunk costs does not depend on the values, so the figures are those of the published weights; the
frames are noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rfengine.config import Backend, EngineConfig
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.pipeline import Pipeline, tuned_ops
from rfengine.runtime.decoders import open_full_decoder

SEED = 0
BIAS_SCALE = 0.02


class GivenTextStates:
    """Stands where a text encoder stands: every prompt has the same states [1, text_len, text_dim]."""

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def encode(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.states.to(device, dtype).expand(len(prompts), -1, -1)


def random_pipeline(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, backend: Backend
) -> tuple[Pipeline, nn.Module]:
    """The models of `config` with random weights, and its decoder as a plain module; nothing is read.

    Raises ValueError for a TensorRT decoder, which is built from a checkpoint.
    """
    kind = config.runtime.vae
    if kind == "tensorrt":
        raise ValueError(
            f"vae is {kind!r} and {config.name} is a preset; give --model a checkpoint directory"
        )
    ops = tuned_ops(config, backend, dtype, device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.device("meta"):
        model = WanDiT(config.model, ops)
        vae = WanVAE(config.vae)
        plain = vae if kind == "full" else TinyVAE(config.tiny_vae, ops)
    for module in dict.fromkeys((model, vae, plain)):  # the plain decoder may be the VAE
        module.to(dtype).to_empty(device=device)
        fill(module, generator)
        module.requires_grad_(False).eval()
    pack_weights(model)
    open_decoder = (
        open_full_decoder(config, vae, backend, dtype, device) if kind == "full" else lambda _: plain
    )
    shape = (1, config.model.text_len, config.model.text_dim)
    states = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    given = GivenTextStates(states)
    return Pipeline(config, model, vae, given, f"random weights, seed {SEED}", open_decoder), plain


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Random values that keep activations near 1: matrices by their inputs, norms at 1, biases near 0."""
    for name, parameter in module.named_parameters():
        if name.endswith("modulation"):
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0, BIAS_SCALE, generator=generator)
        elif parameter.numel() == parameter.shape[0]:  # the scale of a norm
            parameter.fill_(1)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
