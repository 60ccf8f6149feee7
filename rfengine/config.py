"""Frozen configuration of the model, the cache, the schedule and the engine, and the presets built from them.

Every size the engine uses follows from these fields and from the resolution (see grid.py); nothing else holds
one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from rfengine.diffusion_forcing_config import DiffusionForcingConfig, check_diffusion_forcing
from rfengine.limits import Entries, Range, Text, check_fields, shown
from rfengine.runtime_config import RuntimeConfig

BYTE_TOKENS = 256 + 3  # one for each byte, above those for padding, end and unknown

Positions = Literal["relative", "absolute"]
SinkKind = Literal["ema", "frozen", "none"]
SinkPrecision = Literal["split", "bf16"]
Eviction = Literal["oldest", "similarity"]
Rolling = Literal["none", "joint", "causal"]
Backend = Literal["auto", "reference", "triton", "native", "cudnn", "flash"]
DTypeName = Literal["float32", "bfloat16", "float16"]

# Far above every published model, and low enough that nothing of that size takes long to describe. What a
# checkpoint really has is compared with its tensors (checkpoint/checkpoint.py).
Layers = Annotated[int, Range(1, 1024)]
Heads = Annotated[int, Range(1, 1024)]
Width = Annotated[int, Range(1, 65536)]
HiddenWidth = Annotated[int, Range(1, 262144)]
Channels = Annotated[int, Range(1, 1024)]
Epsilon = Annotated[float, Range(1e-12, 1.0)]
MOST_WINDOW = 512  # latent frames
MAX_PIXELS = 8192  # along one side of a frame
Pixels = Annotated[int, Range(1, MAX_PIXELS)]


@dataclass(frozen=True, slots=True)
class WanConfig:
    """Shape of one Wan2.1 text-to-video transformer."""

    dim: Width
    ffn_dim: HiddenWidth
    num_heads: Heads
    num_layers: Layers
    text_dim: Width = 4096
    text_len: Annotated[int, Range(1, 1024)] = 512  # attention of the text encoder grows with its square
    freq_dim: Annotated[int, Range(2, 65536)] = 256
    in_dim: Channels = 16
    out_dim: Channels = 16
    patch_size: Annotated[tuple[int, int, int], Range(1, 16)] = (1, 2, 2)
    eps: Epsilon = 1e-6
    fps_embedding: bool = False  # SkyReels-V2 tells its 1.3B diffusion forcing model the frame rate

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim {self.dim} is not divisible by num_heads {self.num_heads}; change one of them"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"head_dim is {self.head_dim}; rotation needs an even head_dim of at least 6")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim is {self.freq_dim}; it holds cosines and sines, so it must be even")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size is {self.patch_size}; a patch spans exactly one latent frame")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """Shape of the causal video VAE; the statistics of its latents are those of the Wan2.1 VAE."""

    base_dim: Annotated[int, Range(2, 1024)] = 96  # a step between two levels halves it
    z_dim: Channels = 16
    dim_mult: Annotated[tuple[int, ...], Entries(1, 7), Range(1, 64)] = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, Range(1, 64)] = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: Annotated[tuple[float, ...], Range(-1e4, 1e4)] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: Annotated[tuple[float, ...], Range(1e-4, 1e4)] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries for {len(self.dim_mult)} "
                "levels; give one for every step between two levels"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(f"{name} has {len(getattr(self, name))} values; z_dim asks for {self.z_dim}")

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True, slots=True)
class TinyVAEConfig:
    """Shape of the tiny decoder; the defaults are the published taew2_1."""

    z_dim: Channels = 16
    # of the levels with memory blocks, then of the last one
    widths: Annotated[tuple[int, ...], Entries(2, 7), Range(1, 4096)] = (256, 128, 64, 64)
    memory_blocks: Annotated[int, Range(1, 64)] = 3  # of each level
    # frames that come of one, after each level
    time_factors: Annotated[tuple[int, ...], Range(1, 8)] = (1, 2, 2)

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.time_factors) != len(self.widths) - 1:
            raise ValueError(
                f"time_factors has {len(self.time_factors)} entries for {len(self.widths)} widths; give one "
                "for every step between two widths"
            )

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** len(self.time_factors)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return math.prod(self.time_factors)


def require_same_latents(tiny_vae: TinyVAEConfig, vae: VAEConfig) -> None:
    """Raises ValueError unless the tiny decoder takes the latents of `vae` to videos of the same size."""
    for name in ("z_dim", "spatial_stride", "temporal_stride"):
        given, wanted = getattr(tiny_vae, name), getattr(vae, name)
        if given != wanted:
            raise ValueError(
                f"{name} of the tiny decoder is {given} and that of the VAE {wanted}; use a tiny decoder "
                "that was trained for this VAE"
            )


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Shape of the UMT5 text encoder and its tokenizer. known_words: all it understands, if that is known."""

    vocab_size: Annotated[int, Range(3, 4194304)] = 256384
    dim: Width = 4096
    attention_dim: Width = 4096
    ffn_dim: HiddenWidth = 10240
    num_heads: Heads = 64
    num_layers: Layers = 24
    num_buckets: Annotated[int, Range(4, 4096)] = 32
    max_distance: Annotated[int, Range(2, 1048576)] = 128
    eps: Epsilon = 1e-6
    tokenizer: Literal["sentencepiece", "bytes"] = "sentencepiece"
    known_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_buckets % 2:
            raise ValueError(
                f"num_buckets is {self.num_buckets}; half of them are for each direction, so it must be even"
            )
        exact = self.num_buckets // 4  # distances with a bucket of their own; the others share by logarithm
        if self.max_distance <= exact:
            raise ValueError(
                f"max_distance is {self.max_distance} and num_buckets {self.num_buckets}; it must be above "
                f"{exact}, a quarter of them"
            )
        if self.tokenizer == "bytes" and self.vocab_size < BYTE_TOKENS:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; the tokenizer 'bytes' needs at least {BYTE_TOKENS}"
            )
        if self.attention_dim % self.num_heads:
            raise ValueError(
                f"attention_dim {self.attention_dim} is not divisible by num_heads {self.num_heads}; "
                "change one of them"
            )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a query can see, in latent frames: a sink, memory frames, the last frames of the video and what is
    being denoised (arXiv 2512.04678; memory frames: 2603.12513)."""

    chunk_frames: Annotated[int, Range(1, 64)] = 3
    window_frames: Annotated[int, Range(1, MOST_WINDOW)] = 9  # with sink, memory and what is denoised
    sink: SinkKind = "ema"
    sink_frames: Annotated[int, Range(0, 512)] = 3
    # weight of the sink in the EMA; 0.999 in the published code, 0.99 in its description
    alpha: Annotated[float, Range(0, 1)] = 0.999
    positions: Positions = "relative"
    sink_precision: SinkPrecision = "split"
    first_chunk_frames: Annotated[int, Range(1, 64)] | None = None  # chunk_frames where None
    # a memory frame for each: the weight of a frame that leaves, in the average of all that have left
    memory_rates: Annotated[tuple[float, ...], Entries(0, 8), Range(0, 1)] = ()
    eviction: Eviction = "oldest"
    joint_frames: Annotated[int, Range(0, 512)] = 0  # denoised beside each other, in a rolling schedule

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sink == "ema":
            self._check_average()
        elif self.memory_rates and self.positions == "absolute":
            raise ValueError(
                "a memory frame is an average and has no absolute time; use positions='relative'"
            )
        if self.eviction == "similarity":
            self._check_similarity()
        self._check_lengths()

    def _check_lengths(self) -> None:
        chunk, window, sink = self.chunk_frames, self.window_frames, self.sink_frames
        if (self.sink == "none") != (sink == 0):
            raise ValueError(
                f"sink_frames is {sink} and sink is {self.sink!r}; a sink has frames, and sink='none' has 0"
            )
        if self.joint_frames % chunk:
            raise ValueError(
                f"joint_frames is {self.joint_frames}; use a multiple of chunk_frames, which is {chunk}"
            )
        if self.joint_frames and self.first_chunk != chunk:
            raise ValueError(
                f"first_chunk_frames is {self.first_chunk} and joint_frames {self.joint_frames}; chunks that "
                f"are denoised beside each other all have chunk_frames, {chunk}"
            )
        needed = 2 * chunk if self.sink == "ema" or self.eviction == "similarity" else chunk
        if self.past_frames < needed:
            others = ((len(self.memory_rates), "of memory"), (self.joint_frames, "denoised jointly"))
            kept = "".join(f", {count} {what}" for count, what in others if count)
            chunks = f"a chunk of {chunk}" if needed == chunk else f"two chunks of {chunk}, past and present,"
            least = window - self.past_frames + needed
            raise ValueError(
                f"window_frames is {window}; a sink of {sink} frames{kept} and {chunks} do not fit into it, "
                f"use {f'at least {least}' if least <= MOST_WINDOW else 'a smaller sink or chunk'}"
            )
        if self.first_chunk > sink + self.past_frames:
            raise ValueError(
                f"first_chunk_frames is {self.first_chunk}; sink and past hold {sink + self.past_frames}"
            )

    def _check_average(self) -> None:
        if self.positions == "absolute":
            raise ValueError(
                "an averaged sink has no absolute time; use positions='relative' with sink='ema'"
            )
        if self.memory_rates:
            raise ValueError("memory_rates are given with sink='ema', which averages too; use sink='frozen'")

    def _check_similarity(self) -> None:
        if self.sink == "ema" or self.memory_rates or self.positions == "absolute" or self.joint_frames:
            raise ValueError(
                "eviction by similarity decides on the device which frame leaves; use it with relative "
                "positions, a frozen sink or none, no memory_rates and one chunk at a time"
            )

    def check_recache(self) -> None:
        """Raises ValueError where the window cannot be recomputed under another prompt."""
        if self.eviction == "similarity":
            raise ValueError(
                "the window cannot be recomputed where eviction is by similarity: the device alone knows its "
                "frames; switch with mode 'soft' or 'hard'"
            )

    @property
    def first_chunk(self) -> int:
        """Latent frames of the first chunk of a video."""
        return self.chunk_frames if self.first_chunk_frames is None else self.first_chunk_frames

    @property
    def longest_chunk(self) -> int:
        """Latent frames of the longest chunk of a video."""
        return max(self.first_chunk, self.chunk_frames)

    @property
    def resident_frames(self) -> int:
        """Latent frames whose keys stay from chunk to chunk: memory, sink and past."""
        return self.window_frames - self.joint_frames

    @property
    def past_frames(self) -> int:
        """The last latent frames of the video that are seen as they are, those of the chunk included."""
        return self.resident_frames - self.sink_frames - len(self.memory_rates)

    @property
    def filling_chunks(self) -> int:
        """Chunks of a video until sink and past are full; the last of them evicts where it does not fit."""
        return self.chunk_count(self.sink_frames + self.past_frames)

    def chunk_count(self, frames: int) -> int:
        """Chunks from the start of a video that have at least `frames` latent frames."""
        return 0 if frames <= 0 else 1 + max(0, -(-(frames - self.first_chunk) // self.chunk_frames))

    def frames_before(self, chunk: int) -> int:
        """Latent frames of a generated video before its chunk `chunk`."""
        return 0 if chunk == 0 else self.first_chunk + (chunk - 1) * self.chunk_frames


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Flow-matching schedule and the fixed denoising steps of the few-step sampler."""

    shift: Annotated[float, Range(1e-3, 1e3)] = 5.0
    num_train_timesteps: Annotated[int, Range(1, 100000)] = 1000
    # nominal, before the shift warps them
    denoising_steps: Annotated[tuple[int, ...], Entries(1, 1000)] = (1000, 750, 500, 250)
    first_steps: Annotated[tuple[int, ...], Entries(0, 1000)] = ()  # of the first chunks; empty: as others
    first_chunks: Annotated[int, Range(1, 1000)] = 1  # that have first_steps
    rolling: Rolling = "none"
    """joint, causal: chunks at all steps are denoised beside each other, and each pass finishes one (Rolling
    Forcing; Wave Forcing, where a chunk sees the cleaner ones alone)."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_steps("denoising_steps", self.denoising_steps)
        self._check_steps("first_steps", self.first_steps)
        if self.rolling != "none" and self.first_steps:
            raise ValueError(
                f"first_steps is {shown(self.first_steps)} and rolling is {self.rolling!r}; all chunks of a "
                "rolling schedule have the same steps"
            )

    def _check_steps(self, name: str, steps: tuple[int, ...]) -> None:
        if any(not 0 < step <= self.num_train_timesteps for step in steps):
            raise ValueError(f"{name} is {shown(steps)}; give steps from 1 to {self.num_train_timesteps}")
        if any(later >= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"{name} is {shown(steps)}; they must fall from one to the next")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything a checkpoint directory says about itself; stored as its `rfengine.json`."""

    name: Annotated[str, Text(1, 255)]
    model: WanConfig
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    height: Pixels = 480  # the size a checkpoint was trained at, and the default of generate()
    width: Pixels = 832
    fps: Annotated[int, Range(1, 1000)] = 16
    backend: Backend = "auto"
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tiny_vae: TinyVAEConfig = field(default_factory=TinyVAEConfig)
    diffusion_forcing: DiffusionForcingConfig | None = None  # of such a model alone, which streams nothing

    def __post_init__(self) -> None:
        check_fields(self)
        check_diffusion_forcing(self.diffusion_forcing, self.model.fps_embedding, self.vae.temporal_stride)
        if self.model.in_dim != self.vae.z_dim or self.model.out_dim != self.vae.z_dim:
            raise ValueError(
                f"the model maps {self.model.in_dim} to {self.model.out_dim} latent channels "
                f"but the VAE has {self.vae.z_dim}; all three must be equal"
            )
        joint = len(self.schedule.denoising_steps) * self.cache.chunk_frames
        if self.cache.joint_frames != (joint if self.schedule.rolling != "none" else 0):
            raise ValueError(
                f"joint_frames is {self.cache.joint_frames} and rolling is {self.schedule.rolling!r}; it "
                f"must be {joint} in a rolling schedule, a chunk for each denoising step, and 0 in any other"
            )
        if self.runtime.precision == "fp8-attention":
            self._check_fp8_attention()
        if self.model.text_dim != self.text.dim:
            raise ValueError(
                f"text_dim of the model is {self.model.text_dim}, the text encoder gives {self.text.dim}"
            )
        if self.runtime.vae == "tensorrt" and self.cache.first_chunk != self.cache.chunk_frames:
            raise ValueError(
                f"first_chunk_frames is {self.cache.first_chunk} and chunk_frames {self.cache.chunk_frames}; "
                "an engine of TensorRT decodes chunks of one length, use vae='full'"
            )
        if self.runtime.vae == "tiny":
            require_same_latents(self.tiny_vae, self.vae)

    @property
    def fp8_passes(self) -> tuple[int, ...]:
        """The passes of a chunk in the steady state whose attention is in FP8 (RuntimeConfig.fp8_passes)."""
        return self.runtime.fp8_passes(len(self.schedule.denoising_steps) + 1)

    def _check_fp8_attention(self) -> None:
        if self.schedule.rolling != "none":
            raise ValueError(
                f"precision is 'fp8-attention' and rolling is {self.schedule.rolling!r}; chunks that are "
                "denoised beside each other have no FP8 attention, use 'fp8'"
            )
        passes = len(self.schedule.denoising_steps) + 1
        for number in self.runtime.sixteen_bit_passes:
            if not -passes <= number < passes:
                raise ValueError(
                    f"sixteen_bit_passes has {number} and a chunk has {passes} passes; give numbers from "
                    f"{-passes} to {passes - 1}"
                )
        if not self.fp8_passes:
            raise ValueError(
                f"sixteen_bit_passes is {shown(self.runtime.sixteen_bit_passes)}, all {passes} passes of a "
                "chunk; leave out what is to attend in FP8, or use precision='fp8'"
            )
