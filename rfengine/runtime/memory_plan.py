"""MemoryPlan: every byte of a pipeline with one stream, by part and by phase, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rfengine.checkpoint.shapes import expected_shapes
from rfengine.config import DTypeName, EngineConfig
from rfengine.costs.memory import memory_needs, parameter_count
from rfengine.costs.placed_weights import PlacedBytes, text_encoder_weights, transformer_weights
from rfengine.grid import LatentGrid
from rfengine.runtime.decoder_precision import plan_precision
from rfengine.runtime.memory_work import StreamWork, stream_work
from rfengine.runtime.options import model_dtype, runtime_switches

MIB = 2**20
# On CUDA beside what torch's tensors take; none of the three was measured.
CONTEXT_BYTES = 512 * MIB  # what driver and CUDA context keep of a card's memory
LIBRARY_BYTES = 256 * MIB  # workspaces of cuBLAS and cuDNN
ROUNDING = 0.03  # of the tensors: blocks of 2 MiB, and free pieces that nothing fits into
_LATER = ("small", "vae_buffers", "graph_inputs")  # parts that come with the first chunks


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the model's device. parts: what stays, by name. work: what is taken and given back again, by
    name. phases: the peak of each phase, in their order. host: what is in host memory beside that. reserve:
    what is added on CUDA for all that is not a tensor of torch, unmeasured."""

    height: int
    width: int
    parts: dict[str, int]
    work: dict[str, int]
    phases: dict[str, int]
    host: dict[str, int]
    reserve: dict[str, int]

    @property
    def peak(self) -> int:
        """Of torch's tensors in any phase."""
        return max(self.phases.values())

    @property
    def needed(self) -> int:
        """Of a device whose context is there already: the peak and what libraries and rounding take."""
        return self.peak + sum(size for name, size in self.reserve.items() if name != "context")

    @property
    def card(self) -> int:
        """Of a whole card: with the context."""
        return self.peak + sum(self.reserve.values())


def plan_memory(
    config: EngineConfig,
    grid: LatentGrid,
    device_type: str,
    dtype: DTypeName | torch.dtype | None = None,
    text_on_device: bool = True,
) -> MemoryPlan:
    """The plan of a pipeline of `config` with one stream at `grid` on a device of `device_type`, which need
    not be here; nothing is loaded and no memory taken. It takes seconds: it runs the program on tensors
    without memory (memory_work.py).

    dtype: of the model, as from_pretrained takes it. text_on_device: the text encoder is on the model's
    device. On a CPU one memory has all, and `host` is empty. Raises ValueError for a decoder of TensorRT,
    whose memory its engine alone knows, and for a diffusion forcing model.
    """
    if config.runtime.vae == "tensorrt":
        raise ValueError(
            "vae is 'tensorrt', and only its engine knows its memory; plan with 'full' or 'tiny'"
        )
    device = torch.device(device_type)
    own = model_dtype(config.runtime, dtype, device)
    decoding = plan_precision(config.runtime, device_type, own).dtype
    on_cuda = device.type == "cuda"
    work = stream_work(config, grid, own, decoding, on_cuda)
    needs = memory_needs(config, grid, own, decoding)
    switches = runtime_switches(config.runtime, device)
    graphs, overlap = switches["graphs"].on, switches["overlap"].on
    transformer, text = transformer_weights(config, own), text_encoder_weights(config, own)
    parts = _parts(config, grid, needs, work, own, on_cuda)
    parts |= _graph_inputs(config, grid, needs, own) if graphs else {}
    host = {"transformer": transformer.host, "text_encoder": text.host}
    if on_cuda:
        host["transformer"] += _lost_to_pinning(transformer.pinned, config.model.num_layers)
    if not text_on_device:
        host["text_encoder"] = text.device + text.host
        text = PlacedBytes(0, text.host)
    elif on_cuda:
        host["text_encoder"] += _lost_to_pinning(text.pinned, config.text.num_layers)
    if not on_cuda:
        parts["transformer"] += host["transformer"]
        text = PlacedBytes(text.device, host["text_encoder"])
        host = {}
    sums = _Sums(parts, text, work, host, graphs, overlap, transformer.working)
    return _plan(config, grid, own, sums, on_cuda)


@dataclass(frozen=True, slots=True)
class _Sums:
    """What the phases are made of."""

    parts: dict[str, int]
    text: PlacedBytes
    work: StreamWork
    host: dict[str, int]
    graphs: bool
    overlap: bool
    working_blocks: int


def _plan(
    config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, sums: _Sums, on_cuda: bool
) -> MemoryPlan:
    parts, text, work = dict(sums.parts), sums.text, sums.work
    encode = _encoding_work(config, dtype)
    in_host = 0 if on_cuda else text.host
    stays = text.device if config.runtime.text_encoder != "layers" else 0
    passing = text.device - stays  # layers that are there while a prompt is encoded
    weights = sum(parts[name] for name in ("transformer", "transformer_fp8", "vae", "decoder_weights"))
    loading = weights - parts["vae"] + 4 * parameter_count(config.vae)
    parts["text_encoder"] = stays + in_host
    resident = sum(parts.values())
    switch = parts["cross_attention"] + work.text  # the prompt before has its own meanwhile
    steady = (sum if sums.overlap else max)((work.steady, work.decode))
    # recorded graphs keep what they work in; without them a chunk may be decoded while a prompt is encoded
    beside = steady if sums.graphs else work.decode if sums.overlap else 0
    again = max(work.first, work.decode_first) if sums.graphs else 0  # a video that starts anew, op by op
    unmade = sums.working_blocks  # which come with the first keys and values of a text
    phases = {
        "loading": max(loading, weights + (0 if on_cuda else _largest_read(config, dtype))) - unmade,
        "encoding": weights - unmade + parts["text_encoder"] + passing + encode,
        "opening": max(
            weights + parts["text_encoder"] + parts["cross_attention"] + work.text,
            resident - sum(parts.get(name, 0) for name in _LATER),
        ),
        "first chunk": resident + max(work.first, work.decode_first),
        "steady chunk": resident + steady,
        "prompt switch": resident + beside + max(passing + encode, switch, again),
    }
    names = ("first", "steady", "text", "decode_first", "decode")
    taken = {name: getattr(work, name) for name in names} | {"encode": encode + passing}
    reserve = {}
    if on_cuda:
        rounding = int(max(phases.values()) * ROUNDING)
        reserve = {"context": CONTEXT_BYTES, "libraries": LIBRARY_BYTES, "rounding": rounding}
    return MemoryPlan(grid.height, grid.width, parts, taken, phases, sums.host, reserve)


def _parts(
    config: EngineConfig,
    grid: LatentGrid,
    needs: dict[str, int],
    work: StreamWork,
    dtype: torch.dtype,
    on_cuda: bool,
) -> dict[str, int]:
    """What stays, without the text encoder."""
    parts = {name: size for name, size in needs.items() if name not in ("total", "text_encoder")}
    parts["decoder_weights"] = work.decoder_weights
    cache = config.cache
    kept_frames = -(-cache.past_frames // cache.chunk_frames) * cache.chunk_frames
    latents = config.model.in_dim * kept_frames * grid.latent_height * grid.latent_width * dtype.itemsize
    frames = 0 if on_cuda else cache.chunk_frames * config.vae.temporal_stride * grid.height * grid.width * 3
    parts["small"] = work.kept + latents + frames
    return parts


def _graph_inputs(
    config: EngineConfig, grid: LatentGrid, needs: dict[str, int], dtype: torch.dtype
) -> dict[str, int]:
    """What the recorded programs read: noise, and the keys and values of the text once more."""
    draws, cache = len(config.schedule.denoising_steps), config.cache
    values = config.model.in_dim * cache.chunk_frames * grid.latent_height * grid.latent_width
    return {"graph_inputs": needs["cross_attention"] + (draws + 1) * values * dtype.itemsize}


def _encoding_work(config: EngineConfig, dtype: torch.dtype) -> int:
    """That of the text encoder for a prompt of full length: scores of the attention, in `dtype` and in
    float32 for the softmax, or the feed-forward part; with int8 the largest weight as it is multiplied."""
    text, rows = config.text, config.model.text_len
    scores = text.num_heads * rows * rows * (3 * dtype.itemsize + 2 * 4)
    hidden = 3 * rows * text.ffn_dim * dtype.itemsize
    is_int8 = config.runtime.text_weights == "int8"
    widest = 4 if dtype == torch.float16 else dtype.itemsize  # in float16 one product is in float32
    widened = text.ffn_dim * text.dim * widest if is_int8 else 0
    return max(scores, hidden) + widened + 6 * rows * text.dim * 4


def _largest_read(config: EngineConfig, dtype: torch.dtype) -> int:
    """Of one weight of the transformer in float32, which is there while it is cast."""
    if dtype == torch.float32:
        return 0
    return 4 * max(torch.Size(shape).numel() for shape in expected_shapes(config.model).values())


def _lost_to_pinning(size: int, blocks: int) -> int:
    """What torch takes beside `size` bytes of pinned memory in equal blocks: a power of two for each."""
    each = size // blocks
    return blocks * (1 << (each - 1).bit_length()) - size if each else 0
