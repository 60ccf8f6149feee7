"""Replays golden files through the engine's own classes and measures how far the results are apart.

Every size comes from the file. The error of a tensor is the norm of the difference over the norm of what was
recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import Backend, CacheConfig, DTypeName, ScheduleConfig, VAEConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.models.decoder import FrameDecoder
from rfengine.models.dit import WanDiT
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.text_encoder import ByteTokenizer, TextEncoder, build_umt5
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops, choose_ops
from rfengine.parity.golden_file import GoldenFile
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule

_FLOAT32_TOLERANCES = {"causal": 3e-6, "vae": 3e-6, "umt5": 5e-6}
# In 16 bits the error is the same multiple of the epsilon in both dtypes: at most 0.94, 2.0 and 7.4 with
# the reference backend on the golden files of the tests; twice that is allowed.
_EPSILONS = {"causal": 2.0, "vae": 4.0, "umt5": 15.0}
_CALL_FRAMES = (1, 2, 3)  # latent frames per call of the VAE; cache mistakes can hide in longer calls


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Errors of one file by tensor; a result that is not finite has an infinite error."""

    file: str
    kind: str
    dtype: str
    backend: str
    errors: dict[str, float]
    tolerance: float

    @property
    def max_rel_err(self) -> float:
        return max(self.errors.values())

    @property
    def ok(self) -> bool:
        return self.max_rel_err <= self.tolerance

    def to_json(self) -> str:
        """One line; an infinite error is null there, since JSON has no infinity."""
        line = json.dumps(asdict(self) | {"max_rel_err": self.max_rel_err, "ok": self.ok})
        return json.dumps(json.loads(line, parse_constant=lambda name: None))


def replay(
    path: str | Path,
    backend: Backend = "auto",
    device: torch.device | str = "cpu",
    dtype: DTypeName = "float32",
) -> ParityReport:
    """Replay one golden file on `device` in `dtype`.

    Raises ValueError for a file that is damaged or no golden file, RuntimeError where `backend` cannot run.
    """
    where = torch.device(device)
    ops = choose_ops(backend, where, dtype=getattr(torch, dtype))
    replays: dict[str, Callable[[GoldenFile, Ops], dict[str, float]]] = {
        "causal": _replay_causal, "vae": _replay_vae, "umt5": _replay_umt5,
    }  # fmt: skip
    try:
        golden = GoldenFile(Path(path), where, getattr(torch, dtype))
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            errors = replays[golden.kind](golden, ops)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path} cannot be replayed: {text}") from error
    used = "+".join(sorted(set(ops.choice.values())))
    return ParityReport(str(path), golden.kind, dtype, used, errors, tolerance(golden.kind, dtype))


def tolerance(kind: str, dtype: DTypeName) -> float:
    """The largest error that passes for a file of `kind` in `dtype`."""
    if dtype == "float32":
        return _FLOAT32_TOLERANCES[kind]
    return _EPSILONS[kind] * torch.finfo(getattr(torch, dtype)).eps


def _replay_causal(golden: GoldenFile, ops: Ops) -> dict[str, float]:
    config, stored = golden.config_and_weights()
    model = golden.load(WanDiT(config, ops), stored)
    noise, frames, num_chunks = _chunk_noise(golden, config)
    header, steps = golden.header, tuple(golden.header["denoising_steps"])
    runners = []
    for chosen in (steps, steps[:1]):
        schedule = FlowSchedule(ScheduleConfig(float(header["timestep_shift"]), denoising_steps=chosen))
        schedule.context_timestep = float(header.get("context_timestep", schedule.context_timestep))
        runners.append(ChunkRunner(model, schedule))
    runner, first_step = runners
    height, width = (side * VAEConfig().spatial_stride for side in noise[0].shape[-2:])
    grid = LatentGrid.of_parts(config, VAEConfig(), height, width)
    cache_config, batch = _cache_config(golden, grid, frames, num_chunks), noise[0].shape[1]
    cache, twin = (
        StreamingKVCache(config, cache_config, grid, batch, golden.dtype, golden.device, ops)
        for _ in range(2)
    )
    text = model.text_keys_values(golden.input("prompt_embeds"))
    latents, flows = [], []
    for draws in noise:
        plan = cache.plan_chunk()
        # one step from the same state shows the first flow: x0 = noise - sigma * flow
        twin.load(cache.tensors(), cache.position)
        x0 = first_step.advance(twin, plan, draws[:1], text)
        flows.append((draws[0].float() - x0.float()) / first_step.schedule.denoising_sigmas[0])
        latents.append(runner.advance(cache, plan, draws, text))
    errors = {
        "latents": relative_error(torch.cat(latents, 2).transpose(1, 2), golden.recorded("latents")),
        "first_flow": relative_error(torch.cat(flows, 2).transpose(1, 2), golden.recorded("first_flow")),
        **_cache_errors(golden, cache),
    }
    warped = torch.tensor(header["warped_timesteps"], dtype=torch.float64, device="cpu")
    errors["timesteps"] = relative_error(
        torch.tensor(runner.schedule.denoising_timesteps, dtype=torch.float32, device="cpu"), warped
    )
    return errors


def _chunk_noise(golden: GoldenFile, model: WanConfig) -> tuple[list[Tensor], int, int]:
    """Noise of every chunk, [steps, B, C, F, h, w] each; the frames of a chunk and the number of chunks."""
    frames, steps = golden.header["frames_per_chunk"], len(golden.header["denoising_steps"])
    batch, total, *rest = golden.shape("noise")
    num_chunks = golden.shape("renoise")[0]
    expected = [num_chunks, steps - 1, batch, frames, *rest]
    if golden.shape("renoise") != expected or total != num_chunks * frames:
        raise ValueError(
            f"t.noise is {golden.shape('noise')} and t.renoise {golden.shape('renoise')}; with {steps} steps "
            f"and chunks of {frames} frames the second must be {expected}, and the first must have as many "
            "frames"
        )
    text_batch, _, text_dim = golden.shape("prompt_embeds")
    if (text_batch, text_dim, rest[0]) != (batch, model.text_dim, model.in_dim):
        raise ValueError(
            f"t.noise is {golden.shape('noise')} and t.prompt_embeds {golden.shape('prompt_embeds')}; the "
            f"model takes {model.in_dim} channels, and of the same batch texts of {model.text_dim}"
        )
    first, fresh = golden.input("noise"), golden.input("renoise")
    starts = first.unflatten(1, (num_chunks, frames)).unbind(1)
    noise = [torch.cat([start[None], later]) for start, later in zip(starts, fresh, strict=True)]
    return [draws.transpose(2, 3) for draws in noise], frames, num_chunks


def _cache_config(golden: GoldenFile, grid: LatentGrid, frames: int, num_chunks: int) -> CacheConfig:
    """The cache of the recording; a window of -1, and one longer than the recording, never evicts."""
    header = golden.header
    window, sink_frames, total = header["local_attn_size"], header["sink_size"], num_chunks * frames
    recorded = golden.shape("cache_k")[1] if "cache_k" in golden else window * grid.frame_tokens
    if window > 0 and (window % frames or recorded != window * grid.frame_tokens):
        raise ValueError(
            f"local_attn_size is {window} frames of {grid.frame_tokens} tokens, in chunks of {frames}, and "
            f"{recorded} tokens of the cache are recorded; record it again, or with -1 for no window"
        )
    if not 0 < window <= total:
        window = max(total, sink_frames + 2 * frames)
    return CacheConfig(
        chunk_frames=frames,
        window_frames=window,
        sink=header["sink"],
        sink_frames=sink_frames,
        alpha=float(header["alpha"]),
        positions=header["positions"],
    )


def _cache_errors(golden: GoldenFile, cache: StreamingKVCache) -> dict[str, float]:
    """Errors of the cache after the last context pass; keys before rotation where positions are relative."""
    errors, sink_tokens = {}, cache.config.sink_frames * cache.grid.frame_tokens
    for letter, arena in (
        ("k", cache.keys if cache.raw_keys is None else cache.raw_keys),
        ("v", cache.values),
    ):
        valid = cache.chronological(arena)[:, 0]
        for name, own in ((f"cache_{letter}", valid), (f"sink_{letter}_last", valid[:, :sink_tokens])):
            if name in golden:
                recorded = golden.recorded(name)
                # a window that is not full yet may be recorded whole, with zeros behind what is valid
                empty = max(0, recorded.shape[1] - own.shape[1]) if name.startswith("cache") else 0
                padded = torch.cat([own, own.new_zeros(own.shape[0], empty, *own.shape[2:])], dim=1)
                errors[name] = relative_error(padded, recorded)
    return errors


def _replay_vae(golden: GoldenFile, ops: Ops) -> dict[str, float]:
    config, stored = golden.config_and_weights()
    vae = golden.load(WanVAE(config), stored)
    errors = {}
    if "latents" in golden:
        latents, video = golden.input("latents"), golden.recorded("video")
        errors["video_whole"] = relative_error(vae.decode(latents), video)
        streaming = StreamingDecoder(vae, ops)
        for frames in _CALL_FRAMES:
            errors[f"video_by_{frames}"] = relative_error(_decode_by(vae, latents, frames), video)
            each = [_decode_by(streaming, one, frames) for one in latents.split(1)]
            errors[f"video_streamed_by_{frames}"] = relative_error(torch.cat(each), video)
    if "pixels" in golden:
        pixels, encoded = golden.input("pixels"), golden.recorded("encoded")
        errors["encoded"] = relative_error(vae.encode(pixels), encoded)
        for frames in _CALL_FRAMES:
            errors[f"encoded_by_{frames}"] = relative_error(vae.encode_in_groups(pixels, frames), encoded)
    return errors


def _decode_by(vae: FrameDecoder, latents: Tensor, frames: int) -> Tensor:
    """Decode `frames` latent frames in each call, as a stream does."""
    state = vae.decoder_state(latents.shape[0], *latents.shape[3:], latents.dtype, latents.device)
    return torch.cat([vae.decode(piece, state) for piece in latents.split(frames, dim=2)], dim=2)


def _replay_umt5(golden: GoldenFile, _: Ops) -> dict[str, float]:
    config, stored = golden.config_and_weights()
    model = build_umt5(config)
    model.load_state_dict({name: tensor.read() for name, tensor in stored.items()}, strict=False)
    ids, mask = golden.recorded("ids").long(), golden.recorded("mask").long()
    if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"t.mask is {list(mask.shape)}; it must be 0 or 1 for each of the {list(ids.shape)} ids"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"t.ids has ids up to {ids.max()}; the vocabulary has {config.vocab_size}")
    encoder = TextEncoder(model, ByteTokenizer(), ids.shape[1], golden.device, golden.dtype)
    return {"embeds": relative_error(encoder.encode_ids(ids, mask), golden.recorded("embeds"))}
