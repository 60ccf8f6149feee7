"""Bytes that an op has to move once and FLOPs it has to do: its floor, as functions of Shapes.

Shapes: L layers, B batch (1), T tokens of a chunk, S tokens of the window, H heads, E head dim, D dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rfengine.costs.shapes import Shapes

BYTE, HALF, SINGLE = 1, 2, 4  # bytes of an element in e4m3, in 16 and in 32 bits


def slot_bytes(bytes_for_element: int) -> Callable[[Shapes], int]:
    """Bytes for each element of one slot of all layers."""
    return lambda s: s.layers * s.chunk * bytes_for_element


def row_bytes(bytes_for_element: int) -> Callable[[Shapes], int]:
    return lambda s: s.chunk * bytes_for_element


def norm_fp8_bytes(bytes_for_element: int) -> Callable[[Shapes], int]:
    """Of a norm in e4m3, with a scale for each row."""
    return lambda s: s.chunk * bytes_for_element + s.tokens * SINGLE


def resident_bytes(shapes: Shapes) -> int:
    """Of the keys that stay from chunk to chunk, of all layers."""
    return shapes.layers * shapes.resident_tokens * shapes.dim * HALF


def rephase_bytes(shapes: Shapes) -> int:
    return 2 * resident_bytes(shapes) + shapes.resident_tokens * shapes.head_dim * SINGLE


def attention_flops(shapes: Shapes) -> int:
    return 4 * shapes.tokens * shapes.window_tokens * shapes.dim


def attention_bytes(shapes: Shapes) -> int:
    return 2 * HALF * (shapes.tokens + shapes.window_tokens) * shapes.dim


def attention_fp8_bytes(rows: bool) -> Callable[[Shapes], int]:
    """Queries, keys and values of one byte; rows: so is the result, with a scale for each token and head."""

    def moved(shapes: Shapes) -> int:
        scales = SINGLE * shapes.tokens * shapes.heads if rows else 0
        return (2 * shapes.window_tokens + (2 if rows else 3) * shapes.tokens) * shapes.dim + scales

    return moved


def window_fp8_bytes(shapes: Shapes) -> int:
    """Both arenas read, half of that written; means of keys and units of values."""
    elements = 2 * shapes.layers * shapes.window_tokens * shapes.dim
    return elements * (HALF + BYTE) + shapes.layers * (shapes.dim + shapes.heads) * SINGLE


def flow_bytes(shapes: Shapes) -> int:
    grid = shapes.grid
    return 4 * HALF * shapes.config.model.out_dim * shapes.frames * grid.latent_height * grid.latent_width


def ffn_dim(shapes: Shapes) -> int:
    return shapes.config.model.ffn_dim


def product_flops(outputs: Callable[[Shapes], int]) -> Callable[[Shapes], int]:
    """Of a product between D and `outputs` numbers, either way."""
    return lambda s: 2 * s.tokens * s.dim * outputs(s)


def product_bytes(outputs: Callable[[Shapes], int], rows_of_dim: int = 1) -> Callable[[Shapes], int]:
    """Rows in and out and the weight; rows_of_dim: how many rows of D numbers are read or written."""
    return lambda s: HALF * (rows_of_dim * s.chunk + (s.tokens + s.dim) * outputs(s))


@dataclass(frozen=True)
class ProductForm:
    """What a product reads and writes. rows, weight, result: bytes of an element. read_scales,
    written_scales: in float32, for each row; a weight in e4m3 has one for each output."""

    rows: int = HALF
    weight: int = HALF
    result: int = HALF
    read_scales: int = 0
    written_scales: int = 0

    @property
    def is_fp8(self) -> bool:
        return self.weight == BYTE

    def bytes(self, rows: int, inputs: int, outputs: int) -> int:
        moved = rows * inputs * self.rows + outputs * inputs * self.weight + rows * outputs * self.result
        scales = rows * (self.read_scales + self.written_scales) + outputs * self.is_fp8
        return moved + scales * SINGLE


SIXTEEN_BITS = ProductForm()
FROM_NORM_FP8 = ProductForm(BYTE, BYTE, read_scales=1)
GELU_ROWS_FP8 = ProductForm(BYTE, BYTE, BYTE, read_scales=1, written_scales=1)
HEADS_FP8 = ProductForm(HALF, BYTE)  # rounded as they are read


def from_heads_fp8(heads: int) -> ProductForm:
    """Of rows that FP8 attention has written, with a scale for each head."""
    return ProductForm(BYTE, BYTE, read_scales=heads)


def product_fp8_bytes(
    form: ProductForm, outputs: Callable[[Shapes], int], inputs: Callable[[Shapes], int]
) -> Callable[[Shapes], int]:
    return lambda s: form.bytes(s.tokens, inputs(s), outputs(s))


def gelu_rows_fp8_bytes(shapes: Shapes) -> int:
    """A product in 16 bits in, one byte out; a scale for each row either way."""
    return shapes.tokens * (ffn_dim(shapes) * (HALF + BYTE) + 2 * SINGLE)


def conv_flops(level: int) -> Callable[[Shapes], int]:
    return lambda s: 2 * 27 * s.vae_levels[level].channels ** 2 * s.vae_levels[level].pixels


def conv_bytes(level: int, bytes_in: int = HALF) -> Callable[[Shapes], int]:
    """The halo in and the result out."""

    def moved(shapes: Shapes) -> int:
        size = shapes.vae_levels[level]
        halo = size.pixels * (size.frames + 2) // size.frames
        return size.channels * (halo * bytes_in + size.pixels * HALF)

    return moved


def time_conv_bytes(shapes: Shapes) -> int:
    """Twice the channels come out."""
    return conv_bytes(0)(shapes) + HALF * shapes.vae_levels[0].channels * shapes.vae_levels[0].pixels


def phase_flops(level: int) -> Callable[[Shapes], int]:
    """Four taps of C channels for each of the C / 2 channels of every pixel."""
    return lambda s: 8 * s.vae_levels[level - 1].channels ** 2 // 2 * s.vae_levels[level].pixels


def phase_bytes(level: int) -> Callable[[Shapes], int]:
    return lambda s: HALF * s.vae_levels[level - 1].channels * 3 * s.vae_levels[level].pixels // 4


def norm_bytes(level: int) -> Callable[[Shapes], int]:
    """x and the residual read, their sum and the result written."""
    return lambda s: 4 * HALF * s.vae_levels[level].channels * s.vae_levels[level].pixels


def frame_attention_flops(shapes: Shapes) -> int:
    size = shapes.vae_levels[0]
    return 4 * size.channels * size.pixels * size.height * size.width


def pack_bytes(shapes: Shapes) -> int:
    return conv_bytes(-1)(shapes) + (3 - HALF * shapes.vae_levels[-1].channels) * shapes.pixels


def pack_flops(shapes: Shapes) -> int:
    return 2 * 27 * 3 * shapes.vae_levels[-1].channels * shapes.pixels


# by name; _plain: the sink in one part, _arena: keys and values in 16 bits are written too, _raw: keys before
# rotation as well
BYTES: dict[str, Callable[[Shapes], int]] = {
    "adaptive_layer_norm": row_bytes(4),
    "adaptive_layer_norm_fp8": norm_fp8_bytes(3),
    "gated_residual_adaptive_norm": row_bytes(8),
    "gated_residual_adaptive_norm_fp8": norm_fp8_bytes(7),
    "rms_norm": row_bytes(4),
    "qk_norm_rope_write": row_bytes(12),
    "qk_norm_rope_write_raw": row_bytes(14),
    "qk_norm_rope_write_fp8": row_bytes(9),  # into the e4m3 copies of the window alone
    "qk_norm_rope_write_fp8_arena": row_bytes(13),
    "qk_norm_rope_write_fp8_raw": row_bytes(15),
    "window_fp8": window_fp8_bytes,
    "ema_evict": slot_bytes(2 * 10),
    "ema_evict_plain": slot_bytes(2 * 6),
    "rephase_keys": rephase_bytes,
    # rotating costs 4 bytes an element of the window, less reading the sink's new keys: they are in registers
    "evict_and_rephase": lambda s: slot_bytes(2 * 10 - HALF)(s) + rephase_bytes(s),
    "evict_and_rephase_plain": lambda s: slot_bytes(2 * 6 - HALF)(s) + rephase_bytes(s),
    "flow_step": flow_bytes,
    "frame_pack": lambda s: s.pixels * 9,
}
