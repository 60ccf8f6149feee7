"""Autotune cases: for each op and shape, the candidate implementations and a correctness check.

T tokens of a chunk, S tokens of the window, D dim, H heads, E head dim, N outputs and K inputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rfengine.accuracy import wrong_result
from rfengine.config import EngineConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.ops import REFERENCE_OPS, Ops, default_choice, library_fp8
from rfengine.ops.backends import SIXTEEN_BITS, backend_reasons, family, is_hopper
from rfengine.ops.reference import channel_fp8, row_fp8
from rfengine.ops.reference_fp8 import product_reach
from rfengine.ops.table import OPS, implementation, op_of, shape_key
from rfengine.tensor_parallel import WHOLE, TensorParallel
from rfengine.tuning.record import CaseKey
from rfengine.tuning.timing import Arguments

FOLDS_GATE = "folds_gate"  # the name of the one decision that is no backend of an op
APART, FOLDED = "apart", "folded"
ATTENTION = "sink_window_attention"
CHECKED_ROWS = 128
ARENA_BYTES = 2**29  # of the arenas that eviction is timed on: fewer layers than a large model has


@dataclass(frozen=True, slots=True)
class TuningCase:
    """One choice: which of `candidates` runs fastest on arguments as make_inputs makes them.

    candidates: functions by their names in the key, the default first. set_bytes: of one set of arguments.
    meaning: the op in plain PyTorch. part: arguments of less work, from all of them. results: the tensors to
    compare, from the arguments after a call and what it returned; for `part` they are the same tensors.
    check: says why the results of a candidate on some arguments are wrong, or "", in place of that comparison
    with `meaning` in float64; such a case is also checked for a cuDNN that was asked for by name.
    """

    key: CaseKey
    candidates: Mapping[str, Callable[..., object]]
    device: torch.device
    make_inputs: Callable[[torch.Generator], Arguments]
    set_bytes: int
    meaning: Callable[..., object]
    part: Callable[[Arguments], Arguments]
    results: Callable[[Arguments, object], tuple[Tensor, ...]]
    check: Callable[[Callable[..., object], Arguments], str] | None = None

    @property
    def default(self) -> str:
        return self.key.candidates[0]

    def problem(self, run: Callable[..., object], arguments: Arguments) -> str:
        """Why the results of `run` are wrong, or ""."""
        if self.check is not None:
            return self.check(run, arguments)
        return wrong_result(run, self.meaning, arguments, self.part(arguments), self.results)


@dataclass(frozen=True, slots=True)
class TuningShapes:
    """What the cases are made for: one stream of `config` at `grid`, on one of the ranks that hold its
    transformer."""

    config: EngineConfig
    grid: LatentGrid
    dtype: torch.dtype
    device: torch.device
    parallel: TensorParallel = WHOLE

    @property
    def own(self) -> WanConfig:
        """The transformer with the heads and columns of the rank."""
        return self.parallel.own(self.config.model)

    @property
    def tokens(self) -> int:
        return self.config.cache.chunk_frames * self.grid.frame_tokens

    @property
    def window(self) -> int:
        return self.config.cache.window_frames * self.grid.frame_tokens

    def rows(self, generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
        return normal(generator, self.dtype, shape, scale)


def normal(
    generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], scale: float = 1.0
) -> Tensor:
    """Normal numbers, drawn in float32 on the generator's device."""
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return values.mul_(scale).to(dtype)


def runnable(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[..., object]]:
    """The backends of `op` that can run here, the one it has by default first.

    On Hopper in 16 bits all forms of Triton's attention; elsewhere it has one alone.
    """
    reasons = backend_reasons(device)
    has_forms = dtype in SIXTEEN_BITS and is_hopper(device)
    able = [
        name
        for name in OPS[op].backends
        if name not in OPS[op].by_request
        and not reasons[family(name)]
        and (has_forms or family(name) == name)
    ]
    default = default_choice(device, dtype)[op]
    return {name: implementation(op, name) for name in dict.fromkeys((default, *able))}


def case_key(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    candidates: Mapping[str, object],
    depends_on: str = "",
) -> CaseKey:
    return CaseKey(name, shape, str(dtype).removeprefix("torch."), tuple(candidates), depends_on)


# a case, or what makes one from the overrides decided before it
Case = TuningCase | Callable[[Mapping[str, str]], TuningCase]


def transformer_cases(shapes: TuningShapes) -> Iterator[Case]:
    """The cases of the transformer and its cache: attention, every product's shape, eviction, and last, where
    products are in 16 bits, the folded gates, a case that depends on the backends chosen before it."""
    in_fp8 = shapes.config.runtime.multiplies_fp8
    yield window_attention_case(shapes)
    yield _text_attention(shapes)
    yield from _products_fp8(shapes) if in_fp8 else _products(shapes)
    cache = shapes.config.cache
    if cache.sink == "ema" and 2 * cache.sink_frames <= cache.window_frames:
        yield _eviction(shapes)
    if not (in_fp8 or shapes.parallel.divides):
        yield partial(gate_case, shapes)


def _products(shapes: TuningShapes) -> Iterator[TuningCase]:
    dim, own = shapes.config.model.dim, shapes.own
    # q, k and v at once; every output projection; the queries of the text; both of the feed-forward part
    products = (
        ("linear", 3 * own.dim, dim),
        ("linear", dim, own.dim),
        ("linear", own.dim, dim),
        ("linear_gelu", own.ffn_dim, dim),
        ("linear", dim, own.ffn_dim),
    )
    for op, outputs, inputs in dict.fromkeys(products):
        yield _product(shapes, op, outputs, inputs)


def _products_fp8(shapes: TuningShapes) -> Iterator[TuningCase]:
    """Products of the blocks in FP8; those of heads that are rounded as they are read have one backend."""
    dim, own = shapes.config.model.dim, shapes.own
    inner = own.ffn_dim
    yield _product_fp8(shapes, "linear_fp8", 3 * own.dim, dim)  # q, k and v at once
    yield _product_fp8(shapes, "linear_fp8", own.dim, dim)  # the queries of the text
    yield _product_fp8(shapes, "linear_gelu_rows_fp8", inner, dim)
    yield _product_fp8(shapes, "linear_fp8", dim, inner)
    if shapes.config.runtime.precision == "fp8-attention":
        yield _product_fp8(shapes, "linear_fp8", dim, own.dim, own.num_heads)  # what attention in FP8 returns


def _row_case(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    make_inputs: Callable[[torch.Generator], Arguments],
    set_bytes: int,
    able: Mapping[str, Callable[..., object]] | None = None,
    rows: int = 1,
) -> TuningCase:
    """A case whose first arguments, `rows` of them, and result are rows [1, T, ...], T of the shape; about
    CHECKED_ROWS of them, spread over all and with the last, are compared. Rows in e4m3 with their scale are
    compared as numbers. able: the candidates, where it is not all that run here."""
    tokens, able = shape[0], able or runnable(op_of(name), device, dtype)
    step = max(1, tokens // CHECKED_ROWS)
    spread = slice((tokens - 1) % step, None, step)

    def results(_: Arguments, returned: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if isinstance(returned, tuple):
            values, scale = returned
            returned = values.to(scale.dtype) * scale
        return (returned[:, spread] if returned.shape[1] == tokens else returned,)

    def part(arguments: Arguments) -> Arguments:
        return *(each[:, spread] for each in arguments[:rows]), *arguments[rows:]

    return TuningCase(
        case_key(name, shape, dtype, able), able, device, make_inputs, set_bytes,
        implementation(op_of(name), "reference"), part, results,
    )  # fmt: skip


def attention_case(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> TuningCase:
    """The attention of a chunk over a full window. shape: T, S, H, E."""
    tokens, window, heads, head_dim = shape

    def make_inputs(generator: torch.Generator) -> Arguments:
        rows = partial(normal, generator, dtype)
        filled = torch.full((1,), window, dtype=torch.int32, device=device)
        keys, values = (rows((1, window, heads, head_dim)) for _ in range(2))
        return rows((1, tokens, heads, head_dim)), keys, values, window, filled

    set_bytes = 2 * (tokens + window) * heads * head_dim * dtype.itemsize
    return _row_case(ATTENTION, shape, dtype, device, make_inputs, set_bytes)


def window_attention_case(shapes: TuningShapes) -> TuningCase:
    model = shapes.own
    size = (shapes.tokens, shapes.window, model.num_heads, model.head_dim)
    return attention_case(size, shapes.dtype, shapes.device)


def _text_attention(shapes: TuningShapes) -> TuningCase:
    model, tokens = shapes.own, shapes.tokens
    heads = (model.num_heads, model.head_dim)

    def make_inputs(generator: torch.Generator) -> Arguments:
        q = shapes.rows(generator, 1, tokens, *heads)
        return q, *(shapes.rows(generator, 1, model.text_len, *heads) for _ in range(2)), None

    shape, elements = (tokens, model.text_len, *heads), 2 * (tokens + model.text_len) * model.dim
    set_bytes = elements * shapes.dtype.itemsize
    return _row_case("clip_attention", shape, shapes.dtype, shapes.device, make_inputs, set_bytes)


def _product(shapes: TuningShapes, op: str, outputs: int, inputs: int) -> TuningCase:
    tokens = shapes.tokens

    def make_inputs(generator: torch.Generator) -> Arguments:
        return shapes.rows(generator, 1, tokens, inputs), *_layer(shapes, generator, outputs, inputs)

    set_bytes = (tokens * (outputs + inputs) + outputs * inputs) * shapes.dtype.itemsize
    name, shape = shape_key(op, outputs, inputs), (tokens, outputs, inputs)
    return _row_case(name, shape, shapes.dtype, shapes.device, make_inputs, set_bytes)


def _product_fp8(shapes: TuningShapes, op: str, outputs: int, inputs: int, scales: int = 1) -> TuningCase:
    """A product of rows [1, T, K] in e4m3 with so many scales a row. cuBLASLt is a candidate where it makes
    the product; its backend leaves others to Triton's."""
    tokens, dtype, device = shapes.tokens, shapes.dtype, shapes.device
    has_gelu = op == "linear_gelu_rows_fp8"

    def make_inputs(generator: torch.Generator) -> Arguments:
        x = shapes.rows(generator, 1, tokens, inputs)
        values, row_scale = row_fp8(x.unflatten(-1, (scales, -1)))
        weight, bias = _layer(shapes, generator, outputs, inputs)
        layer = *channel_fp8(weight), bias
        reach = (product_reach(*layer),) if has_gelu else ()
        return values.flatten(-2), row_scale.squeeze(-1), *layer, *reach

    able = runnable(op, device, dtype)
    if not library_fp8.serves(dtype, scales, outputs, inputs):
        able.pop("cublaslt", None)
        able = able or {"reference": implementation(op, "reference")}
    result_bytes = 1 if has_gelu else dtype.itemsize
    set_bytes = tokens * inputs + outputs * inputs + tokens * outputs * result_bytes
    name, shape = shape_key(op, outputs, inputs, scales), (tokens, outputs, inputs, scales)
    return _row_case(name, shape, dtype, device, make_inputs, set_bytes, able, rows=2)


def _layer(
    shapes: TuningShapes, generator: torch.Generator, outputs: int, inputs: int
) -> tuple[Tensor, Tensor]:
    return shapes.rows(generator, outputs, inputs, scale=inputs**-0.5), shapes.rows(generator, outputs)


def _eviction(shapes: TuningShapes) -> TuningCase:
    model, cache, window = shapes.own, shapes.config.cache, shapes.window
    sink = cache.sink_frames * shapes.grid.frame_tokens
    layer_bytes = 3 * window * model.dim * shapes.dtype.itemsize
    layers = min(model.num_layers, max(1, ARENA_BYTES // layer_bytes))
    heads, leaving = (model.num_heads, model.head_dim), window - sink
    is_split = cache.sink_precision == "split"

    def make_inputs(generator: torch.Generator) -> Arguments:
        arenas = [shapes.rows(generator, layers, 1, window, *heads) for _ in range(3)]
        low = [shapes.rows(generator, layers, 1, sink, *heads, scale=2.0**-10) for _ in range(2)]
        turn = normal(generator, torch.float32, (window, model.head_dim // 2))
        rotation = torch.stack((turn.cos(), turn.sin()))
        return *arenas, *(low if is_split else (None, None)), rotation, sink, leaving, cache.alpha

    def last_layer(arguments: Arguments) -> Arguments:
        views = (None if tensor is None else tensor[-1:].clone() for tensor in arguments[:5])
        return *views, *arguments[5:]

    def results(arguments: Arguments, _: object) -> tuple[Tensor, ...]:
        raw, rotated, values, low_keys, low_values, *_ = last_layer(arguments)
        if low_keys is None:
            return rotated, raw[:, :, :sink], values[:, :, :sink]
        pairs = ((raw, low_keys), (values, low_values))
        return rotated, *(arena[:, :, :sink].double() + low.double() for arena, low in pairs)

    name = "evict_and_rephase"
    able = runnable(name, shapes.device, shapes.dtype)
    return TuningCase(
        case_key(name, (layers, window, *heads), shapes.dtype, able), able, shapes.device, make_inputs,
        layers * layer_bytes, implementation(name, "reference"), last_layer, results,
    )  # fmt: skip


def gate_case(shapes: TuningShapes, overrides: Mapping[str, str]) -> TuningCase:
    """Whether the three residual additions of a block are folded into the product before each, or fused with
    the norm after it; `overrides` say what runs the products."""
    model, tokens, device = shapes.config.model, shapes.tokens, shapes.device

    def make_inputs(generator: torch.Generator) -> Arguments:
        x, y = (shapes.rows(generator, 1, tokens, model.dim) for _ in range(2))
        hidden = shapes.rows(generator, 1, tokens, model.ffn_dim)
        sizes = ((model.dim, model.dim), (model.dim, model.dim), (model.dim, model.ffn_dim))
        layers = [tensor for size in sizes for tensor in _layer(shapes, generator, *size)]
        table = normal(generator, torch.float32, (1, 1, 6, model.dim), scale=0.2)
        norm = (shapes.rows(generator, model.dim) for _ in range(2))
        return x, y, hidden, table, *norm, *layers

    ops = Ops(default_choice(device, shapes.dtype) | dict(overrides))
    able = {APART: _apart(ops, model.eps)}
    if not backend_reasons(device)["triton"]:
        able[FOLDED] = _folded(Ops(ops.choice | {"gated_linear": "triton"}), model.eps)
    products = (shape_key("linear", model.dim, inputs) for inputs in (model.dim, model.ffn_dim))
    depends_on = "products by " + ", ".join(ops.choice.get(key, ops.choice["linear"]) for key in products)
    key = case_key(FOLDS_GATE, (tokens, model.dim, model.ffn_dim), shapes.dtype, able, depends_on)
    elements = tokens * (2 * model.dim + model.ffn_dim) + model.dim * (2 * model.dim + model.ffn_dim)
    return TuningCase(
        key, able, device, make_inputs, elements * shapes.dtype.itemsize, _apart(REFERENCE_OPS, model.eps),
        lambda arguments: (*(tensor[:, -CHECKED_ROWS:] for tensor in arguments[:3]), *arguments[3:]),
        lambda _, returned: tuple(tensor[:, -CHECKED_ROWS:] for tensor in returned),
    )  # fmt: skip


def _apart(ops: Ops, eps: float) -> Callable[..., tuple[Tensor, ...]]:
    """The three additions and norms of a block, each addition fused with its norm."""

    def run(x: Tensor, y: Tensor, hidden: Tensor, table: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        _, _, gate, shift, scale, gate_ffn = table.unbind(2)
        norm, layers = weights[:2], (weights[2:4], weights[4:6], weights[6:])
        x, first = ops.gated_residual_affine_norm(x, ops.linear(y, *layers[0]), gate, *norm, eps)
        x, second = ops.gated_residual_adaptive_norm(x, ops.linear(y, *layers[1]), None, shift, scale, eps)
        branch = ops.linear(hidden, *layers[2])
        return first, second, ops.gated_residual_adaptive_norm(x, branch, gate_ffn, shift, scale, eps)[1]

    return run


def _folded(ops: Ops, eps: float) -> Callable[..., tuple[Tensor, ...]]:
    """The same, each addition folded into the product before it."""

    def run(x: Tensor, y: Tensor, hidden: Tensor, table: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        _, _, gate, shift, scale, gate_ffn = table.unbind(2)
        norm, layers = weights[:2], (weights[2:4], weights[4:6], weights[6:])
        x = ops.gated_linear(x, y, *layers[0], gate)
        first = ops.affine_layer_norm(x, *norm, eps)
        x = ops.gated_linear(x, y, *layers[1], None)
        second = ops.adaptive_layer_norm(x, shift, scale, eps)
        x = ops.gated_linear(x, hidden, *layers[2], gate_ffn)
        return first, second, ops.adaptive_layer_norm(x, shift, scale, eps)

    return run
