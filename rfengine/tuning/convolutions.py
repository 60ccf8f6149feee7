"""Autotune cases of the decoder's convolutions, one for every shape that one stream has.

No table of layers is kept here: the decoder is run once without data, and its calls are recorded. A
candidate is right where every frame of its result is as near to the exact sum as rounding is, at the sizes of
the first chunk and of all later ones; the convolutions of cuDNN are silently wrong in some versions, at large
sizes alone, and the sum is therefore formed here without a convolution, tap by tap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.accuracy import REFERENCE_FACTOR, relative_error
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS, Ops, native
from rfengine.ops.reference import fold_upsample_weight
from rfengine.ops.table import implementation, shape_key
from rfengine.tuning.candidates import TuningCase, TuningShapes, case_key, runnable
from rfengine.tuning.timing import Arguments

_STEADY_CALL = 1


@dataclass(frozen=True, slots=True)
class ConvolutionShape:
    """One shape of causal_conv3d or phase_conv. into: the layer passes a bias and an `out` of every other
    frame."""

    op: str
    weight: tuple[int, ...]
    height: int  # of the input
    width: int
    into: bool

    @property
    def key(self) -> str:
        return shape_key(self.op, *self.weight, self.height, self.width)

    @property
    def past(self) -> int:
        """Frames of the input in front of those of the result."""
        return 0 if self.op == "phase_conv" else self.weight[2] - 1

    @property
    def channels(self) -> tuple[int, int]:
        """In and out."""
        out, into = self.weight[2:4] if self.op == "phase_conv" else self.weight[:2]
        return into, out


class _RecordingOps(Ops):
    """The reference, which also records its convolutions: frame counts of the result by shape."""

    def __init__(self) -> None:
        super().__init__(REFERENCE_OPS.choice)
        self.calls: dict[ConvolutionShape, list[int]] = {}

    def causal_conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        self._note("causal_conv3d", x, weight, out is not None, x.shape[0] - weight.shape[2] + 1)
        return super().causal_conv3d(x, weight, bias, out)

    def phase_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._note("phase_conv", x, weight, False, x.shape[0])
        return super().phase_conv(x, weight, bias)

    def _note(self, op: str, x: Tensor, weight: Tensor, into: bool, frames: int) -> None:
        shape = ConvolutionShape(op, tuple(weight.shape), *x.shape[1:3], into)
        counts = self.calls.setdefault(shape, [])
        if frames not in counts:
            counts.append(frames)


def convolution_shapes(shapes: TuningShapes) -> dict[ConvolutionShape, list[int]]:
    """Each convolution shape of the decoder in 16 or 32 bits with its output frame counts: [first chunk, if
    shorter], steady chunk."""
    config, grid, chunk = shapes.config, shapes.grid, shapes.config.cache.chunk_frames
    with torch.device("meta"):
        vae = WanVAE(config.vae).to(shapes.dtype)
    ops = _RecordingOps()
    decoder = StreamingDecoder(vae, ops, config.runtime.vae_precision)
    state = decoder.decoder_state(1, grid.latent_height, grid.latent_width, shapes.dtype, "meta")
    latents = torch.empty(
        1, config.vae.z_dim, chunk, grid.latent_height, grid.latent_width, dtype=shapes.dtype, device="meta"
    )
    for state.frames in (0, _STEADY_CALL):
        decoder.run(latents, state, packed=True)
    return ops.calls


def decoder_cases(shapes: TuningShapes) -> Iterator[TuningCase]:
    """A case for each of convolution_shapes."""
    for shape, frames in convolution_shapes(shapes).items():
        yield _case(shapes, shape, frames)


def _case(shapes: TuningShapes, shape: ConvolutionShape, frames: list[int]) -> TuningCase:
    channels, channels_out = shape.channels
    kernel = math.prod(shape.weight) // (channels * channels_out)
    size = (shape.height, shape.width)

    def make_inputs(generator: torch.Generator) -> Arguments:
        x = shapes.rows(generator, frames[-1] + shape.past, *size, channels)
        if shape.op == "phase_conv":
            weight = shapes.rows(generator, channels_out, channels, 3, 3, scale=(9 * channels) ** -0.5)
            return x, fold_upsample_weight(weight), None
        weight = shapes.rows(generator, *shape.weight, scale=(kernel * channels) ** -0.5)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        if not shape.into:
            return x, weight, None
        pairs = shapes.rows(generator, frames[-1], 2, *size, channels_out)
        return x, weight, shapes.rows(generator, channels_out), pairs[:, 0]

    able = runnable(shape.op, shapes.device, shapes.dtype)
    if native.convolution.unserved(shape.weight, shapes.dtype, shapes.device):
        able.pop("native", None)  # the reference would run, which is no candidate
    scale = 4 if shape.op == "phase_conv" else 1
    elements = (frames[-1] + shape.past) * channels + frames[-1] * channels_out * scale
    first = f"and {frames[0]} frames at the start" if len(frames) > 1 else ""
    return TuningCase(
        case_key(shape.key, (frames[-1], *size), shapes.dtype, able, first), able, shapes.device, make_inputs,
        elements * math.prod(size) * shapes.dtype.itemsize, implementation(shape.op, "reference"),
        lambda arguments: arguments, lambda _, returned: (returned,),
        check=partial(_wrong_frame, shape, frames),
    )  # fmt: skip


def _wrong_frame(
    shape: ConvolutionShape, frame_counts: list[int], run: Callable[..., Tensor], arguments: Arguments
) -> str:
    """The first wrong frame of the result of `run` with its error; "" where all are right."""
    x, weight, bias, *into = arguments
    products = math.prod(shape.weight) // shape.channels[1]
    # sums in another order differ by as much
    order = torch.finfo(torch.float32).eps * products**0.5
    for count in frame_counts:
        found = run(x[: count + shape.past], weight, bias, *(out[:count] for out in into))
        for frame in range(count):
            given = x[frame : frame + shape.past + 1]
            exact = _exact_frame(shape, given, weight, bias)
            error = relative_error(found[frame], exact)
            limit = REFERENCE_FACTOR * relative_error(exact.to(x.dtype), exact) + order
            if not error <= limit:  # a NaN is refused as well
                return f"frame {frame} of {count} is {error:.2e} from float32, the limit is {limit:.2e}"
    return ""


def _exact_frame(shape: ConvolutionShape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One frame of the result as a sum of matrix products, in float32 for 16-bit inputs, else in float64."""
    dtype = torch.float64 if x.dtype == torch.float32 else torch.float32
    if shape.op == "phase_conv":
        exact = torch.stack([
            torch.stack([_by_taps(x, weight[a, b].unsqueeze(2), (1, 1), (a, b), dtype) for b in (0, 1)], 2)
            for a in (0, 1)
        ], 1).flatten(0, 1).flatten(1, 2)  # fmt: skip
    else:
        padding = (weight.shape[3] // 2, weight.shape[4] // 2)
        exact = _by_taps(x, weight, padding, (0, 0), dtype)
    return exact if bias is None else exact + bias.to(dtype)


def _by_taps(
    x: Tensor, weight: Tensor, padding: tuple[int, int], offset: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The taps of weight [Cout, Cin, kt, kh, kw] summed up for one frame: x [kt, H, W, Cin] -> [H, W,
    Cout]."""
    _, height, width, channels = x.shape
    padded = F.pad(x.to(dtype), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    taps = weight.to(dtype)
    total = torch.zeros(height * width, weight.shape[0], dtype=dtype, device=x.device)
    for dt in range(weight.shape[2]):
        for dh in range(weight.shape[3]):
            for dw in range(weight.shape[4]):
                top, left = offset[0] + dh, offset[1] + dw
                pixels = padded[dt, top : top + height, left : left + width]
                total.addmm_(pixels.reshape(-1, channels), taps[:, :, dt, dh, dw].t())
    return total.unflatten(0, (height, width))
