"""A small diffusion forcing model, and the same model in Diffusers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfengine.checkpoint.layouts import diffusers_transformer_from_wan
from rfengine.config import EngineConfig, WanConfig
from rfengine.diffusion_forcing.pipeline import DiffusionForcingPipeline
from rfengine.diffusion_forcing_config import DiffusionForcingConfig
from rfengine.models.dit import WanDiT
from support.models import SMALL, SMALL_VAE, small_config, small_model, vae_and_text_encoder

if TYPE_CHECKING:
    from diffusers import SkyReelsV2Transformer3DModel

FORCING = dataclasses.replace(SMALL, fps_embedding=True)
BASE_FRAMES = 21  # six latent frames


def forcing_config() -> EngineConfig:
    """Videos of 32 x 48 pixels, six latent frames at once, four steps."""
    plain = small_config()
    return dataclasses.replace(
        plain, name="small-df", model=dataclasses.replace(plain.model, fps_embedding=True), fps=24,
        diffusion_forcing=DiffusionForcingConfig(base_frames=BASE_FRAMES, steps=4, negative_prompt="ugly"),
    )  # fmt: skip


def forcing_model(config: WanConfig = FORCING, seed: int = 0) -> WanDiT:
    """small_model with a flow near the size of the latents, as a trained one has."""
    model = small_model(config, seed)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(0.3)
    return model


def forcing_pipeline() -> DiffusionForcingPipeline:
    config = forcing_config()
    vae, encoder = vae_and_text_encoder(config, 0)
    return DiffusionForcingPipeline(config, forcing_model(config.model), vae, encoder, lambda grid: vae)


def diffusers_transformer(model: WanDiT, block_frames: int = 1) -> SkyReelsV2Transformer3DModel:
    """The model in Diffusers, where a block of more than one frame is a block-causal mask."""
    from diffusers import SkyReelsV2Transformer3DModel

    config = model.config
    other = SkyReelsV2Transformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
        inject_sample_info=config.fps_embedding, num_frame_per_block=block_frames,
    ).eval()  # fmt: skip
    other.load_state_dict(
        {diffusers_transformer_from_wan(name): value for name, value in model.state_dict().items()}
    )
    return other


def diffusers_parts(model: WanDiT, shift: float) -> dict[str, Any]:
    """What a SkyReels pipeline of Diffusers is made of, with a VAE of random weights.

    Its scheduler is given a copy of each sample: it keeps the first one until its next step, and the pipeline
    gives it a view of latents that it overwrites in between.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    class OwnSamples(UniPCMultistepScheduler):
        def step(self, flow: Tensor, timestep: Tensor, sample: Tensor, **options: bool) -> tuple[Tensor]:
            return super().step(flow, timestep, sample.clone(), **options)

    vae = AutoencoderKLWan(
        base_dim=SMALL_VAE.base_dim, z_dim=SMALL_VAE.z_dim, dim_mult=list(SMALL_VAE.dim_mult),
        num_res_blocks=SMALL_VAE.num_res_blocks, latents_mean=list(SMALL_VAE.latents_mean),
        latents_std=list(SMALL_VAE.latents_std),
    ).eval()  # fmt: skip
    scheduler = OwnSamples(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    transformer = diffusers_transformer(model)
    return {
        "tokenizer": None, "text_encoder": None, "transformer": transformer, "vae": vae,
        "scheduler": scheduler,
    }  # fmt: skip
