"""Part device: what the device reaches, and what the libraries make of the engine's own shapes.

Rows are timed call by call with CUDA events, on random data, over more than one set of inputs in turn. They
say where the engine has to push; kernels.py times the engine's own.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from gate.part import AbsentError, Item, Setting
from gate.record import Result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernels import Ceilings
from rfengine.benchmark.attention_libraries import FLASH_MODULES, SDPA_BACKENDS
from rfengine.benchmark.conditions import device_name, state, versions
from rfengine.config import PRESETS
from rfengine.costs.shapes import Shapes

RUNS, WARM_UPS = 30, 5
LAUNCHES = 200
WRONG = 0.02  # relative error of a convolution that counts as wrong
CORNER = 20  # pixels of the corners of a convolution that are checked
E4M3_LARGEST = 448.0


@dataclass(frozen=True)
class Work:
    """One row: `run` over sets of arguments in turn, and what it has to do and to move at least."""

    run: Callable[..., object]
    sets: Sequence[tuple[Any, ...]]
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Sizes:
    """Shapes of the published setting, or of the smallest model for a self-check."""

    shapes: Shapes
    device: torch.device
    side: int  # of the large matrix product
    copied: int  # elements of the large copy

    @classmethod
    def of(cls, setting: Setting) -> Sizes:
        if setting.small:
            return cls(Shapes(replace(PRESETS["tiny"], height=32, width=32)), setting.device, 128, 2**16)
        return cls(Shapes(), setting.device, 8192, 2**29)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """Name, inputs and outputs of a layer's products."""
        dim, ffn_dim = self.shapes.dim, self.shapes.config.model.ffn_dim
        return [
            ("q, k and v", dim, 3 * dim), ("attention output", dim, dim), ("FFN up", dim, ffn_dim),
            ("FFN down", ffn_dim, dim),
        ]  # fmt: skip


def items(setting: Setting) -> list[Item]:
    sizes = Sizes.of(setting)
    rows = list(rows_of(sizes, setting.small))
    own = [Item("properties", lambda: _properties(setting))]
    if not setting.small:
        own += [Item("ceilings", _ceilings, least_s=4), Item("launches", _launches)]
    return [*own, *(Item(name, _timed_row(make, sizes.device)) for name, make in rows)]


def _properties(setting: Setting) -> Iterator[Result]:
    yield {"gpu": device_name(setting.device), "state": state(setting.device), **versions(setting.device)}
    if not setting.small:
        properties = torch.cuda.get_device_properties()
        yield {
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }


def _ceilings() -> Iterator[Result]:
    yield {"ceilings": asdict(Ceilings.measured(Shapes()))}


def _launches() -> Iterator[Result]:
    """Microseconds of the host for a launch, and of the device for a kernel in a graph that does nothing."""
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            x.add_(1)
    for name, run in (("launched", lambda: [x.add_(1) for _ in range(LAUNCHES)]), ("replayed", graph.replay)):
        run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        host = time.perf_counter() - started
        torch.cuda.synchronize()
        whole = time.perf_counter() - started
        yield {"launch": name, "host_us": host / LAUNCHES * 1e6, "whole_us": whole / LAUNCHES * 1e6}


def _timed_row(make: Callable[[], Work], device: torch.device) -> Callable[[], Iterable[Result]]:
    def run() -> Iterator[Result]:
        work = make()
        ms = median_ms(work, device)
        row = {"ms": ms}
        if work.flops:
            row["tflop_per_s"] = work.flops / ms / 1e9
        if work.bytes:
            row["tb_per_s"] = work.bytes / ms / 1e9
        yield row

    return run


def median_ms(work: Work, device: torch.device) -> float:
    for place in range(WARM_UPS):
        work.run(*work.sets[place % len(work.sets)])
    times = [_one_ms(work, place, device) for place in range(RUNS)]
    return statistics.median(times)


def _one_ms(work: Work, place: int, device: torch.device) -> float:
    arguments = work.sets[place % len(work.sets)]
    if device.type != "cuda":
        started = time.perf_counter()
        work.run(*arguments)
        return (time.perf_counter() - started) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work.run(*arguments)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def rows_of(sizes: Sizes, small: bool) -> Iterator[tuple[str, Callable[[], Work]]]:
    """Rows by name, each made when it is its turn."""
    yield "copy", lambda: _copy(sizes)
    yield f"product bf16 {sizes.side}", lambda: _product(sizes)
    for name, inner, outer in sizes.linears:
        yield f"linear bf16, {name}", lambda inner=inner, outer=outer: _linear(sizes, inner, outer)
        if not small:
            yield f"linear FP8, {name}", lambda inner=inner, outer=outer: _fp8_linear(sizes, inner, outer)
    yield "linear with GELU", lambda: _linear_gelu(sizes)
    yield from _attention_rows(sizes, small)
    yield "layer norm", lambda: _layer_norm(sizes)
    for level in range(len(sizes.shapes.vae_levels)):
        for layout in ("NDHWC", "NCDHW"):
            yield (
                f"conv3d level {level} {layout}",
                lambda level=level, layout=layout: _convolution(sizes, level, layout),
            )


def _copy(sizes: Sizes) -> Work:
    sets = [tuple(sizes.normal(sizes.copied) for _ in range(2)) for _ in range(2)]
    return Work(lambda target, source: target.copy_(source), sets, bytes=2 * sets[0][0].nbytes)


def _product(sizes: Sizes) -> Work:
    side = sizes.side
    sets = [tuple(sizes.normal(side, side) for _ in range(2)) for _ in range(3)]
    return Work(torch.mm, sets, 2 * side**3)


def _linear(sizes: Sizes, inner: int, outer: int) -> Work:
    rows = sizes.shapes.tokens
    sets = [(sizes.normal(rows, inner), sizes.normal(outer, inner), sizes.normal(outer)) for _ in range(4)]
    return Work(F.linear, sets, 2 * rows * inner * outer)


def _fp8_linear(sizes: Sizes, inner: int, outer: int) -> Work:
    """With a scale for each row of both matrices."""
    rows = sizes.shapes.tokens

    def scaled(count: int) -> tuple[Tensor, Tensor]:
        values = sizes.normal(count, inner, dtype=torch.float32)
        scale = values.abs().amax(1, keepdim=True) / E4M3_LARGEST
        return (values / scale).to(torch.float8_e4m3fn), scale

    def inputs() -> tuple[Tensor, ...]:
        (x, x_scale), (weight, weight_scale) = scaled(rows), scaled(outer)
        return x, weight.t(), x_scale, weight_scale.t()

    def run(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
        return torch._scaled_mm(
            x, weight, scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Work(run, [inputs() for _ in range(4)], 2 * rows * inner * outer)


def _linear_gelu(sizes: Sizes) -> Work:
    rows, (_, inner, outer) = sizes.shapes.tokens, sizes.linears[2]
    sets = [(sizes.normal(outer), sizes.normal(rows, inner), sizes.normal(inner, outer)) for _ in range(4)]
    return Work(
        lambda bias, x, weight: torch._addmm_activation(bias, x, weight, use_gelu=True), sets,
        2 * rows * inner * outer,
    )  # fmt: skip


def _attention_rows(sizes: Sizes, small: bool) -> Iterator[tuple[str, Callable[[], Work]]]:
    """While the window fills, and when it is full."""
    shapes = sizes.shapes
    backends = {"SDPA math": SDPBackend.MATH} if small else SDPA_BACKENDS
    for chunks in range(1, shapes.config.cache.window_chunks + 1):
        keys = chunks * shapes.tokens
        for name, backend in backends.items():
            yield f"attention {name}, {keys} keys", lambda k=keys, b=backend: _sdpa(sizes, k, b)
    if not small:
        for name, module in FLASH_MODULES.items():
            yield f"attention {name}, {shapes.window_tokens} keys", lambda m=module: _flash(sizes, m)


def _sdpa(sizes: Sizes, keys: int, backend: SDPBackend) -> Work:
    heads, head_dim, tokens = sizes.shapes.heads, sizes.shapes.head_dim, sizes.shapes.tokens
    lengths = (tokens, keys, keys)
    sets = [tuple(sizes.normal(1, heads, length, head_dim) for length in lengths) for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return Work(run, sets, 4 * tokens * keys * heads * head_dim)


def _flash(sizes: Sizes, module: str) -> Work:
    try:
        attend = importlib.import_module(module).flash_attn_func
    except ImportError as error:
        raise AbsentError(f"{module} cannot be imported: {error}") from error
    heads, head_dim, tokens = sizes.shapes.heads, sizes.shapes.head_dim, sizes.shapes.tokens
    lengths = (tokens, sizes.shapes.window_tokens, sizes.shapes.window_tokens)
    sets = [tuple(sizes.normal(1, length, heads, head_dim) for length in lengths) for _ in range(3)]
    return Work(attend, sets, 4 * tokens * lengths[1] * heads * head_dim)


def _layer_norm(sizes: Sizes) -> Work:
    tokens, dim = sizes.shapes.tokens, sizes.shapes.dim
    sets = [(sizes.normal(tokens, dim), sizes.normal(dim)) for _ in range(8)]
    return Work(lambda x, weight: F.layer_norm(x, (dim,), weight), sets, bytes=2 * 2 * tokens * dim)


def _convolution(sizes: Sizes, level: int, layout: str) -> Work:
    """A residual convolution of the VAE's decoder. Raises RuntimeError where the library is wrong, which some
    versions are at large sizes alone."""
    of = sizes.shapes.vae_levels[level]
    memory = torch.channels_last_3d if layout == "NDHWC" else torch.contiguous_format

    def inputs() -> tuple[Tensor, Tensor]:
        x = sizes.normal(1, of.channels, of.frames + 2, of.height, of.width)
        weight = sizes.normal(of.channels, of.channels, 3, 3, 3) / (27 * of.channels) ** 0.5
        return x.contiguous(memory_format=memory), weight.contiguous(memory_format=memory)

    sets = [inputs() for _ in range(2)]
    x, weight = sets[0]
    check_corners(_convolve(x, weight), x, weight)
    return Work(_convolve, sets, 2 * 27 * of.channels**2 * of.pixels)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv3d(x, weight, padding=(0, 1, 1))


def check_corners(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """RuntimeError unless the first and the last frame agree with float32 in two opposite corners."""
    side = min(CORNER, *x.shape[-2:])
    for frame, frames, corner, inner in (
        (0, slice(None, 3), slice(None, side), slice(None, -1)),
        (-1, slice(-3, None), slice(-side, None), slice(1, None)),
    ):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = _convolve(x[:, :, frames, corner, corner].float(), weight.float())[:, :, 0]
        own = found[:, :, frame, corner, corner].float()
        # the inner border of the corner saw padding where the whole frame goes on
        expected, own = (tensor[..., inner, inner] for tensor in (expected, own))
        error = float((own - expected).norm() / expected.norm())
        if not error < WRONG:
            raise RuntimeError(f"the convolution is wrong: relative error {error:.3g}")
