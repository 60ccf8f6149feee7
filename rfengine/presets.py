"""The configurations that come with the engine, by name."""

from __future__ import annotations

from dataclasses import replace

from rfengine.config import (
    DiffusionForcingConfig,
    EngineConfig,
    ScheduleConfig,
    TextConfig,
    TinyVAEConfig,
    VAEConfig,
    WanConfig,
)

_WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_TINY_Z_DIM = 8

PRESETS: dict[str, EngineConfig] = {
    "tiny": EngineConfig(
        name="tiny",
        model=WanConfig(
            dim=192, ffn_dim=768, num_heads=3, num_layers=4, text_dim=96, text_len=144, in_dim=_TINY_Z_DIM,
            out_dim=_TINY_Z_DIM,
        ),
        vae=VAEConfig(
            base_dim=8, z_dim=_TINY_Z_DIM, dim_mult=(1, 2, 4, 8), num_res_blocks=1,
            latents_mean=(0.0,) * _TINY_Z_DIM, latents_std=(1.0,) * _TINY_Z_DIM,
        ),
        tiny_vae=TinyVAEConfig(z_dim=_TINY_Z_DIM, widths=(32, 24, 16, 16)),
        text=TextConfig(
            vocab_size=259, dim=96, attention_dim=96, ffn_dim=256, num_heads=3, num_layers=3,
            tokenizer="bytes",
        ),
        # low after the first step, from whose noise the model reads where a video begins
        schedule=ScheduleConfig(shift=1.0, denoising_steps=(1000, 500, 300, 150)), height=64, width=64,
    ),
    "wan-1.3b": EngineConfig(name="wan-1.3b", model=_WAN_1_3B),
    "wan-14b": EngineConfig(name="wan-14b", model=_WAN_14B),
    "skyreels-df-1.3b": EngineConfig(
        name="skyreels-df-1.3b", model=replace(_WAN_1_3B, fps_embedding=True), height=544, width=960, fps=24,
        diffusion_forcing=DiffusionForcingConfig(),
    ),
}  # fmt: skip
