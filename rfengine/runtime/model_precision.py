"""The precision of the transformer's products: what a device must have, and which products are left out of
FP8."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.fp8_table import TABLE_FILE, FP8Table
from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.models.dit import WanDiT
from rfengine.models.fp8_products import product_names, require_products
from rfengine.ops.backends import fp8_absence
from rfengine.runtime.loaded_transformer import require_weights

logger = logging.getLogger(__name__)


def require_precision(runtime: RuntimeConfig, device: torch.device) -> None:
    """Raises RuntimeError where `device` cannot multiply as `runtime` asks; no weights are needed."""
    if not runtime.multiplies_fp8:
        return
    if absence := fp8_absence(device):
        raise RuntimeError(f"precision is {runtime.precision!r} and {absence}; use 'default'")
    if device.type == "cpu":
        logger.warning("precision is %r: on a CPU FP8 is emulated, which is slower", runtime.precision)


def products_left_out(checkpoint: Checkpoint, runtime: RuntimeConfig) -> tuple[str, ...]:
    """The products that the table of `runtime`, or else that of the checkpoint, leaves out of FP8.

    Raises ValueError for a table that cannot be read, was measured on other weights or is not of every
    product.
    """
    if not runtime.multiplies_fp8:
        return ()
    own = None if checkpoint.directory is None else checkpoint.directory.path / TABLE_FILE
    if runtime.fp8_table is not None:
        path = Path(runtime.fp8_table)
    elif own is not None and os.path.lexists(own):  # one that cannot be read is an error, not left aside
        path = own
    else:
        return ()
    table = FP8Table.read(path)
    table.require_weights(path, checkpoint.fingerprint())
    require_products(table.left_out, checkpoint.config.model)
    names = product_names(checkpoint.config.model)
    if table.errors.keys() != set(names):
        raise ValueError(
            f"{path} has the errors of {len(table.errors)} products, which are not the {len(names)} of this "
            "model; run `rfengine calibrate` on it"
        )
    return table.left_out


def require_settled(runtime: RuntimeConfig, model: WanDiT) -> None:
    """Raises ValueError unless the weights of a loaded `model` are as `runtime` asks.

    Nothing is changed here: another pipeline may have the same model.
    """
    asked = f"precision is {runtime.precision!r}"
    in_fp8 = model.left_out_of_fp8 is not None
    if runtime.multiplies_fp8 and not in_fp8:
        raise ValueError(
            f"{asked} and the products of the model are not in FP8; load it by from_pretrained, or quantise "
            "a model of its own (models/fp8_products.py)"
        )
    if in_fp8 and not runtime.multiplies_fp8:
        raise ValueError(
            f"the products of the model are in FP8 and {asked}; use 'fp8', or a model of its own"
        )
    require_weights(runtime, model)
    if runtime.precision == "bf16" and model.dtype != torch.bfloat16:
        own = str(model.dtype).removeprefix("torch.")
        raise ValueError(f"{asked} and the model is in {own}; load it in bfloat16, or use 'default'")


def precision_setting(config: EngineConfig, model: WanDiT) -> str:
    """The precision as a snapshot names it: "" without FP8 and int8. It is of the passes, however they were
    given."""
    runtime = config.runtime
    if runtime.block_weights == "int8":
        return "weights in int8"
    if not runtime.multiplies_fp8:
        return ""
    words = [runtime.precision]
    if left_out := sorted(model.left_out_of_fp8 or ()):
        digest = hashlib.sha256(" ".join(left_out).encode()).hexdigest()
        words.append(f"without {len(left_out)} products ({digest[:8]})")
    if runtime.precision == "fp8-attention":
        passes = ", ".join(map(str, config.fp8_passes))
        words.append(f"attention in FP8 in passes {passes or 'none'}")
    return ", ".join(words)
