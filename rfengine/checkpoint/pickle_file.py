"""Weights in a pickle (.pt, .pth, .bin), as the reference trainers save them; only convert reads these."""

from __future__ import annotations

import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfengine.checkpoint.file_format import weights_format
from rfengine.checkpoint.layouts import EMA_WORDS, list_names
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.files import absence

logger = logging.getLogger(__name__)

OLDEST_TORCH = (2, 10)  # weights_only of earlier versions can be made to corrupt memory

# What torch.load raises for damaged content, and how it words the refusal of a class or function.
_LOAD_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, zipfile.BadZipFile, OverflowError, struct.error,
)  # fmt: skip
_REFUSED_CODE = re.compile(r"GLOBAL |allowlisted|unrecognized function")

# In the order of preference: averaged weights first, as the published trainers save them; `module` is
# DeepSpeed's.
MODEL_KEYS = (
    *EMA_WORDS, "generator", "model", "state_dict", "module", "model_state_dict", "student", "shadow",
)  # fmt: skip
_SYNONYMS = EMA_WORDS[1:]  # that errors do not list
_MOST_LEVELS = 4  # of dictionaries in dictionaries; a pickle may hold itself
LORA_KEYS = ("generator_lora",)


def open_pickle(path: Path, keys: Sequence[str] = MODEL_KEYS) -> dict[str, StoredTensor]:
    """The tensors of one model in a pickle, by name; the file is mapped, and no code in it runs.

    Of a dictionary of models the first of `keys` that is present is taken, else the file itself; so again
    inside what was taken.
    Raises RuntimeError for a torch older than 2.10, and ValueError for a file that is damaged, holds anything
    but tensors, or needs code to be read.
    """
    version = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise RuntimeError(
            f"torch is {torch.__version__}; pickles are read safely from 2.10 on, so update torch"
        )
    return _tensors_of(path, _load(path), keys)


def _load(path: Path) -> Any:
    """What a torch file holds, on the CPU and mapped where it can be."""
    if not path.is_file():
        raise ValueError(f"{path} {absence(path)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); get the file again")
    zipped = _is_archive(path)
    try:
        with path.open("rb") as file:
            # torch.load goes by the suffix .safetensors and not by the content.
            named = f"/dev/fd/{file.fileno()}" if path.suffix == ".safetensors" else path
            # Files older than torch 1.6 are no zip archives and cannot be mapped.
            return torch.load(named, map_location="cpu", weights_only=True, mmap=zipped)
    except _LOAD_ERRORS as error:
        if isinstance(error, pickle.UnpicklingError) and _REFUSED_CODE.search(str(error)):
            raise ValueError(
                f"{path} holds more than tensors, and reading it would run code from it; get its weights as "
                "safetensors"
            ) from error
        if weights_format(path) == "safetensors":  # which raises for any other format that it knows
            raise ValueError(f"{path} is safetensors, not a torch pickle; get it as one") from error
        raise ValueError(f"{path} is damaged or not a torch file; get it again") from error


def _is_archive(path: Path) -> bool:
    """Whether torch can map the file. Raises ValueError for a zip archive that torch did not write, of which
    it knows no compressed ones."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return False  # damaged, as torch says of it
    if not any(member.filename.endswith("data.pkl") for member in members):
        shown = list_names(member.filename for member in members) or "nothing"
        raise ValueError(f"{path} is a zip archive of {shown}, not a torch file; give the weights themselves")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(
            f"{path} is a compressed archive, as torch never writes it; load it and save it again with torch"
        )
    return True


def _tensors_of(path: Path, payload: Any, keys: Sequence[str]) -> dict[str, StoredTensor]:
    if not isinstance(payload, dict):
        raise ValueError(
            f"{path} holds a {type(payload).__name__}, not a dictionary of tensors; give a model's weights"
        )
    weights, taken = payload, []
    while len(taken) < _MOST_LEVELS:
        chosen = next((key for key in keys if isinstance(weights.get(key), dict)), None)
        if chosen is None:
            break
        _warn_of_others(path, weights, chosen)
        weights = weights[chosen]
        taken.append(chosen)
    logger.info("%s: reading %s", path, ".".join(taken) or "the whole file")
    foreign = [
        str(name)
        for name, each in weights.items()
        if not (isinstance(name, str) and isinstance(each, Tensor))
    ]
    if foreign or not weights:
        raise ValueError(
            f"{path} has {list_names(foreign) or 'nothing'} where tensors are expected; it has to be a "
            f"dictionary of tensors, or hold one as {', '.join(key for key in keys if key not in _SYNONYMS)}"
        )
    for name, tensor in weights.items():
        _check_tensor(path, name, tensor)
    return {name: StoredTensor.of(tensor) for name, tensor in weights.items()}


def _warn_of_others(path: Path, weights: dict[Any, Any], chosen: str) -> None:
    others = [
        str(key)
        for key, value in weights.items()
        if key != chosen
        and isinstance(value, dict)
        and any(isinstance(each, Tensor) for each in value.values())
    ]
    if others:
        logger.warning("%s: %s is read, and not %s", path, chosen, list_names(others))


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse what is no plain tensor of its own memory: a file of 1 kB can state one of a petabyte."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.device.type != "cpu":
        kind = (
            "a quantized tensor" if tensor.is_quantized else f"a {type(tensor).__name__} in {tensor.layout}"
        )
        raise ValueError(
            f"{path} has {name} as {kind} on {tensor.device}, not as a plain tensor; save the model's plain "
            "state_dict"
        )
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path} has {name} {tuple(tensor.shape)}, which is larger than what the file holds for it; get "
            "it again"
        )
