"""Weights in a pickle (.pt, .pth, .bin), as the reference trainers save them; only convert reads these."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.tensor_file import StoredTensor

logger = logging.getLogger(__name__)

OLDEST_TORCH = (2, 10)  # weights_only of earlier versions can be made to corrupt memory

# What torch.load raises for damaged content, and how it words the refusal of a class or function.
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
_REFUSED_CODE = re.compile(r"GLOBAL |allowlisted|unrecognized function")

MODEL_KEYS = ("generator_ema", "generator", "model", "state_dict")  # in the order of preference (spec 6.1)
LORA_KEYS = ("generator_lora",)


def open_pickle(path: Path, keys: Sequence[str] = MODEL_KEYS) -> dict[str, StoredTensor]:
    """The tensors of one model in a pickle, by name; the file is mapped, and no code in it runs.

    Of a dictionary of models the first of `keys` that is present is taken, else the file itself.
    Raises RuntimeError for a torch older than 2.10, and ValueError for a file that is damaged, holds anything
    but tensors, or needs code to be read.
    """
    _check_torch()
    if not path.is_file():
        raise ValueError(f"{path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); get the file again")
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _LOAD_ERRORS as error:
        if isinstance(error, pickle.UnpicklingError) and _REFUSED_CODE.search(str(error)):
            raise ValueError(
                f"{path} holds more than tensors, and reading it would run code from it; get its weights as "
                "safetensors"
            ) from error
        raise ValueError(f"{path} is damaged or not a torch file; get it again") from error
    return _tensors_of(path, payload, keys)


def _check_torch() -> None:
    version = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise RuntimeError(
            f"torch is {torch.__version__}; pickles are read safely from 2.10 on, so update torch"
        )


def _tensors_of(path: Path, payload: Any, keys: Sequence[str]) -> dict[str, StoredTensor]:
    if not isinstance(payload, dict):
        raise ValueError(
            f"{path} holds a {type(payload).__name__}, not a dictionary of tensors; give a model's weights"
        )
    chosen = next((key for key in keys if isinstance(payload.get(key), dict)), None)
    weights = payload if chosen is None else payload[chosen]
    logger.info("%s: reading %s", path, chosen or "the whole file")
    foreign = [
        str(name)
        for name, value in weights.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if foreign or not weights:
        raise ValueError(
            f"{path} has {list_names(foreign) or 'nothing'} where tensors are expected; it has to be a "
            f"dictionary of tensors, or hold one as {', '.join(keys)}"
        )
    return {name: StoredTensor.of(tensor) for name, tensor in weights.items()}
