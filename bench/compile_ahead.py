"""Fills a Triton cache for a GPU that is not here, so that a first start there compiles no kernel.

The programs of the engine run on tensors of their real sizes in host memory, most of which is never touched,
since no kernel runs: every chunk from the first to the steady state, in 16 bits and in FP8, and the decoders,
with every op that Triton has a form of on Triton, in each form that autotune compares. The golden files are
replayed as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch
from torch import nn

from bench.absent_gpu import ARCHITECTURES, Architecture, recorded_launches
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import EngineConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.kernels.gelu_fp8 import gelu_rows_fp8
from rfengine.kernels.linear_fp8 import linear_fp8
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.models.fp8_products import quantise
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops, backends
from rfengine.ops.table import OPS, has_backend
from rfengine.parity.replay import replay
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.runtime.decoder_precision import plan_precision
from rfengine.schedule import FlowSchedule

Module = TypeVar("Module", bound=nn.Module)
FP8_ATTENTION = ("window_fp8", "qk_norm_rope_write_fp8", "sink_window_attention_fp8")
DTYPES = ("float32", "bfloat16")  # of the golden files


def fill_cache(
    cache: Path, arch: str, config: EngineConfig, dtype: torch.dtype, golden: list[Path]
) -> tuple[int, float]:
    """Compile what `config` in `dtype` and `golden` launch into `cache`, which TRITON_CACHE_DIR must name.
    Returns how many kernels were not in it yet, and the seconds."""
    architecture, started, before = ARCHITECTURES[arch], time.monotonic(), _kernels(cache)
    with recorded_launches(architecture), torch.no_grad():
        variants = list(engine_ops(architecture))
        for ops in variants:
            run_chunks(config, dtype, ops)
        if architecture.capability >= 89:
            run_chunks(config, dtype, variants[0], in_fp8=True)
            run_beside_library(config.model, LatentGrid.of(config).frame_tokens * config.cache.chunk_frames)
        decoding = plan_precision(config.runtime, "cuda", dtype).dtype
        run_decoders(config, decoding, variants[0])  # the others differ in ops of the transformer alone
        # Triton counts as a backend of the CPU, where its launches are not run
        with mock.patch.object(backends, "_triton_absence", lambda on_cuda: ""):
            for path in golden:
                for name in DTYPES:
                    replay(path, "triton", "cpu", name)
    return _kernels(cache) - before, time.monotonic() - started


def engine_ops(architecture: Architecture) -> Iterator[Ops]:
    """Every op on Triton where it has a form: with folded gates, with each form of the window attention."""
    choice = {op: "triton" if has_backend(op, "triton") else "reference" for op in OPS}
    yield Ops(choice)
    yield Ops(choice, folds_gate=True)
    if architecture.capability == 90:
        for form in ("triton-descriptor", "triton-pointer"):
            yield Ops(choice | {"sink_window_attention": form})


def run_chunks(config: EngineConfig, dtype: torch.dtype, ops: Ops, in_fp8: bool = False) -> None:
    """The chunks of a stream until every program of the steady state has run once. in_fp8: its products, and
    the attention of every pass where Triton has the ops of it."""
    grid, model_config = LatentGrid.of(config), _with_few_layers(config.model)
    model = _unfilled(WanDiT, model_config, ops, dtype=dtype)
    pack_weights(model)
    if in_fp8:
        quantise(model)
    attends = in_fp8 and all(has_backend(op, "triton") for op in FP8_ATTENTION)
    passes = range(len(config.schedule.denoising_steps) + 1) if attends else ()
    runner = ChunkRunner(model, FlowSchedule(config.schedule), fp8_passes=passes)
    cache = StreamingKVCache(model_config, config.cache, grid, dtype=dtype, device="cpu", ops=ops)
    states = torch.empty(1, model_config.text_len, model_config.text_dim, dtype=dtype)
    text = model.text_keys_values(states)
    noise = torch.empty(
        runner.num_steps, 1, model_config.in_dim, config.cache.chunk_frames, grid.latent_height,
        grid.latent_width, dtype=dtype,
    )  # fmt: skip
    for _ in range(config.cache.filling_chunks + 1):  # filled, then the steady state
        runner.advance(cache, cache.plan_chunk(), noise, text)


def run_beside_library(model: WanConfig, tokens: int) -> None:
    """The kernels beside products that a library makes in FP8, and the product of rows from FP8 attention."""
    rows = torch.empty(tokens, model.ffn_dim, dtype=torch.bfloat16)
    scale = torch.empty(tokens, 1, dtype=torch.float32)
    gelu_rows_fp8(rows, scale, torch.empty(2, dtype=torch.float32))
    values = torch.empty(tokens, model.dim, dtype=torch.float8_e4m3fn)
    heads = torch.empty(tokens, model.num_heads, dtype=torch.float32)
    weight = torch.empty(model.dim, model.dim, dtype=torch.float8_e4m3fn)
    units = torch.empty(model.dim, dtype=torch.float32)
    linear_fp8(values, heads, weight, units, units.bfloat16())


def _with_few_layers(model: WanConfig) -> WanConfig:
    """Layers are alike, but Triton compiles apart for a count of 1 and for one that 16 divides."""
    return replace(model, num_layers=16 if model.num_layers % 16 == 0 else min(2, model.num_layers))


def _unfilled(kind: type[Module], *arguments: object, dtype: torch.dtype) -> Module:
    """A module of `kind` in memory that is only reserved, except the scales of norms, which set FP8 units."""
    with torch.device("meta"):
        module = kind(*arguments).to(dtype)
    module.to_empty(device="cpu").requires_grad_(False).eval()
    for parameter in module.parameters():
        if parameter.numel() == parameter.shape[0]:
            parameter.fill_(1)
    return module


def run_decoders(config: EngineConfig, dtype: torch.dtype, ops: Ops) -> None:
    """A first and a steady chunk of the lossless decoder, in 16 bits and in 8."""
    grid, chunk = LatentGrid.of(config), config.cache.chunk_frames
    size = (grid.latent_height, grid.latent_width)
    latents = torch.empty(1, config.vae.z_dim, chunk, *size, dtype=dtype)
    vae = _unfilled(WanVAE, config.vae, dtype=dtype)
    decoders = [StreamingDecoder(vae, ops)]
    if dtype != torch.float32:
        decoders.append(StreamingDecoder(vae, ops, "fp8"))
    for decoder in decoders:
        state = decoder.decoder_state(1, *size, dtype, "cpu")
        for state.frames in (0, chunk):
            decoder.run(latents, state, packed=True)


def _kernels(cache: Path) -> int:
    return sum(1 for _ in cache.rglob("*.cubin"))
