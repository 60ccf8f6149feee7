"""Contests: what autotune.py can choose, as calls at the engine's own shapes with a check of each.

T tokens of a chunk, S tokens of the window, D dim, H heads, E head dim, N outputs and K inputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.ops import REFERENCE_OPS, Ops, default_choice
from rfengine.ops.backends import SIXTEEN_BITS, backend_reasons, family, is_hopper
from rfengine.ops.table import OPS, implementation, op_of, shape_key
from rfengine.tuning.record import Subject
from rfengine.tuning.timing import Arguments

FOLDS_GATE = "folds_gate"  # the key of the one decision that is no backend of an op
APART, FOLDED = "apart", "folded"
CHECKED_ROWS = 128
ARENA_BYTES = 2**29  # of the arenas that eviction is timed on: fewer layers than a large model has


@dataclass(frozen=True, slots=True)
class Contest:
    """One thing to choose: which of `contenders` runs fastest on arguments such as make_inputs gives.

    contenders: functions by the names in the subject, the default first. meaning: the op in plain PyTorch.
    results: the tensors to check, from the arguments after a call and what it returned; with the arguments of
    `part` in place of all, the same tensors from less work. check: why the results of a contender on some
    arguments are wrong, or "", in place of that comparison with `meaning` in float64.
    """

    subject: Subject
    contenders: Mapping[str, Callable[..., object]]
    device: torch.device
    make_inputs: Callable[[torch.Generator], Arguments]
    set_bytes: int
    meaning: Callable[..., object]
    part: Callable[[Arguments], Arguments]
    results: Callable[[Arguments, object], tuple[Tensor, ...]]
    check: Callable[[Callable[..., object], Arguments], str] | None = None

    @property
    def default(self) -> str:
        return self.subject.contenders[0]


@dataclass(frozen=True, slots=True)
class Site:
    """Where and for what contests are held: one stream of `config` at `grid`."""

    config: EngineConfig
    grid: LatentGrid
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.config.cache.chunk_frames * self.grid.frame_tokens

    def subject(self, key: str, shape: tuple[int, ...], able: Iterable[str], given: str = "") -> Subject:
        return Subject(key, shape, str(self.dtype).removeprefix("torch."), tuple(able), given)

    def rows(self, generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return values.mul_(scale).to(self.dtype)


def backend_contests(site: Site) -> list[Contest]:
    """The contests between backends of one op: attention, every product's shape, eviction."""
    model = site.config.model
    contests = [_window_attention(site), _text_attention(site)]
    # q, k and v at once; every output projection and the queries of the text; both of the feed-forward part
    for op, outputs, inputs in (
        ("linear", 3 * model.dim, model.dim),
        ("linear", model.dim, model.dim),
        ("linear_gelu", model.ffn_dim, model.dim),
        ("linear", model.dim, model.ffn_dim),
    ):
        contests.append(_product(site, op, outputs, inputs))
    if site.config.cache.sink == "ema":
        contests.append(_eviction(site))
    return contests


def contenders(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[..., object]]:
    """The backends of `op` that can run here, the one it has by default first.

    On Hopper in 16 bits all forms of Triton's attention; elsewhere it has one alone.
    """
    reasons = backend_reasons(device)
    usual = default_choice(device, dtype)[op]
    has_forms = dtype in SIXTEEN_BITS and is_hopper(device)
    able = [
        name
        for name in OPS[op].backends
        if name not in OPS[op].by_request
        and not reasons[family(name)]
        and (has_forms or family(name) == name)
    ]
    return {name: implementation(op, name) for name in dict.fromkeys((usual, *able))}


def _contest(
    site: Site,
    key: str,
    shape: tuple[int, ...],
    elements: int,
    make_inputs: Callable[[torch.Generator], Arguments],
    part: Callable[[Arguments], Arguments],
) -> Contest:
    """A contest whose result is one tensor [B, T, ...], of which the last rows are checked."""
    able = contenders(op_of(key), site.device, site.dtype)
    return Contest(
        site.subject(key, shape, able), able, site.device, make_inputs, elements * site.dtype.itemsize,
        implementation(op_of(key), "reference"), part, lambda _, returned: (returned[:, -CHECKED_ROWS:],),
    )  # fmt: skip


def _last_rows(arguments: Arguments) -> Arguments:
    return arguments[0][:, -CHECKED_ROWS:], *arguments[1:]


def _window_attention(site: Site) -> Contest:
    model, frames = site.config.model, site.config.cache.window_frames
    window, heads = frames * site.grid.frame_tokens, (model.num_heads, model.head_dim)

    def make_inputs(generator: torch.Generator) -> Arguments:
        filled = torch.full((1,), window, dtype=torch.int32, device=site.device)
        q = site.rows(generator, 1, site.tokens, *heads)
        return q, *(site.rows(generator, 1, window, *heads) for _ in range(2)), window, filled

    shape, elements = (site.tokens, window, *heads), 2 * (site.tokens + window) * model.dim
    return _contest(site, "sink_window_attention", shape, elements, make_inputs, _last_rows)


def _text_attention(site: Site) -> Contest:
    model = site.config.model
    heads = (model.num_heads, model.head_dim)

    def make_inputs(generator: torch.Generator) -> Arguments:
        q = site.rows(generator, 1, site.tokens, *heads)
        return q, *(site.rows(generator, 1, model.text_len, *heads) for _ in range(2)), None

    shape, elements = (site.tokens, model.text_len, *heads), 2 * (site.tokens + model.text_len) * model.dim
    return _contest(site, "clip_attention", shape, elements, make_inputs, _last_rows)


def _product(site: Site, op: str, outputs: int, inputs: int) -> Contest:
    def make_inputs(generator: torch.Generator) -> Arguments:
        return site.rows(generator, 1, site.tokens, inputs), *_layer(site, generator, outputs, inputs)

    shape = (site.tokens, outputs, inputs)
    elements = site.tokens * (outputs + inputs) + outputs * inputs
    return _contest(site, shape_key(op, outputs, inputs), shape, elements, make_inputs, _last_rows)


def _layer(site: Site, generator: torch.Generator, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    return site.rows(generator, outputs, inputs, scale=inputs**-0.5), site.rows(generator, outputs)


def _eviction(site: Site) -> Contest:
    model, cache = site.config.model, site.config.cache
    window, sink = (frames * site.grid.frame_tokens for frames in (cache.window_frames, cache.sink_frames))
    layer_bytes = 3 * window * model.dim * site.dtype.itemsize
    layers = min(model.num_layers, max(1, ARENA_BYTES // layer_bytes))
    heads, leaving = (model.num_heads, model.head_dim), window - site.tokens
    is_split = cache.sink_precision == "split"

    def make_inputs(generator: torch.Generator) -> Arguments:
        arenas = [site.rows(generator, layers, 1, window, *heads) for _ in range(3)]
        low = [site.rows(generator, layers, 1, sink, *heads, scale=2.0**-10) for _ in range(2)]
        turn = torch.randn(
            window, model.head_dim // 2, generator=generator, dtype=torch.float32, device=site.device
        )
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

    able = contenders("evict_and_rephase", site.device, site.dtype)
    return Contest(
        site.subject("evict_and_rephase", (layers, window, *heads), able), able, site.device, make_inputs,
        layers * layer_bytes, implementation("evict_and_rephase", "reference"), last_layer, results,
    )  # fmt: skip


def gate_contest(site: Site, overrides: Mapping[str, str]) -> Contest:
    """Whether the three residual additions of a block are folded into the product before each, or fused with
    the norm after it; `overrides` say what runs the products."""
    model, tokens = site.config.model, site.tokens

    def make_inputs(generator: torch.Generator) -> Arguments:
        x, y = (site.rows(generator, 1, tokens, model.dim) for _ in range(2))
        hidden = site.rows(generator, 1, tokens, model.ffn_dim)
        shapes = ((model.dim, model.dim), (model.dim, model.dim), (model.dim, model.ffn_dim))
        layers = [tensor for shape in shapes for tensor in _layer(site, generator, *shape)]
        table = 0.2 * torch.randn(
            1, 1, 6, model.dim, generator=generator, dtype=torch.float32, device=site.device
        )
        norm = (site.rows(generator, model.dim) for _ in range(2))
        return x, y, hidden, table, *norm, *layers

    ops = Ops(default_choice(site.device, site.dtype) | dict(overrides))
    able = {APART: _apart(ops, model.eps)}
    if not backend_reasons(site.device)["triton"]:
        able[FOLDED] = _folded(Ops(ops.choice | {"gated_linear": "triton"}), model.eps)
    keys = (shape_key("linear", model.dim, inputs) for inputs in (model.dim, model.ffn_dim))
    given = "products by " + ", ".join(ops.choice.get(key, ops.choice["linear"]) for key in keys)
    weights = model.dim * (2 * model.dim + model.ffn_dim)
    return Contest(
        site.subject(FOLDS_GATE, (tokens, model.dim, model.ffn_dim), able, given), able, site.device,
        make_inputs, (tokens * (2 * model.dim + model.ffn_dim) + weights) * site.dtype.itemsize,
        _apart(REFERENCE_OPS, model.eps),
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
