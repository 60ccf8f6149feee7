"""`rfengine calibrate`: which products of a checkpoint stay out of FP8, in a file beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from rfengine.cli.cleaned_prompt import check_cleaned
from rfengine.cli.terminal import find_device
from rfengine.config import DTypeName
from rfengine.limits import Range

if TYPE_CHECKING:
    from rfengine.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Measure the error of every product of a transformer in FP8, and write which ones are left out of it."""

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint directory, or tiny, which comes with the package."""
    out: Path | None = None
    """The file; DIR/fp8.json, which --precision fp8 finds by itself, where nothing is given."""
    limit: Annotated[float, Range(1e-4, 1.0)] = 0.1
    """The largest error of a product in FP8, over its size; rounding alone is about 0.04."""
    prompt: tuple[str, ...] = ()
    """Whose videos are measured; three of its own where nothing is given."""
    chunks: Annotated[int, Range(1, 1000)] = 6
    """Chunks of each video; at least as many as fill the window show what a long stream has."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    device: str | None = None
    """cpu, cuda or cuda:N; cuda where there is one."""
    dtype: DTypeName | None = None
    """Precision of the weights; bfloat16 on CUDA, float32 on the CPU."""


def run(options: CalibrateOptions) -> int:
    from rfengine.calibration import PROMPTS, TOY_PROMPTS, CalibrationRun, calibrate
    from rfengine.checkpoint.checkpoint import Checkpoint
    from rfengine.checkpoint.directories import checkpoint_directory
    from rfengine.checkpoint.fp8_table import TABLE_FILE
    from rfengine.costs.shapes import require_stream
    from rfengine.grid import LatentGrid
    from rfengine.limits import check_options
    from rfengine.runtime.options import dtype_of, present_device

    check_options(options)
    find_device(options.device)
    for prompt in options.prompt:
        check_cleaned(prompt, "a prompt")
    directory = checkpoint_directory(options.directory)
    checkpoint = Checkpoint.open(directory)
    require_stream(checkpoint.config)
    path = options.out or directory / TABLE_FILE
    if not os.access(path.parent, os.W_OK) or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} cannot be written; name a file in a directory of yours by --out")
    device = present_device(options.device)
    own = TOY_PROMPTS if checkpoint.config.text.known_words else PROMPTS
    grid = LatentGrid.of(checkpoint.config, options.height, options.width)
    settings = CalibrationRun(
        options.prompt or own, options.chunks, grid, device, dtype_of(options.dtype, device)
    )
    found = calibrate(checkpoint, settings, options.limit)
    found.table.write(path)
    print(render(found, path))
    return 0


def render(found: Calibration, path: Path) -> str:
    """The table in words: the worst and the median error of each kind of product, and what is left out."""
    from rfengine.models.fp8_products import PRODUCTS

    table = found.table
    lines = [f"{table.settings}", f"{'product':<16}{'median':>9}{'worst':>9}  {'worst in':<12}left out"]
    for kind in PRODUCTS:
        errors = {name: error for name, error in table.errors.items() if name.endswith(f".{kind}")}
        worst = max(errors, key=errors.__getitem__)
        middle = sorted(errors.values())[len(errors) // 2]
        count = sum(name in errors for name in table.left_out)
        block = ".".join(worst.split(".")[:2])
        lines.append(f"{kind:<16}{middle:>9.4f}{errors[worst]:>9.4f}  {block:<12}{count} of {len(errors)}")
    by_chunk = ", ".join(f"{value:.3f}" for value in found.difference)
    lines.append(f"latents with this table differ from those without FP8 by {by_chunk} (chunk by chunk)")
    lines.append(f"{path}: {len(table.left_out)} of {len(table.errors)} products left out of FP8")
    return "\n".join(lines)
