"""The file of a LoRA: opened, and matched with the tensors of a transformer."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.directories import folder_names, inner_directory
from rfengine.checkpoint.file_format import weights_format
from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.loader import open_weights
from rfengine.checkpoint.lora_change import LoraChange
from rfengine.checkpoint.lora_names import LoraNames, Unmatched, parse_lora
from rfengine.checkpoint.lora_scale import (
    CONFIG_FILE,
    ScaleStatement,
    check_alpha,
    header_statements,
    read_adapter_config,
)
from rfengine.checkpoint.pickle_file import LORA_KEYS
from rfengine.checkpoint.tensor_file import StoredTensor, read_header

logger = logging.getLogger(__name__)

# What PEFT and Diffusers call an adapter; of two formats of one adapter the first is taken.
_STEMS = ("adapter_model", "pytorch_lora_weights")
_SUFFIXES = (".safetensors", ".bin")
_NO_NUMBERS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)
_SAME_SCALE = 2**-8  # relative; an alpha among the tensors may have been rounded to bfloat16
_MOST_UNMATCHED = 24  # keys that an error lists before it only counts


@dataclass(frozen=True, slots=True)
class LoraFile:
    """The tensors of a LoRA by the names in its file, and what is stated of its scale."""

    label: str  # what it is called in errors
    tensors: dict[str, StoredTensor]
    statements: tuple[ScaleStatement, ...] = ()


def open_lora(path: Path, pickles: bool = True) -> LoraFile:
    """Open a LoRA; no matrix is read yet. An adapter_config.json beside the file belongs to it.

    Raises ValueError where there is none or several, for a damaged file, for a pickle without `pickles`, and
    for a statement about it that is damaged or that the engine does not follow.
    """
    if os.path.isdir(path):  # where Path.is_dir raises for too long a name
        path = _file_in(path)
    if not pickles and os.path.lexists(path) and weights_format(path) == "pickle":
        raise ValueError(
            f"{path} is a torch pickle, which convert alone reads; merge it for good by `rfengine convert "
            f"SRC DST --lora {path}`, or save its tensors as safetensors"
        )
    tensors = open_weights([path], LORA_KEYS)
    statements = []
    config = path.with_name(CONFIG_FILE)
    if os.path.lexists(config):
        statements.append(read_adapter_config(config))
    if weights_format(path) == "safetensors":
        has_alphas = any(name.endswith(".alpha") for name in tensors)
        statements += header_statements(read_header(path)[1], str(path), has_alphas)
    return LoraFile(str(path), tensors, tuple(statements))


def _file_in(folder: Path) -> Path:
    folder = inner_directory(folder)
    names = folder_names(folder)
    of_stem = {stem: [stem + suffix for suffix in _SUFFIXES if stem + suffix in names] for stem in _STEMS}
    found = [files[0] for files in of_stem.values() if files]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise ValueError(f"{folder} holds {' and '.join(found)}; give the one that is meant")
    raise ValueError(
        f"{folder} has no {' and no '.join(f'{stem}.safetensors' for stem in _STEMS)} (it holds "
        f"{list_names(names) or 'nothing'}); give the file of the LoRA itself"
    )


def lora_changes(
    lora: LoraFile, shapes: Mapping[str, tuple[int, ...]], allow_unmatched: bool = False
) -> dict[str, LoraChange]:
    """What the LoRA does to the tensors of a transformer of these `shapes`, by their names; none is read.

    The factor of a pair is what its alpha among the tensors or the statements give, and 1 with a warning
    where nothing does. allow_unmatched: keys that match nothing are left out, with a warning. Raises
    ValueError for those without it, where nothing matches, where shapes or statements do not fit, and, once a
    tensor is read, for values that are not finite.
    """
    layers, unmatched = parse_lora(lora.tensors, shapes, lora.label)
    _check_tensors(shapes, layers, lora)
    _check_unmatched(unmatched, bool(layers), allow_unmatched, lora.label)
    _check_whole(layers, lora)
    factors = _factors(layers, lora)
    changes = {}
    for target, names in layers.items():
        pair = re.sub(r"\.bias$", ".weight", target)  # which gives the factor of the bias beside it
        stored = (names.down, names.up, names.up_bias, names.diff, names.whole)
        changes[target] = LoraChange(factors.get(pair, 1.0), *(_finite(lora, name) for name in stored))
    return changes


def _finite(lora: LoraFile, name: str | None) -> StoredTensor | None:
    """The tensor `name`, whose values are checked when they are read."""
    if name is None:
        return None
    stored = lora.tensors[name]

    def read() -> Tensor:
        tensor = stored.read()
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{name} in {lora.label} has values that are not finite; get the file again")
        return tensor

    return StoredTensor(stored.shape, stored.dtype, read)


def _check_unmatched(unmatched: Unmatched, some_match: bool, allow: bool, label: str) -> None:
    if not unmatched.names:
        return
    listed = list_names(unmatched.names, _MOST_UNMATCHED)
    if not some_match:
        raise ValueError(f"nothing in {label} matches the transformer ({listed}); {unmatched.reason}")
    if not allow:
        raise ValueError(
            f"{label} has keys that match nothing in the transformer ({listed}); {unmatched.reason}, or "
            "leave them out with allow_unmatched (--allow-unmatched-lora)"
        )
    logger.warning("%s: keys that match nothing in the transformer are left out: %s", label, listed)


def _check_tensors(
    shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, LoraNames], lora: LoraFile
) -> None:
    """Raises ValueError for matrices and differences of integers, without values, or of other shapes."""
    integers, empty, misfits = [], [], []
    for target, names in layers.items():
        shape, pair = tuple(shapes[target]), (names.down, names.up)
        for name in (*pair, names.up_bias, names.diff, names.whole):
            if name is not None and not lora.tensors[name].dtype.is_floating_point:
                integers.append(f"{name} {lora.tensors[name].dtype}")
            if name is not None and name not in pair and lora.tensors[name].shape != shape:
                misfits.append(f"{target} is {shape} in the model and {lora.tensors[name].shape} in the LoRA")
        if names.down is not None and names.up is not None:
            up, down = lora.tensors[names.up].shape, lora.tensors[names.down].shape
            if 0 in (*up, *down):
                empty.append(f"{target} by {up} x {down}")
            elif not _fits(shape, up, down):
                product = (up[0], *down[1:]) if up[1:2] == down[:1] else f"{up} x {down}"
                misfits.append(f"{target} is {shape} in the model and {product} in the LoRA")
    if integers:
        raise ValueError(
            f"{lora.label} holds {list_names(integers)} where floating-point numbers are expected; quantized "
            "adapters are not merged, so give it in BF16, F16 or F32"
        )
    if empty:
        raise ValueError(
            f"{lora.label} has matrices of rank 0 or without values for {list_names(empty)}; get it again"
        )
    if misfits:
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise ValueError(f"{lora.label} does not fit: {misfits[0]}{more}; give a LoRA of this model")


def _fits(weight: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether up @ down, flattened behind the first axis, has the values of `weight`.

    Those of a convolution are up [out, rank, 1, ...] and down [rank, in, *kernel], or flat.
    """
    if min(len(weight), len(up), len(down)) < 2 or (up[0], up[1]) != (weight[0], down[0]):
        return False
    inner, flat = _without_ones(down[1:]), math.prod(weight[1:])
    return set(up[2:]) <= {1} and inner in (_without_ones(weight[1:]), _without_ones((flat,)))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without the axes of length 1 at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _check_whole(layers: Mapping[str, LoraNames], lora: LoraFile) -> None:
    """Whole tensors beside an adapter and what is stated of them have to agree."""
    saved = {module: False for each in lora.statements for module in each.saved_modules}
    has_biases = any(each.has_biases for each in lora.statements)
    strange = []
    for target, names in layers.items():
        if names.whole is None:
            continue
        modules = [
            module for module in saved if any(f".{layer}".endswith(f".{module}") for layer in names.layers)
        ]
        saved |= dict.fromkeys(modules, True)
        if not modules and not (has_biases and target.endswith(".bias")):
            strange.append(names.whole)
    if strange:
        raise ValueError(
            f"{lora.label} holds {list_names(strange)} whole, and no modules_to_save or bias in its "
            "adapter_config.json says that they take the place of others; give the adapter with that file"
        )
    absent = [module for module, is_there in saved.items() if not is_there]
    if absent:
        raise ValueError(f"{lora.label} lacks the modules_to_save {list_names(absent)}; get the file again")
    if has_biases and not any(names.whole and target.endswith(".bias") for target, names in layers.items()):
        raise ValueError(
            f"{lora.label} lacks the biases that its adapter_config.json states; get the file again"
        )
    for each in lora.statements:
        if each.has_lora_bias not in (None, any(names.up_bias is not None for names in layers.values())):
            raise ValueError(
                f"{each.source} has lora_bias {str(each.has_lora_bias).lower()} and {lora.label} is "
                "otherwise; they do not belong together"
            )


def _factors(layers: Mapping[str, LoraNames], lora: LoraFile) -> dict[str, float]:
    """The factor of every pair, by the weight that it changes."""
    factors, unstated = {}, []
    for target, names in layers.items():
        if names.down is None:
            continue
        rank = lora.tensors[names.down].shape[0]
        stated = {each.source: each.scale(names.layers, rank) for each in lora.statements}
        if names.alpha is not None:
            stated[names.alpha] = _read_alpha(lora, names.alpha) / rank
        known = {source: scale for source, scale in stated.items() if scale is not None}
        first = next(reversed(known.values()), 1.0)
        if any(not math.isclose(first, scale, rel_tol=_SAME_SCALE) for scale in known.values()):
            shown = ", ".join(f"{scale:g} by {source}" for source, scale in known.items())
            raise ValueError(
                f"the scale of {target} in {lora.label} is contradictory: {shown}; leave one of them away"
            )
        if not known:
            unstated.append(target)
            bias = layers.get(f"{target.removesuffix('.weight')}.bias", LoraNames()).up_bias
            if bias is not None:
                raise ValueError(
                    f"{lora.label} has {bias}, which PEFT scales as its matrices, and no alpha is stated; "
                    "put the adapter_config.json of the adapter beside it"
                )
        factors[target] = first
    _warn_of_unstated(unstated, len(factors), layers, lora)
    return factors


def _warn_of_unstated(
    unstated: Sequence[str], pairs: int, layers: Mapping[str, LoraNames], lora: LoraFile
) -> None:
    if unstated:
        logger.warning(
            "%s: no alpha is stated for %d of %d pairs, which are merged at scale 1; if they were trained at "
            "another, put an adapter_config.json with r and lora_alpha beside the file",
            lora.label, len(unstated), pairs,
        )  # fmt: skip
    adapted = [names.layers for names in layers.values() if names.down is not None]
    for each in lora.statements:
        if unused := each.unused_patterns(adapted):
            logger.warning("%s: no adapted layer has the name %s", each.source, list_names(unused))


def _read_alpha(lora: LoraFile, name: str) -> float:
    stored = lora.tensors[name]
    if math.prod(stored.shape) != 1 or stored.dtype in _NO_NUMBERS:
        raise ValueError(
            f"{name} in {lora.label} is {stored.dtype} {stored.shape}; an alpha is one number, so get the "
            "file again"
        )
    return check_alpha(stored.read().double().item(), f"{name} in {lora.label}")
