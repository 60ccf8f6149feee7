"""PEFT LoRA files: their names, and their merge into the transformer (spec 6.2)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.prefixes import WRAPPER_SEGMENTS, strip_prefixes
from rfengine.checkpoint.tensor_file import StoredTensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoraNames:
    """Names in a LoRA file that belong to one adapted layer."""

    down: str  # lora_A, [rank, in]
    up: str  # lora_B, [out, rank]
    alpha: str | None  # a scalar; the scale is alpha / rank, and 1 without it


def parse_lora(names: Iterable[str]) -> dict[str, LoraNames]:
    """The adapted layers of a LoRA, each by the engine's name of its weight.

    Raises ValueError for a name of another form and for a layer that has only one of the two matrices.
    """
    found: dict[str, dict[str, str]] = {}
    foreign = []
    for name in names:
        clean = strip_prefixes(WRAPPER_SEGMENTS.sub("", name).removeprefix("base_model.model."))
        match = re.fullmatch(r"(.+)\.(?:lora_([AB])(?:\.default)?\.weight|alpha)", clean)
        if match is None:
            foreign.append(name)
            continue
        found.setdefault(f"{match[1]}.weight", {})[match[2] or "alpha"] = name
    if foreign or not found:
        raise ValueError(
            f"the LoRA has {list_names(foreign) or 'no tensor'} where lora_A and lora_B of PEFT "
            "are expected; give a file of those alone"
        )
    single = [weight for weight, sides in found.items() if not {"A", "B"} <= set(sides)]
    if single:
        raise ValueError(f"the LoRA has only one of lora_A and lora_B for {list_names(single)}; get it again")
    return {weight: LoraNames(sides["A"], sides["B"], sides.get("alpha")) for weight, sides in found.items()}


def add_lora(transformer: dict[str, StoredTensor], lora: Mapping[str, StoredTensor], label: str) -> None:
    """Replace the adapted weights in `transformer` by merged ones, which are computed when they are read.

    label: what the LoRA is called in errors. Raises ValueError when it does not fit the transformer.
    """
    layers = parse_lora(lora)
    unknown = [weight for weight in layers if weight not in transformer]
    if unknown:
        raise ValueError(
            f"{label} adapts {list_names(unknown)}, which the transformer lacks; it is for another model"
        )
    misfits = [
        f"{weight} {transformer[weight].shape} by {lora[names.up].shape} x {lora[names.down].shape}"
        for weight, names in layers.items()
        if not _fits(transformer[weight].shape, lora[names.up].shape, lora[names.down].shape)
    ]
    if misfits:
        raise ValueError(
            f"{label} does not fit {list_names(misfits)}; it is for a transformer of another size"
        )
    for weight, names in layers.items():
        alpha = None if names.alpha is None else lora[names.alpha]
        transformer[weight] = _merged(transformer[weight], lora[names.down], lora[names.up], alpha)
    logger.info("%s: merging %d pairs", label, len(layers))


def _fits(weight: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return len(weight) == len(up) == len(down) == 2 and (*up, down[1]) == (weight[0], down[0], weight[1])


def _merged(
    weight: StoredTensor, down: StoredTensor, up: StoredTensor, alpha: StoredTensor | None
) -> StoredTensor:
    def read() -> Tensor:
        return merge_lora(
            weight.read(), down.read(), up.read(), None if alpha is None else float(alpha.read())
        )

    return replace(weight, dtype=torch.float32, read=read)


def merge_lora(weight: Tensor, down: Tensor, up: Tensor, alpha: float | None = None) -> Tensor:
    """weight + alpha / rank * up @ down in float32, whatever the dtypes given.

    weight: [out, in]; down: [rank, in]; up: [out, rank]. Without alpha the scale is 1.
    """
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return torch.addmm(weight.float(), up.float(), down.float(), alpha=scale)
