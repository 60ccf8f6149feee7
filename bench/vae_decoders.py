"""Decoders that bench/vae.py compares: ours, the plain one, the tiny one, and diffusers'.

A stream of diffusers' AutoencoderKLWan decodes latent by latent and keeps its list of past frames from chunk
to chunk, which is how the published demos stream with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.layouts import wan_vae_from_diffusers
from rfengine.config import Backend, EngineConfig, RuntimeConfig
from rfengine.cuda_graph import recording
from rfengine.grid import LatentGrid
from rfengine.models.decoder import FrameDecoder, FrameDecoderState
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops
from rfengine.runtime.decoder_precision import dtype_name
from rfengine.runtime.decoders import FP8_TIER, TIERS, decoder_ops

Decode = Callable[[Tensor], Tensor]
OURS, PLAIN, BY_LATENT = "rfengine", "plain, chunk by chunk", "plain, latent by latent"
FP8_ROW, TINY_ROW = "rfengine, FP8", "rfengine, tiny decoder"
SEED = 3


@dataclass(frozen=True)
class Setting:
    """What is decoded, where, with which weights. vae: its decoder in dtype, on the device; exact: all of it
    in float32."""

    checkpoint: Checkpoint
    grid: LatentGrid
    exact: WanVAE
    vae: WanVAE
    dtype: torch.dtype
    device: torch.device
    backend: Backend

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, grid: LatentGrid, dtype: torch.dtype, device: torch.device,
        backend: Backend = "auto",
    ) -> Setting:  # fmt: skip
        exact = checkpoint.load(lambda: WanVAE(checkpoint.config.vae), "vae", torch.float32, device)
        exact.requires_grad_(False).eval()
        return cls(checkpoint, grid, exact, exact, torch.float32, device, backend).in_dtype(dtype)

    def in_dtype(self, dtype: torch.dtype) -> Setting:
        vae = copy.deepcopy(self.exact)
        vae.set_decoder_dtype(dtype)
        return replace(self, vae=vae, dtype=dtype)

    @property
    def config(self) -> EngineConfig:
        return self.checkpoint.config

    @property
    def frames(self) -> int:
        """Latents of a chunk."""
        return self.config.cache.chunk_frames

    def ops(self, precision: str = "default") -> Ops:
        runtime = RuntimeConfig(vae_precision=precision)
        config = replace(self.config, runtime=runtime, backend=self.backend)
        return decoder_ops(config, self.grid, self.dtype, self.device)

    def state_of(self, decoder: FrameDecoder) -> FrameDecoderState:
        size = self.grid.latent_height, self.grid.latent_width
        return decoder.decoder_state(1, *size, self.dtype, self.device)

    def latents(self, chunks: int) -> list[Tensor]:
        """Normal ones of so many chunks."""
        size = self.grid.latent_height, self.grid.latent_width
        shape = (chunks, 1, self.config.vae.z_dim, self.frames, *size)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        return list(drawn.to(self.device, self.dtype))


@dataclass(frozen=True)
class Candidate:
    """A way to decode. tier: the quality of its frames.

    open: takes whether to pack, and returns a stream from the start of a video: a function from the latents
    of the next chunk [1, z, F, h, w] to uint8 frames [T, H, W, 3] on the device, or pixels [1, 3, T, H, W].
    """

    name: str
    tier: str
    open: Callable[[bool], Decode]


def our_candidates(setting: Setting, fp8: bool) -> Iterator[Candidate]:
    """The streaming decoder, its form in the other 16-bit dtype and in FP8, each in a CUDA graph as well; the
    plain one; the tiny one."""
    ours = [(OURS, "lossless", setting, "default")]
    ours += [(name, "lossless", setting.in_dtype(dtype), "default") for name, dtype in _other_halves(setting)]
    ours += [(FP8_ROW, FP8_TIER, setting, "fp8")] if fp8 else []
    for name, tier, own, precision in ours:
        decoder = StreamingDecoder(own.vae, own.ops(precision), precision)
        candidate = Candidate(name, tier, _streams(decoder, own))
        yield candidate
        if setting.device.type == "cuda":
            yield replace(candidate, name=f"{name}, CUDA graph", open=_graphed(decoder, own))
    plain = Candidate(PLAIN, "lossless", _streams(setting.vae, setting))
    yield plain
    yield replace(plain, name=BY_LATENT, open=_by_latent(plain))
    config, ops, checkpoint = setting.config, setting.ops(), setting.checkpoint
    if not checkpoint.has("tiny_vae"):
        checkpoint = Checkpoint.random(config)
    tiny = checkpoint.load(lambda: TinyVAE(config.tiny_vae, ops), "tiny_vae", setting.dtype, setting.device)
    yield Candidate(TINY_ROW, TIERS["tiny"], _streams(tiny.requires_grad_(False).eval(), setting))


def _other_halves(setting: Setting) -> Iterator[tuple[str, torch.dtype]]:
    """The 16-bit dtype that a setting in 16 bits does not have, after the name of its row."""
    for dtype in (torch.float16, torch.bfloat16) if setting.dtype.itemsize == 2 else ():
        if dtype != setting.dtype:
            yield f"{OURS}, {dtype_name(dtype)}", dtype


def _streams(decoder: FrameDecoder, setting: Setting) -> Callable[[bool], Decode]:
    def opened(packs: bool) -> Decode:
        state, decode = setting.state_of(decoder), decoder.decode_frames if packs else decoder.decode
        return lambda latents: decode(latents, state)

    return opened


def _by_latent(candidate: Candidate) -> Callable[[bool], Decode]:
    def opened(packs: bool) -> Decode:
        decode, dim = candidate.open(packs), 0 if packs else 2
        return lambda latents: torch.cat([decode(one) for one in latents.split(1, dim=2)], dim=dim)

    return opened


def _graphed(decoder: StreamingDecoder, setting: Setting) -> Callable[[bool], Decode]:
    """Streams whose third chunk is recorded in a CUDA graph, which is replayed from then on."""

    def opened(packs: bool) -> Decode:
        state, seen, held = setting.state_of(decoder), [], {}

        def decode(latents: Tensor) -> Tensor:
            seen.append(None)
            if len(seen) < 3:
                return decoder.decode_frames(latents, state) if packs else decoder.decode(latents, state)
            if not held:
                held["latents"] = latents.clone()
                held["graph"] = torch.cuda.CUDAGraph()
                with recording(held["graph"], torch.cuda.Stream()):
                    held["frames"] = decoder.run(held["latents"], state, packed=packs)
            held["latents"].copy_(latents)
            held["graph"].replay()
            return held["frames"]

        return decode

    return opened


def diffusers_candidates(setting: Setting, compiles: bool) -> Iterator[Candidate]:
    """AutoencoderKLWan with the weights of the setting: eager, compiled."""
    model = _autoencoder(setting)
    yield Candidate("diffusers, eager", "lossless", _published(model, model.decoder, setting))
    if compiles:
        compiled = torch.compile(model.decoder, dynamic=False)
        yield Candidate("diffusers, torch.compile", "lossless", _published(model, compiled, setting))


def _autoencoder(setting: Setting) -> nn.Module:
    from diffusers import AutoencoderKLWan

    config, state = setting.config.vae, setting.vae.state_dict()
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan(
            base_dim=config.base_dim, z_dim=config.z_dim, dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks, temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(config.latents_mean), latents_std=list(config.latents_std),
        )  # fmt: skip
    # torch's own: that of diffusers warns of a dtype that is given afterwards
    nn.Module.to(autoencoder, setting.dtype).to_empty(device=setting.device)
    names = {name: wan_vae_from_diffusers(name, config.num_res_blocks) for name in autoencoder.state_dict()}
    autoencoder.load_state_dict({name: state[ours] for name, ours in names.items()})
    return autoencoder.requires_grad_(False).eval()


def _published(
    autoencoder: nn.Module, decoder: Callable[..., Tensor], setting: Setting
) -> Callable[[bool], Decode]:
    shift, scale = (
        torch.tensor(values, device=setting.device).view(1, -1, 1, 1, 1)
        for values in (setting.config.vae.latents_mean, setting.config.vae.latents_std)
    )

    def opened(packs: bool) -> Decode:
        autoencoder.clear_cache()
        past: list[Tensor | str | None] = list(autoencoder._feat_map)
        seen: list[None] = []

        def decode(latents: Tensor) -> Tensor:
            hidden = autoencoder.post_quant_conv((latents.float() * scale + shift).to(setting.dtype))
            pieces = []
            for latent in hidden.split(1, dim=2):
                first = {} if seen else {"first_chunk": True}
                pieces.append(decoder(latent, feat_cache=past, feat_idx=[0], **first))
                seen.append(None)
            pixels = torch.cat(pieces, dim=2)
            return _packed(pixels) if packs else pixels

        return decode

    return opened


def _packed(pixels: Tensor) -> Tensor:
    scaled = (pixels[0].clamp(-1, 1).float() + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
