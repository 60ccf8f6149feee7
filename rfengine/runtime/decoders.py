"""The decoders by name (full, tiny, tensorrt): quality, what each needs, and what opens one for a size.

The full decoder runs on the backends that won at its size, and in FP8 only where that is near enough.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.export.tensorrt_api import import_tensorrt
from rfengine.export.tensorrt_decoder import TensorRTDecoder
from rfengine.grid import LatentGrid
from rfengine.models.decoder import FrameDecoder
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops, choose_ops
from rfengine.ops.backends import fp8_absence
from rfengine.runtime.decoder_precision import (
    CHUNK,
    PRECISION_DTYPES,
    SIDE,
    require_fp8,
    settle_decoder_dtype,
)
from rfengine.runtime.options import runtime_switches
from rfengine.runtime_config import DecoderKind

OpenDecoder = Callable[[LatentGrid], FrameDecoder]
TIERS: dict[DecoderKind, str] = {"full": "lossless", "tiny": "reduced", "tensorrt": "lossless"}
FP8_TIER = "near-lossless"  # of the full decoder with FP8 convolutions
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
    if runtime.vae_precision == "fp8" and (absence := fp8_absence(device)):
        raise RuntimeError(f"vae_precision is 'fp8' and {absence}; use 'default'")


def opener(
    checkpoint: Checkpoint, config: EngineConfig, vae: WanVAE, dtype: torch.dtype, device: torch.device
) -> OpenDecoder:
    """The function that opens the decoder of config.runtime for a size. dtype: of the model.

    vae: the checkpoint's, in float32 on `device`; its decoder is put into the dtype it runs in, in place.
    Raises ValueError where the checkpoint lacks the decoder's weights, RuntimeError where the full decoder
    does not pass in float16 and that is asked for, and as full_opener does.
    """
    weights = hashlib.sha256(f"{checkpoint.fingerprint()}, {config.vae}".encode()).hexdigest()[:16]
    settle_decoder_dtype(vae, config.runtime, dtype, device, weights)
    if config.runtime.vae == "tiny":
        ops = choose_ops(config.backend, device)
        tiny = checkpoint.load(lambda: TinyVAE(config.tiny_vae, ops), "tiny_vae", dtype, device).eval()
        return lambda grid: tiny
    if config.runtime.vae == "tensorrt":
        graphs = runtime_switches(config.runtime, device)["graphs"].on
        return functools.cache(
            lambda grid: TensorRTDecoder.open(checkpoint.path, config, grid, dtype, device, graphs)
        )
    return full_opener(config, vae, device, weights)


def full_opener(
    config: EngineConfig, vae: WanVAE, device: torch.device, fingerprint: str | None = None
) -> Callable[[LatentGrid], StreamingDecoder]:
    """The function that opens the full decoder for a size; its backends are chosen at a size's first use.

    It runs in the dtype that the decoder of `vae` has; whether its range is wide enough `opener` checks, and
    nothing here. fingerprint: what distinguishes the weights from others; without it they are checked at
    every load. The decoders of the last _KEPT_SIZES sizes are kept, with their buffers; an older one lives
    while a stream has it. Raises ValueError where config asks for another dtype, RuntimeError where FP8
    convolutions do not reach LEAST_PSNR_DB with these weights: here on small frames, later at the size that
    is opened; decoder_ops raises for a size.
    """
    precision, dtype, chunk = config.runtime.vae_precision, vae.decoder_dtype, config.cache.chunk_frames
    if PRECISION_DTYPES.get(precision, dtype) != dtype:
        raise ValueError(
            f"vae_precision is {precision!r} and the decoder of this VAE is in {dtype}; load it with "
            "Pipeline.from_pretrained, which checks the weights and casts them"
        )
    ops = choose_ops(config.backend, device, _fp8_override(config, device))
    decoder = StreamingDecoder(vae, ops, precision)
    about = fingerprint and f"{fingerprint}, backend {config.backend}"
    if precision == "fp8":
        require_fp8(vae, decoder, (SIDE, SIDE), CHUNK, about)

    @functools.lru_cache(_KEPT_SIZES)
    def open_decoder(grid: LatentGrid) -> StreamingDecoder:
        fastest = decoder_ops(config, grid, dtype, device)
        if precision == "fp8":
            size = grid.latent_height, grid.latent_width
            require_fp8(vae, decoder.on(fastest), size, chunk, about)
        return decoder.on(fastest)

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
