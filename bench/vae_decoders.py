"""Decoders that bench_vae.py holds against each other: ours, the plain one, the tiny one, and diffusers'.

All have the same weights, but the tiny one. A stream of diffusers' AutoencoderKLWan decodes latent by latent
and keeps its list of past frames from chunk to chunk, which is how the published demos stream with it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.layouts import wan_vae_from_diffusers
from rfengine.config import Backend, EngineConfig, RuntimeConfig, VAEConfig
from rfengine.grid import LatentGrid
from rfengine.models.streaming_decoder import FP8_TIER, StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops
from rfengine.pipeline import VAE_TIERS
from rfengine.runtime.decoders import FP8_CAPABILITY, decoder_ops

Decode = Callable[[Tensor], Tensor]
OURS, PLAIN, BY_LATENT = "rfengine", "plain, chunk by chunk", "plain, latent by latent"
FP8_ROW, TINY_ROW = "rfengine, FP8", "rfengine, tiny decoder"


@dataclass(frozen=True)
class Contender:
    """A way to decode. tier: the quality of its frames.

    pixels, frames: each call gives a stream from the start of a video, a function from the latents of the
    next chunk [1, z, F, h, w] to pixels [1, 3, T, H, W] or to uint8 frames [T, H, W, 3] on the device.
    """

    name: str
    tier: str
    pixels: Callable[[], Decode]
    frames: Callable[[], Decode]


@dataclass(frozen=True)
class Setting:
    """What is decoded, where, with which weights. vae: in dtype, on the device."""

    config: EngineConfig
    grid: LatentGrid
    vae: WanVAE
    weights: str
    dtype: torch.dtype
    device: torch.device
    backend: Backend

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        directory: str | None,
        grid: LatentGrid,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> Setting:
        """directory: the checkpoint; None fills the models with seeded random weights."""
        checkpoint = Checkpoint.random(config) if directory is None else Checkpoint.open(directory)
        vae = checkpoint.load(lambda: WanVAE(config.vae), "vae", dtype, device)
        weights = f"random, seed {checkpoint.seed}" if directory is None else f"those of {directory}"
        return cls(config, grid, vae.requires_grad_(False).eval(), weights, dtype, device, backend)

    def ops(self, precision: str = "default") -> Ops:
        config = replace(self.config, runtime=RuntimeConfig(vae_precision=precision))
        return decoder_ops(config, self.grid, self.backend, self.dtype, self.device)

    def state_of(self, decoder: WanVAE | StreamingDecoder | TinyVAE):
        size = self.grid.latent_height, self.grid.latent_width
        return decoder.decoder_state(1, *size, self.dtype, self.device)


def our_contenders(setting: Setting, fp8: bool) -> Iterator[Contender]:
    """The streaming decoder, in a CUDA graph where there is one, and in FP8; the plain one; the tiny one."""
    decoder = StreamingDecoder(setting.vae, setting.ops())
    yield _streams(OURS, decoder, setting)
    if setting.device.type == "cuda":
        yield replace(_streams(f"{OURS}, CUDA graph", decoder, setting), frames=_graphed(decoder, setting))
    if fp8:
        eights = StreamingDecoder(setting.vae, setting.ops("fp8"), "fp8")
        yield _streams(FP8_ROW, eights, setting, FP8_TIER)
        if setting.device.type == "cuda":
            name = f"{FP8_ROW}, CUDA graph"
            yield replace(_streams(name, eights, setting, FP8_TIER), frames=_graphed(eights, setting))
    yield _streams(PLAIN, setting.vae, setting)
    yield _by_latent(_streams(BY_LATENT, setting.vae, setting))


def has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def tiny_contender(setting: Setting, directory: str | None) -> Contender:
    """The tiny decoder, with random weights where the checkpoint has none of it."""
    config, ops = setting.config.tiny_vae, setting.ops()
    checkpoint = Checkpoint.random(setting.config) if directory is None else Checkpoint.open(directory)
    if not checkpoint.has("tiny_vae"):
        checkpoint = Checkpoint.random(setting.config)
    tiny = checkpoint.load(lambda: TinyVAE(config, ops), "tiny_vae", setting.dtype, setting.device)
    return _streams(TINY_ROW, tiny.requires_grad_(False).eval(), setting, VAE_TIERS["tiny"])


def _streams(
    name: str, decoder: WanVAE | StreamingDecoder | TinyVAE, setting: Setting, tier: str = "lossless"
) -> Contender:
    def pixels() -> Decode:
        state = setting.state_of(decoder)
        return lambda latents: decoder.decode(latents, state)

    def frames() -> Decode:
        state = setting.state_of(decoder)
        return lambda latents: decoder.decode_frames(latents, state)

    return Contender(name, tier, pixels, frames)


def _by_latent(contender: Contender) -> Contender:
    def split(open_stream: Callable[[], Decode], dim: int) -> Callable[[], Decode]:
        def opened() -> Decode:
            decode = open_stream()
            return lambda latents: torch.cat([decode(one) for one in latents.split(1, dim=2)], dim=dim)

        return opened

    return replace(contender, pixels=split(contender.pixels, 2), frames=split(contender.frames, 0))


def _graphed(decoder: StreamingDecoder, setting: Setting) -> Callable[[], Decode]:
    """Streams whose third chunk is recorded in a CUDA graph, which is replayed from then on."""

    def opened() -> Decode:
        state, seen, held = setting.state_of(decoder), [], {}

        def decode(latents: Tensor) -> Tensor:
            seen.append(None)
            if len(seen) < 3:
                return decoder.decode_frames(latents, state)
            if not held:
                held["latents"] = latents.clone()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    held["frames"] = decoder.run(held["latents"], state, packed=True)
                held["graph"] = graph
            held["latents"].copy_(latents)
            held["graph"].replay()
            return held["frames"]

        return decode

    return opened


def diffusers_absence() -> str:
    """Why diffusers' decoder cannot be measured here, or ""."""
    present = importlib.util.find_spec("diffusers") is not None
    return "" if present else "diffusers is not installed: pip install diffusers"


def diffusers_contenders(setting: Setting, compiles: bool) -> Iterator[Contender]:
    """AutoencoderKLWan with the weights of the setting: eager, channels-last, compiled."""
    autoencoder = _autoencoder(setting.vae, setting.config.vae)
    yield _published("diffusers, eager", autoencoder, autoencoder.decoder, setting, False)
    last = copy.deepcopy(autoencoder)
    for parameter in last.parameters():
        if parameter.ndim in (4, 5):
            layout = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=layout)
    yield _published("diffusers, channels last", last, last.decoder, setting, True)
    if compiles:
        compiled = torch.compile(autoencoder.decoder, dynamic=False)
        yield _published("diffusers, torch.compile", autoencoder, compiled, setting, False)


def _autoencoder(vae: WanVAE, config: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKLWan

    weight = vae.conv2.weight
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan(
            base_dim=config.base_dim, z_dim=config.z_dim, dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks, temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(config.latents_mean), latents_std=list(config.latents_std),
        )  # fmt: skip
    # torch's own: that of diffusers warns of a dtype that is given afterwards
    nn.Module.to(autoencoder, weight.dtype).to_empty(device=weight.device)
    state, blocks = vae.state_dict(), config.num_res_blocks
    named = {name: state[wan_vae_from_diffusers(name, blocks)] for name in autoencoder.state_dict()}
    autoencoder.load_state_dict(named)
    return autoencoder.requires_grad_(False).eval()


def _published(
    name: str, autoencoder: nn.Module, decoder: Callable[..., Tensor], setting: Setting, last: bool
) -> Contender:
    shift, scale = (
        torch.tensor(values, device=setting.device).view(1, -1, 1, 1, 1)
        for values in (setting.config.vae.latents_mean, setting.config.vae.latents_std)
    )
    layout = torch.channels_last_3d if last else torch.contiguous_format

    def pixels() -> Decode:
        autoencoder.clear_cache()
        past: list[Tensor | str | None] = list(autoencoder._feat_map)
        seen: list[None] = []

        def decode(latents: Tensor) -> Tensor:
            raw = (latents.float() * scale + shift).to(setting.dtype).contiguous(memory_format=layout)
            hidden, pieces = autoencoder.post_quant_conv(raw), []
            for latent in hidden.split(1, dim=2):
                first = {} if seen else {"first_chunk": True}
                pieces.append(decoder(latent, feat_cache=past, feat_idx=[0], **first))
                seen.append(None)
            return torch.cat(pieces, dim=2)

        return decode

    def frames() -> Decode:
        decode = pixels()
        return lambda latents: _packed(decode(latents))

    return Contender(name, "lossless", pixels, frames)


def _packed(pixels: Tensor) -> Tensor:
    scaled = (pixels[0].clamp(-1, 1).float() + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
