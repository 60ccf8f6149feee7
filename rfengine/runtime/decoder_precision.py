"""In which dtype the full decoder runs, and whether its frames are near enough to float32 in it.

What is measured is kept in the record of tuning/record.py, once for each checkpoint and machine; weights of
which nobody says what distinguishes them are measured again.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.accuracy import psnr_db
from rfengine.config import RuntimeConfig
from rfengine.cuda_graph import made_current
from rfengine.memory import free_memory
from rfengine.models.decoder import FrameDecoder
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import RGB_CHANNELS, WanVAE
from rfengine.ops import REFERENCE_OPS
from rfengine.runtime_config import DecoderKind, VAEPrecision
from rfengine.tuning.record import CaseKey, Decision, TuningCache, default_cache_path, describe_machine

logger = logging.getLogger(__name__)

PRECISION_DTYPES: dict[VAEPrecision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
LEAST_PSNR_DB = 45.0  # of FP8 convolutions
HEADROOM = 2.0  # times the largest activation that is seen, which float16 must hold
SIGMAS = (1.0, 4.0)  # of the latents that are drawn for the range of float16
# Latents along a side of the small check. A layer's values depend on the picture around a pixel and not on
# the size of the frame, except the attention's, which is an average; so a small frame shows the range, and a
# load waits for two chunks of 64 x 64 pixels, a hundredth of the work at 832 x 480.
SIDE = 8
CHUNK, CHUNKS = 3, 2  # latents of a call, and calls
GATE_S = 30.0  # that the check of FP8 at the size of a stream may take; a larger frame is cut to what fits
_EXACT_PASSES = 5.0  # decodes that encoding twice and decoding three times in float32 take, at most
_LIVE_LAYERS = 10  # largest activations, four frames of them, that float32 and its workspace hold at once
_SEED = 0
_PASSED, _REFUSED = "passed", "refused"


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """The dtype of the full decoder, before any weights are seen.

    checked: whether the weights must pass check_float16 first. fallback: the dtype where they do not; None
    where that is an error.
    """

    dtype: torch.dtype
    checked: bool
    fallback: torch.dtype | None
    reason: str

    def __str__(self) -> str:
        name = dtype_name(self.dtype)
        if not self.checked:
            return f"{name}: {self.reason}"
        instead = "nothing else" if self.fallback is None else f"else {dtype_name(self.fallback)}"
        return f"{name} where it passes its check, {instead}: {self.reason}"


def plan_precision(runtime: RuntimeConfig, device_type: str, dtype: torch.dtype) -> PrecisionPlan:
    """The plan for a model in `dtype` whose decoder is on a device of `device_type`.

    float16 has ten bits of mantissa where bfloat16 has seven, at the same speed, and a smaller range; so it
    is the default on CUDA for a model of 16 bits. FP8 convolutions stand in a decoder of the default's dtype.
    """
    asked = PRECISION_DTYPES.get(runtime.vae_precision)
    if asked is not None:
        return PrecisionPlan(asked, asked == torch.float16, None, "asked for")
    if runtime.vae != "full":
        return PrecisionPlan(dtype, False, None, f"the decoder is {runtime.vae}")
    if device_type != "cuda":
        return PrecisionPlan(dtype, False, None, f"the model's, the default on {device_type}")
    if dtype.itemsize != 2:
        return PrecisionPlan(dtype, False, None, "the model's, which has more than 16 bits")
    return PrecisionPlan(torch.float16, True, torch.bfloat16, f"the default on {device_type}")


def settle_decoder_dtype(
    vae: WanVAE, runtime: RuntimeConfig, dtype: torch.dtype, device: torch.device, fingerprint: str | None
) -> None:
    """Put the decoder of `vae`, all of which is float32 on `device`, into its dtype, in place.

    dtype: of the model. fingerprint: what distinguishes the weights from others, for the record. Raises
    RuntimeError where float16 is asked for and does not pass.
    """
    plan = plan_precision(runtime, device.type, dtype)
    chosen, reason = plan.dtype, plan.reason
    if plan.checked:
        key = CaseKey("vae_fp16", candidates=(_PASSED, _REFUSED), depends_on=f"weights {fingerprint}")
        with made_current(device):
            verdict = _remembered(key, device, fingerprint, lambda: check_float16(vae))
        reason = f"{plan.reason}; {verdict.reason}"
        if verdict.backend == _REFUSED:
            if plan.fallback is None:
                raise RuntimeError(
                    f"vae_precision is 'fp16' and with these weights {verdict.reason}; use 'default'"
                )
            chosen = plan.fallback
            logger.warning("the decoder is in %s: with these weights %s", dtype_name(chosen), verdict.reason)
    vae.set_decoder_dtype(chosen)
    logger.info("the decoder is in %s: %s", dtype_name(chosen), reason)


@torch.no_grad()
def check_float16(exact: WanVAE) -> tuple[str, str]:
    """Whether the decoder may run in float16, "passed" or "refused", and why. exact: in float32.

    It may where float16 holds HEADROOM times every activation that float32 has, and the frames in float16
    are as near to those in float32 as the frames in bfloat16 are; all on small latents of a moving picture
    and on drawn ones of several sigmas. The reference ops decode, which round where every backend rounds, so
    that no kernel is built for it. Sums that they leave open, such as a convolution's without its bias, are
    inside the headroom.
    """
    sets = latent_sets(exact, (SIDE, SIDE), CHUNK * CHUNKS, SIGMAS)
    with _exact_products(), _largest_activations(exact) as largest:
        pixels = [_decoded(exact, latents, 1) for latents in sets]
    values = {name: value.item() for name, value in largest.items()}
    # the first that is no number, in the order they run, comes before all
    place = max(values, key=lambda name: math.inf if math.isnan(values[name]) else values[name])
    limit = torch.finfo(torch.float16).max
    found = f"the largest activation is {values[place]:.4g} in {place}"
    if not values[place] * HEADROOM <= limit:
        return _REFUSED, f"{found}, where float16 holds {HEADROOM:g} times as much up to {limit / HEADROOM:g}"
    psnrs = {}
    for dtype in (torch.float16, torch.bfloat16):
        twin = copy.deepcopy(exact)
        twin.set_decoder_dtype(dtype)
        psnrs[dtype] = _lowest_psnr(StreamingDecoder(twin, REFERENCE_OPS), sets, pixels, dtype, CHUNK)
    distances = "float16 is {:.1f} dB (PSNR) from float32 and bfloat16 {:.1f} dB".format(*psnrs.values())
    nearer = psnrs[torch.float16] >= psnrs[torch.bfloat16]  # no NaN is
    return _PASSED if nearer else _REFUSED, f"{distances}, and {found} of {limit:g}"


def require_fp8(
    vae: WanVAE, decoder: StreamingDecoder, size: tuple[int, int], chunk: int, fingerprint: str | None
) -> None:
    """Raises RuntimeError where the FP8 decoder of `vae` is below LEAST_PSNR_DB at `size` latents.

    chunk: latents of a call. Frames of a size that would take longer than GATE_S, or more memory than is
    free, are cut to what does not. fingerprint: as for settle_decoder_dtype, and of the backend.
    """
    device, dtype = vae.conv2.weight.device, vae.decoder_dtype
    key = CaseKey(
        "vae_fp8", (chunk, *size), dtype_name(dtype), (_PASSED, _REFUSED),
        f"weights {fingerprint}",
    )  # fmt: skip
    with made_current(device):
        verdict = _remembered(key, device, fingerprint, lambda: check_fp8(vae, decoder, size, chunk))
    if verdict.backend == _REFUSED:
        raise RuntimeError(
            f"vae_precision is 'fp8' and with these weights {verdict.reason}; at least {LEAST_PSNR_DB:g} dB "
            "is asked, use 'default'"
        )
    logger.info("FP8 convolutions of the decoder: %s", verdict.reason)


def check_fp8(vae: WanVAE, decoder: StreamingDecoder, size: tuple[int, int], chunk: int) -> tuple[str, str]:
    """Whether the frames of `decoder` hold LEAST_PSNR_DB, "passed" or "refused", and how near they are."""
    exact = copy.deepcopy(vae).float()
    cut = size if max(size) <= SIDE else _fitting_size(exact, size)
    psnr = decoded_psnr(exact, decoder, vae.decoder_dtype, cut, chunk)
    if cut != size and vae.conv2.weight.is_cuda:
        torch.cuda.empty_cache()
    of = "" if cut == size else f" of {size[0]} x {size[1]}"
    reason = f"its frames are {psnr:.1f} dB (PSNR) from float32, at {cut[0]} x {cut[1]}{of} latents"
    return _PASSED if psnr >= LEAST_PSNR_DB else _REFUSED, reason  # a NaN is refused as well


@torch.no_grad()
def decoded_psnr(
    exact: WanVAE,
    decoder: FrameDecoder,
    dtype: torch.dtype,
    size: tuple[int, int] = (SIDE, SIDE),
    chunk: int = CHUNK,
) -> float:
    """PSNR in dB of `decoder`, whose state is in `dtype`, against `exact`, a VAE in float32, of frames in
    [-1, 1] (a peak of 2): the lower one of latent_sets at `size`, in calls of `chunk` latents."""
    sets = latent_sets(exact, size, CHUNKS * chunk)
    with _exact_products():
        pixels = [_decoded(exact, latents, 1) for latents in sets]
    return _lowest_psnr(decoder, sets, pixels, dtype, chunk)


def latent_sets(
    exact: WanVAE, size: tuple[int, int], frames: int, sigmas: Sequence[float] = (1.0,)
) -> list[Tensor]:
    """Latents [1, z, frames, *size] in float32: of a moving picture, and normal ones for each of sigmas.

    Normal latents have the statistics of latents by definition. Those of the picture are of drawn_clip as the
    VAE itself reconstructs it: one of a small world reconstructs only a part of the clip's colours, and the
    latents of the others are none that a stream has.
    """
    config, device = exact.config, exact.conv2.weight.device
    sides = [side * config.spatial_stride for side in size]
    clip = drawn_clip(1 + (frames - 1) * config.temporal_stride, *sides).to(device)
    with torch.no_grad(), _exact_products():
        # of a decoder that is broken the checks see what it makes of these latents
        shown = _decoded(exact, exact.encode_in_groups(clip, 1), 1).clamp(-1, 1).nan_to_num()
        encoded = exact.encode_in_groups(shown, 1)
    generator = torch.Generator().manual_seed(_SEED)
    shape = (1, config.z_dim, frames, *size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    return [encoded, *(sigma * noise for sigma in sigmas)]


def drawn_clip(frames: int, height: int, width: int) -> Tensor:
    """[1, 3, frames, height, width] in [-1, 1]: coloured waves that drift, finer ones in a band below, and a
    disc that crosses them. Waves have lengths in pixels, so that every size has as much detail."""
    time_ = torch.arange(frames, dtype=torch.float32, device="cpu").view(1, -1, 1, 1) / 21
    y = torch.arange(height, dtype=torch.float32, device="cpu").view(1, 1, -1, 1) / 64
    x = torch.arange(width, dtype=torch.float32, device="cpu").view(1, 1, 1, -1) / 64
    colour = torch.arange(RGB_CHANNELS, dtype=torch.float32, device="cpu").view(-1, 1, 1, 1)
    waves = 0.6 * torch.sin(2 * math.pi * ((1 + colour) * x + y + time_) + colour)
    fine = 0.3 * torch.sin(2 * math.pi * (8 * x + 4 * y - 2 * time_))
    waves = torch.where(y % 1 > 0.75, waves + fine, waves)
    is_disc = (x % 1 - 0.2 - 0.6 * (time_ % 1)).square() + (y % 1 - 0.5).square() < 0.03
    return torch.where(is_disc, 0.9 - 0.8 * colour, waves).clamp(-1, 1).unsqueeze(0)


def state_dtype(runtime: RuntimeConfig, vae: WanVAE, dtype: torch.dtype) -> torch.dtype:
    """Of the state of the decoder in `runtime`, beside a model in `dtype`; an engine of TensorRT has its
    own."""
    return vae.decoder_dtype if runtime.vae == "full" else dtype


def decoder_name(kind: DecoderKind, dtype: torch.dtype, model_dtype: torch.dtype) -> str:
    """A decoder as a snapshot names it: with the dtype of its state where that is not the model's."""
    return kind if dtype == model_dtype else f"{kind} in {dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remembered(
    key: CaseKey, device: torch.device, fingerprint: str | None, check: Callable[[], tuple[str, str]]
) -> Decision:
    """The record's decision of `key`, else that of `check`, which is kept; neither without a fingerprint."""
    if fingerprint is None:
        return Decision(key, *check())
    cache = TuningCache(default_cache_path(), describe_machine(device))
    known = cache.find(key)
    if known is None:
        known = Decision(key, *check())
        cache.store([known])
    return known


def _fitting_size(exact: WanVAE, size: tuple[int, int]) -> tuple[int, int]:
    """`size`, or the part of it whose check takes at most GATE_S and half of the free memory."""
    device, config = exact.conv2.weight.device, exact.config
    latents = torch.zeros(1, config.z_dim, CHUNK, SIDE, SIDE, dtype=torch.float32, device=device)
    seconds = math.inf
    with torch.no_grad(), _exact_products():
        for _ in range(2):  # the first builds what the second finds
            started = time.perf_counter()
            _decoded(exact, latents, 1).sum().item()
            seconds = time.perf_counter() - started
    area = size[0] * size[1]
    by_time = GATE_S / (seconds * CHUNKS * _EXACT_PASSES * area / SIDE**2)
    values = config.temporal_stride * area * config.spatial_stride**2 * config.base_dim * config.dim_mult[0]
    free = free_memory(device)
    by_memory = math.inf if free is None else free / 2 / (_LIVE_LAYERS * 4 * values)
    share = min(1.0, by_time, by_memory) ** 0.5
    return tuple(max(min(side, SIDE), int(side * share)) for side in size)


def _lowest_psnr(
    decoder: FrameDecoder, sets: Iterable[Tensor], pixels: Iterable[Tensor], dtype: torch.dtype, chunk: int
) -> float:
    """The lowest PSNR of `decoder`, whose state is in `dtype`, against the pixels of each set, or NaN."""
    psnrs = []
    for latents, exact in zip(sets, pixels, strict=True):
        found = _decoded(decoder, latents, chunk, dtype)
        if not (found.isfinite().all() and exact.isfinite().all()):
            return math.nan
        psnrs.append(psnr_db(found, exact))
    return min(psnrs)


def _decoded(
    decoder: FrameDecoder, latents: Tensor, chunk: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Pixels of a video from its start, in calls of `chunk` latents, with a state in `dtype`."""
    state = decoder.decoder_state(1, *latents.shape[3:], dtype, latents.device)
    with torch.no_grad():
        return torch.cat([decoder.decode(part, state) for part in latents.split(chunk, dim=2)], dim=2)


@contextmanager
def _exact_products() -> Iterator[None]:
    """float32 convolutions in float32, not in TF32, which is torch's default on CUDA."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@contextmanager
def _largest_activations(vae: WanVAE) -> Iterator[dict[str, Tensor]]:
    """Inside, the largest absolute value that each module of the decoder returns is noted under its name."""
    largest: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
            value = output.abs().amax()
            largest[name] = torch.maximum(largest.get(name, value), value)

        return note

    halves = {"conv2": vae.conv2, "decoder": vae.decoder}
    modules = {
        f"{half}.{name}".rstrip("."): module
        for half, whole in halves.items()
        for name, module in whole.named_modules()
    }
    handles = [module.register_forward_hook(noting(name)) for name, module in modules.items()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()
