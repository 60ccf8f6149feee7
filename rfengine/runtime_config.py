"""RuntimeConfig: how the engine runs on a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rfengine.limits import DeviceName, Entries, Range, Text, check_fields

DecoderKind = Literal["full", "tensorrt", "tiny"]
VAEPrecision = Literal["default", "fp16", "bf16", "fp8"]
Precision = Literal["default", "bf16", "fp8", "fp8-attention"]
PresetName = Literal["auto", "24gb", "16gb", "12gb", "8gb"]
WeightKind = Literal["default", "int8"]
TextPlace = Literal["stays", "layers"]


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """How the engine runs. None of it changes a result beyond rounding, except the tiny decoder, FP8 and
    int8."""

    graphs: bool | None = None
    """Replay each chunk as one CUDA graph; on with CUDA."""
    overlap: bool | None = None
    """Decode a chunk beside the next one; on with CUDA, and on a CPU of which torch has several threads."""
    decode_device: DeviceName | None = None
    """Where the frames are made, such as cuda:1; the model's device where nothing is given."""
    autotune: bool = True
    """Time the backends at the start, once for each GPU and size, and keep the fastest."""
    vae: DecoderKind = "full"
    """What makes the frames: full and tensorrt (an engine of rfengine export-vae) are lossless, tiny is
    faster and of lower quality."""
    vae_precision: VAEPrecision = "default"
    """Of the full decoder; the encoder is in float32. default: for a 16-bit model on CUDA fp16 where the
    weights pass a check, else bf16; anywhere else the model's dtype. fp16: an error where they fail. fp8:
    large convolutions in FP8, if its frames have 45 dB (PSNR) against float32; the rest as by default."""
    precision: Precision = "default"
    """Of the transformer's products. default: as its dtype. bf16: in bfloat16. fp8: the linears of the blocks
    in e4m3. fp8-attention: the attention over a full window as well."""
    sixteen_bit_passes: Annotated[tuple[int, ...], Entries(0, 64), Range(-64, 63)] = (0, -1)
    """With fp8-attention, the passes of a chunk whose attention is not in FP8: denoising steps count from 0
    and the context pass is the last; -1 is the last one, -2 the one before. Chunks of another length or with
    steps of their own (first_steps) have none in FP8."""
    fp8_table: Annotated[str, Text(1, 4096)] | None = None
    """The products left out of FP8, as `rfengine calibrate` writes them; fp8.json of the checkpoint, if it
    has one, where nothing is given."""
    tensorrt_directory: Annotated[str, Text(1, 4096)] | None = None
    """Where export-vae wrote the engine, if not beside the checkpoint or in the user's cache directory."""
    preset: PresetName | None = None
    """Options for a card of that memory, where they are not given themselves (docs/small_cards.md). auto: the
    first that fits into the memory that is free, and after an out-of-memory error the next one."""
    text_encoder: TextPlace | None = None
    """Of its weights. stays: on its device from the first prompt on, the default. layers: in host memory, and
    for each prompt on the device two layers at a time."""
    text_weights: WeightKind | None = None
    """Of the text encoder. int8: 8-bit integers with a scale for each output."""
    block_weights: WeightKind | None = None
    """Of the products of the transformer's blocks. int8: 8-bit integers with a scale for each output, and
    none in 16 bits beside them."""
    block_buffers: Annotated[int, Range(0, 64)] | None = None
    """2 or more: the weights of the blocks are in host memory and so many blocks on the device, brought while
    the one before computes; without CUDA graphs. 0, the default: all are on the device."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_weights()
        if self.fp8_table is not None and not self.multiplies_fp8:
            raise ValueError(
                f"fp8_table is {self.fp8_table!r} and precision is {self.precision!r}; it is for 'fp8' and "
                "'fp8-attention'"
            )
        if self.tensorrt_directory is not None and self.vae != "tensorrt":
            raise ValueError(
                f"tensorrt_directory is {self.tensorrt_directory!r} and vae is {self.vae!r}; it is for "
                "vae='tensorrt'"
            )
        if self.vae_precision != "default" and self.vae != "full":
            ways = {"tensorrt": "an engine has that of `rfengine export-vae --precision`"}
            raise ValueError(
                f"vae_precision is {self.vae_precision!r} and vae is {self.vae!r}; it is for vae='full', "
                f"{ways.get(self.vae, 'leave it out')}"
            )

    def _check_weights(self) -> None:
        if self.block_buffers == 1:
            raise ValueError("block_buffers is 1; use 2 or more, one to compute and one to copy to, or 0")
        is_int8 = self.block_weights == "int8"
        if self.multiplies_fp8 and (is_int8 or self.block_buffers):
            asked = "block_weights is 'int8'" if is_int8 else f"block_buffers is {self.block_buffers}"
            raise ValueError(
                f"{asked} and precision is {self.precision!r}, whose products keep weights of both kinds on "
                "the device; give one of them"
            )
        if self.graphs and self.block_buffers:
            raise ValueError(
                f"graphs are asked for and block_buffers is {self.block_buffers}; blocks that come from host "
                "memory are not recorded, give one of them"
            )

    @property
    def multiplies_fp8(self) -> bool:
        """Whether products of the transformer are in FP8."""
        return self.precision in ("fp8", "fp8-attention")

    def fp8_passes(self, count: int) -> tuple[int, ...]:
        """The passes whose attention is in FP8, of a chunk of `count`: denoising steps from 0, then the
        context pass."""
        if self.precision != "fp8-attention":
            return ()
        kept = {number % count for number in self.sixteen_bit_passes}
        return tuple(number for number in range(count) if number not in kept)
