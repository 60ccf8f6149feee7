"""Frozen configuration of the model, the cache, the schedule and the engine, and the presets built from them.

Every size the engine uses follows from these fields and from the resolution (see grid.py); nothing else holds
one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Positions = Literal["relative", "absolute"]
SinkKind = Literal["ema", "frozen", "none"]
SinkPrecision = Literal["split", "bf16"]
Backend = Literal["auto", "reference", "triton", "native", "cudnn", "flash"]
DTypeName = Literal["float32", "bfloat16", "float16"]
DecoderKind = Literal["full", "tensorrt", "tiny"]
VAEPrecision = Literal["default", "fp8"]

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class WanConfig:
    """Shape of one Wan2.1 text-to-video transformer (spec 1.1)."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "text_dim",
            "text_len",
            "in_dim",
            "out_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
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
    """Shape of the causal video VAE and the statistics of its latents (spec 4.1)."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def __post_init__(self) -> None:
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
    """Shape of the tiny decoder; the defaults are the published taew2_1 (spec 4.9)."""

    z_dim: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)  # of the levels with memory blocks, then of the last one
    memory_blocks: int = 3  # of each level
    time_factors: tuple[int, ...] = (1, 2, 2)  # frames that come of one, after each level

    def __post_init__(self) -> None:
        if len(self.time_factors) != len(self.widths) - 1 or not self.time_factors:
            raise ValueError(
                f"time_factors has {len(self.time_factors)} entries for {len(self.widths)} widths; give one "
                "for every step between two widths, at least one"
            )
        for name in ("z_dim", "memory_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("widths", "time_factors"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; each entry must be at least 1")

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
    """Shape of the UMT5 text encoder (spec 5.1) and the tokenizer in front of it."""

    vocab_size: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    tokenizer: Literal["sentencepiece", "bytes"] = "sentencepiece"

    def __post_init__(self) -> None:
        if self.attention_dim % self.num_heads:
            raise ValueError(
                f"attention_dim {self.attention_dim} is not divisible by num_heads {self.num_heads}; "
                "change one of them"
            )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a query can see: chunk, window and sink, all in latent frames (spec 2)."""

    chunk_frames: int = 3
    window_frames: int = 9  # sink and current chunk included
    sink: SinkKind = "ema"
    sink_frames: int = 3
    alpha: float = (
        0.999  # weight of the sink in the EMA; 0.999 in the published code, 0.99 in its description
    )
    positions: Positions = "relative"
    sink_precision: SinkPrecision = "split"

    def __post_init__(self) -> None:
        chunk, window, sink = self.chunk_frames, self.window_frames, self.sink_frames
        if chunk < 1:
            raise ValueError(f"chunk_frames is {chunk}; a chunk has at least one latent frame")
        if window < chunk or window % chunk:
            raise ValueError(f"window_frames is {window}; use a multiple of chunk_frames, which is {chunk}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha is {self.alpha}; use a value from 0 to 1 (1 keeps the sink as it is)")
        if self.sink not in ("ema", "frozen", "none"):
            raise ValueError(f"sink is {self.sink!r}; use 'ema', 'frozen' or 'none'")
        if self.positions not in ("relative", "absolute"):
            raise ValueError(f"positions is {self.positions!r}; use 'relative' or 'absolute'")
        if self.sink_precision not in ("split", "bf16"):
            raise ValueError(f"sink_precision is {self.sink_precision!r}; use 'split' or 'bf16'")
        if self.sink == "none":
            if sink != 0:
                raise ValueError(
                    f"sink_frames is {sink} but sink is 'none'; set sink_frames to 0 or choose a sink"
                )
            return
        if sink < chunk or sink % chunk:
            raise ValueError(f"sink_frames is {sink}; a sink is a multiple of chunk_frames, which is {chunk}")
        if sink + chunk > window:
            raise ValueError(
                f"sink_frames {sink} and chunk_frames {chunk} do not fit into window_frames {window}"
            )
        if self.sink == "ema" and sink != chunk:
            raise ValueError(
                f"sink_frames is {sink} and chunk_frames is {chunk}; EMA-Sink folds one evicted chunk into "
                "the sink, so the two must be equal (the published code silently overwrites the sink here)"
            )
        if self.sink == "ema" and self.positions == "absolute":
            raise ValueError(
                "an averaged sink has no absolute time; use positions='relative' with sink='ema'"
            )
        if self.sink == "ema" and window < 3 * chunk:
            raise ValueError(
                f"window_frames is {window}; EMA-Sink needs the sink, one past chunk and the current one "
                f"({3 * chunk}), since the chunk that leaves may not be the one that is written"
            )

    @property
    def window_chunks(self) -> int:
        return self.window_frames // self.chunk_frames

    @property
    def sink_chunks(self) -> int:
        return self.sink_frames // self.chunk_frames


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Flow-matching schedule and the fixed denoising steps of the few-step sampler (spec 3.1)."""

    shift: float = 5.0
    num_train_timesteps: int = 1000
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)  # nominal, before the shift warps them

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}; it must be positive")
        steps = self.denoising_steps
        if not steps or any(not 0 < step <= self.num_train_timesteps for step in steps):
            raise ValueError(
                f"denoising_steps is {steps}; give at least one, from 1 to {self.num_train_timesteps}"
            )
        if any(later >= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"denoising_steps is {steps}; they must fall from one to the next")


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """How the engine runs on a machine. None of it changes a result beyond rounding, but vae="tiny" and
    vae_precision="fp8".

    graphs: replay a chunk as one CUDA graph; None is on where the device is CUDA. merged_pass: run the
    context pass of a chunk together with the first step of the next. overlap: decode a chunk beside the next
    one; None is on where the device is CUDA. decode_device: where the VAE runs; the model's device where it
    is None. autotune: time the backends at the engine's own shapes at start-up, and keep what won. vae:
    "full" is the lossless decoder, "tensorrt" the same as an engine that `rfengine export-vae` built, "tiny"
    a small decoder of lower quality. vae_precision: "fp8" runs the large convolutions of the full decoder in
    FP8, and is refused where its frames are further than 45 dB from those in float32.
    """

    graphs: bool | None = None
    merged_pass: bool = False
    overlap: bool | None = None
    decode_device: str | None = None
    autotune: bool = True
    vae: DecoderKind = "full"
    vae_precision: VAEPrecision = "default"

    def __post_init__(self) -> None:
        for name, kind in (("vae", DecoderKind), ("vae_precision", VAEPrecision)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; use {', '.join(map(repr, get_args(kind)))}"
                )
        if self.vae_precision == "fp8" and self.vae != "full":
            raise ValueError(f"vae_precision is 'fp8' and vae is {self.vae!r}; FP8 is for vae='full'")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything a checkpoint directory says about itself; stored as its `rfengine.json`."""

    name: str
    model: WanConfig
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    height: int = 480  # pixels; the size a checkpoint was trained at, and the default of generate()
    width: int = 832
    fps: int = 16
    backend: Backend = "auto"
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tiny_vae: TinyVAEConfig = field(default_factory=TinyVAEConfig)

    def __post_init__(self) -> None:
        if self.model.in_dim != self.vae.z_dim or self.model.out_dim != self.vae.z_dim:
            raise ValueError(
                f"the model maps {self.model.in_dim} to {self.model.out_dim} latent channels "
                f"but the VAE has {self.vae.z_dim}; all three must be equal"
            )
        if self.model.text_dim != self.text.dim:
            raise ValueError(
                f"text_dim of the model is {self.model.text_dim}, the text encoder gives {self.text.dim}"
            )
        if self.runtime.vae == "tiny":
            require_same_latents(self.tiny_vae, self.vae)
        if self.fps < 1:
            raise ValueError(f"fps is {self.fps}; it must be at least 1")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; from_dict is the way back."""
    return dataclasses.asdict(config)


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Build the configuration `kind` from JSON values; lists become tuples, nested tables become
    configurations.

    Raises ValueError when a key is not a field of `kind` or a field without default is missing.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} is {values!r}; it must be a table of its fields")
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    required = {
        name
        for name, entry in fields.items()
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    if missing:
        raise ValueError(f"{kind.__name__} needs {', '.join(missing)}; add it")
    return kind(**{name: _field_value(kind, name, value) for name, value in values.items()})


_NESTED = {
    "model": WanConfig,
    "vae": VAEConfig,
    "tiny_vae": TinyVAEConfig,
    "text": TextConfig,
    "cache": CacheConfig,
    "schedule": ScheduleConfig,
    "runtime": RuntimeConfig,
}


def _field_value(kind: type, name: str, value: Any) -> Any:
    if kind is EngineConfig and name in _NESTED:
        return from_dict(_NESTED[name], value)
    hint = get_type_hints(kind)[name]
    if isinstance(value, list):
        value = tuple(value)
    if not _fits(value, hint):
        wanted = "a finite number" if hint is float else getattr(hint, "__name__", hint)
        raise ValueError(f"{kind.__name__}.{name} is {value!r}; it must be {wanted}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is what the type of a field says; only the types that fields have."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


_WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_TINY_Z_DIM = 8

PRESETS: dict[str, EngineConfig] = {
    "tiny": EngineConfig(
        name="tiny",
        model=WanConfig(
            dim=192, ffn_dim=576, num_heads=3, num_layers=4, text_dim=96, text_len=128, in_dim=_TINY_Z_DIM,
            out_dim=_TINY_Z_DIM,
        ),
        vae=VAEConfig(
            base_dim=8, z_dim=_TINY_Z_DIM, dim_mult=(1, 2, 4, 8), num_res_blocks=1,
            latents_mean=(0.0,) * _TINY_Z_DIM, latents_std=(1.0,) * _TINY_Z_DIM,
        ),
        tiny_vae=TinyVAEConfig(z_dim=_TINY_Z_DIM, widths=(32, 24, 16, 16)),
        text=TextConfig(
            vocab_size=259, dim=96, attention_dim=96, ffn_dim=256, num_heads=3, num_layers=2,
            tokenizer="bytes",
        ),
        height=64,
        width=64,
    ),
    "wan-1.3b": EngineConfig(name="wan-1.3b", model=_WAN_1_3B),
    "wan-14b": EngineConfig(name="wan-14b", model=_WAN_14B),
}  # fmt: skip
