"""What the work of a stream takes beside what stays: found by running the program itself on tensors that have
no memory (torch's FakeTensorMode), so that a change of the program changes it too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.costs.live_memory import LiveMemory
from rfengine.costs.memory import described_vae
from rfengine.grid import LatentGrid
from rfengine.models.dit import TextKeysValues
from rfengine.models.fp8_products import quantise
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.ops import OPS, Ops, choose_ops
from rfengine.ops.cpu import identity_of_norm
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.runtime.loaded_transformer import load_transformer
from rfengine.runtime.rolling_runner import RollingRunner
from rfengine.schedule import FlowSchedule

_CPU = torch.device("cpu")
_KEPT = 32  # results, which the plans of several presets share


@dataclass(frozen=True, slots=True)
class StreamWork:
    """Bytes. first, steady: that a chunk of the transformer takes and gives back; text: the same of the keys
    and values of a prompt; decode_first, decode: of decoding these chunks. kept: small tensors of a running
    stream. decoder_weights: that the decoder holds beside those of the VAE."""

    first: int
    steady: int
    text: int
    decode_first: int
    decode: int
    kept: int
    decoder_weights: int


class _Rehearsed(LiveMemory):
    """LiveMemory of tensors without memory, of which oneDNN makes no convolution: this makes its result,
    whose channels are last in memory."""

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.mkldnn_convolution.default:
            function, args, kwargs = _convolved, args, {}
        return super().__torch_dispatch__(function, types, args, kwargs)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, stride: Any, dilation: Any, groups: int
) -> Tensor:
    """A tensor like aten.mkldnn_convolution's."""
    none = [0] * len(padding)
    convolve = torch.ops.aten.convolution.default
    shape = convolve(x, weight, bias, stride, padding, dilation, False, none, groups).shape
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


class _FusedOps(Ops):
    """Each op as one kernel: of what its reference takes, the result counts, and no total that a kernel
    writes over x."""

    def __init__(self, live: LiveMemory) -> None:
        self._live = live
        super().__init__(dict.fromkeys(OPS, "reference"))

    def _bound(self, name: str) -> Callable[..., Any]:
        run, live = super()._bound(name), self._live
        if name == "channel_norm_silu":
            return lambda x, *others: live.as_one(_over_x, run, x, *others)[0]
        if name.startswith("gated_residual_"):
            return lambda x, *others: live.as_one(_over_x, run, x, *others)
        return lambda *arguments: live.as_one(run, *arguments)


def _over_x(run: Callable[..., Any], x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """x in the place of the total, the first or only result, and the others."""
    result = run(x, *others)
    return (x, *result[1:]) if isinstance(result, tuple) else (x,)


def stream_work(
    config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, decoding: torch.dtype, on_cuda: bool
) -> StreamWork:
    """That of a stream of `config` at `grid`, with the model in `dtype` and the full decoder in `decoding`.

    on_cuda: every op is one kernel, as on a GPU; else what the ops of a CPU do. Takes about a second and no
    memory. FP8 convolutions of the decoder count as those in `decoding`.
    """
    layers = config.model.num_layers
    one, two = (
        _chunk_work(_with_layers(config, count), grid, dtype, on_cuda) for count in (1, min(2, layers))
    )
    # all layers together; each pass of a chunk is over one layer after the other
    first, steady = _eviction_work(replace(config, runtime=RuntimeConfig()), grid, dtype, on_cuda)
    decodes = replace(config, runtime=RuntimeConfig(vae=config.runtime.vae))
    decoder = _decoder_work(decodes, grid, dtype, decoding, on_cuda)
    return StreamWork(
        first=max(two["first"], first),
        steady=max(two["steady"], steady),
        text=one["text"] + (layers - 1) * (two["text"] - one["text"]),
        kept=one["kept"] + (layers - 1) * (two["kept"] - one["kept"]) + _of_other_steps(config, grid, dtype),
        **decoder,
    )


def _with_layers(config: EngineConfig, layers: int) -> EngineConfig:
    """`config` with so many layers, all on the device, and nothing that changes no work of a chunk."""
    asked = config.runtime
    runtime = RuntimeConfig(block_weights=asked.block_weights)
    if asked.multiplies_fp8:
        runtime = RuntimeConfig(precision="fp8")
    schedule = config.schedule
    if schedule.rolling == "none":  # every step takes the same
        schedule = replace(schedule, denoising_steps=schedule.denoising_steps[:1], first_steps=())
    model = replace(config.model, num_layers=layers)
    return replace(config, model=model, runtime=runtime, schedule=schedule)


def _of_other_steps(config: EngineConfig, grid: LatentGrid, dtype: torch.dtype) -> int:
    """Of the modulation and the noise of the steps that _with_layers leaves out."""
    schedule, model = config.schedule, config.model
    if schedule.rolling != "none":
        return 0
    levels = len({*schedule.denoising_steps, *schedule.first_steps}) - 1
    modulation = (6 * model.num_layers + 2) * model.dim * torch.float32.itemsize
    draw = model.in_dim * config.cache.chunk_frames * grid.latent_height * grid.latent_width * dtype.itemsize
    return levels * modulation + (len(schedule.denoising_steps) - 1) * draw


def _without_memory() -> AbstractContextManager[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _ops(live: LiveMemory, config: EngineConfig, dtype: torch.dtype, on_cuda: bool) -> Ops:
    return _FusedOps(live) if on_cuda else choose_ops(config.backend, _CPU, dtype=dtype)


@functools.lru_cache(_KEPT)
def _chunk_work(config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, on_cuda: bool) -> dict[str, int]:
    """first, steady, text and kept of a model with the few layers of `config`."""
    peaks: dict[str, int] = {}
    schedule, rolling = FlowSchedule(config.schedule), config.schedule.rolling  # which reads its own values
    identity_of_norm(config.model.dim)  # which the ops of a CPU keep for other runs, so it must have memory
    with _without_memory(), torch.no_grad(), _Rehearsed() as live:
        ops = _ops(live, config, dtype, on_cuda)
        model = load_transformer(Checkpoint.random(config), config, ops, dtype, _CPU)
        if config.runtime.multiplies_fp8:
            quantise(model)
        cache = _cache(config, grid, dtype, ops)
        before = live.live
        states = torch.zeros(1, config.model.text_len, config.model.text_dim, dtype=dtype, device=_CPU)
        with live.section(peaks, "text"):
            text = model.text_keys_values(states)
        peaks["text"] -= text.keys.nbytes + text.values.nbytes
        if rolling == "none":
            runner = ChunkRunner(model, schedule)
        else:
            runner = RollingRunner(model, schedule, rolling == "causal")
        with live.section(peaks, "first"):
            kept = _advance(runner, cache, text, dtype)
        while not cache.plan_chunk().evicts:
            _pass_over(cache)
        with live.section(peaks, "steady"):
            kept = [kept, _advance(runner, cache, text, dtype)]  # of another length than the first, perhaps
        peaks["kept"] = live.live - before - text.keys.nbytes - text.values.nbytes
    return peaks


def _cache(config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, ops: Ops) -> StreamingKVCache:
    return StreamingKVCache(config.model, config.cache, grid, dtype=dtype, device=_CPU, ops=ops)


def _advance(runner: ChunkRunner, cache: StreamingKVCache, text: TextKeysValues, dtype: torch.dtype) -> Any:
    """One chunk; what of it is alive until the next one."""
    plan, grid = cache.plan_chunk(), cache.grid
    draws, channels = len(runner.draws(cache, plan.chunk)), runner.model.config.in_dim
    shape = (draws, 1, channels, plan.frames, grid.latent_height, grid.latent_width)
    noise = torch.zeros(shape, dtype=dtype, device=_CPU)
    return noise, runner.advance(cache, plan, noise, text)


def _pass_over(cache: StreamingKVCache) -> None:
    plan = cache.plan_chunk()
    cache.begin_chunk(plan)
    cache.commit(plan)


@functools.lru_cache(_KEPT)
def _eviction_work(
    config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, on_cuda: bool
) -> tuple[int, int]:
    """What the beginning of the first chunk and of a steady one takes, for all layers together."""
    peaks: dict[str, int] = {}
    with _without_memory(), torch.no_grad(), _Rehearsed() as live:
        cache = _cache(config, grid, dtype, _ops(live, config, dtype, on_cuda))
        with live.section(peaks, "first"):
            _pass_over(cache)
        while not cache.plan_chunk().evicts:
            _pass_over(cache)
        with live.section(peaks, "steady"):
            _pass_over(cache)
    return peaks["first"], peaks["steady"]


@functools.lru_cache(_KEPT)
def _decoder_work(
    config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, decoding: torch.dtype, on_cuda: bool
) -> dict[str, int]:
    """decode_first, decode and decoder_weights."""
    peaks: dict[str, int] = {}
    cache, size = config.cache, (grid.latent_height, grid.latent_width)
    is_tiny = config.runtime.vae == "tiny"
    with torch.device("meta"):
        module = TinyVAE(config.tiny_vae).to(dtype) if is_tiny else described_vae(config, decoding)
    described = module.decoder_state(1, *size, dtype if is_tiny else decoding, "meta")
    with _without_memory(), torch.no_grad(), _Rehearsed() as live:
        _place(module)
        of_vae = 0 if is_tiny else live.live
        ops = _ops(live, config, decoding, on_cuda)
        decoder = module if is_tiny else StreamingDecoder(module, ops)
        decoder.ops = ops  # of the tiny one
        weights = live.live - of_vae
        state = type(described)({name: _like(slot) for name, slot in described.slots.items()})
        for name, frames in (
            ("decode_first", cache.first_chunk),
            ("decode", cache.chunk_frames),
            ("decode", cache.chunk_frames),
        ):  # fmt: skip
            latents = torch.zeros(1, config.vae.z_dim, frames, *size, dtype=dtype, device=_CPU)
            halos = 0 if is_tiny else decoder.halo_bytes
            with live.section(peaks, name):
                _decode(decoder, latents, state)
            peaks[name] -= 0 if is_tiny else decoder.halo_bytes - halos  # those stay
    return {**peaks, "decoder_weights": weights}


def _place(module: nn.Module) -> None:
    """Give the parameters of a module on the meta device their size in what is counted."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(_like(parameter), requires_grad=False))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device=_CPU)


def _decode(decoder: StreamingDecoder | TinyVAE, latents: Tensor, state: Any) -> Tensor:
    """decode_frames, but for the check of values, of which there are none."""
    if isinstance(decoder, TinyVAE):
        return decoder.decode_frames(latents, state)
    frames = decoder.run(latents, state, packed=True)
    state.frames += latents.shape[2]
    return frames
