"""Refuses to time a wrong engine: its first chunks are compared with the reference, evictions included.

The truth is the reference in twice the precision, which is TF32 for bfloat16. The engine may be as far from
it as the tolerance of parity/replay.py for its dtype, or twice as far as the reference in the engine's own
dtype, whichever is more, since rounding grows with the depth of the model; but never twenty times that
tolerance, for a reference so far off would be wrong itself. With FP8, which rounds to 4 bits, the truth has
none, and the engine may be twice as far from it as the reference with the same FP8 is, but never by a half.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rfengine.accuracy import relative_error
from rfengine.benchmark.measured_engine import leave_out_context_pass
from rfengine.benchmark.timing import recorded_chunks
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.models.fp8_products import quantise
from rfengine.models.int8_products import weights_in
from rfengine.parity.replay import tolerance
from rfengine.pipeline import Pipeline
from rfengine.runtime.options import runtime_switches
from rfengine.runtime.rolling_runner import runner_of

SEED = 11
PROMPT = "a red ball rolling to the left"
OWN_ERRORS = 2.0
MOST_TOLERANCES = 20.0
MOST_FP8_ERROR = 0.5


@contextmanager
def truth_precision(dtype: torch.dtype) -> Iterator[None]:
    """How float32 is multiplied while the truth of an engine in `dtype` is computed: in TF32 for bfloat16,
    whose own rounding is eight times as coarse, exactly for float16, whose rounding is TF32's, and for
    float32. Put back afterwards."""
    is_coarse = dtype == torch.bfloat16
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = is_coarse
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=is_coarse):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products


class WrongEngineError(RuntimeError):
    """The engine does not compute what the reference computes."""


@dataclass(frozen=True)
class Agreement:
    """How far the engine is from the truth at worst, and the reference in the engine's dtype."""

    what: str
    chunks: int
    error: float
    reference_error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


def check_agreement(
    pipeline: Pipeline, grid: LatentGrid, decoder: nn.Module | None, context_pass: bool = True
) -> list[Agreement]:
    """Agreement of latents and, where a decoder is given, of frames. Raises WrongEngineError.

    decoder: the plain module whose weights the pipeline decodes with, such as its VAE. context_pass: False
    where the pipeline makes its chunks without it (measured_engine.py).
    """
    chunks = checked_chunks(pipeline)
    found = engine_latents(pipeline, grid, chunks)
    results = [_latents_agreement(pipeline, grid, found, context_pass)]
    if decoder is not None:
        results.append(_frames_agreement(pipeline, grid, decoder, found))
    for result in results:
        if not result.holds:
            raise WrongEngineError(
                f"the engine is wrong, so nothing was measured: its {result.what} of the first {chunks} "
                f"chunks are {result.error:.2g} from the reference in twice the precision; "
                f"{result.allowed:.2g} is allowed, since the reference in the same precision is "
                f"{result.reference_error:.2g} from it"
            )
    return results


def checked_chunks(pipeline: Pipeline) -> int:
    """As many chunks as show an eviction and, where graphs are on, a replay of the graph."""
    cache = pipeline.config.cache
    graphs = runtime_switches(pipeline.config.runtime, pipeline.model.device)["graphs"]
    return recorded_chunks(cache) if graphs.on else cache.filling_chunks + 1


def engine_latents(pipeline: Pipeline, grid: LatentGrid, chunks: int) -> list[Tensor]:
    """Latents of the first chunks as the pipeline makes them."""
    stream = pipeline.stream(PROMPT, seed=SEED, height=grid.height, width=grid.width)
    latents = []
    for _ in range(chunks):
        stream.advance(decode=False)
        latents.append(stream.latents.clone())
    return latents


def reference_latents(
    pipeline: Pipeline,
    grid: LatentGrid,
    chunks: int,
    context_pass: bool,
    dtype: torch.dtype,
    in_fp8: bool = False,
) -> list[Tensor]:
    """The same chunks by the reference ops, without graphs, with the pipeline's weights in `dtype`. in_fp8:
    what the pipeline has in FP8 is in FP8."""
    config, model = pipeline.config, pipeline.model
    with torch.device("meta"):
        twin = WanDiT(config.model)
    twin.load_state_dict(weights_in(model, dtype), assign=True)
    twin.requires_grad_(False)
    if in_fp8 and model.left_out_of_fp8 is not None:
        quantise(twin, model.left_out_of_fp8)
    if not context_pass:
        leave_out_context_pass(twin)
    runner = runner_of(twin, config.schedule, False, config.fp8_passes if in_fp8 else ())
    cache = StreamingKVCache(config.model, config.cache, grid, dtype=dtype, device=model.device)
    states = pipeline.text_encoder.encode([PROMPT], model.device, model.dtype).to(dtype)
    latents = []
    with torch.no_grad():
        text = twin.text_keys_values(states)
        for chunk in range(chunks):
            plan = cache.plan_chunk()
            noise = runner.draw_noise(cache, chunk, plan.frames, SEED).to(model.device, model.dtype)
            latents.append(runner.advance(cache, plan, noise.to(dtype), text))
    return latents


def _latents_agreement(
    pipeline: Pipeline, grid: LatentGrid, found: list[Tensor], context_pass: bool
) -> Agreement:
    dtype, given = pipeline.model.dtype, (pipeline, grid, len(found), context_pass)
    with truth_precision(dtype):
        truth = reference_latents(*given, twice(dtype))
    in_fp8 = pipeline.config.runtime.multiplies_fp8
    reference = reference_latents(*given, dtype, in_fp8=in_fp8)
    own = max(relative_error(ours, true.cpu()) for ours, true in zip(reference, truth, strict=True))
    error = max(relative_error(ours, true.cpu()) for ours, true in zip(found, truth, strict=True))
    judged = _judged("latents", len(found), error, own, "causal", dtype)
    return replace(judged, allowed=min(OWN_ERRORS * own, MOST_FP8_ERROR)) if in_fp8 else judged


def _frames_agreement(
    pipeline: Pipeline, grid: LatentGrid, decoder: nn.Module, latents: list[Tensor]
) -> Agreement:
    """uint8 frames of the engine against pixels decoded from the engine's own latents, in units of a byte.

    What rounding the true pixels to bytes does is allowed on top.
    """
    dtype = pipeline.vae_dtype
    stream = pipeline.stream(PROMPT, seed=SEED, height=grid.height, width=grid.width)
    found = [torch.from_numpy(stream.advance().frames.copy()) for _ in latents]
    with truth_precision(dtype):
        truth = _decoded(decoder, grid, latents, twice(dtype))
        reference = _decoded(decoder, grid, latents, dtype)
    rounding = max(relative_error(pixels.round(), pixels) for pixels in truth)
    own = max(relative_error(ours, true) for ours, true in zip(reference, truth, strict=True))
    error = max(relative_error(ours, true) for ours, true in zip(found, truth, strict=True))
    judged = _judged("frames", len(latents), error, own, "vae", dtype)
    return replace(judged, allowed=judged.allowed + rounding)


def _decoded(decoder: nn.Module, grid: LatentGrid, latents: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Pixels [T, H, W, 3] from 0 to 255, not rounded, by the plain decoder in `dtype`."""
    twin = copy.deepcopy(decoder).to(dtype)
    device = next(twin.parameters()).device
    state = twin.decoder_state(1, grid.latent_height, grid.latent_width, dtype, device)
    with torch.no_grad():
        pieces = [twin.decode(chunk.to(device, dtype), state)[0] for chunk in latents]
    return [((piece.double().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0).cpu() for piece in pieces]


def _judged(what: str, chunks: int, error: float, own: float, kind: str, dtype: torch.dtype) -> Agreement:
    usual = tolerance(kind, str(dtype).removeprefix("torch."))
    allowed = min(max(usual, OWN_ERRORS * own), MOST_TOLERANCES * usual)
    return Agreement(what, chunks, error if math.isfinite(error) else math.inf, own, allowed)


def twice(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32
