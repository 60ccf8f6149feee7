"""The decoders of the VAE, chunk by chunk in the steady state, whole and layer by layer.

    python bench/vae.py --json figures.json

Every decoder has a stream of its own and makes uint8 frames on the device from the same latents, one chunk
each alternating, every round in the reverse order, so that a change of the clock meets all alike. All have
the same weights, except the tiny one. First each is compared with the plain decoder in float32 over some
chunks: PSNR of pixels in [-1, 1] (a peak of 2) and the largest error, on latents of a drawn clip. A layer of
our decoder is a residual block, the attention, or a doubling; its floor counts what costs/vae.py counts,
except that the doubling of the size takes 4 of 9 products and reads its input at the small size. A preset has
random weights and normal latents, whose PSNR is no evidence for the published weights.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from bench.vae_decoders import (
    BY_LATENT,
    OURS,
    PLAIN,
    Candidate,
    Setting,
    diffusers_candidates,
    our_candidates,
)
from rfengine.accuracy import psnr_db
from rfengine.benchmark.agreement import truth_precision
from rfengine.benchmark.conditions import device_name, state, versions
from rfengine.benchmark.measured_engine import device_of
from rfengine.benchmark.timing import synchronize
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.cli.process import run_script
from rfengine.cli.terminal import find_device
from rfengine.config import Backend, DTypeName
from rfengine.costs.chunk import Part
from rfengine.costs.rates import GPU, floor_ms, rates_of
from rfengine.costs.vae import decode_work
from rfengine.grid import LatentGrid
from rfengine.limits import Range, check_options
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import Upsample
from rfengine.ops.backends import FP8_CAPABILITY
from rfengine.presets import PRESETS
from rfengine.runtime.decoder_precision import drawn_clip
from rfengine.runtime.decoders import FP8_TIER

CHECKED_CHUNKS = 3
WARM_UP_CHUNKS = 3  # the first of a video, one like all others, one that is recorded
LAYER_CHUNKS = 7
FAR_DB, PLENTY_DB = 6.1, 95.0  # twice the error of the plain decoder; float32 is beyond the second
AHEAD_CYCLES = 50_000_000  # that the device waits for, about 30 ms: the host has launched everything by then
REST = "first and last convolution, frames"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the decoders of the VAE beside each other, whole and layer by layer."""

    model: str | None = None
    """tiny, a checkpoint directory, or a preset with random weights; wan-1.3b on CUDA, else tiny."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    chunks: Annotated[int, Range(1, 1_000_000)] = 50
    """Chunks to time of every decoder."""
    backend: Backend = "auto"
    """What runs the ops of our decoder."""
    dtype: DTypeName | None = None
    """Of the decoders; float16 on CUDA, float32 on a CPU where nothing is given. In 16 bits a row shows ours
    in the other 16-bit dtype."""
    fp8: bool | None = None
    """A row with FP8 convolutions; on where the GPU has FP8. A CPU emulates it."""
    diffusers: bool = True
    """Rows of diffusers' AutoencoderKLWan, where it is installed; on CUDA also under torch.compile."""
    threads: Annotated[int, Range(1, 1024)] | None = None
    """CPU threads of torch; its own choice where nothing is given."""
    device: str | None = None
    """cpu, cuda or cuda:N; cuda where there is one."""
    json: Path | None = None
    """Write the figures as JSON; - prints them instead of the table."""


class WrongDecoderError(RuntimeError):
    """Our decoder does not give the frames of the plain one."""


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """Figures and their circumstances. Raises ValueError for a model or a size that cannot be, and
    WrongDecoderError before anything is timed."""
    check_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    setting = _setting(options)
    checkpoint, device = setting.checkpoint, setting.device
    before = state(device)
    candidates, left_out = _candidates(options, setting)
    checked, exact = _exact(setting)
    quality = {each.name: _quality(each, checked, exact) for each in candidates}
    _require_agreement(quality)
    gpu = rates_of(device, setting.dtype)
    times = _time(candidates, setting, options.chunks)
    layers = measure_layers(setting, gpu)
    is_random = checkpoint.directory is None
    weights = f"random, seed {checkpoint.seed}" if is_random else f"those of {checkpoint.path}"
    faster = {
        name: statistics.median(slow / fast for slow, fast in zip(times[BY_LATENT], times[name], strict=True))
        for name in (OURS, PLAIN)
    }
    return {
        "model": setting.config.name, "weights": weights, "height": setting.grid.height,
        "width": setting.grid.width, "latents": setting.frames,
        "frames": setting.frames * setting.grid.temporal_stride,
        "dtype": str(setting.dtype).removeprefix("torch."), "ops": setting.ops().choice,
        "device": device_name(device), "threads": torch.get_num_threads(), "chunks": options.chunks,
        "versions": versions(device), "before": before, "after": state(device),
        "ceilings": gpu and asdict(gpu),
        "decoders": [_row(each, times[each.name], quality[each.name], setting, gpu) for each in candidates],
        "chunk_over_latent_by_latent": faster, "layers": layers, "left_out": left_out,
    }  # fmt: skip


def _setting(options: Options) -> Setting:
    find_device(options.device)
    device = device_of(options.device)
    on_cuda = device.type == "cuda"
    model = options.model or ("wan-1.3b" if on_cuda else "tiny")
    is_random = model != "tiny" and model in PRESETS
    checkpoint = Checkpoint.random(PRESETS[model]) if is_random else Checkpoint.open(model)
    dtype = getattr(torch, options.dtype or ("float16" if on_cuda else "float32"))
    grid = LatentGrid.of(checkpoint.config, options.height, options.width)
    return Setting.load(checkpoint, grid, dtype, device, options.backend)


def _candidates(options: Options, setting: Setting) -> tuple[list[Candidate], dict[str, str]]:
    """Those that can be measured, and why others are left out."""
    on_cuda, left_out = setting.device.type == "cuda", {}
    able = on_cuda and torch.cuda.get_device_capability(setting.device) >= FP8_CAPABILITY
    fp8 = able if options.fp8 is None else options.fp8
    if not fp8:
        left_out["FP8"] = "the GPU has no FP8" if on_cuda and options.fp8 is None else "not asked for"
    candidates = list(our_candidates(setting, fp8))
    if not options.diffusers:
        left_out["diffusers"] = "switched off"
    elif importlib.util.find_spec("diffusers") is None:
        left_out["diffusers"] = "diffusers is not installed: pip install diffusers"
    else:
        candidates += diffusers_candidates(setting, compiles=on_cuda)
    return candidates, left_out


def _exact(setting: Setting) -> tuple[list[Tensor], Tensor]:
    """Latents of some chunks, and their pixels by the plain decoder in float32, on the host.

    The latents are those of a drawn clip; normal where the weights are random.
    """
    twin, grid = setting.exact, setting.grid
    latents = setting.latents(CHECKED_CHUNKS)
    with truth_precision(setting.dtype):
        if setting.checkpoint.directory is not None:
            clip = drawn_clip(grid.pixel_frames(setting.frames * CHECKED_CHUNKS), grid.height, grid.width)
            latents = list(twin.encode_in_groups(clip).to(setting.dtype).split(setting.frames, dim=2))
        state = twin.decoder_state(1, grid.latent_height, grid.latent_width, torch.float32, setting.device)
        pixels = [twin.decode(chunk.float(), state).cpu() for chunk in latents]
    return latents, torch.cat(pixels, dim=2)


def _quality(candidate: Candidate, latents: list[Tensor], exact: Tensor) -> dict[str, float | str]:
    """PSNR in dB and the largest error over some chunks; what cannot run has an error instead."""
    try:
        decode = candidate.open(False)
        found = torch.cat([decode(chunk).float().cpu() for chunk in latents], dim=2)
    except RuntimeError as error:  # a compiler that does not take the model
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"}
    largest = (found.clamp(-1, 1) - exact.clamp(-1, 1)).abs().max().item()
    return {"psnr_db": psnr_db(found, exact), "largest_error": largest}


def _require_agreement(quality: dict[str, dict[str, float]]) -> None:
    ours, plain = quality[OURS]["psnr_db"], quality[PLAIN]["psnr_db"]
    if not ours >= min(plain - FAR_DB, PLENTY_DB):
        raise WrongDecoderError(
            f"our decoder is wrong, so nothing was timed: {ours:.1f} dB (PSNR) from float32, where the plain "
            f"one in the same precision is {plain:.1f} dB from it"
        )


def _time(candidates: list[Candidate], setting: Setting, chunks: int) -> dict[str, list[float]]:
    """Milliseconds of every chunk by decoder; none of one that cannot run."""
    latents = setting.latents(2)
    streams, times = {}, {each.name: [] for each in candidates}
    for each in candidates:
        with suppress(RuntimeError):  # its quality says why
            decode = each.open(True)
            for place in range(WARM_UP_CHUNKS):
                decode(latents[place % 2])
            streams[each.name] = decode
    for place in range(chunks):
        for name in list(streams) if place % 2 else reversed(streams):
            synchronize(setting.device)
            started = time.perf_counter()
            streams[name](latents[place % 2])
            synchronize(setting.device)
            times[name].append((time.perf_counter() - started) * 1e3)
    return times


def _row(
    candidate: Candidate, times: list[float], quality: dict[str, Any], setting: Setting, gpu: GPU | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"decoder": candidate.name, "tier": candidate.tier, **quality}
    if not times:
        return row
    ms = statistics.median(times)
    frames = setting.frames * setting.grid.temporal_stride
    row |= {"chunk_ms": ms, "frame_ms": ms / frames, "chunks_ms": times}
    if candidate.tier != "reduced":  # the floor is that of the full decoder
        fp8 = candidate.tier == FP8_TIER and gpu is not None and gpu.fp8_tflop_per_s is not None
        row |= _floor(sum(layer_parts(setting, fp8).values(), []), ms, gpu)
    return row


def _floor(parts: list[Part], ms: float, gpu: GPU | None) -> dict[str, float | None]:
    floor = None if gpu is None else sum(floor_ms(part, gpu) for part in parts)
    return {"floor_ms": floor, "share_of_floor": floor / ms if floor and ms else None}


def layer_paths(setting: Setting) -> Iterator[str]:
    """Paths of the layers of StreamingDecoder, in the order they run."""
    for group in ("middle", "upsamples"):
        for index, block in enumerate(getattr(setting.vae.decoder, group)):
            path = f"decoder.{group}.{index}"
            if not isinstance(block, Upsample):
                yield path
                continue
            if block.time_conv is not None:
                yield f"{path}.time_conv"
            yield f"{path}.resample"


def layer_parts(setting: Setting, fp8: bool = False) -> dict[str, list[Part]]:
    """What each layer computes and moves for a chunk later than the first; REST last."""
    work = decode_work(setting.config.vae, setting.grid, setting.frames, False)
    item, eights = setting.dtype.itemsize, set()
    if fp8:
        slots = StreamingDecoder(setting.vae, setting.ops("fp8"), "fp8").fp8_slots
        eights = {f"decoder.{slot}" for slot in slots}
    parts: dict[str, list[Part]] = {path: [] for path in (*layer_paths(setting), REST)}

    def add(path: str, flops: int, moved: int) -> None:
        layer = next((one for one in parts if path == one or path.startswith(f"{one}.")), REST)
        parts[layer].append(Part("VAE decode", layer, flops, moved, path in eights, decodes=True))

    for path, product in work.products.items():
        flops, read = product.flops, (1 if path in eights else item) * product.read_elements
        if path.endswith("resample.1"):
            flops, read = flops * 4 // 9, read // 4
        add(path, flops, read + item * product.written_elements)
    for path, elements in work.norm_elements.items():
        add(path, 0, 2 * item * elements)
    return parts


def measure_layers(setting: Setting, gpu: GPU | None) -> list[dict[str, Any]]:
    """A row for each layer: median milliseconds in one chunk, after two that warm up."""
    decoder, device = StreamingDecoder(setting.vae, setting.ops()), setting.device
    state, marks, samples = setting.state_of(decoder), [], []

    def timed(layer: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            marks.append(_now(device))
            result = layer(*arguments)
            marks.append(_now(device))
            return result

        return run

    with patch.object(decoder, "_layers", [timed(layer) for layer in decoder._layers]):
        for chunk in setting.latents(LAYER_CHUNKS):
            if device.type == "cuda":
                torch.cuda._sleep(AHEAD_CYCLES)
            marks.clear()
            began = _now(device)
            decoder.decode_frames(chunk, state)
            ended = _now(device)
            synchronize(device)
            inside = [_ms(*pair) for pair in zip(marks[::2], marks[1::2], strict=True)]
            samples.append([*inside, _ms(began, ended) - sum(inside)])
    medians = [statistics.median(times) for times in zip(*samples[2:], strict=True)]
    return [
        {"layer": name, "ms": ms, **_floor(parts, ms, gpu), "gflop": sum(part.flops for part in parts) / 1e9}
        for (name, parts), ms in zip(layer_parts(setting).items(), medians, strict=True)
    ]


def _now(device: torch.device) -> Any:
    """A point in time of the device's work: an event, or the seconds of the host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(before: Any, after: Any) -> float:
    return (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)


def render(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['model']} at {figures['width']} x {figures['height']}, {figures['dtype']}, "
        f"{figures['latents']} latents to {figures['frames']} frames a chunk, {figures['chunks']} chunks; "
        f"weights: {figures['weights']}",
        f"{figures['device']}, {figures['threads']} threads; commit {figures['versions']['commit']}, torch "
        f"{figures['versions']['torch']}; before {figures['before']}, after {figures['after']}",
        "",
        f"{'decoder':<28}{'tier':<15}{'ms a chunk':>11}{'a frame':>9}{'of floor':>10}{'PSNR, dB':>10}"
        f"{'max error':>11}",
    ]
    for row in figures["decoders"]:
        head = f"{row['decoder']:<28}{row['tier']:<15}"
        if "chunk_ms" not in row:
            lines.append(f"{head} {row.get('error', 'it failed with frames')}")
            continue
        share = f"{row['share_of_floor']:.0%}" if row.get("share_of_floor") else ""
        lines.append(
            f"{head}{row['chunk_ms']:>11.3f}{row['frame_ms']:>9.3f}{share:>10}{row['psnr_db']:>10.1f}"
            f"{row['largest_error']:>11.1e}"
        )
    ratios = figures["chunk_over_latent_by_latent"]
    shown = ", ".join(f"{name} {ratio:.2f} times as fast" for name, ratio in ratios.items())
    lines += ["", f"chunks against single latents (plain): {shown}", ""]
    lines.append(f"{'layer of ' + OURS:<42}{'ms':>10}{'floor, ms':>12}{'of floor':>10}{'GFLOP':>10}")
    for row in figures["layers"]:
        floor = f"{row['floor_ms']:.4f}" if row["floor_ms"] else ""
        share = f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else ""
        lines.append(f"{row['layer']:<42}{row['ms']:>10.4f}{floor:>12}{share:>10}{row['gflop']:>10.3f}")
    lines += [f"left out: {name}: {reason}" for name, reason in figures["left_out"].items()]
    return "\n".join(lines)


def run(options: Options) -> None:
    figures = measure(options)
    text = json.dumps(figures, indent=1)
    if options.json is not None and str(options.json) != "-":
        options.json.write_text(text)
    print(text if str(options.json) == "-" else render(figures))


if __name__ == "__main__":
    sys.exit(run_script("vae", Options, run))
