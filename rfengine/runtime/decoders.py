"""The decoders by name (full, tiny, tensorrt): quality, what each needs, and what opens one for a size.

The full decoder runs on the backends that won at its size, and in FP8 only where that is near enough.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rfengine.accuracy import psnr_db
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import DecoderKind, EngineConfig, RuntimeConfig
from rfengine.cuda_graph import made_current
from rfengine.export.tensorrt_api import import_tensorrt
from rfengine.export.tensorrt_decoder import TensorRTDecoder
from rfengine.grid import LatentGrid
from rfengine.models.decoder import FrameDecoder
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import RGB_CHANNELS, WanVAE
from rfengine.ops import Ops, choose_ops
from rfengine.runtime.options import runtime_switches

logger = logging.getLogger(__name__)

OpenDecoder = Callable[[LatentGrid], FrameDecoder]
TIERS: dict[DecoderKind, str] = {"full": "lossless", "tiny": "reduced", "tensorrt": "lossless"}
FP8_TIER = "near-lossless"  # of the full decoder with FP8 convolutions
LEAST_PSNR_DB = 45.0
FP8_CAPABILITY = (8, 9)
_SIDE, _CHUNK, _CHUNKS = 8, 3, 2  # of the FP8 check: latents along a side, latent frames of a call, calls
_SEED = 0
_KEPT_SIZES = 2  # a decoder's buffers are 1.9 GB at 832x480


def tier_of(runtime: RuntimeConfig) -> str:
    """Quality of the frames of the decoder in `runtime`."""
    return FP8_TIER if runtime.vae_precision == "fp8" else TIERS[runtime.vae]


def absences(checkpoint: Checkpoint) -> dict[DecoderKind, str]:
    """Every kind of decoder, with the reason why it cannot be used with `checkpoint`, or ""."""
    reasons: dict[DecoderKind, str] = dict.fromkeys(TIERS, "")
    if not checkpoint.has("tiny_vae"):
        reasons["tiny"] = f"{checkpoint.path} has no tiny_vae"
    try:
        import_tensorrt()
    except RuntimeError as error:
        reasons["tensorrt"] = str(error)
    return reasons


def require_decoder(runtime: RuntimeConfig, device: torch.device) -> None:
    """Raises RuntimeError where the decoder in `runtime` cannot run on `device`; no weights are needed."""
    if runtime.vae == "tensorrt":
        import_tensorrt()
    fp8 = runtime.vae_precision == "fp8" and device.type == "cuda"
    if fp8 and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise RuntimeError(
            f"vae_precision is 'fp8' and {torch.cuda.get_device_name(device)} has no FP8 products, which "
            "come with compute capability 8.9; use 'default'"
        )


def opener(
    checkpoint: Checkpoint, config: EngineConfig, vae: WanVAE, dtype: torch.dtype, device: torch.device
) -> OpenDecoder:
    """The function that opens the decoder of config.runtime for a size. vae: the checkpoint's, on `device`.

    Raises ValueError where the checkpoint lacks the decoder's weights, and as full_opener does.
    """
    if config.runtime.vae == "tiny":
        ops = choose_ops(config.backend, device)
        tiny = checkpoint.load(lambda: TinyVAE(config.tiny_vae, ops), "tiny_vae", dtype, device).eval()
        return lambda grid: tiny
    if config.runtime.vae == "tensorrt":
        graphs = runtime_switches(config.runtime, device)["graphs"].on
        return functools.cache(
            lambda grid: TensorRTDecoder.open(checkpoint.path, config, grid, dtype, device, graphs)
        )
    return full_opener(config, vae, dtype, device)


def full_opener(
    config: EngineConfig, vae: WanVAE, dtype: torch.dtype, device: torch.device
) -> Callable[[LatentGrid], StreamingDecoder]:
    """The function that opens the full decoder for a size; its backends are chosen at a size's first use.

    The decoders of the last _KEPT_SIZES sizes are kept, with their buffers; an older one lives while a stream
    has it. Raises RuntimeError where FP8 convolutions do not reach LEAST_PSNR_DB with these weights;
    decoder_ops raises for a size.
    """
    ops = choose_ops(config.backend, device, _fp8_override(config, device))
    decoder = StreamingDecoder(vae, ops, config.runtime.vae_precision)
    if config.runtime.vae_precision == "fp8":
        with made_current(device):
            require_psnr(vae, decoder, dtype)

    @functools.lru_cache(_KEPT_SIZES)
    def open_decoder(grid: LatentGrid) -> StreamingDecoder:
        return decoder.on(decoder_ops(config, grid, dtype, device))

    return open_decoder


def decoder_ops(config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, device: torch.device) -> Ops:
    """The ops of config.backend; for "auto", those that won at `grid` where autotune is on.

    Raises RuntimeError for a cuDNN that was asked for and is wrong at one of the shapes.
    """
    requested, overrides = config.backend, _fp8_override(config, device)
    measures = requested == "auto" and runtime_switches(config.runtime, device)["autotune"].on
    if device.type == "cuda" and (measures or requested == "cudnn"):
        from rfengine.tuning.autotune import tune
        from rfengine.tuning.candidates import TuningShapes
        from rfengine.tuning.convolutions import decoder_cases

        shapes = TuningShapes(config, grid, dtype, device)
        overrides |= tune(decoder_cases(shapes), device, requested=requested).overrides
    return choose_ops(requested, device, overrides)


def _fp8_override(config: EngineConfig, device: torch.device) -> dict[str, str]:
    """Only Triton multiplies in FP8; the reference computes the same, many times slower."""
    asked = config.runtime.vae_precision == "fp8" and device.type == "cuda" and config.backend != "reference"
    return {"causal_conv3d_fp8": "triton"} if asked else {}


def require_psnr(vae: WanVAE, decoder: FrameDecoder, dtype: torch.dtype) -> float:
    """decoded_psnr in dB. Raises RuntimeError where it is below LEAST_PSNR_DB."""
    psnr = decoded_psnr(vae, decoder, dtype)
    if not psnr >= LEAST_PSNR_DB:  # a NaN is refused as well
        raise RuntimeError(
            f"vae_precision is 'fp8' and with these weights its frames are {psnr:.1f} dB (PSNR) from "
            f"float32; at least {LEAST_PSNR_DB:g} dB is asked, use 'default'"
        )
    logger.info("FP8 convolutions of the decoder: %.1f dB (PSNR) from float32", psnr)
    return psnr


@torch.no_grad()
def decoded_psnr(vae: WanVAE, decoder: FrameDecoder, dtype: torch.dtype) -> float:
    """PSNR in dB of `decoder` in `dtype` against `vae` in float32, of frames in [-1, 1] (a peak of 2).

    The lower one of two sets of latents: those of a drawn clip as the VAE itself reconstructs it, and normal
    noise, which has the statistics of latents by definition. A VAE of a small world reconstructs only a part
    of the clip's colours, and the latents of the others are none that a stream has.
    """
    exact = copy.deepcopy(vae).float()
    device = next(exact.parameters()).device
    shape = (1, vae.config.z_dim, _CHUNKS * _CHUNK, _SIDE, _SIDE)
    noise = torch.randn(
        shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float32, device="cpu"
    )
    frames = 1 + (_CHUNKS * _CHUNK - 1) * vae.config.temporal_stride
    psnrs = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        clip = drawn_clip(frames, *(_SIDE * vae.config.spatial_stride,) * 2).to(device)
        shown = exact.decode(exact.encode(clip)).clamp(-1, 1)
        if not bool(shown.isfinite().all()):
            return math.nan
        for latents in (exact.encode(shown), noise.to(device)):
            state = decoder.decoder_state(1, _SIDE, _SIDE, dtype, device)
            calls = latents.to(dtype).split(_CHUNK, dim=2)
            found = torch.cat([decoder.decode(part, state) for part in calls], dim=2)
            psnrs.append(psnr_db(found, exact.decode(latents)))
    return min(psnrs)


def drawn_clip(frames: int, height: int, width: int) -> Tensor:
    """[1, 3, frames, height, width] in [-1, 1]: coloured waves that drift, and a disc that crosses them."""
    time = torch.arange(frames, dtype=torch.float32, device="cpu").view(1, -1, 1, 1) / frames
    y = torch.linspace(0, 1, height, dtype=torch.float32, device="cpu").view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, dtype=torch.float32, device="cpu").view(1, 1, 1, -1)
    colour = torch.arange(RGB_CHANNELS, dtype=torch.float32, device="cpu").view(-1, 1, 1, 1)
    waves = 0.6 * torch.sin(2 * math.pi * ((1 + colour) * x + y + time) + colour)
    is_disc = (x - 0.2 - 0.6 * time).square() + (y - 0.5).square() < 0.03
    return torch.where(is_disc, 0.9 - 0.8 * colour, waves).clamp(-1, 1).unsqueeze(0)
