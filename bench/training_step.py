"""Time of a training step, against the floor that its FLOPs set and by what it is spent on.

    python bench/training_step.py --recipe toy_re_dmd --batch 16 --cycles 3

The floor is the plan's FLOPs (rfengine/training/resources.py) at the rate of the fastest matrix product that
is measured on the same device and threads, in the step's precision or in float32: a CPU without 16-bit
arithmetic multiplies bfloat16 matrices at a fraction of its rate. A cycle is critic_updates steps, so that
every kind of update is in it; the first is not counted. "model" is time inside the transformers' forward
passes and backward, "VAE" inside its decoder, "rest" all else: draws, scores, optimizers, averages.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from rfengine.cli.process import run_script
from rfengine.cli.train import TrainOptions, train_config
from rfengine.limits import Range, check_options
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.training.build import build_stage
from rfengine.training.config import Precision, TrainConfig
from rfengine.training.parallel import Ranks
from rfengine.training.resources import plan_resources

_TIMED = [
    *((WanDiT, method, "model") for method in ("forward_chunk", "context_pass", "forward_clip")),
    *((WanDiT, method, "model") for method in ("text_keys_values", "modulation")),
    (torch.Tensor, "backward", "model"),
    (WanVAE, "decode", "VAE"),
]
_SIDE = 2048  # of the matrices whose product gives the rate
_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time of a training step, its floor, and what it is spent on."""

    recipe: str = "toy_re_dmd"
    """A recipe of rfengine train."""
    batch: int | None = None
    """Samples of one pass; the recipe's where nothing is given."""
    precision: Precision | None = None
    """Precision of the arithmetic; the recipe's where nothing is given."""
    teacher: str = "tiny"
    """A checkpoint directory; it starts the critic as well."""
    cycles: Annotated[int, Range(1, 1_000_000)] = 3
    """Cycles of critic_updates steps to time."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: Annotated[int, Range(1, 1024)] = 1
    """CPU threads of torch."""


def now(device: torch.device) -> float:
    """Seconds, once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float]]:
    """The seconds inside the block's outermost calls of _TIMED, by name."""
    seconds: dict[str, float] = {}
    inside = False

    def timed(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return plain(*arguments, **options)
            inside, started = True, now(device)
            try:
                return plain(*arguments, **options)
            finally:
                inside = False
                seconds[name] = seconds.get(name, 0.0) + now(device) - started

        return call

    with ExitStack() as stack:
        for owner, method, name in _TIMED:
            stack.enter_context(patch.object(owner, method, timed(getattr(owner, method), name)))
        yield seconds


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several products of square matrices, in this type and in float32."""
    best = float("inf")
    for kind in {dtype, torch.float32}:
        a, b = (torch.randn(_SIDE, _SIDE, device=device, dtype=kind) for _ in range(2))
        for _ in range(_TRIES):
            started = now(device)
            torch.nn.functional.linear(a, b)  # both matrices row by row, as in the model
            best = min(best, now(device) - started)
    return 2 * _SIDE**3 / best


def measure(options: Options) -> dict[str, Any]:
    """The report as JSON values."""
    check_options(options)
    torch.set_num_threads(options.threads)
    device, config = torch.device(options.device), _config(options)
    stage = build_stage(config, device, Ranks())
    cycle = config.critic_updates if config.stage in ("dmd", "re-dmd") else 1
    for step in range(cycle):
        stage.update(step)
    started, steps = now(device), cycle * options.cycles
    with watched(device) as spent_in:
        for step in range(cycle, cycle + steps):
            stage.update(step)
    seconds = (now(device) - started) / steps
    parts = {name: spent / steps for name, spent in spent_in.items()}
    rest = seconds - sum(parts.values())
    flops = plan_resources(config, 1, 1, device.type).step_flops
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    rate = product_rate(device, dtype)
    return {
        "recipe": config.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": options.threads,
        "batch": config.batch,
        "steps": steps,
        "seconds_per_step": round(seconds, 4),
        "gflop_per_step": round(flops / 1e9, 2),
        "gflop_per_s_of_a_product": round(rate / 1e9, 1),
        "floor_seconds": round(flops / rate, 4),
        "times_the_floor": round(seconds * rate / flops, 2),
        "parts": {name: round(spent, 4) for name, spent in (parts | {"rest": rest}).items()},
        "outside_forward_and_backward": round(rest / seconds, 4),
    }


def _config(options: Options) -> TrainConfig:
    given = TrainOptions(
        recipe=options.recipe,
        batch=options.batch,
        precision=options.precision,
        teacher=options.teacher,
        critic=options.teacher,
    )
    return replace(train_config(given), average_start=0)


def run(options: Options) -> None:
    print(json.dumps(measure(options), indent=2))


if __name__ == "__main__":
    sys.exit(run_script("training_step", Options, run))
