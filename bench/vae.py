"""The decoders of the VAE, chunk by chunk in the steady state, whole and layer by layer.

    python bench/vae.py --json figures.json

Every decoder has a stream of its own and makes uint8 frames on the device from the same latents. They decode
in turn, one chunk each, every round the other way round, so that a change of the clock meets all alike. First
each is held against the plain decoder in float32 over some chunks: PSNR of pixels in [-1, 1] (a peak of 2)
and the largest error, on latents of a drawn clip. The floor is that of vae_layers.py. A preset has random
weights and normal latents, whose PSNR is no evidence for the published weights.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import torch
from torch import Tensor
from typing_extensions import Doc
from vae_decoders import (
    BY_LATENT,
    OURS,
    PLAIN,
    Contender,
    Setting,
    diffusers_absence,
    diffusers_contenders,
    has_fp8,
    our_contenders,
    tiny_contender,
)
from vae_layers import floor_of, layer_parts, measure_layers

from rfengine.accuracy import psnr_db
from rfengine.benchmark.agreement import truth_precision
from rfengine.benchmark.command_line import parse_options
from rfengine.benchmark.conditions import device_name, state, versions
from rfengine.benchmark.options import Switch
from rfengine.benchmark.timing import synchronize
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.cli.process import run_process
from rfengine.config import PRESETS, Backend, DTypeName
from rfengine.costs.rates import GPU, gpu_of, measured_cpu
from rfengine.grid import LatentGrid
from rfengine.limits import Range, check_options
from rfengine.models.streaming_decoder import FP8_TIER
from rfengine.runtime.decoders import drawn_clip

CHECKED_CHUNKS = 3
WARM_UP_CHUNKS = 3  # the first of a video, one like all others, one that is recorded
LAYER_CHUNKS = 7
SEED = 3
FAR_DB, PLENTY_DB = 6.1, 95.0  # twice the error of the plain decoder; float32 is beyond the second


@dataclass(frozen=True)
class Options:
    """Time the decoders of the VAE against each other, whole and layer by layer."""

    model: Annotated[
        str | None,
        Doc("tiny, a checkpoint directory, or a preset with random weights; wan-1.3b on CUDA, else tiny."),
    ] = None
    height: Annotated[int | None, Doc("Pixels; the model's own size where nothing is given.")] = None
    width: Annotated[int | None, Doc("Pixels.")] = None
    chunks: Annotated[int, Range(1, 1_000_000), Doc("Chunks that are timed of every decoder.")] = 50
    latents: Annotated[int, Range(1, 64), Doc("Latents of a chunk.")] = 3
    backend: Annotated[Backend, Doc("What runs the ops of our decoder.")] = "auto"
    dtype: Annotated[DTypeName | None, Doc("bfloat16 on CUDA, float32 on a CPU.")] = None
    fp8: Annotated[
        Switch, Doc("A row with FP8 convolutions; auto where the GPU has FP8. A CPU emulates it.")
    ] = "auto"
    diffusers: Annotated[Switch, Doc("Rows of diffusers' AutoencoderKLWan; auto where it is there.")] = "auto"
    compile: Annotated[Switch, Doc("A row of it under torch.compile; auto is on with CUDA.")] = "auto"
    threads: Annotated[
        int | None, Range(1, 1024), Doc("CPU threads of torch; its own choice where nothing is given.")
    ] = None
    device: Annotated[str | None, Doc("cpu, cuda or cuda:N; cuda where there is one.")] = None
    json: Annotated[Path | None, Doc("Write the figures as JSON; - prints them instead of the table.")] = None


class WrongDecoderError(RuntimeError):
    """Our decoder does not give the frames of the plain one."""


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """Figures and their circumstances. Raises ValueError for a model or a size that cannot be, and
    WrongDecoderError before anything is timed."""
    check_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    setting, directory = _setting(options)
    device = setting.device
    before = state(device)
    contenders, left_out = _contenders(options, setting, directory)
    checked, exact = _exact(setting, options.latents, directory is not None)
    quality = {each.name: _quality(each, checked, exact) for each in contenders}
    _require_agreement(quality)
    gpu = gpu_of(device_name(device)) if device.type == "cuda" else measured_cpu(setting.dtype)
    times = _time(contenders, setting, options)
    layers = measure_layers(setting, _latents(setting, options.latents, LAYER_CHUNKS), gpu)
    return {
        "model": setting.config.name,
        "weights": setting.weights,
        "height": setting.grid.height,
        "width": setting.grid.width,
        "latents": options.latents,
        "frames": options.latents * setting.grid.temporal_stride,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "ops": setting.ops().choice,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "chunks": options.chunks,
        "versions": versions(device),
        "before": before,
        "after": state(device),
        "ceilings": None if gpu is None else {"name": gpu.name, "tb_per_s": gpu.tb_per_s,
                                              "tflop_per_s": gpu.bf16_tflop_per_s},
        "decoders": [_row(each, times[each.name], quality[each.name], setting, options.latents, gpu)
                     for each in contenders],
        "chunk_over_latent_by_latent": _ratios(times[BY_LATENT], times[OURS], times[PLAIN]),
        "layers": [layer.to_dict() for layer in layers],
        "left_out": left_out,
    }  # fmt: skip


def _setting(options: Options) -> tuple[Setting, str | None]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {device} and torch finds no CUDA device; use --device cpu")
    model = options.model or ("wan-1.3b" if device.type == "cuda" else "tiny")
    directory = None if model != "tiny" and model in PRESETS else model
    config = PRESETS[model] if directory is None else Checkpoint.open(directory).config
    grid = LatentGrid.of(config, options.height, options.width)
    name = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, name)
    return Setting.load(config, directory, grid, dtype, device, options.backend), directory


def _contenders(
    options: Options, setting: Setting, directory: str | None
) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be measured, and why others are left out."""
    on_cuda, left_out = setting.device.type == "cuda", {}
    fp8 = options.fp8 == "on" or (options.fp8 == "auto" and has_fp8(setting.device))
    if not fp8:
        left_out["FP8"] = "not asked for" if not on_cuda or options.fp8 == "off" else "the GPU has no FP8"
    contenders = [*our_contenders(setting, fp8), tiny_contender(setting, directory)]
    absence = "switched off" if options.diffusers == "off" else diffusers_absence()
    if absence:
        left_out["diffusers"] = absence
        return contenders, left_out
    compiles = options.compile == "on" or (options.compile == "auto" and on_cuda)
    if not compiles:
        left_out["diffusers, torch.compile"] = "not asked for: --compile on"
    return [*contenders, *diffusers_contenders(setting, compiles)], left_out


def _latents(setting: Setting, frames: int, chunks: int) -> list[Tensor]:
    shape = (chunks, 1, setting.config.vae.z_dim, frames, setting.grid.latent_height,
             setting.grid.latent_width)  # fmt: skip
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    return list(drawn.to(setting.device, setting.dtype))


def _exact(setting: Setting, frames: int, encodes: bool) -> tuple[list[Tensor], Tensor]:
    """Latents of some chunks, and their pixels by the plain decoder in float32, on the host.

    encodes: the latents are those of a drawn clip, else normal.
    """
    twin, grid = copy.deepcopy(setting.vae).float(), setting.grid
    latents = _latents(setting, frames, CHECKED_CHUNKS)
    with truth_precision(setting.dtype):
        if encodes:
            clip = drawn_clip(grid.pixel_frames(frames * CHECKED_CHUNKS), grid.height, grid.width)
            latents = list(twin.encode_in_groups(clip).to(setting.dtype).split(frames, dim=2))
        state = twin.decoder_state(1, grid.latent_height, grid.latent_width, torch.float32, setting.device)
        pixels = [twin.decode(chunk.float(), state).cpu() for chunk in latents]
    return latents, torch.cat(pixels, dim=2)


def _quality(contender: Contender, latents: list[Tensor], exact: Tensor) -> dict[str, float | str]:
    """PSNR in dB and the largest error over some chunks; what cannot run has an error instead."""
    try:
        decode = contender.pixels()
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


def _time(contenders: list[Contender], setting: Setting, options: Options) -> dict[str, list[float]]:
    """Milliseconds of every chunk by decoder; none of one that cannot run."""
    latents = _latents(setting, options.latents, 2)
    streams, times = {}, {each.name: [] for each in contenders}
    for each in contenders:
        try:
            decode = each.frames()
            for place in range(WARM_UP_CHUNKS):
                decode(latents[place % 2])
            streams[each.name] = decode
        except RuntimeError:  # its quality says why
            continue
    for place in range(options.chunks):
        order = list(streams) if place % 2 else list(reversed(streams))
        for name in order:
            synchronize(setting.device)
            started = time.perf_counter()
            streams[name](latents[place % 2])
            synchronize(setting.device)
            times[name].append((time.perf_counter() - started) * 1e3)
    return times


def _row(
    contender: Contender,
    times: list[float],
    quality: dict[str, Any],
    setting: Setting,
    frames: int,
    gpu: GPU | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"decoder": contender.name, "tier": contender.tier, **quality}
    if not times:
        return row
    ms = statistics.median(times)
    row |= {"chunk_ms": ms, "frame_ms": ms / frames / setting.grid.temporal_stride, "chunks_ms": times}
    if contender.tier != "reduced":  # the floor is that of the full decoder
        fp8 = contender.tier == FP8_TIER and gpu is not None and gpu.fp8_tflop_per_s is not None
        parts = layer_parts(setting, frames, fp8)
        floor = floor_of([part for held in parts.values() for part in held], gpu)
        row |= {"floor_ms": floor, "share_of_floor": floor / ms if floor else None}
    return row


def _ratios(by_latent: list[float], ours: list[float], plain: list[float]) -> dict[str, float]:
    """How many times as fast chunks are as single latents, the median over the rounds."""
    return {
        name: statistics.median(slow / fast for slow, fast in zip(by_latent, times, strict=True))
        for name, times in ((OURS, ours), (PLAIN, plain))
    }


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
    told = ", ".join(f"{name} {ratio:.2f} times as fast" for name, ratio in ratios.items())
    lines += ["", f"chunks against single latents (plain): {told}", ""]
    lines.append(f"{'layer of ' + OURS:<42}{'ms':>10}{'floor, ms':>12}{'of floor':>10}{'GFLOP':>10}")
    for row in figures["layers"]:
        floor = f"{row['floor_ms']:.4f}" if row["floor_ms"] else ""
        share = f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else ""
        lines.append(f"{row['layer']:<42}{row['ms']:>10.4f}{floor:>12}{share:>10}{row['gflop']:>10.3f}")
    lines += [f"left out: {name}: {reason}" for name, reason in figures["left_out"].items()]
    return "\n".join(lines)


def main() -> None:
    options = parse_options(Options)
    try:
        figures = measure(options)
    except (ValueError, WrongDecoderError) as error:
        sys.exit(f"bench_vae: {error}")
    text = json.dumps(figures, indent=1)
    if options.json is not None and str(options.json) != "-":
        options.json.write_text(text)
    print(text if str(options.json) == "-" else render(figures))


if __name__ == "__main__":
    sys.exit(run_process(main, "bench_vae"))
