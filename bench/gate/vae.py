"""Part vae: milliseconds of the decoders per chunk, and how near bfloat16 comes to float32.

Weights are random: a chunk costs the same, and the PSNR is that of random weights. Then bench/vae.py,
layer by layer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from gate.part import AbsentError, Item, Setting
from gate.record import Result
from torch import Tensor

from rfengine.accuracy import psnr_db
from rfengine.benchmark.agreement import truth_precision
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import PRESETS, EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.decoder import FrameDecoder, FrameDecoderState
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.ops import choose_ops
from rfengine.ops.backends import backend_reasons
from rfengine.tuning.timing import capture_calls

BENCH = Path(__file__).resolve().parents[1]
RUNS = 20
SEED = 5
CONVOLUTIONS = ("causal_conv3d", "phase_conv")
PSNR_CHUNKS = 2
FP8_CAPABILITY = (8, 9)


def items(setting: Setting) -> list[Item]:
    bench = Item("bench_vae", lambda: _bench_vae(setting), least_s=20)
    if setting.small:
        return [Item("reference", _timed(setting, "reference")), bench]
    names = ("cudnn", "triton", "fp8", "tiny", "plain")
    psnr = [Item(f"PSNR {name}", _psnr(setting, name), least_s=8) for name in ("cudnn", "triton", "fp8")]
    return [*(Item(name, _timed(setting, name), least_s=5) for name in names), *psnr, bench]


def _config(setting: Setting) -> EngineConfig:
    if setting.small:
        return replace(PRESETS["tiny"], height=32, width=32)
    return PRESETS["wan-1.3b"]


@cache
def _vae(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> WanVAE:
    vae = Checkpoint.random(config, SEED).load(lambda: WanVAE(config.vae), "vae", dtype, device)
    return vae.requires_grad_(False).eval()


def _decoder(setting: Setting, name: str, dtype: torch.dtype) -> FrameDecoder:
    config, device = _config(setting), setting.device
    if name == "plain":
        return _vae(config, device, dtype)
    if name == "tiny":
        checkpoint, ops = Checkpoint.random(config, SEED), choose_ops("auto", device)
        tiny = checkpoint.load(lambda: TinyVAE(config.tiny_vae, ops), "tiny_vae", dtype, device)
        return tiny.requires_grad_(False).eval()
    if name == "fp8":
        if not setting.small and torch.cuda.get_device_capability() < FP8_CAPABILITY:
            raise AbsentError("the GPU has no FP8")
        return StreamingDecoder(_vae(config, device, dtype), choose_ops("auto", device), "fp8")
    reason = backend_reasons(device)[name]
    if reason:
        raise AbsentError(reason)
    overrides = dict.fromkeys(CONVOLUTIONS, name)
    return StreamingDecoder(_vae(config, device, dtype), choose_ops("auto", device, overrides))


def _dtype(setting: Setting) -> torch.dtype:
    return torch.float32 if setting.small else torch.bfloat16


def _latents(setting: Setting, dtype: torch.dtype, chunk: int) -> Tensor:
    config = _config(setting)
    grid = LatentGrid.of(config)
    shape = (1, config.vae.z_dim, config.cache.chunk_frames, grid.latent_height, grid.latent_width)
    generator = torch.Generator().manual_seed(SEED + chunk)
    return torch.randn(shape, generator=generator).to(setting.device, dtype)


def _fresh_state(setting: Setting, decoder: FrameDecoder, dtype: torch.dtype) -> FrameDecoderState:
    grid = LatentGrid.of(_config(setting))
    return decoder.decoder_state(1, grid.latent_height, grid.latent_width, dtype, setting.device)


def _timed(setting: Setting, name: str) -> Callable[[], Iterator[Result]]:
    @torch.no_grad()
    def run() -> Iterator[Result]:
        dtype = _dtype(setting)
        decoder = _decoder(setting, name, dtype)
        state, latents = _fresh_state(setting, decoder, dtype), _latents(setting, dtype, 0)
        for _ in range(2):
            frames = decoder.decode_frames(latents, state)
        result = {"decoder": name, "frames": frames.shape[0], "weights": "random"}
        if setting.small:
            yield result
            return
        yield result | {"ms": _median_ms(lambda: decoder.decode_frames(latents, state)), "graph": False}
        if isinstance(decoder, StreamingDecoder):
            graph = capture_calls(lambda given: decoder.run(given, state, packed=True), [(latents,)])
            yield result | {"ms": _median_ms(graph.replay), "graph": True}

    return run


def _median_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _psnr(setting: Setting, name: str) -> Callable[[], Iterator[Result]]:
    @torch.no_grad()
    def run() -> Iterator[Result]:
        found, expected = _video(setting, name, _dtype(setting)), _exact_video(setting)
        largest = float((found - expected).abs().max())
        yield {
            "psnr_db": psnr_db(found, expected),
            "largest_error": largest,
            "decoder": name,
            "weights": "random",
        }

    return run


@cache
def _exact_video(setting: Setting) -> Tensor:
    """By the plain decoder in float32; the same for every decoder that is held against it."""
    return _video(setting, "plain", torch.float32)


def _video(setting: Setting, name: str, dtype: torch.dtype) -> Tensor:
    """[1, 3, T, H, W] in [-1, 1], float32."""
    decoder = _decoder(setting, name, dtype)
    state = _fresh_state(setting, decoder, dtype)
    with truth_precision(_dtype(setting)):
        pieces = [
            decoder.decode(_latents(setting, dtype, chunk), state).float().clamp(-1, 1)
            for chunk in range(PSNR_CHUNKS)
        ]
    return torch.cat(pieces, dim=2)


def _bench_vae(setting: Setting) -> Iterator[Result]:
    small = ["--device", "cpu", "--height", "32", "--width", "32", "--chunks", "1", "--threads", "1"]
    chosen = [*small, "--diffusers", "off"] if setting.small else ["--chunks", "20", "--compile", "off"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vae.json"
        command = [sys.executable, str(BENCH / "bench_vae.py"), "--json", str(path), *chosen]
        done = subprocess.run(command, capture_output=True, text=True, timeout=setting.seconds_left)
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
        yield {"bench_vae": json.loads(path.read_text())}
