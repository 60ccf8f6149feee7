"""The error that FP8 makes in every product of a transformer, measured on its own videos, for an FP8Table.

The model runs in its own dtype, op by op. Of each product a part of the rows is formed again in FP8 and in
float32; its error is the norm of their difference over that of the exact product without its bias (after
a GELU, with it). Rounding alone makes about 3.7 % of normal numbers: 2.6 % of rows and as much of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.fp8_table import FP8Table
from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import TextKeysValues, WanDiT
from rfengine.models.fp8_products import product_names, products, quantise
from rfengine.models.linear import Linear, LinearOfHeads, WeightFP8
from rfengine.ops import Ops, choose_ops, reference_fp8
from rfengine.ops.backends import fp8_absence
from rfengine.ops.reference import row_fp8, to_e4m3
from rfengine.runtime.rolling_runner import runner_of

DEFAULT_LIMIT = 0.1
MEASURED_ROWS = 256  # of each call, spread over all
PROMPTS = (
    "A sailing boat crosses a bay at sunset, waves breaking at its bow.",
    "A cat jumps from a table to a shelf in a bright kitchen.",
    "A busy street at night in the rain, neon signs, people with umbrellas.",
)
TOY_PROMPTS = (  # for a model that knows few words
    "a red ball rolling to the left",
    "a small green square moving right on grass",
    "a blue triangle spinning, sky",
)


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """What is measured: `chunks` chunks of a video of each prompt, at one size."""

    prompts: tuple[str, ...]
    chunks: int
    grid: LatentGrid
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Calibration:
    """table: what was found. difference: of the latents in FP8 with that table from those without FP8, the
    norm of it over theirs, by chunk."""

    table: FP8Table
    difference: tuple[float, ...]


class _MeasuringOps(Ops):
    """The ops of a model, which also note the error of each product in FP8, between watch and stop."""

    def __init__(self, choice: Mapping[str, str]) -> None:
        super().__init__(choice)
        self.errors: dict[str, Tensor] = {}
        self._watched: dict[int, tuple[str, Linear, WeightFP8]] = {}
        self._hidden_scale: Tensor | None = None  # of the rows of the last GELU, which the next product reads

    def watch(self, model: WanDiT) -> None:
        for name, product in products(model).items():
            for layer in product.layers:
                self._watched[layer.weight.data_ptr()] = (name, layer, WeightFP8.of((layer,)))

    def stop(self) -> None:
        self._watched.clear()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self._note(x, weight)
        return super().linear(x, weight, bias)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self._note(x, weight)
        return super().linear_gelu(x, weight, bias)

    def _note(self, x: Tensor, weight: Tensor) -> None:
        if weight.data_ptr() not in self._watched:
            return
        name, layer, fp8 = self._watched[weight.data_ptr()]
        rows = x.flatten(0, -2)
        rows = rows[:: max(1, len(rows) // MEASURED_ROWS)].float()
        exact, found = F.linear(rows, weight.float()), self._in_fp8(name, layer, fp8, rows)
        if name.endswith(".ffn.0"):
            exact = F.gelu(exact + layer.bias.float(), approximate="tanh")
        error = (found - exact).norm() / exact.norm().clamp_min(1e-12)
        self.errors[name] = torch.maximum(self.errors.get(name, error), error)

    def _in_fp8(self, name: str, layer: Linear, fp8: WeightFP8, rows: Tensor) -> Tensor:
        """The product of float32 rows [M, K] in FP8, without its bias but before a GELU."""
        no_bias = torch.zeros_like(fp8.bias, dtype=torch.float32)
        weight = fp8.values, fp8.scale
        if isinstance(layer, LinearOfHeads):
            return reference_fp8.linear_heads_fp8(rows, *weight, no_bias, layer.num_heads)
        if name.endswith(".ffn.2") and self._hidden_scale is not None:
            values = to_e4m3(rows / self._hidden_scale)
            return reference_fp8.linear_fp8(values, self._hidden_scale, *weight, no_bias)
        values, scale = row_fp8(rows)
        if name.endswith(".ffn.0"):
            self._hidden_scale = reference_fp8.hidden_unit(scale, fp8.reach)
            return reference_fp8.linear_gelu_fp8(values, scale, *weight, fp8.bias.float())
        return reference_fp8.linear_fp8(values, scale, *weight, no_bias)


@torch.no_grad()
def calibrate(checkpoint: Checkpoint, run: CalibrationRun, limit: float) -> Calibration:
    """Measure every product of the transformer of `checkpoint`; those above `limit` are left out.

    Raises RuntimeError for a GPU without FP8 and ValueError for a checkpoint that no table can be of, before
    anything is read; ValueError where activations overflow in the dtype of `run`.
    """
    if absence := fp8_absence(run.device):
        raise RuntimeError(f"device is {run.device} and {absence}; calibrate on 'cpu'")
    config, dtype = checkpoint.config, str(run.dtype).removeprefix("torch.")
    fingerprint, encoder = checkpoint.fingerprint(), checkpoint.text_encoder(run.device, run.dtype, None)
    ops = _MeasuringOps(choose_ops("auto", run.device, dtype=run.dtype).choice)
    model = checkpoint.load(lambda: WanDiT(config.model, ops), "transformer", run.dtype, run.device).eval()
    texts = [
        model.text_keys_values(encoder.encode([prompt], run.device, run.dtype)) for prompt in run.prompts
    ]
    ops.watch(model)
    exact = _latents(config, model, run, texts)
    ops.stop()
    errors = {name: error.item() for name, error in ops.errors.items()}
    if unknown := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise ValueError(
            f"the rows or the result of {unknown[0]} are not finite in {dtype}; calibrate in another dtype, "
            "such as bfloat16"
        )
    quantise(model, [name for name, error in errors.items() if error > limit])
    found = _latents(config, model, run, texts)
    difference = [relative_error(ours, true) for ours, true in zip(found, exact, strict=True)]
    by_chunk = tuple(max(difference[chunk :: run.chunks]) for chunk in range(run.chunks))
    ordered = tuple(name for name in product_names(config.model) if name in model.left_out_of_fp8)
    size = f"{run.grid.height} x {run.grid.width}"
    settings = f"{len(run.prompts)} videos of {run.chunks} chunks at {size} pixels, in {dtype}"
    table = FP8Table(fingerprint, limit, ordered, errors, settings)
    return Calibration(table, by_chunk)


def _latents(
    config: EngineConfig, model: WanDiT, run: CalibrationRun, texts: Sequence[TextKeysValues]
) -> list[Tensor]:
    """The latents of every chunk of every video, one video after another; the same noise at each call."""
    runner, found = runner_of(model, config.schedule, graphs=False), []
    for number, text in enumerate(texts):
        cache = StreamingKVCache(config.model, config.cache, run.grid, dtype=run.dtype, device=run.device)
        for chunk in range(run.chunks):
            plan = cache.plan_chunk()
            noise = runner.draw_noise(cache, chunk, plan.frames, number).to(run.device, run.dtype)
            found.append(runner.advance(cache, plan, noise, text))
    return found
