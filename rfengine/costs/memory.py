"""Memory of one stream: weights, cache, and the state and buffers of the decoder, in bytes, and
whether they fit; that of LoRAs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rfengine.cache.kv_cache import StreamingKVCache, arena_shape
from rfengine.cache.window_fp8 import AttentionUnits, WindowFP8
from rfengine.checkpoint.lora import LoadedLora, changes_by_tensor
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.config import EngineConfig, TextConfig, VAEConfig, WanConfig
from rfengine.costs.chunk import block_linears
from rfengine.costs.placed_weights import text_encoder_weights, transformer_weights
from rfengine.costs.shapes import require_stream
from rfengine.grid import LatentGrid
from rfengine.memory import require_memory
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS

_BYTES_OF_FRAMES = 2  # for each value of a video: the chunks, and their concatenation
_BYTES_OF_FLOATS = 6  # where frames are returned as float32: those, and both of the above


def memory_needs(
    config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, decoder_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Bytes that one stream of `config` at `grid` needs, without activations, with weights and state in
    `dtype`, but for the VAE: its encoder in float32, its decoder in decoder_dtype or else `dtype`; allocates
    nothing.

    transformer_fp8: the weights in e4m3 beside the model's own, as if no product were left out. keys_values,
    raw_keys: the arenas of the cache; raw keys are kept with relative positions. window_fp8: copies of the
    window for attention in FP8. sink_remainder: the low part of averages. in_flight: latents of a rolling
    schedule, and numbers of frames that the device keeps. cross_attention: keys and values of the text.
    vae_state: of the decoder. vae_buffers: of the lossless one, shared by all streams. total: their sum.
    Raises ValueError for a diffusion forcing model, of which costs/window.py speaks.
    """
    require_stream(config)
    model = config.model
    cache = StreamingKVCache(model, config.cache, grid, dtype=dtype, device="meta").tensors()
    apart = ("keys", "values", "raw_keys", "joint_latents", "device_held")
    arenas = {name: cache.pop(name).nbytes for name in apart if name in cache}
    vae = described_vae(config, decoder_dtype or dtype)
    needs = {
        **weight_bytes(config, dtype, vae),
        "keys_values": arenas["keys"] + arenas["values"],
        "raw_keys": arenas.get("raw_keys", 0),
        "window_fp8": window_fp8_bytes(config, grid),
        "sink_remainder": _nbytes(cache.values()),
        "in_flight": arenas.get("joint_latents", 0) + arenas.get("device_held", 0),
        "cross_attention": text_bytes(model, dtype),
        **decoder_bytes(config, grid, dtype, vae),
    }
    return needs | {"total": sum(needs.values())}


def described_vae(config: EngineConfig, decoding: torch.dtype) -> WanVAE:
    """The VAE on the meta device, its decoder in `decoding` and its encoder in float32."""
    with torch.device("meta"):
        vae = WanVAE(config.vae).float()
    vae.set_decoder_dtype(decoding)
    return vae


def weight_bytes(config: EngineConfig, dtype: torch.dtype, vae: WanVAE) -> dict[str, int]:
    """Bytes of the weights of each part on the device, in `dtype` but for the VAE and what config.runtime has
    in int8."""
    return {
        "transformer": transformer_weights(config, dtype).device,
        "transformer_fp8": fp8_weight_bytes(config.model, dtype) if config.runtime.multiplies_fp8 else 0,
        "vae": _nbytes(vae.parameters()),
        "text_encoder": text_encoder_weights(config, dtype).device,
    }


def fp8_weight_bytes(model: WanConfig, dtype: torch.dtype) -> int:
    """Of the WeightFP8 of every product of the blocks: for each weight a byte, for each output a scale and a
    copy of the bias, and its reach."""
    sizes = block_linears(model).values()
    of_outputs = sum(outputs for _, outputs in sizes) * (torch.float32.itemsize + dtype.itemsize)
    weights = sum(inputs * outputs for inputs, outputs in sizes)
    return model.num_layers * (weights + of_outputs + len(sizes) * 2 * torch.float32.itemsize)


def window_fp8_bytes(config: EngineConfig, grid: LatentGrid) -> int:
    """Of the WindowFP8 of one stream; 0 where no pass attends in FP8."""
    if not config.fp8_passes:
        return 0
    shape = arena_shape(config.model, config.cache, grid)
    arena = torch.empty(shape, dtype=torch.float32, device="meta")
    units = AttentionUnits(*(arena.new_empty(config.model.num_layers) for _ in AttentionUnits._fields))
    window = WindowFP8.of(arena, units)
    return _nbytes((window.keys, window.values, window.key_mean, window.value_unit))


def text_bytes(model: WanConfig, dtype: torch.dtype) -> int:
    """Of the keys and values of one prompt, for all layers."""
    return 2 * model.num_layers * model.text_len * model.dim * dtype.itemsize


def decoder_bytes(config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, vae: WanVAE) -> dict[str, int]:
    """Bytes of the state and the buffers of the decoder: the tiny one, which has no buffers, or the lossless
    one of a described_vae. dtype: of the latents, and of the tiny decoder."""
    if config.runtime.vae == "tiny":
        with torch.device("meta"):
            tiny = TinyVAE(config.tiny_vae)
        slots = tiny.decoder_state(1, grid.latent_height, grid.latent_width, dtype, "meta").tensors()
        return {"vae_state": _nbytes(slots.values()), "vae_buffers": 0}
    decoder, size = StreamingDecoder(vae, REFERENCE_OPS), (grid.latent_height, grid.latent_width)
    state = decoder.decoder_state(1, *size, vae.decoder_dtype, "meta")
    with torch.no_grad():
        for frames in (config.cache.first_chunk, config.cache.chunk_frames):  # the first, then any other
            latents = torch.empty(1, config.vae.z_dim, frames, *size, dtype=dtype, device="meta")
            decoder.run(latents, state, packed=False)
            state.frames += frames
    return {"vae_state": _nbytes(state.tensors().values()), "vae_buffers": decoder.halo_bytes}


def lora_bytes(loras: Sequence[LoadedLora], config: WanConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of host memory that LoRAs take in a pipeline whose weights are in `dtype`.

    lora_values: their own, in the dtypes of their files. lora_originals: the weights of what they change, as
    they are without them; those at scale 0 change nothing.
    """
    shapes = expected_shapes(config)
    values = sum(torch.Size(shapes[name]).numel() for name in changes_by_tensor(loras))
    return {"lora_values": sum(each.nbytes for each in loras), "lora_originals": values * dtype.itemsize}


def stream_bytes(needs: dict[str, int]) -> int:
    """Of memory_needs, what each stream has of its own."""
    shared = {"transformer", "transformer_fp8", "vae", "text_encoder", "vae_buffers", "total"}
    return sum(size for name, size in needs.items() if name not in shared)


def require_stream_fits(
    config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, devices: tuple[torch.device, torch.device]
) -> None:
    """Raises RuntimeError where the cache, or the largest layer of the full decoder, cannot fit.

    devices: the model's, and the decoder's.
    """
    place, decoding = devices
    arenas = 3 if config.cache.positions == "relative" else 2
    needs = {place: arenas * dtype.itemsize * math.prod(arena_shape(config.model, config.cache, grid))}
    needs[place] += window_fp8_bytes(config, grid)
    if config.runtime.vae == "full":
        frames = config.cache.longest_chunk * grid.temporal_stride
        values = frames * grid.height * grid.width * config.vae.base_dim * config.vae.dim_mult[0]
        needs[decoding] = needs.get(decoding, 0) + 2 * values * dtype.itemsize  # the layer's input and output
    for device, size in needs.items():
        what = f"a stream of {grid.height} x {grid.width} pixels"
        require_memory(size, device, what, "choose a smaller height and width, or a smaller window")


def require_frames_fit(
    count: int,
    grid: LatentGrid,
    as_floats: bool = False,
    instead: str = "take the chunks of stream() one by one",
) -> None:
    """Raises RuntimeError where host memory cannot hold `count` frames; as_floats: they are returned as
    float32. instead: what the error offers beside fewer frames."""
    size = count * grid.height * grid.width * 3 * (_BYTES_OF_FLOATS if as_floats else _BYTES_OF_FRAMES)
    what = f"holding {count} frames of {grid.height} x {grid.width} pixels"
    require_memory(size, torch.device("cpu"), what, f"ask for fewer, or {instead}")


def parameter_count(config: WanConfig | VAEConfig | TextConfig) -> int:
    """Parameters of a part of the engine."""
    return sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
